"""The engine that reads a table of rules forwards (import) and backwards (export).

A rule pairs a name of theirs with a path of ours, or with several where they fuse weights, and an invertible operation. `{i}` in theirs and not in ours
means: one tensor of theirs a layer, stacked on axis 0 of ours. What does not fit is listed whole at the end, not one key at a time.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator

import numpy as np

from neva_jax.errors import UserError

DUPLICATE = " (again, as "  # in the name under which a reader of files lists a second tensor of one weight: no table knows it, and `check` tells

MISFIT = (ValueError, TypeError, IndexError)  # what numpy raises where a reshape, or a number of dimensions, does not fit an operation


@dataclasses.dataclass(frozen=True)
class Op:
    """An invertible change of layout: one tensor of theirs -> one of ours, or a tuple of ours; and back."""

    forward: Callable
    inverse: Callable


COPY = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(lambda x: x.T, lambda x: x.T)  # torch Linear [out, in] <-> kernel [in, out]


def patch_conv(patch_size: int) -> Op:
    """torch Conv2d [out, 3, p, p] of stride p <-> kernel [p * p * 3, out] over patches flattened as rows, columns, channels."""
    p = patch_size
    return Op(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), lambda x: x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1))


def pad_rows(rows: int, padded: int) -> Op:
    """A table of `rows` rows <-> one of `padded` rows, with zeros below; further rows of theirs (their own padding) are cut."""

    def pad(x):
        if len(x) >= padded:
            return x[:padded]
        return blank((padded, *x.shape[1:])) if is_blank(x) else np.pad(x, [(0, padded - len(x))] + [(0, 0)] * (x.ndim - 1))

    return Op(pad, lambda x: x[:rows])


def chain(first: Op, second: Op) -> Op:
    return Op(lambda x: second.forward(first.forward(x)), lambda x: first.inverse(second.inverse(x)))


def fused_qkv(num_groups: int, queries_per_group: int, head_dim: int) -> Op:
    """Megatron's rows, group by group: the group's query heads, its key head, its value head, head_dim rows each <-> (q, k, v), transposed if matrices."""
    g, r, d = num_groups, queries_per_group, head_dim

    def split(x):
        blocks = x.reshape(g, r + 2, d, *x.shape[1:])
        return tuple(part.reshape(-1, *x.shape[1:]).T for part in (blocks[:, :r], blocks[:, r], blocks[:, r + 1]))

    def fuse(q, k, v):
        rest = q.T.shape[1:]
        parts = [q.T.reshape(g, r, d, *rest), k.T.reshape(g, 1, d, *rest), v.T.reshape(g, 1, d, *rest)]
        return np.concatenate(parts, axis=1).reshape(-1, *rest)

    return Op(split, fuse)


# Megatron's gated MLP: the gate's rows, then up's <-> (gate, up), transposed if matrices.
FUSED_GLU = Op(lambda x: (x[: len(x) // 2].T, x[len(x) // 2 :].T), lambda gate, up: np.concatenate([gate.T, up.T]))


@dataclasses.dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str | tuple[str, ...]
    op: Op = COPY

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def is_stacked(self) -> bool:
        return "{i}" in self.theirs

    def split(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """One tensor of theirs -> one array for each of `paths`. Raises MISFIT where it does not fit."""
        return (self.op.forward(x),) if isinstance(self.ours, str) else self.op.forward(x)

    def fused_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of theirs from one layer's shapes of `paths`."""
        return self.op.inverse(*map(blank, shapes)).shape


