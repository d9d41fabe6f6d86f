"""NeMo's neva_inference.yaml, for asking a trained model, in the words of generate.py; every field is honoured, does nothing (and says so) or is refused.

Where NeMo's own code does something else than the field says, the field is believed: repetition_penalty works, min_tokens_to_generate holds for sampling too.
"""

import difflib
import logging
from pathlib import Path

import yaml

from neva_jax.build import omega
from neva_jax.errors import UserError

log = logging.getLogger(__name__)

OPTIONS = {  # inference.*: the field of Sampling
    "tokens_to_generate": "max_new_tokens",
    "min_tokens_to_generate": "min_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "end_strings": "end_strings",
}
FOLDERS = ("media_base_path", "images_base_path")  # of v2.0.0 and v1.23.0
INSERTS = ("insert_media_token", "insert_image_token")
OTHERS = {"greedy", "add_BOS", "all_probs", "compute_logprob", "media_type", "batch_size", *FOLDERS, *INSERTS}
PLACES = {  # the flag of generate.py
    "neva_model_file": "model",
    "base_model_file": "base",
    "prompt_file": "input",
    "output_file": "output",
    "tensor_model_parallel_size": "tensor_parallel",
}
KINDS = {name: int if name.startswith("tensor") else str for name in PLACES}
REFUSED = ("checkpoint_dir", "checkpoint_name", "hparams_file")
INERT = {
    "trainer": "the devices that a model takes are tensor_model_parallel_size",
    "cluster_type": "the launcher's environment is read instead",
    **dict.fromkeys(("pipeline_model_parallel_size", "pipeline_model_parallel_split_rank"), "layers are not split into stages to answer"),
    **dict.fromkeys(("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"), "NeMo does not read it either"),
    **dict.fromkeys(("server", "port", "web_server", "share", "username", "password", "web_port"), "python -m neva_jax.demo serves a page"),
    "quantization": "read only with quantization.enable",
    "add_media_sep": "read only with insert_media_token",
}


def _near(name, known: list[str]) -> str:
    found = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(known)}"


def sampling_options(inference: dict) -> dict:
    """NeMo's section `inference` -> options of vlm.generate; UserError for a field or a value that cannot be done."""
    if unknown := [name for name in inference if name not in OPTIONS and name not in OTHERS]:
        raise UserError(f"inference.{unknown[0]} is not a field of NeVA's inference{_near(unknown[0], [*OPTIONS, *OTHERS])}")
    if inference.get("all_probs"):
        raise UserError("inference.all_probs is True: log-probabilities are kept of the chosen tokens alone; set it to False")
    if bad := [name for name in (*FOLDERS, *INSERTS) if not isinstance(inference.get(name), str | None)]:
        raise UserError(f"inference.{bad[0]} is {inference[bad[0]]!r:.80}, expected a text")
    size = inference.get("batch_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UserError(f"inference.batch_size is {size!r:.80}, expected a whole number of at least 1")
    if (inference.get("media_type") or "image") != "image":
        raise UserError(f"inference.media_type is {inference['media_type']!r}: only pictures are read here; take frames out of a video and ask with several")
    if inference.get("add_BOS"):
        log.warning("inference.add_BOS does nothing: the template says whether a prompt opens with it, as in NeVA")
    options = {ours: inference[name] for name, ours in OPTIONS.items() if inference.get(name) is not None}
    if isinstance(top_p := options.get("top_p", 1), int | float) and not 0 < top_p < 1:
        options.pop("top_p", None)  # off, in NeMo
    if inference.get("greedy"):
        options["temperature"] = 0.0
    elif inference.get("greedy") is not None and options.get("temperature") == 0:
        raise UserError("inference.temperature is 0, and inference.greedy is False; set greedy to True, or a temperature above 0")
    return options


def by_name(argument: str) -> tuple[str, object]:
    """--inference.NAME=VALUE -> NAME, VALUE, which is YAML."""
    name, _, value = argument.lstrip("-").removeprefix("inference.").partition("=")
    try:
        return name, yaml.load(value, omega.Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{argument}: {value!r:.80} is not YAML; write a value as it would stand in NeMo's file") from None


def section_flags(section: dict) -> dict:
    """NeMo's section `inference` -> {flag of generate.py: value}, `insert` ("left", "right" or None) among them."""
    found = sampling_options(section)
    found |= {"image_folder": next((section[name] for name in FOLDERS if section.get(name)), None)}
    found |= {"insert": next((section[name] for name in INSERTS if section.get(name)), None), "batch_size": section.get("batch_size")}
    if found["insert"] not in (None, "left", "right"):
        raise UserError(f"inference.insert_media_token is {found['insert']!r}, expected left, right or null")
    return {name: value for name, value in found.items() if value is not None}


def read(path: str, changes: dict | None = None) -> dict:
    """The file -> {flag of generate.py: value}, see `section_flags`, and `separator` (what stands behind an inserted tag). changes: to its inference.*."""
    tree = omega.read(path)
    section = tree.get("inference")
    if not isinstance(section, dict):
        raise UserError(f"{path} has no section `inference`; name a file such as NeMo's neva_inference.yaml")
    tree["inference"] = section | (changes or {})
    interpolation = omega.Interpolation(tree, set())
    tree = {key: interpolation.evaluate(value, (key,)) for key, value in tree.items()}
    if interpolation.missing:
        raise UserError(f"{path}: the environment lacks {', '.join(f'{name} ({where})' for name, where in interpolation.missing.items())}; set each")
    section = tree.pop("inference")
    if unknown := [name for name in tree if name not in PLACES and name not in INERT and name not in REFUSED]:
        raise UserError(f"{path}: {unknown[0]} is not a field of NeVA's inference{_near(unknown[0], [*PLACES, *INERT, *REFUSED])}")
    if given := [name for name in REFUSED if tree.get(name)]:
        raise UserError(f"{path}: {given[0]} names a checkpoint of PyTorch Lightning, which is not read here; save it as .nemo and give neva_model_file")
    if bad := [name for name in ("trainer", "quantization") if not isinstance(tree.get(name) or {}, dict)]:
        raise UserError(f"{path}: {bad[0]} is {tree[bad[0]]!r:.80}, expected a section; copy it from NeMo's neva_inference.yaml")
    for name, kind in KINDS.items():
        if not isinstance(tree.get(name), kind | None):
            raise UserError(f"{path}: {name} is {tree[name]!r:.80}, expected {'a whole number' if kind is int else 'a path'}")
    if (tree.get("quantization") or {}).get("enable"):
        raise UserError(f"{path}: quantization.enable is True: weights are not quantised to answer; set it to False")
    found = section_flags(section)
    found |= {ours: tree[name] for name, ours in PLACES.items() if tree.get(name) is not None}
    found["separator"] = " \n" if tree.get("add_media_sep") else ""
    precision = str((tree.get("trainer") or {}).get("precision", ""))
    found["dtype"] = {"32": "float32", "bf16": "bfloat16"}.get(precision.removesuffix("-mixed").removesuffix("-true"))
    idle: dict[str, list[str]] = {}
    for name in tree.keys() & INERT.keys() - {"quantization"}:
        idle.setdefault(INERT[name], []).append(name)
    for reason, names in sorted(idle.items()):
        log.info(f"{Path(path).name}: {', '.join(sorted(names))} {'does' if len(names) == 1 else 'do'} nothing here: {reason}")
    return {name: value for name, value in found.items() if value is not None}
