"""Adapters give the same numbers on every mesh, beside frozen weights in fp32 and in float8, and lie where the sides of their base lie."""

import numpy as np
import pytest
from mesh_steps import make_step

from neva_jax.transforms.lora import is_adapter

pytestmark = pytest.mark.peft
LORA = {
    "model__peft__peft_scheme": "lora", "model__peft__lora_tuning__adapter_dim": 4, "model__peft__lora_tuning__target_modules": ("all",),
    "model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True, "model__num_layers": 4,
}  # fmt: skip
FULL = {"model__activations_checkpoint_granularity": "full", "model__activations_checkpoint_method": "uniform"}


def mesh(devices: int, **sizes) -> dict:
    return {"trainer__devices": devices} | {f"model__{name}": value for name, value in sizes.items()}


MESHES = {
    "fsdp 2, tensor 2, sequence parallel": mesh(4, fsdp_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "tensor 4, more than key/value heads; layers computed again": mesh(4, tensor_model_parallel_size=4) | FULL,
    "data 4, optimizer state over data, micro-batches of 2": mesh(4, optim__name="distributed_fused_adam", micro_batch_size=2),
    "pipeline 2, 2 virtual, fsdp 2": mesh(
        4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, fsdp_parallel_size=2, pipeline_round_size=4
    ),
}
VARIANTS = {"fused": {}, "canonical, FP8": {"model__peft__lora_tuning__variant": "canonical", "model__fp8": True}}
CASES = [("fused", name) for name in MESHES] + [("canonical, FP8", name) for name in list(MESHES)[::3]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {variant: train(tmp_path_factory.mktemp("alone"), variant) for variant in VARIANTS}


def train(directory, variant: str, **mesh):
    """-> losses, first moments, weights. In float8 one step: a last bit may become a sixteenth or, of gradients, a quarter, and grows from step to step."""
    steps = 3 if variant == "fused" else 1
    return make_step(directory, **LORA, **VARIANTS[variant], **mesh).train(steps, lr=1e-4)[:3]


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_same_numbers(tmp_path, alone, variant, name):
    (losses, moments, weights), expected = train(tmp_path, variant, **MESHES[name]), alone[variant]
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    assert sum(map(is_adapter, moments)) == (11 if variant == "fused" else 14) and len(moments) == sum(map(is_adapter, moments)) + 4
    for path, moment in expected[1].items():
        largest = np.max(np.abs(moment))
        assert largest > 1e-6, path
        np.testing.assert_allclose(moments[path], moment, rtol=0, atol=(1e-5 if variant == "fused" else 0.05) * largest, err_msg=path)
        if variant == "fused":
            np.testing.assert_allclose(weights[path], expected[2][path], rtol=0, atol=1e-5, err_msg=path)  # a tenth of the learning rate


def test_they_lie_as_their_base_lies(tmp_path):
    step = make_step(tmp_path, **LORA, **mesh(8, fsdp_parallel_size=2, tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    specs = {path.removeprefix("llm/layers/"): tuple(sharding.spec) for path, sharding in step.model.shardings.items() if is_adapter(path)}
    assert specs["self_attn/k_proj/lora_A"] == ("pipeline", "fsdp", "tensor") and specs["self_attn/q_proj/lora_B"] == ("pipeline", None, "tensor")
    assert specs["mlp/down_proj/lora_A"] == ("pipeline", "tensor", None) and specs["mlp/down_proj/lora_B"] == ("pipeline", None, "fsdp")
