"""Score a model: python -m neva_jax.evaluate --model PATH --task TASK --questions FILE --image_folder DIR --output FILE [--annotations FILE ...] [--json]

Tasks: captions, vqav2, gqa, textvqa, scienceqa, pope, mme, exact_match. Questions, annotations and answers are the benchmarks' own files, or LLaVA's; see
docs/evaluation.md. --score_only --answers FILE scores answers made elsewhere and needs no model.
Beside --output NAME.json come NAME.answers.jsonl (the answers, written as they are made: a killed command goes on where it stopped), the file that the
benchmark's server expects, and NAME.png, pictures with question, answer and truth, the worst first.
"""

import json
from pathlib import Path

from absl import flags
from PIL import Image

from neva_jax import cli
from neva_jax.errors import UserError
from neva_jax.evaluation import asking
from neva_jax.evaluation.answers_file import AnswersFile, digest
from neva_jax.evaluation.page import page, table
from neva_jax.evaluation.question import Given, Question
from neva_jax.evaluation.tasks import TASKS, Task, scored


def main(task: str, questions: str, output: str | None, **f) -> None:
    one, path = TASKS[task], Path(questions)
    _check(path, output, f)
    asked = one.module.read(path, [Path(file) for file in f["annotations"]], split=f["split"])
    given = one.answers(Path(f["answers"]), asked, f["missing_as_wrong"]) if f["score_only"] else made(one, asked, task, Path(output), f)
    result = scored(task, asked, given)
    if output:
        try:
            result["files"] = write(Path(output), one, asked, result, f["image_folder"])
        except OSError as error:
            raise UserError(f"--output {output}: {error.filename or 'a file beside it'} cannot be written ({error.strerror})") from None
    show(result, f["json"])


def _check(path: Path, output: str | None, f: dict) -> None:
    """What absl cannot see."""
    if f["score_only"] and not f["answers"]:
        raise UserError("--score_only needs --answers FILE, the answers to score")
    if f["answers"] and not f["score_only"]:
        raise UserError("--answers names answers made elsewhere; add --score_only to score them")
    if not f["score_only"] and not (f["model"] and output):
        raise UserError(f"--{'output' if f['model'] else 'model'} is required, or --score_only with --answers to score answers made elsewhere")
    for name, file in (("questions", str(path)), ("answers", f["answers"]), *(("annotations", file) for file in f["annotations"])):
        if file and not Path(file).exists():
            raise UserError(f"--{name} {file}: there is no such file or folder")
        if file and output and Path(file).resolve() == Path(output).resolve():
            raise UserError(f"--output {output}: is what --{name} reads, and would be written over; name another")
    if f["image_folder"] and not Path(f["image_folder"]).exists():
        raise UserError(f"--image_folder {f['image_folder']}: there is no such folder or tar")
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UserError(f"--output {output}: {'is a folder' if Path(output).is_dir() else 'its folder does not exist'}; name a file such as results.json")
    for name in ("max_new_tokens", "batch_size", "tensor_parallel"):
        if f[name] is not None and f[name] < 1:
            raise UserError(f"--{name} is {f[name]}, expected at least 1")


