"""Whether a model and its batches fit the mesh that a config asks for, in a config {path: value} whose values are right by themselves. Each error names the
field and the values that would do.

Heads and layers are never split unevenly. Key/value heads may be fewer than the tensor parallel size: they are repeated.
"""

import math
from collections.abc import Iterable

from neva_jax.errors import UserError

TENSOR, PIPELINE, FSDP = (f"model.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "fsdp"))
VIRTUAL, ROUND, MICRO, GLOBAL = (
    f"model.{name}" for name in ("virtual_pipeline_model_parallel_size", "pipeline_round_size", "micro_batch_size", "global_batch_size")
)


def check_shape(get: dict) -> None:
    """What can be said before the devices are known: heads, widths, layers."""
    tensor, stages, virtual, layers = get[TENSOR], get[PIPELINE], get[VIRTUAL] or 1, get["model.num_layers"]
    heads, width = get["model.num_attention_heads"], get["model.ffn_hidden_size"]
    for path in ("model.num_attention_heads", "model.ffn_hidden_size"):
        if get[path] % tensor:
            raise UserError(f"{TENSOR} is {tensor}, which does not divide {path} {get[path]}; {listed(divisors(math.gcd(heads, width)))} would do")
    if stages == 1:
        for path in (VIRTUAL, ROUND):
            if get[path] is not None and (path, get[path]) != (VIRTUAL, 1):
                raise UserError(f"{path} is {get[path]}, and without a pipeline ({PIPELINE} 1) it means nothing; set it to null, or {PIPELINE} to 2 or more")
    if layers % (stages * virtual):
        product, fit = f"{PIPELINE} is {stages}", f"{PIPELINE} {listed(n for n in divisors(layers) if n > 1)} would do"
        if virtual > 1:
            product += f" and {VIRTUAL} {virtual}, together {stages * virtual}"
            if layers % stages == 0:
                fit = f"{VIRTUAL} {listed(divisors(layers // stages))} would do"
        raise UserError(f"{product}, which does not divide model.num_layers {layers}; {fit}")
    if get["evaluation.questions"] and virtual > 1 and get["evaluation.batch_size"] % stages:
        raise UserError(f"evaluation.batch_size is {get['evaluation.batch_size']}, expected a multiple of {PIPELINE} {stages}, since {VIRTUAL} is {virtual}")
    if get[ROUND] is not None and virtual > 1 and get[ROUND] % stages:
        near = [n for n in (get[ROUND] // stages * stages, -(-get[ROUND] // stages) * stages) if n]
        raise UserError(f"{ROUND} is {get[ROUND]}, expected a multiple of {PIPELINE} {stages}, since {VIRTUAL} is {virtual}; {listed(near)} would do")


def check_devices(get: dict, num_devices: int) -> int:
    """The data parallel size (data x fsdp) on so many devices, after checking that the mesh and the batch sizes fit it."""
    tensor, stages, fsdp, micro, batch = (get[path] for path in (TENSOR, PIPELINE, FSDP, MICRO, GLOBAL))
    shards, rest = divmod(num_devices, tensor * stages)
    if rest or shards == 0:
        fit = [f"{path} {listed(divisors(num_devices // other))}" for path, other in ((TENSOR, stages), (PIPELINE, tensor)) if num_devices % other == 0]
        product = f"{TENSOR} is {tensor}" + (f" and {PIPELINE} {stages}, together {tensor * stages}" if stages > 1 else "")
        would = f"; {', or '.join(fit)} would do" if fit else ""
        raise UserError(f"{product}, which does not divide the {num_devices} devices (trainer.devices x trainer.num_nodes){would}")
    if shards % fsdp:
        raise UserError(f"{FSDP} is {fsdp}, which does not divide the data parallel size {shards}; {listed(divisors(shards))} would do")
    if batch % (micro * shards):
        step = micro * shards
        advice = f"{GLOBAL} {listed(n for n in (batch // step * step, (batch // step + 1) * step) if n)} would do"
        advice += f", or {MICRO} {listed(divisors(batch // shards))}" if batch % shards == 0 else ""
        parts = f"tensor parallel size {tensor}" + (f" / pipeline parallel size {stages}" if stages > 1 else "")
        sizes = f"{MICRO} {micro} x data parallel size {shards} ({num_devices} devices / {parts})"
        raise UserError(f"{GLOBAL} is {batch}, which is not a multiple of {sizes}; {advice}")
    round_size(get, shards)
    return shards


def round_size(get: dict, shards: int) -> int:
    """Micro-batches that one gradient takes: model.pipeline_round_size, whose null means 4 x stages, or the most below that divides a global batch's."""
    stages, virtual, micro_batches = get[PIPELINE], get[VIRTUAL] or 1, get[GLOBAL] // (get[MICRO] * shards)
    if stages == 1:
        return 1
    has = f"{GLOBAL} {get[GLOBAL]} makes {micro_batches} micro-batches ({MICRO} {get[MICRO]}, data parallel size {shards})"
    fit = [n for n in divisors(micro_batches) if virtual == 1 or n % stages == 0]
    if not fit:
        sizes = [n for n in divisors(get[GLOBAL] // shards) if get[GLOBAL] // shards // n % stages == 0]
        advice = f"{GLOBAL} {listed([get[MICRO] * shards * stages * n for n in (1, 2, 4)])} would do" + (f", or {MICRO} {listed(sizes)}" if sizes else "")
        raise UserError(f"{has}, and with {VIRTUAL} {virtual} they must be a multiple of {PIPELINE} {stages}; {advice}")
    if get[ROUND] is None:
        return max(n for n in fit if n <= max(4 * stages, fit[0]))
    if get[ROUND] not in fit:
        raise UserError(f"{ROUND} is {get[ROUND]}, and {has}, which rounds must fill; {listed(fit)} would do")
    return get[ROUND]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    shown = list(map(str, numbers if len(numbers) <= 8 else [*numbers[:7], numbers[-1]]))
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
