"""NeMo's own YAML as a config: every field under its name, ${...} as one-way references, older names as the newer, and a word on what becomes of each field.

What the file does not have keeps its value of configs/base.py, which is that of NeMo's neva_config_v2.0.0.yaml; where NeMo's code has another default for an
absent key (normalization, activation, bias, dropouts, ...), that is not taken. Given up: composing files (`defaults`), and the `model` section alone.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from neva_jax.build import omega
from neva_jax.config import changed, coerce, literal, refusals, schema, sections, suggest
from neva_jax.errors import UserError
from neva_jax.fields import HONOURED, INERT, REFUSED, VISION

log = logging.getLogger(__name__)

WRAPPERS = ("training", "fine_tuning", "peft")  # NeMo's launcher puts a file below one of these, and the file's references begin with it
RENAMED = {
    "trainer.replace_sampler_ddp": "trainer.use_distributed_sampler",
    "trainer.checkpoint_callback": "trainer.enable_checkpointing",
    "trainer.gpus": "trainer.devices",
    "model.restore_from_pretrained": "model.restore_from_path",
    "model.posistion_embedding_type": "model.position_embedding_type",  # so in video_neva_config.yaml
    "model.mm_cfg.model_type": "model.mm_cfg.llm.model_type",  # so written by NeMo's converter of LLaVA
    "model.data.crop_size": f"{VISION}.crop_size",  # so in NeMo 1.23; beside the newer name it does nothing
}
ELSEWHERE = {  # fields that are not in base, and do nothing here; a section stands for all that is in it
    "run": "the cluster's launcher reads it",
    "trainer.strategy": "sharding is set by model.tensor_model_parallel_size and model.fsdp_parallel_size",
    "trainer.enable_progress_bar": "belongs to PyTorch Lightning",
    "model.get_attention_mask_from_fusion": "belongs to Megatron-Core",
    "model.dist_ckpt_load_strictness": "checkpoints are written by Orbax",
}
HYDRA = {"defaults", "hydra"}
OTHER_FILES = {  # a section that no training config has: what the file is
    "inference": "NeMo's file for asking a trained model (neva_evaluation.py): a prompt file, sampling and the model's path, but no field of a training",
    "infer": "NeMo's file for a TensorRT engine, and holds no field of a training",
    "mm_cfg": "the `model` section alone, as in the model_config.yaml of a .nemo file, without trainer and exp_manager",
}


def load(path: str, config: ConfigDict) -> ConfigDict:
    """config, one that configs.base made, with what a NeMo YAML file says. UserError for what cannot be read; config.check says whether it can be done."""
    if not path:
        raise UserError("no YAML file is named; write --config configs/nemo_yaml.py:path/to/neva_config.yaml")
    tree, name = omega.read(path), Path(path).name
    for section, what in OTHER_FILES.items():
        if section in tree:
            raise UserError(f"{path} is {what}; name a training config, such as neva_config.yaml")
    for section in sorted(HYDRA & tree.keys()):
        log.warning("%s: %s %r is Hydra's and is left out; what it would compose must be in the file", name, section, tree.pop(section))
    try:
        return _load(name, tree, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(name: str, tree: dict, config: ConfigDict) -> ConfigDict:
    places, others = _fields(tree)
    interpolation = omega.Interpolation(tree, {place for field, place in places.items() if ".".join(place) == field}, WRAPPERS)
    values = {field: interpolation.value(place) for field, place in places.items()}
    if missing := interpolation.missing:
        asked = ", ".join(f"{variable} ({where})" for variable, where in missing.items())
        raise UserError(f"the environment lacks {asked}; set each before the command, as in {next(iter(missing))}=... python ...")
    inert = _other_fields(others, interpolation.used)
    if not values.get("model.energon.use_energon") and "model.energon.data" in values:
        values["model.energon.data"] = None  # NeMo's file has an example there, which nothing reads
    _set(config, values)
    _report(name, config, places, inert)
    return config


def _fields(tree: dict) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """({field: its place in the file}, {dotted path: place} of all else). A field that the file has by an older name stands at that place."""
    places, others = {}, {}

    def walk(node: dict, at: tuple = ()):
        for key, child in node.items():
            place = (*at, key)
            path = ".".join(map(str, place))
            if path in sections() and not isinstance(child, dict | None):
                raise UserError(f"{path} is {child!r}, expected a mapping of its fields")
            if "." in str(key):
                raise UserError(f"the key {key!r} has a dot; write a section and a field below it")
            if isinstance(child, dict) and path not in schema():
                walk(child, place)
            elif path not in sections() and not (child is None and path in RENAMED):
                (places if path in schema() else others)[path] = place

    walk(tree)
    for old, new in RENAMED.items():
        if new not in places and (place := others.pop(old, None) or places.pop(old, None)):
            places[new] = place
            log.info("%s is read as %s", old, new)
        elif old in others and omega.find(tree, others.pop(old)) != omega.find(tree, places[new]):
            raise UserError(f"{old} is an older name of {new}, and the file has both with different values; keep {new}")
    return places, others


def _other_fields(others: dict[str, tuple], used: set[tuple]) -> dict[str, list[str]]:
    """{reason: fields} of those that do nothing here; UserError for those that nobody knows. What only serves another field's ${...} is neither."""
    inert, unknown = {}, []
    for path in [path for path, place in others.items() if place not in used]:
        reasons = [reason for known, reason in ELSEWHERE.items() if f"{path}.".startswith(f"{known}.")]
        if reasons:
            inert.setdefault(reasons[0], []).append(path)
        else:
            unknown.append(path)
    if unknown:
        more = f", nor are {', '.join(unknown[1:6])}{' and more' * (len(unknown) > 6)}" if len(unknown) > 1 else ""
        raise UserError(f"{unknown[0]} is not a field of NeVA{more}{suggest(unknown[0])}")
    return inert


