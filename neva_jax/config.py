"""The gate between a ConfigDict and the library: types, ranges, what a field means here, what was changed, and the way to JSON and back.

`check` is called once, before anything is built; whatever it lets through is honoured, or was warned about. The tables are in fields.py. Given up: unknown
fields are never carried along, not even from newer versions. What needs the tokenizer, a checkpoint or the devices is checked where those are opened.
"""

import ast
import difflib
import functools
import logging
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import base
from neva_jax.data.conversation import TEMPLATES
from neva_jax.errors import UserError
from neva_jax.fields import ADAPTERS, ARCHITECTURE, CHOICES, FOLLOWERS, HINTS, INERT, NULLABLE, REFUSED, RULES, SCHED, idle, traps
from neva_jax.mesh_sizes import check_devices, check_shape

log = logging.getLogger(__name__)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a sequence, such as '(1, 2)'", object: "a value"}


class Leaf(NamedTuple):
    kind: type
    default: object
    nullable: bool


@functools.cache
def schema() -> dict[str, Leaf]:
    """{dotted path: Leaf} of every field."""

    def walk(node, prefix=""):
        for key in node:
            if isinstance(node[key], ConfigDict):
                yield from walk(node[key], f"{prefix}{key}.")
            else:
                path, kind, default = prefix + key, node.get_type(key), node[key]
                yield path, Leaf(kind, default, default is None or path in NULLABLE)

    return dict(walk(base.get_config()))


@functools.cache
def sections() -> frozenset[str]:
    """Paths that hold fields: "model", "model.optim", ..."""
    return frozenset(path.rsplit(".", n)[0] for path in schema() for n in range(1, path.count(".") + 1))


def leaves(config) -> dict[str, object]:
    """{dotted path: value} of a ConfigDict or a nested dict, references resolved."""

    def walk(node, prefix=""):
        for key in node:
            if isinstance(node[key], ConfigDict | dict) and prefix + key not in schema():
                yield from walk(node[key], f"{prefix}{key}.")
            else:
                yield prefix + key, node[key]

    return dict(walk(config))


# ---- setting -----------------------------------------------------------------------------------------------------------------------------------------


def assign(config: ConfigDict, path: str, value) -> None:
    """Set one field, or several from a dictionary for a section. value: of the field's type, or text that says it (a command line, a YAML file)."""
    if path in schema():
        return _set(config, path, coerce(path, value))
    if path not in sections():
        raise UserError(f"{path} is not a field of the config{suggest(path)}")
    value = literal(value)
    if not isinstance(value, ConfigDict | dict):
        raise UserError(f"{path} is {value!r}, expected a dictionary of its fields; one field is set by {path}.NAME")
    for key in value:
        assign(config, f"{path}.{key}", value[key])


def coerce(path: str, value):
    """value as the type of the field; null, none and "" mean None where the field may be null."""
    leaf = schema()[path]
    says_null = value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", ""))
    if says_null and leaf.nullable:
        return None
    try:
        if value is None or (says_null and leaf.kind is not str):
            raise TypeError
        return READERS[leaf.kind](value)
    except (TypeError, ValueError, KeyError, OverflowError):
        expected = f"{KINDS[leaf.kind]}{' or null' * leaf.nullable}"
        raise UserError(f"{path} is {value!r}, expected {expected}; its default is {leaf.default!r}") from None


def literal(value):
    """Text as the Python or YAML value that it spells, else as it is; lists as tuples."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            return value
    return _frozen(value)


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _read_bool(value):
    return {"true": True, "1": True, "false": False, "0": False}[str(value).strip().lower()]


def _read_number(kind, value):
    if isinstance(value, bool) or not isinstance(value, (int, str) if kind is int else (int, float, str)) or not math.isfinite(number := kind(value)):
        raise TypeError
    return number


def _read_text(value):
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _read_tuple(value):
    if isinstance(value := literal(value), str):
        value = tuple(part.strip() for part in value.split(","))
    return value if isinstance(value, tuple) else (value,)


READERS = {bool: _read_bool, int: functools.partial(_read_number, int), float: functools.partial(_read_number, float), str: _read_text, tuple: _read_tuple}
READERS[object] = literal


def _set(config: ConfigDict, path: str, value) -> None:
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value


def suggest(path: str) -> str:
    """What a misspelt path might have meant, as the end of a sentence: fields of that name elsewhere, else fields and sections spelt like it."""
    known, name = [p for p in (*schema(), *sections()) if not path.startswith(f"{p}.")], path.rpartition(".")[2]
    found = difflib.get_close_matches(path, [p for p in known if p.rpartition(".")[2] == name], 3, 0) or difflib.get_close_matches(path, known, 3, 0.75)
    return f"; did you mean {' or '.join(found)}?" if found else "; configs/base.py lists them all"


# ---- checking ----------------------------------------------------------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Bring every field to its type, then raise a UserError for all that cannot be done; at the end warn once of each trap, and of each that does nothing."""
    _check_fields(config)
    if refused := list(refusals(config).values()):
        numbered = [f"({n}) {sentence}" for n, sentence in enumerate(refused, 1)]
        raise UserError(refused[0] if len(refused) == 1 else f"{len(refused)} fields cannot be done: {'; '.join(numbered)}")
    get, different = leaves(config), changed(config)
    _check_llm(get)
    check_shape(get)
    _check_together(get)
    _check_peft(get)
    if get["trainer.devices"] not in (-1, "auto"):
        check_parallel(config, get["trainer.devices"] * get["trainer.num_nodes"])
    for sentence in traps(get):
        log.warning(sentence)
    inert = INERT | idle(get)
    for path in sorted(different.keys() & inert.keys()):
        log.warning("%s is %r, which does nothing here: %s", path, different[path], inert[path])


