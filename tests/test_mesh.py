"""Whole runs over a mesh: train.py with a pipeline, tensor and data parallelism and the optimizer state over data, against one device; a checkpoint of one
mesh continues on another. The step by itself on every kind of mesh: parallel/test_meshes.py.
"""

import numpy as np
import pytest
from runs import assert_same, logged, run, saved

SHAPE = {"model__num_layers": 4, "model__global_batch_size": 8, "trainer__log_every_n_steps": 1, "trainer__max_steps": 5}
MESH = {
    "trainer__devices": 8, "model__micro_batch_size": 1, "model__tensor_model_parallel_size": 2, "model__pipeline_model_parallel_size": 2,
    "model__virtual_pipeline_model_parallel_size": 2, "model__sequence_parallel": True, "model__optim__name": "distributed_fused_adam",
}  # fmt: skip
FSDP = {"trainer__devices": 4, "model__micro_batch_size": 2, "model__tensor_model_parallel_size": 2, "model__fsdp_parallel_size": 2}


@pytest.fixture(scope="module")
def meshed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("meshed")
    return directory, run(directory, **SHAPE, **MESH)


def test_same_numbers(tmp_path, meshed):
    directory, report = meshed
    assert report["val_loss"] == pytest.approx(run(tmp_path, **SHAPE)["val_loss"], rel=1e-5)
    expected, found = (np.array(logged(d, "reduced_train_loss", "tokens", "supervised_tokens")) for d in (tmp_path, directory))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    weights, ours = saved(tmp_path, "trainable"), saved(directory, "trainable")
    for path in weights:
        np.testing.assert_allclose(ours[path], weights[path], atol=2e-4, err_msg=path)  # a tenth of the learning rate


def test_a_checkpoint_continues_on_other_meshes(meshed):
    """A step of rate 0 on each: loaded, made, saved, bit for bit."""
    directory, _ = meshed
    before = saved(directory, "trainable")
    still = {"model__optim__lr": 0.0, "model__optim__sched__min_lr": 0.0}
    for steps, mesh in ((6, FSDP), (7, MESH), (8, {})):
        run(directory, **(SHAPE | mesh | still | {"trainer__max_steps": steps}))
        assert_same(saved(directory, "trainable"), before)