class KeyMap:
    """Rules for a model of `num_layers`. `tensors` are lazy: theirs is `{name: object with .shape and .read()}`."""

    def __init__(self, rules: list[Rule], num_layers: dict[str, int | tuple[int, ...]]):
        """num_layers: depth of the stack for each prefix of ours, e.g. {"llm": 32, "vision_encoder": 24}, or the layers that theirs have, counted from 0:
        the others of ours are zeros."""
        self.rules = {path: rule for rule in rules for path in rule.paths}
        self.num_layers = num_layers

    def layers(self, ours: str) -> tuple[int, ...]:
        """The layers of ours that theirs have a tensor for; one where there are no layers."""
        found = self.num_layers[ours.split("/")[0]] if self.rules[ours].is_stacked else 1
        return tuple(range(found)) if isinstance(found, int) else found

    def their_names(self, ours: str) -> list[str]:
        return [self.rules[ours].theirs.replace("{i}", str(i)) for i in self.layers(ours)]

    def check(self, theirs: dict, ours: Collection[str] | dict[str, tuple[int, ...]], where: str) -> None:
        """Every tensor of theirs used, every path of ours filled and, where `ours` says the shapes, all of them right; else one error that lists it all."""
        wanted = {name for path in ours for name in self.their_names(path)}
        known = {name for path in self.rules for name in self.their_names(path)}
        missing, extra = sorted(wanted - set(theirs)), sorted(set(theirs) - known)
        twice, unknown = [name for name in extra if DUPLICATE in name], [name for name in extra if DUPLICATE not in name]
        parts = [f"{len(missing)} tensors are missing ({some(missing)})"] if missing else []
        parts += [f"{len(unknown)} are not part of such a model ({some(unknown)})"] if unknown else []
        parts += [f"{len(twice)} are there twice ({some(twice)})"] if twice else []
        if isinstance(ours, dict) and (misshapen := self._misshapen(theirs, ours)):
            parts.append(f"{len(misshapen)} have another shape ({some(misshapen)})")
        if parts:
            listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
            raise UserError(f"{where}: {listed}; the config's layer counts, biases, tying or projector type disagree with the weights")

    def _misshapen(self, theirs: dict, ours: dict[str, tuple[int, ...]]) -> list[str]:
        found = []
        for rule in self._rules(ours):
            wanted = [tuple(ours[path])[rule.is_stacked :] for path in rule.paths]
            fits: dict[tuple[int, ...], bool] = {}
            for name in filter(theirs.__contains__, self.their_names(rule.paths[0])):
                shape = tuple(theirs[name].shape)
                if shape not in fits:
                    fits[shape] = shapes_of(rule, shape) == wanted
                if not fits[shape]:
                    found.append(f"{name} {list(shape)}, the config makes it {list(rule.fused_shape(wanted))}")
        return found

    def read(self, theirs: dict, ours: str, shape: tuple[int, ...], where: str) -> np.ndarray:
        """The array of one path of ours, in their dtype. shape: what the model expects."""
        return np.asarray(self.lazy(theirs, ours, shape, where))

    def lazy(self, theirs: dict, ours: str, shape: tuple[int, ...], where: str) -> "LazyArray":
        """The same, read when it is asked for, a layer at a time."""
        return LazyArray(self, theirs, ours, tuple(shape), where)

    def write(self, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All paths of ours -> all tensors of theirs."""
        return dict(self.parts(ours))

    def parts(self, ours: dict) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor of theirs), one at a time. ours: {path: array or LazyArray}, read a layer at a time."""
        for rule in self._rules(ours):
            arrays = [ours[path] for path in rule.paths]
            for layer, name in zip(self.layers(rule.paths[0]), self.their_names(rule.paths[0]), strict=True):
                chosen = [np.asarray(array[layer]) if rule.is_stacked else np.asarray(array) for array in arrays]
                yield name, np.ascontiguousarray(rule.op.inverse(*chosen))

    def outline(self, ours: dict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{name: (shape, dtype)} of what `parts` will give, with nothing computed."""
        found = {}
        for rule in self._rules(ours):
            shape = rule.fused_shape([tuple(ours[path].shape)[rule.is_stacked :] for path in rule.paths])
            found |= dict.fromkeys(self.their_names(rule.paths[0]), (shape, np.dtype(ours[rule.paths[0]].dtype)))
        return found

    def _rules(self, ours: Collection[str]) -> list[Rule]:
        return list(dict.fromkeys(self.rules[path] for path in ours))


class LazyArray:
    """One path of ours as tensors of theirs that are not read yet. `[layer]` reads one layer of a stack, `[slices]` a block, `np.asarray` all; of a mapped
    file only what is asked for is read."""

    def __init__(self, keys: KeyMap, theirs: dict, path: str, shape: tuple[int, ...], where: str):
        self.rule, self.path, self.shape, self.where = keys.rules[path], path, shape, where
        self.names, self.layers = keys.their_names(path), keys.layers(path)
        self.tensors = [theirs[name] for name in self.names]

    @property
    def dtype(self) -> np.dtype:
        """Their dtype; where a file does not say it, one layer is read for it."""
        known = getattr(self.tensors[0], "dtype", None)
        return known if isinstance(known, np.dtype) else self._layer(self.layers[0]).dtype

    def _layer(self, layer: int) -> np.ndarray:
        wanted = self.shape[self.rule.is_stacked :]
        if layer not in self.layers:
            return np.zeros(wanted, self.dtype)
        name, tensor = self.names[self.layers.index(layer)], self.tensors[self.layers.index(layer)]
        try:
            part = self.rule.split(tensor.read())[self.rule.paths.index(self.path)]
        except MISFIT:
            raise UserError(f"{self.where}: {name} has the shape {list(tensor.shape)}, which does not split into {', '.join(self.rule.paths)}") from None
        if part.shape != wanted:
            there = f"{name} {list(tensor.shape)} gives {self.path} the shape {list(part.shape)}"
            raise UserError(f"{self.where}: {there}, the config makes it {list(wanted)}")
        return part

    def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
        if not self.rule.is_stacked:
            return self._layer(0)[index]
        if not isinstance(index, tuple):
            return self._layer(index)
        return np.stack([self._layer(layer)[index[1:]] for layer in range(*index[0].indices(self.shape[0]))])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self[(slice(None),) * len(self.shape)]
        return array if dtype is None else array.astype(dtype)


def blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of one byte, whatever its shape: operations run on it to learn shapes."""
    return np.broadcast_to(np.False_, shape)


def is_blank(array: np.ndarray) -> bool:
    return array.dtype == bool and not any(array.strides)


def shapes_of(rule: Rule, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The shapes that a tensor of theirs gives the rule's paths; None where it does not fit."""
    try:
        return [part.shape for part in rule.split(blank(shape))]
    except MISFIT:
        return None


def some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