def refusals(config: ConfigDict) -> dict[str, str]:
    """{path: what is wrong with its value and what to set}, of every field whose value cannot be done by itself. The fields have their types."""
    get, different = leaves(config), changed(config)
    result = {p: f"{p} is {get[p]!r}, but {sentence}; set it to {schema()[p].default!r}" for p, sentence in REFUSED.items() if p in different}
    nemo = tuple(name for name, template in TEMPLATES.items() if not template.llava)
    for path, choices in {**CHOICES, "model.data.conv_template": tuple(TEMPLATES), "model.mm_cfg.llm.model_type": nemo}.items():
        if get[path] not in choices and (path in different or path not in FOLLOWERS):  # else its source is named
            result[path] = f"{path} is {get[path]!r}, expected one of {', '.join(map(str, choices))}{HINTS.get(path, '')}"
    for path, (holds, expected) in RULES.items():
        if get[path] is not None and not holds(get[path]):
            result[path] = f"{path} is {get[path]!r}, expected {expected}"
    return result


def _check_fields(config: ConfigDict) -> None:
    found = leaves(config)
    for path in found.keys() - schema().keys():
        raise UserError(f"{path} is not a field of the config{suggest(path)}")
    if missing := sorted(schema().keys() - found.keys()):
        raise UserError(f"the config lacks {', '.join(missing[:5])}{' and more' * (len(missing) > 5)}; begin with configs.base.get_config()")
    for path, value in found.items():
        coerced = coerce(path, value)
        if type(coerced) is not type(value) or coerced != value:
            _set(config, path, coerced)


