"""The same losses and weights on one device and on meshes of 2 and 4, over data, fsdp and tensor; a checkpoint of one mesh continues on another."""

import numpy as np
import pytest
from runs import assert_same, logged, run, saved

MESHES = {
    "data 2 x tensor 2, sequence parallel": {
        "trainer__devices": 4, "model__micro_batch_size": 2, "model__tensor_model_parallel_size": 2, "model__sequence_parallel": True,
    },
    "fsdp 2 x tensor 2": {"trainer__devices": 4, "model__micro_batch_size": 2, "model__tensor_model_parallel_size": 2, "model__fsdp_parallel_size": 2},
    "data 2, optimizer state over data": {"trainer__devices": 2, "model__micro_batch_size": 2, "model__optim__name": "distributed_fused_adam"},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run(directory, trainer__max_steps=5)
    return directory


@pytest.mark.parametrize("name", MESHES)
def test_same_numbers(tmp_path, alone, name):
    run(tmp_path, trainer__max_steps=5, **MESHES[name])
    expected, found = (np.array([loss for _, loss in logged(d, "reduced_train_loss")]) for d in (alone, tmp_path))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    weights, ours = saved(alone, "trainable"), saved(tmp_path, "trainable")
    for path in weights:
        np.testing.assert_allclose(ours[path], weights[path], atol=2e-4, err_msg=path)  # a tenth of the learning rate


def test_a_checkpoint_continues_on_another_mesh(tmp_path):
    run(tmp_path, trainer__max_steps=3, **MESHES["fsdp 2 x tensor 2"])
    before = saved(tmp_path, "trainable")
    run(tmp_path, trainer__max_steps=4, model__optim__lr=0.0, model__optim__sched__min_lr=0.0)
    assert_same(saved(tmp_path, "trainable"), before)  # loaded, a step of rate 0 made, saved: bit for bit
