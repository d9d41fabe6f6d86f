"""Convert a model between Hugging Face, NeMo and neva_jax. The input's format is recognised; the output must not exist, and is whole or not there.

    a Hugging Face Llama as .nemo        python convert_torch.py --input Llama-2-7b-chat-hf --output llama2.nemo --to nemo [--tensor_parallel 2]
    a LLaVA as .nemo                     python convert_torch.py --input llava-1.5-7b-hf --output neva.nemo --to nemo
    a .nemo for transformers, vLLM, ...  python convert_torch.py --input neva.nemo --output neva-hf --to hf --base clip-vit-large-patch14-336
    another number of ranks              python convert_torch.py --input llama2_tp1.nemo --output llama2_tp4_pp2.nemo --to nemo --tensor_parallel 4
                                             --pipeline_parallel 2
    a run of ours, or a step of it       python convert_torch.py --input nemo_experiments/finetune[/checkpoints/2000] --output my-llava --to hf
    a LoRA run's adapters alone          python convert_torch.py --input nemo_experiments/peft --output adapter --to {hf,nemo}
    the same in its base's weights       python convert_torch.py --input nemo_experiments/peft --output my-llava --to {hf,nemo,orbax} --merge_lora
    another program's adapters           python convert_torch.py --input adapter --base llava-1.5-7b-hf --output my-llava --to hf --merge_lora
    weights to train from, prepared      python convert_torch.py --input llava-1.5-7b-hf --output llava-ours --to orbax

Inputs: Hugging Face directories (Llama, Mistral, CLIP, SigLIP, LLaVA in every published layout; safetensors or .bin), .nemo files and unpacked
ones (plain, any tensor and pipeline ranks, distributed), runs and steps of this program, LLaVA's mm_projector.bin, LoRA adapters (a directory
of Hugging Face's peft, LLaVA's too, or a .nemo of NeMo's). What an input lacks, such as the tower that NeMo leaves out of its files or the language
model beneath a trained projector or adapters, comes from --base, which may be repeated; a run of ours knows its own.

An export --to hf ends with a round trip: the written directory is opened, reads a picture and tokens, and its logits are compared with the input's. A .nemo
holds what NeMo itself would save: a tower only if it was trained (--parts llm,projector,vision_encoder puts it in).
"""

import contextlib
import functools
import json as jsonlib
import logging
import signal
import threading
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from neva_jax import cli, hub
from neva_jax.build import export, export_lora, roundtrip
from neva_jax.build.opened import opened
from neva_jax.convert.nemo import KEY_FORMATS
from neva_jax.convert.source import PARTS
from neva_jax.errors import UserError

log = logging.getLogger(__name__)


def main(
    input: str, output: str, to: str, tensor_parallel: int | None, pipeline_parallel: int | None, key_format: str | None, dtype: str | None,
    base: list[str], tokenizer: str | None, conv_template: str | None, parts: list[str], verify: bool, json: bool, merge_lora: bool, merge_into: str | None,
) -> None:  # fmt: skip
    start, output = time.perf_counter(), Path(output)
    options = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel, "key_format": key_format}
    options = {name: value for name, value in options.items() if value is not None}
    if options and to != "nemo":
        raise UserError(f"--{next(iter(options))} goes with --to nemo; a directory --to {to} knows no ranks")
    export.check_output(output, dtype)
    try:
        with interruptible() as check, opened(input, bases=base, tokenizer=tokenizer, template=conv_template) as model:
            log.info(f"{input}: {hub.FORMATS[model.format]}, with {', '.join(model.parts) or 'no weights'}")
            if verify:
                verify_base(model, base)
            if merge_lora or merge_into:
                model = merge(model, merge_into, merge_lora)
            adapters = model.lora is not None and to != "orbax"
            if adapters and parts:
                raise UserError("--parts is of whole models, and the adapters alone are written; add --merge_lora to write them into the model")
            chosen = ("adapters",) if adapters else choose(model, to, tuple(parts))
            report = {"input_format": model.format, "output_format": to, "parts": chosen}
            with tqdm(unit="B", unit_scale=True, total=None if adapters else export.num_bytes(model.arrays(chosen)), disable=None) as bar:
                whole = {"orbax": export.to_orbax, "nemo": export.to_nemo, "hf": export.to_huggingface}
                write = {"nemo": export_lora.to_nemo, "hf": export_lora.to_peft}[to] if adapters else functools.partial(whole[to], parts=chosen)
                report |= write(model, output, dtype=dtype, tell=lambda count: check() or bar.update(count), **options)
            if to == "hf" and not adapters:
                report |= roundtrip.compare(model, output, chosen)
            elif to == "hf":
                report |= roundtrip.compare_adapters(model, output)
    except KeyboardInterrupt:
        log.error(f"interrupted: {f'{output} is whole, but was not compared' if output.exists() else f'nothing was left of {output}'}")
        raise
    except OSError as error:
        raise UserError(f"{error.filename or output}: {(error.strerror or str(error)).lower()}; check the path and its permissions") from None
    report["seconds"] = round(time.perf_counter() - start, 2)
    print(jsonlib.dumps(report) if json else describe(output, report))