def _check_llm(get: dict) -> None:
    heads, hidden = get["model.num_attention_heads"], get["model.hidden_size"]
    groups, width = get["model.num_query_groups"] or heads, get["model.kv_channels"]
    if heads % groups:
        raise UserError(f"model.num_query_groups is {groups}, which does not divide model.num_attention_heads {heads}")
    if width is None and hidden % heads:
        raise UserError(f"model.hidden_size is {hidden}, which is not a multiple of model.num_attention_heads {heads}; set model.kv_channels if that is meant")
    rotated = int((width or hidden // heads) * get["model.rotary_percentage"])
    if rotated < 2 or rotated % 2:
        raise UserError(f"model.rotary_percentage {get['model.rotary_percentage']} rotates {rotated} dimensions of a head, expected an even number")


def _check_together(get: dict) -> None:
    if get["trainer.precision"] != get["model.precision"]:
        raise UserError(f"model.precision is {get['model.precision']!r} and trainer.precision {get['trainer.precision']!r}; set trainer.precision alone")
    if get["trainer.max_steps"] < 0 and get["trainer.max_epochs"] < 0:
        raise UserError("trainer.max_steps and trainer.max_epochs are both -1, so that training would never end; set one of them")
    if get["trainer.max_steps"] < 0 and get[f"{SCHED}.max_steps"] is None:
        raise UserError(f"trainer.max_steps is -1, so that the learning-rate schedule has no length; set {SCHED}.max_steps")
    if get["model.fp8_e4m3"] and get["model.fp8_hybrid"]:
        raise UserError("model.fp8_e4m3 and model.fp8_hybrid are both True; hybrid has e5m2 gradients, e4m3 has e4m3 gradients: set one of them")
    if get["model.fp8_frozen_weights"] and not get["model.fp8"]:
        raise UserError("model.fp8_frozen_weights is True and model.fp8 False: weights in e4m3 are for FP8 GEMMs; set model.fp8 to True")
    if get["model.activations_checkpoint_granularity"] == "full" and get["model.activations_checkpoint_method"] is None:
        raise UserError("model.activations_checkpoint_granularity full needs model.activations_checkpoint_method uniform or block")
    for name in ("warmup", "constant", "hold"):
        steps, ratio = get[f"{SCHED}.{name}_steps"], get[f"{SCHED}.{name}_ratio"]
        if steps and ratio:
            raise UserError(f"{SCHED}.{name}_steps is {steps} and {SCHED}.{name}_ratio is {ratio}; set one of them, and the other to null")
    if get[f"{SCHED}.name"] == "CosineAnnealing" and get[f"{SCHED}.min_lr"] > get["model.optim.lr"]:
        raise UserError(f"{SCHED}.min_lr is {get[f'{SCHED}.min_lr']}, expected at most model.optim.lr {get['model.optim.lr']}")


def _check_peft(get: dict) -> None:
    peft, tuning = "model.peft", "model.peft.lora_tuning"
    if get[f"{peft}.peft_scheme"] is None:
        return
    for part in ("llm", "vision_encoder"):
        if not get[f"model.mm_cfg.{part}.freeze"] and get["model.trainable"] is None:
            raise UserError(
                f"{peft}.peft_scheme is {get[f'{peft}.peft_scheme']} and model.mm_cfg.{part}.freeze False: adapters stand beside frozen weights; set freeze to "
                "True, or peft_scheme to None, or say what trains with model.trainable"
            )
    if above := [layer for layer in get[f"{tuning}.layer_selection"] or () if layer > get["model.num_layers"]]:
        raise UserError(f"{tuning}.layer_selection names layer {above[0]} of {get['model.num_layers']} (model.num_layers); the lowest is 1")
    if get[f"{tuning}.column_init_method"] == get[f"{tuning}.row_init_method"] == "zero":
        raise UserError(f"{tuning}.column_init_method and row_init_method are both zero, from where no gradient leads away; set one of them to xavier")
    if get[f"{tuning}.adapter_dropout"] and get["model.pipeline_model_parallel_size"] > 1:
        raise UserError(
            f"{tuning}.adapter_dropout is {get[f'{tuning}.adapter_dropout']} with model.pipeline_model_parallel_size "
            f"{get['model.pipeline_model_parallel_size']}: the micro-batches of a round would drop the same; set it to 0, or shard by fsdp_parallel_size"
        )


def check_parallel(config: ConfigDict, num_devices: int) -> int:
    """The data parallel size (data x fsdp) on so many devices, after checking that the mesh and the batch sizes fit it."""
    return check_devices(leaves(config), num_devices)


# ---- comparing and saving ----------------------------------------------------------------------------------------------------------------------------


def changed(config: ConfigDict) -> dict[str, object]:
    """{dotted path: value} of what was set away from base's defaults. A follower that only follows is not in it."""
    fresh, values, result = base.get_config(), leaves(config), {}
    for path in sorted(schema(), key=FOLLOWERS.__contains__):
        if values[path] != fresh[path]:
            result[path] = values[path]
            _set(fresh, path, values[path])
    return result


def to_json(config: ConfigDict) -> dict:
    """Nested dictionaries of plain values, references resolved, tuples as lists."""

    def plain(value):
        if isinstance(value, ConfigDict | dict):
            return {key: plain(value[key]) for key in value}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


def from_json(saved: dict) -> ConfigDict:
    """The config that `to_json` was given. A follower that agrees with its source follows it again."""
    config, values = base.get_config(), leaves(saved)
    for path in sorted(values, key=FOLLOWERS.__contains__):
        if path not in schema() or coerce(path, values[path]) != config[path]:
            assign(config, path, values[path])
    return config


def architecture(config: ConfigDict) -> dict[str, object]:
    """{dotted path: value} of what defines the weights' shapes and meaning, as saved with a checkpoint; null sizes are resolved."""
    adapters = {"model.peft.peft_scheme"} if config.model.peft.peft_scheme is None else ADAPTERS
    result = {path: leaves(config)[path] for path in sorted(ARCHITECTURE | adapters)}
    heads = result["model.num_attention_heads"]
    result["model.num_query_groups"] = result["model.num_query_groups"] or heads
    result["model.kv_channels"] = result["model.kv_channels"] or result["model.hidden_size"] // heads
    result["model.activation"] = result["model.activation"].removeprefix("fast-")
    if adapters == ADAPTERS:
        result["model.peft.lora_tuning.alpha"] = float(result["model.peft.lora_tuning.alpha"] or result["model.peft.lora_tuning.adapter_dim"])
    return to_json(result)


def compare_architecture(saved: dict, now: dict) -> None:
    """Both from `architecture`. Raises a UserError that names every field whose values differ."""
    different = [f"{path} was {saved[path]!r} and is {now[path]!r}" for path in sorted(saved.keys() & now.keys()) if saved[path] != now[path]]
    if different:
        raise UserError(f"the checkpoint is of another model: {'; '.join(different)}; restore these fields, or start a new run in another directory")
