"""The planner where nothing can be compiled for a GPU: what it estimates against numbers by hand, what it prints, what it refuses. For compiled plans see
gpu_graph/."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from neva_jax import cli, plan
from neva_jax.build.data import build_examples, build_tokenizer
from neva_jax.build.model import neva_config
from neva_jax.build.outlook import families, meshes, together
from neva_jax.data.lengths import read_lengths
from neva_jax.errors import UserError
from neva_jax.evaluation.plan_report import print_plan, print_sweep
from neva_jax.parallel.deviceless import NoCudaWheels
from neva_jax.parallel.devices import PLANNED

KEYS = {
    "fits", "memory_gib", "flops_per_sample", "gemms_per_layer", "collectives", "has_logits_tensor", "step_time_s", "samples_per_second_per_gpu", "compiled",
}  # fmt: skip
KINDS = {"total", "frozen", "trainable", "optimizer", "gradients", "activations_and_temporary", "device"}
LAYERS_7B, HEAD_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), 32128 * 4096  # 32,008 pieces, filled up to a multiple of 128
LLM_7B, PROJECTOR = LAYERS_7B + 2 * HEAD_7B + 4096, 1024 * 4096 + 4096
GIB = 2**30


@pytest.fixture(autouse=True)
def without_wheels(monkeypatch):
    def missing(*args):
        raise NoCudaWheels("jax cannot compile for GPUs here")

    assert len(jax.devices()) >= 8  # opened before a plan would open fewer
    monkeypatch.setattr(plan, "absent_devices", missing)
    monkeypatch.setattr(plan, "stay_on_cpu", lambda: None)


def run(capsys, *arguments: str, code: int = 0) -> str:
    """The command line -> standard output, or where it fails, standard error."""
    with pytest.raises(SystemExit) as end:
        cli.run(plan.main, plan.define_flags, plan.with_devices(["plan", *arguments]))
    out = capsys.readouterr()
    assert end.value.code == code, out.err
    return out.err if code else out.out


def planned(capsys, *arguments: str) -> dict:
    return json.loads(run(capsys, *arguments, "--json"))


def test_keys_and_kinds(capsys):
    found = planned(capsys, "--config=configs/pretrain.py", "--device=h100-80g", "--config.model.data.buckets=(336,)")
    assert found.keys() >= KEYS and found["memory_gib"].keys() == KINDS and found["gemms_per_layer"].keys() == {"fp8", "bf16", "fp32"}
    assert found["compiled"] is False and found["fits"] is True and found["has_logits_tensor"] is False
    memory = found["memory_gib"]
    assert memory["total"] == pytest.approx(sum(memory[kind] for kind in KINDS - {"total", "device"}), abs=0.03)
    assert memory["device"] == pytest.approx(PLANNED["h100-80g"].memory / GIB, abs=0.1)
    assert found["gemms_per_layer"] == {"fp8": 0, "bf16": 14, "fp32": 0}
    assert any("32,008 is assumed" in note for note in found["notes"]) and any("T 336" in note for note in found["notes"])


@pytest.mark.parametrize(("fsdp", "sharded_optimizer"), [(1, False), (8, False), (1, True)])
def test_weights_by_hand(capsys, fsdp, sharded_optimizer):
    """Finetuning 7B on 8 GPUs: 4 bytes a master, 8 of moments, 4 of gradients; each split as asked."""
    name = "distributed_fused_adam" if sharded_optimizer else "fused_adam"
    command = ["--config=configs/finetune.py", "--device=b200", "--num_devices=8", "--config.model.data.buckets=(64,)"]
    found = planned(capsys, *command, f"--config.model.fsdp_parallel_size={fsdp}", f"--config.model.optim.name={name}")
    memory, trained = found["memory_gib"], LLM_7B + PROJECTOR
    assert memory["trainable"] == pytest.approx(4 * trained / fsdp / GIB, rel=0.002)
    assert memory["gradients"] == pytest.approx(4 * trained / (8 if sharded_optimizer else fsdp) / GIB, rel=0.002)
    assert memory["optimizer"] == pytest.approx(8 * trained / (8 if sharded_optimizer else fsdp) / GIB, rel=0.002)
    assert found["mesh"] == {"pipeline": 1, "data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}
    assert found["gemms_per_layer"]["bf16"] == 21


def test_flops_by_hand(capsys):
    """Pretraining: 4 FLOPs a weight and token in the layers and the head, causal attention, and a tower of 23 of 24 blocks that runs forward only."""
    found = planned(capsys, "--config=configs/pretrain.py", "--device=h100-80g", "--config.model.data.buckets=(320,)")
    tokens, blocks = 320, 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    tower = 2 * 257 * 23 * 12 * 1024**2 + 4 * 257**2 * 1024 * 23 + 2 * 257 * 1024 * 588
    by_hand = 4 * tokens * (blocks + HEAD_7B) + 3 * 2 * tokens**2 * 4096 * 32 + tower + 2 * 2 * 256 * 1024 * 4096
    assert found["flops_per_sample"] == pytest.approx(by_hand, rel=1e-6)
    assert found["flops_per_step"] == pytest.approx(128 * by_hand, rel=1e-6)
    assert found["ideal_step_time_s"] == pytest.approx(128 * by_hand / 989e12, rel=1e-6)
    assert found["samples_per_second_per_gpu"] == pytest.approx(128 / found["step_time_s"])


def test_recomputation_is_seen(capsys):
    """As JAX says what is kept: with whole layers computed again, a layer's input of each (and little else), and seven more GEMMs."""
    command = ["--config=configs/finetune.py", "--device=h100-80g", "--num_devices=8", "--config.model.fsdp_parallel_size=8"]
    command += ["--config.model.data.buckets=(2048,)"]
    plain = planned(capsys, *command)
    full = planned(capsys, *command, "--config.model.activations_checkpoint_granularity=full", "--config.model.activations_checkpoint_method=uniform")
    inputs = 32 * 4 * 2048 * 4096 * 2 / GIB  # L x rows x T x D in bf16
    assert inputs < full["memory_gib"]["activations_and_temporary"] < plain["memory_gib"]["activations_and_temporary"] - 3 * inputs
    assert full["gemms_per_layer"]["bf16"] == 28 and full["step_time_s"] > 1.2 * plain["step_time_s"]


