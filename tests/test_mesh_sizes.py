"""Sizes that do not fit one another are refused by the field's name and the values that would do; rounds of a pipeline fill a global batch."""

import pytest

from neva_jax.errors import UserError
from neva_jax.mesh_sizes import check_devices, check_shape, round_size

FITS = {
    "model.tensor_model_parallel_size": 1, "model.pipeline_model_parallel_size": 1, "model.fsdp_parallel_size": 1, "model.pipeline_round_size": None,
    "model.virtual_pipeline_model_parallel_size": None, "model.micro_batch_size": 2, "model.global_batch_size": 64, "model.num_layers": 32,
    "model.num_attention_heads": 32, "model.ffn_hidden_size": 11008, "evaluation.questions": None, "evaluation.batch_size": 64,
}  # fmt: skip


def config(*, tensor=1, pipeline=1, fsdp=1, virtual=None, rounds=None, micro=2, batch=64, **others) -> dict:
    sizes = {"tensor_model": tensor, "pipeline_model": pipeline, "fsdp": fsdp, "virtual_pipeline_model": virtual}
    sizes = {f"model.{name}_parallel_size": value for name, value in sizes.items()}
    sizes |= {"model.pipeline_round_size": rounds, "model.micro_batch_size": micro, "model.global_batch_size": batch}
    return FITS | sizes | {name.replace("__", "."): value for name, value in others.items()}


@pytest.mark.parametrize(("sizes", "message"), [
    ({"tensor": 3}, "model.tensor_model_parallel_size is 3, which does not divide model.num_attention_heads 32; 1, 2, 4, 8, 16 or 32 would do"),
    ({"tensor": 3, "model__num_attention_heads": 6, "model__ffn_hidden_size": 64},
     "model.tensor_model_parallel_size is 3, which does not divide model.ffn_hidden_size 64; 1 or 2 would do"),
    ({"pipeline": 2, "model__num_layers": 31}, "model.pipeline_model_parallel_size is 2, which does not divide model.num_layers 31; "
     "model.pipeline_model_parallel_size 31 would do"),
    ({"pipeline": 4, "virtual": 3}, "model.pipeline_model_parallel_size is 4 and model.virtual_pipeline_model_parallel_size 3, together 12, which does not "
     "divide model.num_layers 32; model.virtual_pipeline_model_parallel_size 1, 2, 4 or 8 would do"),
    ({"virtual": 2}, "model.virtual_pipeline_model_parallel_size is 2, and without a pipeline .* set it to null"),
    ({"rounds": 8}, "model.pipeline_round_size is 8, and without a pipeline .* set it to null"),
    ({"pipeline": 4, "virtual": 2, "rounds": 6}, "model.pipeline_round_size is 6, expected a multiple of model.pipeline_model_.* 4, .* 4 or 8 would do"),
    ({"pipeline": 2, "virtual": 2, "evaluation__questions": "q.json", "evaluation__batch_size": 9}, "evaluation.batch_size is 9, expected a multiple of .* 2"),
])  # fmt: skip
def test_refused_before_the_devices_are_known(sizes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_shape(config(**sizes))


@pytest.mark.parametrize(("devices", "sizes", "message"), [
    (6, {"tensor": 4}, "model.tensor_model_parallel_size is 4, which does not divide the 6 devices .*; model.tensor_model_parallel_size 1, 2, 3 or 6 would do"),
    (8, {"tensor": 2, "pipeline": 3}, "model.tensor_model_parallel_size is 2 and model.pipeline_model_parallel_size 3, together 6, which does not divide the 8 "
     "devices .*; model.pipeline_model_parallel_size 1, 2 or 4 would do"),
    (8, {"fsdp": 3}, "model.fsdp_parallel_size is 3, which does not divide the data parallel size 8; 1, 2, 4 or 8 would do"),
    (8, {"pipeline": 2, "batch": 20}, r"model.global_batch_size is 20, which is not a multiple of model.micro_batch_size 2 x data parallel size 4 \(8 "
     "devices / tensor parallel size 1 / pipeline parallel size 2\\); model.global_batch_size 16 or 24 would do, or model.micro_batch_size 1 or 5"),
    (2, {"pipeline": 2, "virtual": 2, "batch": 6}, "model.global_batch_size 6 makes 3 micro-batches .* multiple of model.pipeline_model_parallel_size 2; "
     "model.global_batch_size 4, 8 or 16 would do, or model.micro_batch_size 1 or 3"),
    (2, {"pipeline": 2, "rounds": 5}, "model.pipeline_round_size is 5, and .* 32 micro-batches .*; 1, 2, 4, 8, 16 or 32 would do"),
])  # fmt: skip
def test_refused_on_so_many_devices(devices, sizes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_devices(config(**sizes), devices)


@pytest.mark.parametrize(("sizes", "expected"), [
    ({}, 1), ({"pipeline": 2}, 8), ({"pipeline": 4}, 16), ({"pipeline": 2, "batch": 28}, 7), ({"pipeline": 2, "batch": 12, "virtual": 2}, 6),
    ({"pipeline": 4, "virtual": 2, "rounds": 32}, 32), ({"pipeline": 4, "batch": 6}, 3),
])  # fmt: skip
def test_rounds_fill_a_global_batch(sizes, expected):
    """Four times as many micro-batches as stages, or the most below that divides."""
    check_shape(config(**sizes))
    assert round_size(config(**sizes), 1) == expected


def test_what_fits_passes():
    check_shape(config(tensor=4, pipeline=4, virtual=8))
    assert check_devices(config(tensor=2, pipeline=2, fsdp=2), 8) == 2
    check_shape(config(virtual=1))