def made(task: Task, questions: list[Question], name: str, output: Path, f: dict) -> list[Given]:
    """The model's answers, of which those that `output`'s answers file holds are not made again."""
    task.check(questions)
    suffix = task.module.SUFFIX if f["suffix"] is None else f["suffix"].replace("\\n", "\n")
    prompts = [asking.prompt_of(question, suffix) for question in questions]
    options = {"max_new_tokens": f["max_new_tokens"] or task.max_new_tokens}
    how = {"conv_template": f["conv_template"], "tokenizer": f["tokenizer"], "dtype": f["dtype"]}
    if not Path(f["model"]).exists():
        raise UserError(f"--model: there is no {f['model']}; expected a local path (nothing is downloaded)")
    media = asking.open_folder(f["image_folder"], questions)
    weights = [asking.digest_of_weights(Path(path)) for path in (f["model"], *f["base"]) if Path(path).exists()]
    identity = {"task": name, "model": str(Path(f["model"]).resolve()), "weights": digest(weights), **how, **options}
    identity["questions"] = digest([(str(q.id), prompt, q.images) for q, prompt in zip(questions, prompts, strict=True)])
    file = AnswersFile(output.with_name(f"{output.stem}.answers.jsonl"), identity, questions)
    try:
        if len(file.done) < len(questions):
            from neva_jax.vlm import from_pretrained  # imports JAX

            vlm = from_pretrained(f["model"], bases=tuple(f["base"]), tensor_parallel=f["tensor_parallel"], **how)

            def answers(prompts, images, batch_size):
                return vlm.answers(prompts, images, batch_size=batch_size, **options)

            asking.ask(answers, questions, prompts, file, media, batch_size=f["batch_size"], model=Path(f["model"]).name, tagged=task.tagged)
    finally:
        file.close()
    lines = [file.done[i] for i in range(len(questions))]
    return [Given(str(line["question_id"]), line["text"], line["prompt"]) for line in lines]


def write(output: Path, task: Task, questions: list[Question], result: dict, image_folder: str | None) -> dict[str, str]:
    """The results, the server's file and the page -> {what: path}."""
    texts, marks, truths = ([row[name] for row in result["answers"]] for name in ("answer", "mark", "truth"))
    output.write_text(json.dumps(result, indent=1) + "\n")
    files = {"results": str(output)}
    files["submission"] = str(task.module.write(output.with_name(f"{output.stem}.{task.submission}"), questions, texts))
    if result["scores"]:
        media = asking.open_pictures(image_folder) if image_folder else None
        Image.fromarray(page(questions, texts, marks, truths, media)).save(output.with_suffix(".png"))
        files["page"] = str(output.with_suffix(".png"))
    return files


def show(result: dict, as_json: bool) -> None:
    shown = {name: value for name, value in result.items() if name != "answers"}
    if as_json:
        print(json.dumps(shown))
        return
    print(f"{result['task']}: {result['num_questions']} questions")
    print(*table(result["scores"], "  "), sep="\n")
    if not result["scores"]:
        print("  no truth to compare with: hand the submission to the benchmark's server")
    for what, path in result.get("files", {}).items():
        print(f"  {what}: {path}")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("task", None, list(TASKS), "the benchmark", flag_values=values, required=True)
    flags.DEFINE_string("questions", None, "its questions, in its own format or LLaVA's; for mme a folder", flag_values=values, required=True)
    flags.DEFINE_multi_string("annotations", [], "more of its files, such as its truth; may be repeated", flag_values=values)
    flags.DEFINE_string("image_folder", None, "the folder or tar that the pictures' names start from", flag_values=values)
    flags.DEFINE_string("output", None, "the results, JSON; the answers and the rest are written beside it", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
    flags.DEFINE_bool("score_only", False, "score --answers, and ask no model", flag_values=values)
    flags.DEFINE_string("answers", None, "answers made elsewhere: LLaVA's lines, or what the benchmark's server expects", flag_values=values)
    flags.DEFINE_bool("missing_as_wrong", False, "count questions that --answers lacks as wrong", flag_values=values)
    flags.DEFINE_string("split", "test", "of ScienceQA's pid_splits.json", flag_values=values)
    flags.DEFINE_string("suffix", None, "the line that ends each prompt, unless it ends so already (default: the task's)", flag_values=values)
    flags.DEFINE_string("model", None, "a run, a Hugging Face directory, a .nemo file or directory", flag_values=values)
    flags.DEFINE_multi_string("base", [], "where weights lie that the model stands on; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "instead of the model's own", flag_values=values)
    flags.DEFINE_string("conv_template", None, "instead of the model's own", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "of weights and computation (default: bfloat16, on a CPU float32)", flag_values=values)
    flags.DEFINE_integer("tensor_parallel", 1, "devices that share each weight", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "questions asked at once", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", None, "the most tokens of an answer (default: enough for the task)", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags, with_config=False)