def test_what_does_not_fit_comes_with_what_does(capsys):
    command = ["--config=configs/finetune.py", "--device=h100-80g", "--num_devices=8", "--config.model.data.buckets=(2048,)"]
    found = planned(capsys, *command)
    assert not found["fits"] and found["suggestions"]
    for trial in found["suggestions"]:
        again = planned(capsys, *command, *(f"--config.{path}={value}" for path, value in trial["changes"].items()))
        assert again["fits"] and again["memory_gib"] == trial["memory_gib"]
    print_plan(found)
    text = capsys.readouterr().out
    assert "formula       (max(GEMMs " in text and "DOES NOT FIT" in text and "ESTIMATED" in text and "--config.model.fsdp_parallel_size=" in text


def test_more_gpus_than_a_machine_has():
    assert plan.with_devices(["plan", "--num_devices", "16"])[-2:] == ["--config.trainer.devices=8", "--config.trainer.num_nodes=2"]
    assert plan.with_devices(["plan", "--num_devices=6"])[-2:] == ["--config.trainer.devices=6", "--config.trainer.num_nodes=1"]
    assert plan.with_devices(["plan"]) == ["plan"]


def test_lengths_of_the_data(capsys, tmp_path):
    """With an index of lengths: the padding, the largest shape, and means over an epoch's batches; without one, a note that says how to make it."""
    config = quickstart.get_config()
    config.model.data.cache_dir = str(tmp_path)
    command = ["--config=configs/quickstart.py", "--device=rtx4090", f"--config.model.data.cache_dir={tmp_path}", "--config.model.data.buckets=(64,112)"]
    assert any("inspect_data --lengths" in note for note in planned(capsys, *command)["notes"])
    tokenizer = build_tokenizer(config)
    lengths = read_lengths(build_examples(config, tokenizer, neva_config(config, tokenizer.vocab_size), config.model.data.data_path), tmp_path)
    found = planned(capsys, *command)
    assert found["num_records"] == len(lengths.tokens) and found["batch_shape"]["tokens"] == 112
    used = np.where(lengths.tokens <= 64, 64, 112)
    assert found["padding_share"] == pytest.approx(1 - lengths.tokens.sum() / used.sum(), abs=0.02)
    assert found["days_for_dataset"] == pytest.approx(found["step_time_s"] * len(lengths.tokens) / 32 / 86400)
    largest = planned(capsys, "--config=configs/quickstart.py", "--device=rtx4090", f"--config.model.data.cache_dir={tmp_path / 'none'}")
    assert found["flops_per_sample"] < largest["flops_per_sample"]


