"""NeMo's neva_inference.yaml, for asking a trained model, in the words of generate.py; every field is honoured, does nothing (and says so) or is refused.

Where NeMo's own code does something else than the field says, the field is believed: repetition_penalty works, min_tokens_to_generate holds for sampling too.
"""

import difflib
import logging
from pathlib import Path

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


def _near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(known)}"


def sampling_options(inference: dict) -> dict:
    """NeMo's section `inference` -> options of vlm.generate; UserError for a field or a value that cannot be done."""
    if unknown := [name for name in inference if name not in OPTIONS and name not in OTHERS]:
        raise UserError(f"inference.{unknown[0]} is not a field of NeVA's inference{_near(unknown[0], [*OPTIONS, *OTHERS])}")
    if inference.get("all_probs"):
        raise UserError("inference.all_probs is True: log-probabilities are kept of the chosen tokens alone; set it to False")
    if inference.get("media_type", "image") != "image":
        raise UserError(f"inference.media_type is {inference['media_type']!r}: only pictures are read here; take frames out of a video and ask with several")
    if inference.get("add_BOS"):
        log.warning("inference.add_BOS does nothing: the template says whether a prompt opens with it, as in NeVA")
    options = {ours: inference[name] for name, ours in OPTIONS.items() if inference.get(name) is not None}
    if not 0 < options.get("top_p", 1) < 1:
        options.pop("top_p", None)  # off, in NeMo
    if inference.get("greedy"):
        options["temperature"] = 0.0
    elif inference.get("greedy") is not None and options.get("temperature") == 0:
        raise UserError("inference.temperature is 0, and inference.greedy is False; set greedy to True, or a temperature above 0")
    return options


def read(path: str) -> dict:
    """The file -> {flag of generate.py: value}, `insert` ("left", "right" or None) and `separator` (what stands behind an inserted tag) among them."""
    tree = omega.read(path)
    section = tree.get("inference")
    if not isinstance(section, dict):
        raise UserError(f"{path} has no section `inference`; name a file such as NeMo's neva_inference.yaml")
    interpolation = omega.Interpolation(tree, set())
    tree = {key: interpolation.evaluate(value, (key,)) for key, value in tree.items()}
    if interpolation.missing:
        raise UserError(f"{path}: the environment lacks {', '.join(f'{name} ({where})' for name, where in interpolation.missing.items())}; set each")
    section = tree.pop("inference")
    if unknown := [name for name in tree if name not in PLACES and name not in INERT and name not in REFUSED]:
        raise UserError(f"{path}: {unknown[0]} is not a field of NeVA's inference{_near(unknown[0], [*PLACES, *INERT, *REFUSED])}")
    if given := [name for name in REFUSED if tree.get(name)]:
        raise UserError(f"{path}: {given[0]} names a checkpoint of PyTorch Lightning, which is not read here; save it as .nemo and give neva_model_file")
    if (tree.get("quantization") or {}).get("enable"):
        raise UserError(f"{path}: quantization.enable is True: weights are not quantised to answer; set it to False")
    found = sampling_options(section)
    found |= {ours: tree[name] for name, ours in PLACES.items() if tree.get(name) is not None}
    found |= {"image_folder": next((section[name] for name in FOLDERS if section.get(name)), None)}
    found |= {"insert": next((section[name] for name in INSERTS if section.get(name)), None), "batch_size": section.get("batch_size")}
    if found["insert"] not in (None, "left", "right"):
        raise UserError(f"{path}: inference.insert_media_token is {found['insert']!r}, expected left, right or null")
    found["separator"] = " \n" if tree.get("add_media_sep") else ""
    precision = str((tree.get("trainer") or {}).get("precision", ""))
    found["dtype"] = {"32": "float32", "bf16": "bfloat16"}.get(precision.removesuffix("-mixed").removesuffix("-true"))
    idle: dict[str, list[str]] = {}
    for name in tree.keys() & INERT.keys() - {"quantization"}:
        idle.setdefault(INERT[name], []).append(name)
    for reason, names in sorted(idle.items()):
        log.info(f"{Path(path).name}: {', '.join(sorted(names))} {'does' if len(names) == 1 else 'do'} nothing here: {reason}")
    return {name: value for name, value in found.items() if value is not None}