@contextlib.contextmanager
def interruptible():
    """SIGTERM and SIGHUP are a KeyboardInterrupt too, so that what was begun is removed; -> a function that raises one again, if one was swallowed: Python
    drops an exception of a signal that comes while a library's callback runs."""
    seen = threading.Event()

    def interrupt(*_):
        seen.set()
        raise KeyboardInterrupt

    def check() -> None:
        if seen.is_set():
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield check
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def merge(model, into: str | None, asked: bool):
    """The model with its adapters' products in its kernels."""
    if not asked:
        raise UserError(f"--merge_into {into} goes with --merge_lora; add that")
    if model.lora is None:
        raise UserError(f"--merge_lora: {model.path} holds no LoRA adapters; leave the flag out")
    if model.float8_of and into is None:
        raise UserError(
            f"--merge_lora: {model.path} was trained beside weights in e4m3 (model.fp8_frozen_weights); say what the adapters are added to: --merge_into "
            "original (the weights before they were rounded, as is common) or --merge_into dequantized (the weights as training saw them)"
        )
    if into and not model.float8_of:
        raise UserError(f"--merge_into {into}: {model.path} was not trained beside weights in float8; leave the flag out")
    return model.merged(dequantized=into == "dequantized")


def choose(model, to: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := set(wanted) - set(PARTS):
        raise UserError(f"--parts names {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    if wanted:
        return tuple(part for part in PARTS if part in wanted)
    if to == "nemo":
        return export.nemo_parts(model)
    is_neva = to == "hf" and ("projector" in model.parts or {"llm", "vision_encoder"} <= {*model.parts})  # whose directory has to be whole
    return PARTS if is_neva else model.parts


def verify_base(model, bases: list[str]) -> None:
    if model.format != "orbax":
        raise UserError(f"--verify compares what a run of ours stands on with what it recorded, and {model.path} is no run")
    log.info(f"{hub.verify_base(hub.run_of(model.path), bases)} sources of frozen weights are what they were, to the last byte")


def describe(output: Path, report: dict) -> str:
    lines = [f"{output}: {report['num_tensors']} tensors, {report['num_bytes'] / 2**30:.2f} GiB of {', '.join(report['parts'])}, in {report['seconds']} s"]
    if report.get("max_logit_difference") is not None:
        same = "the same" if report["tokens_equal"] else "NOT the same"
        lines.append(f"opened again: the largest difference of a logit is {report['max_logit_difference']:.3g}, the likeliest tokens are {same}")
    return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("input", None, "a Hugging Face directory, .nemo, run of ours or a step of it, mm_projector.bin", flag_values=values, required=True)
    flags.DEFINE_string("output", None, "must not exist; a name that ends in .nemo is a tar, any other a directory", flag_values=values, required=True)
    flags.DEFINE_enum("to", None, ["orbax", "hf", "nemo"], "the format to write", flag_values=values, required=True)
    flags.DEFINE_integer("tensor_parallel", None, "--to nemo: tensor ranks (default 1)", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("pipeline_parallel", None, "--to nemo: pipeline ranks (default 1)", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("key_format", None, list(KEY_FORMATS), "--to nemo: names as megatron-core has them (default), or as NeMo before it", flag_values=values)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16, of all tensors; default: as they are", flag_values=values)
    flags.DEFINE_multi_string("base", [], "a model that has what the input lacks; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "a sentencepiece model or a Hugging Face directory, instead of the input's own", flag_values=values)
    flags.DEFINE_string("conv_template", None, "the conversation template, where the input names none", flag_values=values)
    flags.DEFINE_list("parts", [], "of llm,vision_encoder,projector, what to write; default: all there is, and for a .nemo what NeMo saves", flag_values=values)
    flags.DEFINE_bool("verify", False, "of a run: read every byte of the weights it stands on and compare hashes", flag_values=values)
    flags.DEFINE_bool("merge_lora", False, "add the adapters' products to the weights they stand beside", flag_values=values)
    flags.DEFINE_enum("merge_into", None, ["original", "dequantized"], "--merge_lora of a run with model.fp8_frozen_weights: into which", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags, with_config=False)
