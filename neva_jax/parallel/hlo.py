"""Reading a compiled step, as text (`compiled.as_text()`): its GEMMs, its collectives and the mesh axis of each, its tensors. A loop's body counts once a turn.

Given up: a general parser of HLO. What XLA prints for GPUs and CPUs is read; a loop whose number of turns XLA does not know counts as one.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64}
BITS |= {"f64": 64, "c64": 64}
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|called_computations|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
GEMM_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__cudnn$blockScaledDot")
PRECISION = {"bf16": "bf16", "f16": "bf16", "f32": "fp32", "f64": "fp32"}


class Instruction(NamedTuple):
    """type: as printed, "bf16[4,8]{1,0}" or a tuple of such; rest: what follows the operands."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def op_name(self) -> str:
        """Where in the program it comes from: "jit(train_step)/while/body/..."."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str | None:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else None


class Module(NamedTuple):
    """computations: {name: {instruction's name: it}}; donated: {number of an argument} whose memory an output takes over."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    donated: frozenset[int]


class Gemm(NamedTuple):
    """precision: fp8, bf16 or fp32; batched: one a head (attention without a kernel of its own), not one a weight; computation: where it stands; count: how
    often a step runs it; op_name: what the program called it."""

    precision: str
    batched: bool
    computation: str
    count: int
    op_name: str = ""


class Collective(NamedTuple):
    """bytes: of one run on one device, what is reduced, sent or, of an all-gather, had at the end; axis: "fsdp", "data+fsdp"; num_devices: that take part."""

    op: str
    axis: str
    num_devices: int
    bytes: int
    computation: str
    count: int


def parse(text: str) -> Module:
    computations, entry, current = {}, "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if head := HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            current[found[1]] = _instruction(found[1], found[2])
    aliases = re.search(r"input_output_alias=\{(.*?)\}, (?:entry|buffer|alias|repl|num|front)", text.partition("\n")[0])
    return Module(computations, entry, frozenset(int(n) for n in re.findall(r"\}: \((\d+)", aliases[1] if aliases else "")))


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].strip()
    opcode, _, text = text.partition("(")
    end = _closing("(" + text)
    operands = tuple(part.split()[-1].lstrip("%") for part in text[: end - 1].split(", ") if "%" in part)
    return Instruction(name, kind, opcode, operands, text[end:])


def _closing(text: str) -> int:
    """Where the bracket that opens `text` is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def executions(module: Module) -> dict[str, int]:
    """{computation: how often one run of the program runs it}."""
    counts = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in module.computations.get(name, {}).values():
            turns = _turns(instruction) if instruction.opcode == "while" else 1
            for names in CALLED.findall(instruction.rest):
                for called in names.split(", "):
                    visit(called.strip("%"), times * turns)

    visit(module.entry, 1)
    return counts


def _turns(loop: Instruction) -> int:
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else 1


def _instructions(module: Module):
    """Every instruction that runs, its computation's name, and how often."""
    for name, count in executions(module).items():
        for instruction in module.computations.get(name, {}).values():
            yield instruction, name, count


def loops_of(module: Module, scope: str) -> frozenset[str]:
    """The computations that run inside loops which the program wrote within `jax.named_scope(scope)`. What XLA merges there has lost its own name."""
    inside, todo = set(), []
    for computation in module.computations.values():
        todo += [one for one in computation.values() if one.opcode == "while" and scope in one.op_name]
    while todo:
        called = {name.strip("%") for names in CALLED.findall(todo.pop().rest) for name in names.split(", ")} - inside
        inside |= called
        todo += [one for name in called for one in module.computations.get(name, {}).values()]
    return frozenset(inside)


def arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """A type as printed -> [(dtype, shape)] of the arrays in it."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(kind) if dtype in BITS or dtype.startswith("f8")]


def num_bytes(kind: str) -> int:
    return sum(math.prod(shape) * BITS.get(dtype, 8) // 8 for dtype, shape in arrays(kind))


# ---- GEMMs -------------------------------------------------------------------------------------------------------------------------------------------


def gemms(module: Module) -> list[Gemm]:
    """Every product of matrices: dots, in fusions too, and calls of cuBLAS."""
    found = []
    for instruction, name, count in _instructions(module):
        if instruction.opcode == "dot" or instruction.target in GEMM_TARGETS:
            batched = re.search(r'lhs_batch_dim(?:s=\{|ensions":\[")\d', instruction.rest) is not None
            found.append(Gemm(_precision(instruction, module.computations[name]), batched, name, count, instruction.op_name))
    return found


def _precision(instruction: Instruction, neighbours: dict[str, Instruction]) -> str:
    if instruction.target and instruction.target.endswith("$f8"):
        return "fp8"
    types = [dtype for name in instruction.operands[:2] if name in neighbours for dtype, _ in arrays(neighbours[name].type)]
    dtype = types[0] if types else arrays(instruction.type)[0][0]
    return "fp8" if dtype.startswith("f8") else PRECISION.get(dtype, dtype)


def targets(module: Module) -> collections.Counter:
    """{name of a library's kernel: how often a step calls it}, such as __cudnn$fmhaSoftmax."""
    calls = collections.Counter()
    for instruction, _, count in _instructions(module):
        if instruction.target:
            calls[instruction.target] += count
    return calls


# ---- collectives -------------------------------------------------------------------------------------------------------------------------------------


def collectives(module: Module, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every collective that moves something between devices. mesh_shape: {axis: size}, in the order in which the devices lie."""
    found = []
    for instruction, name, count in _instructions(module):
        op = instruction.opcode.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        groups = replica_groups(instruction.rest, math.prod(mesh_shape.values()))
        size = max(map(len, groups))
        if size > 1:
            payload = sum(num_bytes(module.computations[name][operand].type) for operand in instruction.operands)
            found.append(Collective(op, axis_of(groups, mesh_shape), size, payload * (size if op == "all-gather" else 1), name, count))
    return found


def replica_groups(rest: str, num_devices: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of XLA's four spellings; pairs of a permutation are groups of two."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return _numbers(pairs[1])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        return _mesh_groups(mesh[1], mesh[3], _iota(mesh[2]) if mesh[2] else np.arange(num_devices))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _numbers(listed[1])
    return [list(range(num_devices))]


def _numbers(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 in an array [4, 2], transposed -> the numbers in their order; or the numbers themselves."""
    if not (found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)):
        return np.array([int(n) for n in text.split(",")])
    dims = [int(n) for n in found[1].split(",")]
    order = [int(n) for n in found[2].split(",")] if found[2] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)


def _mesh_groups(mesh: str, axes: str, devices: np.ndarray) -> list[list[int]]:
    """mesh['axis_0'=4,'axis_1'=2] {'axis_0'}: groups along axis_0; 'axis_0':(2)2 is the part of it with two before and size two."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    inside = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    dims, moving = [], []
    for name, size in sizes.items():
        before, part = inside.get(name, (size, 1))
        moving.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    devices = np.moveaxis(devices.reshape(dims), moving, range(-len(moving), 0))
    return devices.reshape(-1, math.prod(dims[i] for i in moving)).tolist()


def axis_of(groups: list[list[int]], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ: "tensor", "data+fsdp"."""
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh_shape.values())), tuple(mesh_shape.values())), -1)
    differs = np.any([np.ptp(places[group], axis=0) > 0 for group in groups], axis=0)
    return "+".join(axis for axis, differ in zip(mesh_shape, differs, strict=True) if differ)


# ---- tensors -----------------------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def shapes(text: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Every (dtype, shape) of the text."""
    return frozenset(array for kind in set(re.findall(r"\b[a-z]+\d*[a-z0-9]*\[[\d,]+\]", text)) for array in arrays(kind))


def holds_tensor(text: str, *, width: int, rows: int, but_not: frozenset[int] = frozenset()) -> bool:
    """Whether some tensor has a dimension `width` and at least `rows` elements for each of its places, as [B, T, V] has. but_not: sizes of the other
    dimension of matrices that may: a weight [D, V] has D rows."""
    for _, shape in shapes(text):
        others = [n for n in shape if n != 1]
        if width not in others:
            continue
        others.remove(width)
        if math.prod(others) >= rows and not (len(others) == 1 and others[0] in but_not):
            return True
    return False
