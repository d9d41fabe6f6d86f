"""benchmarks/gpu.py on a CPU, tiny: it measures, its checks can fail, and whatever ends a section early is said and ends nothing else."""

import json
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_steps  # noqa: E402


def last(command: str, seconds: float = 30.0) -> dict:
    return list(gpu.watch([sys.executable, "-c", command], seconds))[-1]


@pytest.mark.processes
def test_a_section_is_measured(tmp_path):
    gpu.main("tiny", 9, ["pretrain bf16"], tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    one = found["sections"]["pretrain bf16"]
    assert (found["size"], one["device_kind"], one["mfu"], found["losses"]) == ("tiny", "cpu", None, {})
    assert one["rounds"] == gpu_steps.ROUNDS and one["step_seconds"]["fastest"] <= one["step_seconds"]["median"] <= one["step_seconds"]["slowest"]
    assert one["samples_per_second"] * one["step_seconds"]["median"] == pytest.approx(4, rel=1e-3)
    assert one["tokens_per_second"] == pytest.approx(64 * one["samples_per_second"], rel=1e-3)
    assert len(one["losses"]) == 30 and one["skipped_in_a_row"] == 0
    assert np.mean(one["losses"][-5:]) < 0.8 * np.mean(one["losses"][:5])


def test_what_is_wrong_does_not_pass(monkeypatch):
    """A run with other rotations stands for attention that is wrong."""
    monkeypatch.setattr(gpu_steps, "RUNS", {"fp32": {"trainer__precision": "32"}, "bf16": {}, "bf16 xla": {"model__rotary_base": 10.0}})
    found = list(gpu_steps.correctness("tiny"))[-1]
    assert {name: check["passed"] for name, check in found["checks"].items()} == {"bf16 - fp32": True, "bf16 - bf16 xla": False}
    assert found["passed"] is False
    answer = {"loss": np.ones(5), "grad_norm": np.ones(5), "logits": np.full((3, 4), np.nan)}
    assert not gpu_steps.compare(answer, answer, gpu_steps.TOLERANCES["bf16", "fp32"])["passed"]


def test_batches_are_what_training_gets():
    step = gpu_steps.describe("tiny", "finetune", jax.devices()[:1])
    for ragged in (False, True):
        found = {name: np.asarray(field) for name, field in gpu_steps.batch(step, 0, ragged=ragged).items()}
        assert {name: (field.shape, field.dtype) for name, field in found.items()} == {name: (one.shape, one.dtype) for name, one in step.batch.items()}
        assert (found["segment_ids"].min() == 0) == ragged
        for row in np.ndindex(found["tokens"].shape[:2]):
            learnt = np.flatnonzero(found["labels"][row] >= 0)
            assert learnt[0] == 16 and (found["labels"][row][learnt] == found["tokens"][row][learnt + 1]).all()  # the first token behind the picture
            assert (found["supervised_positions"][row][: len(learnt)] == learnt).all() and found["loss_mask"][row].sum() == len(learnt)
            assert (found["media_index"][row][1:17] == np.arange(16)).all() and (found["media_index"][row] >= 0).sum() == 16


def test_a_section_that_dies_keeps_what_it_had():
    found = last('print("{\\"rounds\\": 2}", flush=True); print("noise"); import os, sys; print("why", file=sys.stderr, flush=True); os.abort()')
    assert found["rounds"] == 2 and found["error"] == "ended with code -6: why\n"
    found = last('print("{\\"rounds\\": 2}", flush=True); import time; time.sleep(60)', seconds=1.0)
    assert found["rounds"] == 2 and found["error"] == "stopped after 1 s: the time was up" and found["seconds"] < 20
    assert last('print("{\\"rounds\\": 2}")').keys() == {"rounds", "seconds"}


def test_errors_and_want_of_time_are_said(tmp_path):
    found = gpu.main("7b", 9, ["pretrain fp8"], tmp_path / "gpu.json")["sections"]
    assert found["pretrain fp8"]["error"].startswith("UserError: JAX sees a CPU here")
    gpu.main("tiny", 0.5, list(gpu.SECTIONS), tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert found == {name: {"skipped": f"30 s of 30 were left, and it takes {seconds}"} for name, seconds in gpu.SECTIONS.items()}


def test_losses_side_by_side():
    bf16 = {"losses": [2.0] * 6, "num_layers": 32}
    found = gpu.losses({"pretrain bf16": bf16, "pretrain fp8": bf16 | {"losses": [2.0, 2.2, 2.0, 2.0, 2.0, 1.9]}, "finetune bf16": bf16})
    assert found == {"pretrain": {"steps": 6, "largest_difference": 0.1, "last_round": 0.01}}
    assert gpu.losses({"finetune bf16": bf16, "finetune fp8": bf16 | {"num_layers": 16}}) == {}


def test_plans_are_of_these_steps():
    """What is committed was planned for what is measured, and fits."""
    for name, card in gpu.planned_before().items():
        assert card.keys() == gpu.SECTIONS.keys() - {"correctness"}
        for section, one in card.items():
            shape, precision = gpu_steps.SIZES["7b"][3][section.split()[0]], section.split()[1]
            assert (one["device_kind"], one["fits"], one["fp8"]) == (gpu.planned(name).kind, True, precision == "fp8")
            assert (one["micro_batch_size"], one["global_batch_size"], one["batch_shape"]) == (*shape[1:], shape.bucket._asdict())
            about = {key: value for key, value in one.items() if key not in gpu.NUMBERS}
            measured = gpu.with_plan(about | {"step_seconds": {"median": 2 * one["step_time_s"]}})
            assert measured["measured_to_planned"] == 2.0 and measured["planned"]["memory_gib"] == one["memory_gib"]
            assert "planned" not in gpu.with_plan(about | {"num_layers": 2})
    assert {"h200", "h100-80g"} <= gpu.planned_before().keys()