def test_weights_elsewhere(capsys):
    found = planned(
        capsys, "--config=configs/pretrain.py", "--device=h200", "--config.model.mm_cfg.llm.from_pretrained=/not/here", "--config.model.data.buckets=(336,)"
    )
    assert any("/not/here is not here" in note for note in found["notes"])


def test_sweep(capsys, tmp_path):
    picture = tmp_path / "sweep.png"
    command = ["--config=configs/pretrain.py", "--device=h100-80g", "--num_devices=2", "--sweep", f"--output={picture}"]
    command += ["--config.model.data.buckets=(2048,)", "--config.model.global_batch_size=16", "--config.model.micro_batch_size=2"]
    told = planned(capsys, *command)
    rows = told["sweep"]
    found = {(row["mesh"]["fsdp"], row["mesh"]["tensor"]) for row in rows}
    assert found == {(1, 1), (2, 1), (1, 2)}
    for mesh in found:
        mine = [row for row in rows if (row["mesh"]["fsdp"], row["mesh"]["tensor"]) == mesh]
        assert [row["fits"] for row in mine[:-1]] == [True] * (len(mine) - 1), "only the last, largest micro-batch of a mesh may not fit"
        assert [row["memory_gib"]["total"] for row in mine] == sorted(row["memory_gib"]["total"] for row in mine)
    with Image.open(picture) as image:
        assert image.width > 900 and len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 6
    print_sweep(told)
    assert "fastest that fits" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["--device=h100"], ["'h100'", "h100-80g", "b200"]),
    (["--device=a100-80g", "--config.model.fp8=True"], ["model.fp8", "a100-80g", "h200"]),
    (["--device=h100-80g", "--num_devices=6"], ["global_batch_size", "would do"]),
    (["--device=h100-80g", "--config.model.fsdp_parallel_size=3", "--num_devices=4"], ["fsdp_parallel_size", "would do"]),
    (["--device=h100-80g", "--sweep", "--output=/not/here/x.png", "--config.model.global_batch_size=1", "--config.model.micro_batch_size=1",
      "--config.model.data.buckets=(64,)"], ["--output", "cannot be written"]),
    ([], ["--device"]),
])  # fmt: skip
def test_bad_input(capsys, arguments, words):
    error = run(capsys, "--config=configs/pretrain.py", *arguments, code=2)
    assert all(word in error for word in words) and "Traceback" not in error


def test_changes_are_ordered_and_real():
    config = cli.load("configs/finetune.py")
    config.trainer.devices = 8
    kinds = families(config, PLANNED["h100-80g"], 8)
    fsdp = next(kind for kind in kinds if "model.fsdp_parallel_size" in kind[0])
    assert [change["model.fsdp_parallel_size"] for change in fsdp] == [2, 4, 8]
    assert [change["model.micro_batch_size"] for kind in kinds for change in kind if "model.micro_batch_size" in change] == [2, 1]
    assert {"model.fp8": True} in [kind[0] for kind in kinds] and {"model.fp8": True} not in [kind[0] for kind in families(config, PLANNED["a100-80g"], 8)]
    most = list(together(kinds))[-1]
    assert most["model.micro_batch_size"] == 1 and most["model.fsdp_parallel_size"] == 8 and "model.fp8" not in most


def test_meshes_multiply_to_the_devices():
    config = cli.load("configs/finetune.py")
    for found in (meshes(config, 8), meshes(config, 16)):
        assert all(1 <= mesh["model.tensor_model_parallel_size"] <= 8 for mesh in found)
        assert len({tuple(mesh.values()) for mesh in found}) == len(found)


def test_without_room_for_the_mesh():
    from neva_jax.parallel import deviceless

    with pytest.raises(UserError, match="a process of its own"):
        deviceless.cpu_devices(len(jax.devices()) * 2)
    assert len(deviceless.cpu_devices(2)) == 2


def test_target_describes_the_card():
    from neva_jax.parallel.deviceless import target_config

    for name, device in PLANNED.items():
        text = target_config(device)
        assert "runtime_version" in text, "without it XLA drops FP8 in silence"
        assert f"device_memory_size: {device.memory}" in text and f"core_count: {device.cores}" in text
        assert (device.fp8 is None) == (device.capability < (8, 9)), name
        assert device.usable < device.memory and math.isclose((device.fp8 or 2 * device.bf16) / device.bf16, 2, rel_tol=0.03)