# ---- setting -----------------------------------------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """What a FieldReference computes: fn(its own value, *values of the references `args`); null if one of them is null."""

    fn: object
    args: list


def _typed(field: str, value):
    """value as the field's type; YAML files also write 1e3 where a whole number is meant."""
    if schema()[field].kind is int and isinstance(number := literal(value), float) and number.is_integer():
        value = int(number)
    return coerce(field, value)


def _set(config: ConfigDict, values: dict) -> None:
    """Set fields within the references that stand there, so that base's own followers go on following."""

    def place(field: str) -> tuple[ConfigDict, str]:
        section, _, name = field.rpartition(".")
        return (config[section] if section else config), name

    late = {field: value for field, value in values.items() if isinstance(value, omega.Late)}
    for field, value in values.items():  # those of `late` too: a follower must let go of base's source before it gets its own
        section, name = place(field)
        section[name] = section[name] if field in late else _typed(field, value)
    for field, (sources, compute) in late.items():
        kind = schema()[field].kind

        def value(_, *values, field=field, compute=compute):
            return _typed(field, compute(*values))

        section, name = place(field)
        references = [section.get_ref(name) for section, name in map(place, sources)]
        section.get_ref(name).set(FieldReference(kind(), field_type=kind, op=Op(value, references)))


# ---- telling -----------------------------------------------------------------------------------------------------------------------------------------


def _report(name: str, config: ConfigDict, fields: Iterable[str], inert: dict[str, list[str]]) -> None:
    """Say what becomes of the file's fields. Why a changed field does nothing, and what to set for a refused one, config.check says."""
    refused, different = refusals(config), changed(config)
    honoured, silent, fixed = ([field for field in fields if field in table and field not in refused] for table in (HONOURED, INERT, REFUSED))
    counts = f"{len(honoured)} honoured, {len(silent)} inert, {len(refused)} refused, {len(fixed)} at the only value that can be done"
    log.info("%s: %s (neva_jax/fields.py lists all)", name, counts)
    log.info("  honoured and not the default: %s", ", ".join(f"{field} {config[field]}" for field in honoured if field in different) or "none")
    for reason, paths in inert.items():
        log.info("  inert: %s: %s", ", ".join(paths), reason)
    if refused:
        log.info("  refused as they stand: %s", ", ".join(refused))
