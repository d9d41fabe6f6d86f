"""Ask a model: one question, a chat on the terminal, or a file of questions.

    python -m neva_jax.generate --model PATH --image cat.jpg --prompt "What is this?" [--temperature 0.2 --top_p 0.9 --json]
    python -m neva_jax.generate --model PATH --chat
    python -m neva_jax.generate --model PATH --input questions.jsonl --image_folder DIR --output answers.jsonl
    python -m neva_jax.generate --inference neva_inference.yaml

PATH: a run of ours, a Hugging Face directory, a .nemo. --inference reads NeMo's own file; flags count more than it does, and `--inference.top_k=5` and the like
set a field of it by NeMo's name. Answers go to standard output, all else to standard error.
"""

import json as jsonlib
import logging
import os
import re
import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from neva_jax import cli
from neva_jax.build import nemo_inference
from neva_jax.data import prompt_file
from neva_jax.data.media import open_media
from neva_jax.errors import UserError
from neva_jax.vlm import Vlm, from_pretrained

log = logging.getLogger(__name__)

OPTIONS = ("max_new_tokens", "min_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "end_strings")
BY_NAME = re.compile(r"--?inference\.\w+=.*", re.DOTALL)
IDLE = {"prompt": ("output", "overwrite", "image_folder"), "chat": ("json", "num_answers", "output", "overwrite"), "input": ("image", "num_answers")}
HELP = "/image FILE shows a picture, /clear begins anew, /quit ends"


def main(**given) -> None:
    given = {name: value for name, value in given.items() if value not in (None, [])}
    named = dict(map(nemo_inference.by_name, given.pop("by_name", [])))
    nemo = nemo_inference.read(given.pop("inference"), named) if "inference" in given else nemo_inference.section_flags(named)
    if given.get("prompt") or given.get("chat"):
        nemo.pop("input", None)
    flag = nemo | given
    if "model" not in flag:
        raise UserError("--model is required; give a run of ours, a Hugging Face directory or a .nemo")
    if sum((bool(flag.get("prompt")), bool(flag.get("chat")), "input" in flag)) != 1:
        raise UserError("nothing, or more than one thing, is to be asked; give one of --prompt TEXT, --chat and --input FILE")
    if idle := [(name, other) for name, others in IDLE.items() if flag.get(name) for other in others if given.get(other)]:
        raise UserError(f"--{idle[0][1]} does nothing with --{idle[0][0]}; leave it out")
    if "input" in flag:
        records, write = prompt_file.read(flag["input"]), _open_output(flag)
    opening = {name: flag[name] for name in ("tokenizer", "conv_template", "dtype", "tensor_parallel") if name in flag}
    bases = flag.get("base", ())
    vlm = from_pretrained(flag["model"], bases=[bases] if isinstance(bases, str) else bases, **opening)
    options = {name: flag[name] for name in OPTIONS if name in flag}
    if "input" in flag:
        write(_answer_file(vlm, records, flag, options))
        if flag.get("json"):
            print(jsonlib.dumps({"num_questions": len(records), "output": flag["output"]}))
    elif flag.get("chat"):
        _chat(vlm, list(flag.get("image", ())), flag.get("seed", 0), options)
    else:
        _ask(vlm, flag, options)


def _ask(vlm: Vlm, flag: dict, options: dict) -> None:
    count, prompt, images, seed = flag.get("num_answers", 1), flag["prompt"], flag.get("image", []), flag.get("seed", 0)
    if count > 1 and not options.get("temperature"):
        raise UserError(f"--num_answers is {count} and --temperature 0, which always gives the same answer; give a temperature above 0")
    if not flag.get("json") and count == 1:
        for piece in vlm.stream(prompt, images, seed=seed, **options):
            print(piece, end="", flush=True)
        return print()
    answers = vlm.answers([prompt] * count, [images] * count, seed=seed, **options)
    if not flag.get("json"):
        return print("\n\n".join(answer.text for answer in answers))
    told = [{"text": a.text, "tokens": a.tokens, "logprobs": a.logprobs, "finish": a.finish} for a in answers]
    print(jsonlib.dumps({"prompt": vlm.render(prompt, len(images)), "answers": told}))


def _chat(vlm: Vlm, images: list, seed: int, options: dict) -> None:
    """Until the end of input. A picture is shown with the next question; an error leaves the conversation as it was."""
    log.info(f"{vlm.processor.encoder.template}, {vlm.max_length} positions; {HELP}" if vlm.processor.encoder else vlm.processor.lacking)
    turns, shown, new = [], [], images
    while (line := _line()) is not None and line != "/quit":
        word, _, rest = line.partition(" ")
        if word == "/image":
            new = [*new, rest.strip()] if os.path.isfile(rest.strip()) else new
            log.info(f"{len(new)} to be shown with the next question" if rest.strip() in new else f"there is no file {rest.strip()!r}")
        elif word == "/clear":
            turns, shown, new = [], [], []
        elif word.startswith("/"):
            log.info(f"{word} is unknown; {HELP}")
        elif line:
            asked = [*turns, {"from": "human", "value": "<image>\n" * len(new) + line.replace("<image>", "< image >")}]  # a tag that is typed is no picture
            said = ""
            try:
                for piece in vlm.stream(asked, [*shown, *new], seed=seed, **options):
                    said += piece
                    print(piece, end="", flush=True)
            except UserError as error:
                log.info(f"{error}")
                continue
            print()
            turns, shown, new = [*asked, {"from": "gpt", "value": said.replace("<image>", "< image >")}], [*shown, *new], []


def _line() -> str | None:
    try:
        print("> ", end="", file=sys.stderr, flush=True)
        return input().strip()
    except (EOFError, RuntimeError):  # the second where there is no standard input at all
        return None


def _answer_file(vlm: Vlm, records: list, flag: dict, options: dict):
    """-> answered records, in the file's order."""
    asked = [prompt_file.question(record, where, flag.get("insert"), flag.get("separator", "")) for where, record in records]
    needed = any(names for _, names in asked)
    if needed and not flag.get("image_folder"):
        raise UserError(f"{flag['input']} names pictures; give --image_folder DIR, the folder or tar that their names start from")
    media, size = open_media(flag["image_folder"]) if needed else None, flag.get("batch_size") or 8
    with tqdm(total=len(records), unit="question", disable=None) as bar:
        for start in range(0, len(asked), 8 * size):  # batches of like length within a window, whose pictures are in memory together
            window = slice(start, start + 8 * size)
            prompts = [text for text, _ in asked[window]]
            images = [[media.read(name) for name in names] for _, names in asked[window]]
            try:
                answers = vlm.answers(prompts, images, seed=flag.get("seed", 0) + start, batch_size=size, **options)
            except UserError as error:
                raise UserError(re.sub(r"\bprompt (\d+)\b", lambda found: records[start + int(found[1])][0], str(error), count=1)) from None  # noqa: B023
            for (_, record), prompt, pictures, answer in zip(records[window], prompts, images, answers, strict=True):
                yield prompt_file.answered(record, prompt, vlm.render(prompt, len(pictures)), answer, str(flag["model"]))
            bar.update(len(answers))


def _open_output(flag: dict):
    """-> a function that writes records, each as it comes; the file has its name only when it is whole."""
    output = flag.get("output")
    if not output:
        raise UserError("--output is required with --input; name a .jsonl or .json file")
    if not output.endswith((".json", ".jsonl")):
        raise UserError(f"--output {output}: unknown extension, expected .json or .jsonl")
    if Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    if Path(output).exists() and not flag.get("overwrite"):
        raise UserError(f"--output {output} exists; name another file, or add --overwrite")
    partial = Path(f"{output}.partial")
    try:
        file = partial.open("w")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None

    def write(records) -> None:
        with file:
            if output.endswith(".json"):
                jsonlib.dump(list(records), file, indent=2)
            else:
                for record in records:
                    file.write(jsonlib.dumps(record) + "\n")
                    file.flush()
        os.replace(partial, output)

    return write


def with_names(argv: list[str]) -> list[str]:
    """--inference.NAME=VALUE as a flag that absl knows."""
    return [f"--by_name={argument}" if BY_NAME.fullmatch(argument) else argument for argument in argv]


def define_flags(values: flags.FlagValues) -> None:
    text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=values)  # noqa: E731
    whole = lambda name, least, help: flags.DEFINE_integer(name, None, help, lower_bound=least, flag_values=values)  # noqa: E731
    number = lambda name, help: flags.DEFINE_float(name, None, help, flag_values=values)  # noqa: E731
    text("model", "a run of ours, a Hugging Face directory, a .nemo file or directory")
    text("prompt", "the question, with an <image> where a picture stands; without one, pictures come first")
    flags.DEFINE_multi_string("image", [], "a picture; may be repeated", flag_values=values)
    flags.DEFINE_bool("chat", False, "questions and answers on the terminal", flag_values=values)
    text("input", "a file of questions, NeVA's .json or .jsonl: image, prompt (or text, question)")
    text("output", "with --input: NeVA's answers, .json or .jsonl")
    flags.DEFINE_bool("overwrite", False, "let --output replace a file", flag_values=values)
    text("image_folder", "with --input: the folder or tar of the pictures")
    text("inference", "NeMo's neva_inference.yaml; --inference.NAME=VALUE sets one of its inference fields")
    flags.DEFINE_multi_string("by_name", [], "what --inference.NAME=VALUE becomes", flag_values=values)
    text("conv_template", "the conversation template, instead of the model's own")
    whole("max_new_tokens", 1, "at most as many (default 64)")
    whole("min_tokens", 0, "no end before as many (default 0)")
    number("temperature", "0 (default): the likeliest token each time; else draws")
    whole("top_k", 0, "draw among so many likeliest tokens only (default 0: all)")
    number("top_p", "draw among the likeliest tokens that together have this probability (default 1: all)")
    number("repetition_penalty", "above 1: what was said becomes less likely (default 1)")
    flags.DEFINE_multi_string("end_strings", [], "an answer ends before this text; may be repeated", flag_values=values)
    whole("seed", 0, "of draws (default 0)")
    whole("num_answers", 1, "to one prompt (default 1)")
    whole("batch_size", 1, "questions at a time (default 8)")
    flags.DEFINE_multi_string("base", [], "a model that has what this one lacks, such as the tower of a .nemo; may be repeated", flag_values=values)
    text("tokenizer", "a sentencepiece model or a Hugging Face directory, instead of the model's own")
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "of weights and computation (default: bfloat16 on a GPU, else float32)", flag_values=values)
    whole("tensor_parallel", 1, "devices that share each weight (default 1)")
    flags.DEFINE_bool("json", False, "one JSON object on standard output: prompt, answers (with --input: num_questions, output)", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags, with_names(sys.argv), with_config=False)
