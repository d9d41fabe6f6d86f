"""FP8 as a config asks for it: the recipe, which GEMMs it is for, whether the devices have it, and the proof that a compiled step really uses it."""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from neva_jax.errors import UserError
from neva_jax.parallel import hlo
from neva_jax.transforms.fp8 import E4M3, E5M2, MARK, Quantised, Recipe, apply_fp8, describe_fp8, find_kernels, quantise
from neva_jax.transforms.select import Weight

log = logging.getLogger(__name__)

PROJECTIONS = r"^llm/layers/\w+/\w+_proj$"  # the seven of a layer; embedding, head, norms, projector and tower stay in the compute dtype
LEAST_CAPABILITY = 8.9  # of GPUs whose tensor cores have FP8: Ada, Hopper, Blackwell
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}  # with either at its default XLA drops FP8 without a word
FP8_GEMM = "__cublas$lt$matmul$f8"
NAMED = re.compile(rf"{MARK}\.(\w+)\.(forward|backward)")


@dataclasses.dataclass(frozen=True)
class Fp8:
    """kernels: paths of those whose GEMMs are FP8; quantised: those of them that are frozen and stored in e4m3; scales: {path: Weight} of delayed scaling.
    transform: what makes a model's GEMMs FP8."""

    recipe: Recipe
    graphdef: nnx.GraphDef
    kernels: tuple[str, ...]
    quantised: tuple[str, ...]
    scales: dict[str, Weight]
    transform: Callable[[nnx.Module], nnx.Module]

    def check_compiled(self, text: str) -> None:
        """Raises where a step compiled for a GPU multiplies in another precision what is to be FP8."""
        check_compiled(text, [name_of(path) for path in self.kernels])


def build_fp8(config: ConfigDict, make, weights, rows, mesh: Mesh) -> Fp8 | None:
    """make: function of a `transform` of the base model -> module; weights, rows: see build.model.Model. None: the config does not ask for FP8."""
    m = config.model
    if not m.fp8:
        return None
    check_devices(mesh)
    recipe = Recipe(m.fp8_scaling, E4M3 if m.fp8_e4m3 else E5M2, m.fp8_amax_history_len, m.fp8_amax_compute_algo, m.fp8_margin)
    kernels = find_kernels(weights, PROJECTIONS)
    quantised = tuple(path for path in kernels if path not in rows) if m.fp8_frozen_weights else ()
    transform = functools.partial(apply_fp8, recipe=recipe, kernels=kernels, quantised=quantised)
    graphdef, scales = describe_fp8(lambda: make(transform=transform))
    log.info(describe(recipe, kernels, quantised))
    return Fp8(recipe, graphdef, kernels, quantised, scales, transform)


def describe(recipe: Recipe, kernels, quantised) -> str:
    """Which GEMMs are FP8, and how, in a line."""
    names = ", ".join(map(name_of, kernels))
    stored = {0: "weights are quantised every step", len(kernels): "weights are frozen and stored in e4m3"}
    stored = stored.get(len(quantised), f"of the weights {len(quantised)} of {len(kernels)} are frozen and stored in e4m3")
    gradients = "e4m3" if recipe.gradients == E4M3 else "e5m2"
    return (
        f"FP8: {names} of every layer of the language model, forward in e4m3, gradients in {gradients}, {recipe.scaling} scaling; {stored}; "
        "all other GEMMs are in the compute dtype"
    )


def name_of(kernel: str) -> str:
    """The projection, of a kernel's path."""
    return kernel.split("/")[-2]


def check_devices(mesh: Mesh) -> None:
    device = mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "cpu":
        log.info("FP8: XLA emulates it on a CPU: the numbers of a GPU, not its speed")
    elif capability is not None and float(capability) < LEAST_CAPABILITY:
        raise UserError(
            f"model.fp8 is True, and {device.device_kind} (compute capability {capability}) has no FP8; it takes {LEAST_CAPABILITY} or more "
            "(Ada, Hopper, Blackwell): set model.fp8 to False"
        )


def store(kernel: jax.Array | Quantised, target: Quantised) -> Quantised:
    """A kernel as its target says, on the devices that hold it."""
    if isinstance(kernel, Quantised):
        return kernel
    return jax.jit(quantise, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(kernel)


def target(kernel: jax.ShapeDtypeStruct) -> Quantised:
    """What `store` makes of a kernel [L, in, out], as ShapeDtypeStructs."""
    layers = NamedSharding(kernel.sharding.mesh, PartitionSpec(*kernel.sharding.spec[:-2]))
    values = jax.ShapeDtypeStruct(kernel.shape, jnp.dtype(E4M3), sharding=kernel.sharding)
    return Quantised(values, jax.ShapeDtypeStruct(kernel.shape[:-2], jnp.float32, sharding=layers))


# ---- the compiled step -----------------------------------------------------------------------------------------------------------------------------------


def check_compiled(text: str, names: list[str]) -> None:
    """text: a step compiled for a GPU; names: of the projections whose GEMMs, forward and backward, must be FP8."""
    found, wrong = set(), {f"{name} {way}": "not to be found" for name in names for way in ("forward", "backward")}
    for instruction in (one for computation in hlo.parse(text).computations.values() for one in computation.values()):
        name = NAMED.search(instruction.op_name)
        if name and instruction.target == FP8_GEMM:
            found.add(" ".join(name.groups()))
        elif name and (instruction.opcode == "dot" or instruction.target in hlo.GEMM_TARGETS):
            wrong[" ".join(name.groups())] = instruction.target or instruction.opcode
    if wrong := {name: kind for name, kind in wrong.items() if name not in found or kind != "not to be found"}:
        listed = ", ".join(f"{name} ({kind})" for name, kind in sorted(wrong.items()))
        raise UserError(
            f"model.fp8 is True, and XLA has compiled GEMMs of the step to something else: {listed}; remove XLA_FLAGS that set "
            f"{' or '.join(COMPILER_OPTIONS)}, make hidden_size and ffn_hidden_size a device multiples of 16, or set model.fp8 to False"
        )


class CheckedStep:
    """A jitted step that is compiled, and its program checked, before the first call with arguments of some shapes."""

    def __init__(self, step, check: Callable[[str], None]):
        self.lower, self.check, self.compiled = step.lower, check, {}

    def __call__(self, *args):
        key = tuple(map(jnp.shape, jax.tree.leaves(args)))
        if key not in self.compiled:
            self.compiled[key] = self.lower(*args).compile()
            self.check(self.compiled[key].as_text())
        return self.compiled[key](*args)
