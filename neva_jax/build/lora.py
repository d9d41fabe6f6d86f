"""LoRA as a config asks for it: `model.peft` as a transform of the model, as rows of what trains, and in words."""

import dataclasses
import logging
import math

import jax
from flax import nnx
from ml_collections import ConfigDict

from neva_jax.config import assign, leaves
from neva_jax.errors import UserError
from neva_jax.fields import ADAPTERS, LORA_TARGETS
from neva_jax.transforms.lora import PATTERN, Lora, Target, adapters_of, apply_lora, describe_keys, draw_keys
from neva_jax.transforms.select import Row, Weight

log = logging.getLogger(__name__)

SEED = 1  # beside model.seed, so that a base that is born random is the same with adapters and without


def build_lora(config: ConfigDict) -> Lora | None:
    """None: the config asks for none. What training drops is not in it: see Dropout."""
    p = config.model.peft
    if p.peft_scheme is None:
        return None
    t = p.lora_tuning
    layers = None if t.layer_selection is None else tuple(sorted(layer - 1 for layer in t.layer_selection))
    layers = None if layers == tuple(range(config.model.num_layers)) else layers
    alpha = t.adapter_dim if t.alpha is None else t.alpha
    return Lora(t.adapter_dim, float(alpha), targets_of(t.target_modules, t.variant), layers, t.column_init_method, t.row_init_method)


def targets_of(names, variant: str) -> tuple[Target, ...]:
    """names: of fields.LORA_TARGETS. variant: NeMo's; in "nemo" the projections of attention_qkv, and those of mlp_fc1, have one A; in "canonical" one each.
    Those that are named singly always have one each."""
    groups, todo = {}, list(names)
    while todo:
        name = todo.pop(0)
        if LORA_TARGETS[name][0] in LORA_TARGETS:
            todo += LORA_TARGETS[name]
        else:
            groups[LORA_TARGETS[name]] = None
    groups = [group for group in groups if not any(set(group) < set(other) for other in groups)]
    return tuple(Target(rf"^llm/layers/\w+/({'|'.join(group)})_proj$", variant == "nemo" and len(group) > 1) for group in groups)


def with_adapters(model: nnx.Module, lora: Lora | None, seed: int) -> nnx.Module:
    return model if lora is None else apply_lora(model, lora, nnx.Rngs(params=jax.random.fold_in(jax.random.key(seed), SEED)))


def check_targets(config: ConfigDict, lora: Lora, weights: dict[str, Weight]) -> None:
    """weights: of the base. Every name that is to get adapters is there, and an adapter is smaller than what it stands for."""
    for name in config.model.peft.lora_tuning.target_modules:
        if name == "gate_proj" and not any(path.endswith("/gate_proj/kernel") for path in weights):
            activation = config.model.activation
            raise UserError(f"model.peft.lora_tuning.target_modules names gate_proj, which model.activation {activation} does not have; name up_proj")
    for kernel in adapters_of(weights, lora):
        rows, columns = weights[kernel].shape[-2:]
        if lora.rank > min(rows, columns):
            raise UserError(
                f"{kernel.removesuffix('/kernel')} is a matrix of {rows} x {columns}, of no higher rank than {min(rows, columns)}, and its adapter would have "
                f"rank {lora.rank}; set model.peft.lora_tuning.adapter_dim to at most {min(rows, columns)}, or leave {kernel.split('/')[-2]} out of "
                "target_modules"
            )


def check_rows(lora: Lora, weights: dict[str, Weight], rows: dict[str, Row]) -> None:
    """model.trainable has the last word, but adapters that stay as they are born were not asked for."""
    idle = sorted({path for pair in adapters_of(weights, lora).values() for path in pair} - rows.keys())
    if idle:
        raise UserError(
            f"model.trainable leaves out {len(idle)} weights of the adapters that model.peft asks for ({', '.join(idle[:3])}); add the row "
            f"({PATTERN!r}, 1.0, None), or set model.peft.peft_scheme to None"
        )


def check_same_adapters(config: ConfigDict, theirs: dict[str, object], lora: Lora, weights: dict[str, Weight], where: str) -> None:
    """theirs: {config field: value} of adapters that are to be taken over; they must be those that the config asks for."""
    theirs, other = {name: theirs[name] for name in sorted(ADAPTERS & theirs.keys())}, config.copy_and_resolve_references()
    other.unlock()
    for name, value in theirs.items():
        assign(other, name, value)
    found = build_lora(other)
    theirs["model.peft.lora_tuning.alpha"] = found.alpha  # which a run may have left to follow the rank
    pairs = lambda one: adapters_of(weights, one)  # noqa: E731
    differ = {"adapter_dim": found.rank != lora.rank, "alpha": found.alpha != lora.alpha, "layer_selection": found.layers != lora.layers}
    differ |= dict.fromkeys(("target_modules", "variant"), pairs(found) != pairs(lora))
    ours, theirs = leaves(config), {f"model.peft.lora_tuning.{name}": theirs[f"model.peft.lora_tuning.{name}"] for name, is_other in differ.items() if is_other}
    if theirs := {name: value for name, value in theirs.items() if value != ours[name]}:
        listed = "; ".join(f"{name} is {ours[name]}, the adapters have {value}" for name, value in theirs.items())
        spelt = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in theirs.items()}
        raise UserError(f"{where} has other adapters: {listed}; add {' '.join(f'--config.{name}={value}' for name, value in spelt.items())}")


def describe_lora(lora: Lora, weights: dict[str, Weight]) -> str:
    """The adapters, in a line."""
    found = adapters_of(weights, lora)
    depth = next(weights[kernel].shape[0] for kernel in found)
    names = {}
    for kernel, (lora_A, _) in found.items():
        names.setdefault(lora_A, []).append(kernel.split("/")[-2])
    where = ", ".join(" and ".join(group) + (" (one lora_A)" if len(group) > 1 else "") for group in names.values())
    layers = f"all {depth} layers" if lora.layers is None else f"layers {', '.join(str(layer + 1) for layer in lora.layers)} of {depth}"
    return f"LoRA: rank {lora.rank}, alpha {lora.alpha:g} at {where} of {layers}; {num_weights(lora, weights):,} weights"


def num_weights(lora: Lora, weights: dict[str, Weight]) -> int:
    """Of adapters, in the layers that have them."""
    shapes = [weights[path].shape for path in {path for pair in adapters_of(weights, lora).values() for path in pair}]
    return sum(math.prod(shape[1:]) * (shape[0] if lora.layers is None else len(lora.layers)) for shape in shapes)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """The model that training runs where adapters drop: its graph, and {path: shape} of the keys that every micro-batch brings anew. seed: of these."""

    graphdef: nnx.GraphDef
    shapes: dict[str, tuple[int, ...]]
    seed: int

    def draw(self, step: jax.Array, micro_batch: jax.Array) -> dict[str, jax.Array]:
        """The keys of one micro-batch: the same after a resume, and on every mesh with as many rows in it."""
        return draw_keys(jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), step), micro_batch), self.shapes)


def build_dropout(config: ConfigDict, lora: Lora | None, make) -> Dropout | None:
    """make: function of a Lora -> module."""
    t = config.model.peft.lora_tuning
    if lora is None or not t.adapter_dropout:
        return None
    dropping = dataclasses.replace(lora, dropout=t.adapter_dropout, dropout_position=t.dropout_position)
    return Dropout(*describe_keys(lambda: make(dropping)), config.model.seed)
