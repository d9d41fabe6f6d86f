"""The engine that reads a table of rules forwards (import) and backwards (export).

A rule pairs a name of theirs with a path of ours and an invertible operation. `{i}` in theirs and not in ours means: one tensor of theirs a layer,
stacked on axis 0 of ours. What does not fit is listed whole at the end, not one key at a time.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from neva_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible change of layout of one tensor."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


COPY = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(lambda x: x.T, lambda x: x.T)  # torch Linear [out, in] <-> kernel [in, out]


def patch_conv(patch_size: int) -> Op:
    """torch Conv2d [out, 3, p, p] of stride p <-> kernel [p * p * 3, out] over patches flattened as rows, columns, channels."""
    p = patch_size
    return Op(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), lambda x: x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1))


def pad_rows(rows: int, padded: int) -> Op:
    """A table of `rows` rows <-> one of `padded` rows, with zeros below; further rows of theirs (their own padding) are cut."""
    return Op(lambda x: np.pad(x[:padded], [(0, max(0, padded - len(x)))] + [(0, 0)] * (x.ndim - 1)), lambda x: x[:rows])


def chain(first: Op, second: Op) -> Op:
    return Op(lambda x: second.forward(first.forward(x)), lambda x: first.inverse(second.inverse(x)))


@dataclasses.dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str
    op: Op = COPY


class KeyMap:
    """Rules for a model of `num_layers`. `tensors` are lazy: theirs is `{name: object with .shape and .read()}`."""

    def __init__(self, rules: list[Rule], num_layers: dict[str, int]):
        """num_layers: depth of the stack for each prefix of ours, e.g. {"llm": 32, "vision_encoder": 24}."""
        self.rules = {rule.ours: rule for rule in rules}
        self.num_layers = num_layers

    def their_names(self, ours: str) -> list[str]:
        rule = self.rules[ours]
        depth = self.num_layers[ours.split("/")[0]] if "{i}" in rule.theirs else 1
        return [rule.theirs.replace("{i}", str(i)) for i in range(depth)]

    def check(self, theirs: dict, ours: list[str], where: str) -> None:
        """Every tensor of theirs used, every path of ours filled; else one error that lists all of both."""
        wanted = {name for path in ours for name in self.their_names(path)}
        known = {name for path in self.rules for name in self.their_names(path)}
        missing, unknown = sorted(wanted - set(theirs)), sorted(set(theirs) - known)
        if missing or unknown:
            parts = [f"{len(missing)} tensors are missing ({some(missing)})"] if missing else []
            parts += [f"{len(unknown)} are not part of such a model ({some(unknown)})"] if unknown else []
            raise UserError(f"{where}: {' and '.join(parts)}; the config's layer counts, biases, tying or projector type disagree with the weights")

    def read(self, theirs: dict, ours: str, shape: tuple[int, ...], where: str) -> np.ndarray:
        """The array of one path of ours, in their dtype. shape: what the model expects."""
        rule = self.rules[ours]
        stacked = "{i}" in rule.theirs
        wanted, parts = tuple(shape)[stacked:], []
        for name in self.their_names(ours):
            part = rule.op.forward(theirs[name].read())
            if part.shape != wanted:
                raise UserError(f"{where}: {name} {list(theirs[name].shape)} gives {ours} the shape {list(part.shape)}, the config makes it {list(wanted)}")
            parts.append(part)
        return np.stack(parts) if stacked else parts[0]

    def write(self, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All paths of ours -> all tensors of theirs."""
        out = {}
        for path, array in ours.items():
            rule, names = self.rules[path], self.their_names(path)
            for name, part in zip(names, array if "{i}" in rule.theirs else [array], strict=True):
                out[name] = np.ascontiguousarray(rule.op.inverse(np.asarray(part)))
        return out


def some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
