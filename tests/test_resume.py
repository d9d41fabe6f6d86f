"""A run that was stopped and continued is the run that was not: weights, optimizer state, losses and batch order, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from runs import assert_same, logged, run, run_until_stopped, saved, steps_of, tiny

from neva_jax.build.data import Split
from neva_jax.config import to_json
from neva_jax.errors import DataError, UserError
from neva_jax.hub import is_run


@pytest.mark.parametrize(("micro_batch_size", "workers"), [(4, 2), (1, 0)], ids=["accumulation 1, 2 workers", "accumulation 4, 0 workers"])
def test_exact(tmp_path, monkeypatch, micro_batch_size, workers):
    """The uninterrupted run has no workers: they change nothing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, model__micro_batch_size=micro_batch_size)
    settings = {"model__micro_batch_size": micro_batch_size, "model__data__num_workers": workers}
    assert run_until_stopped(monkeypatch, parts, after=2, **settings) == 143
    stopped_at = steps_of(parts)[-1]
    assert 2 <= stopped_at < 6
    run(parts, **settings)
    assert steps_of(parts)[-1] == 6
    for item in ("trainable", "optimizer"):
        assert_same(saved(parts, item), saved(whole, item))
    names = ("reduced_train_loss", "grad_norm", "consumed_samples", "tokens", "supervised_tokens")
    assert logged(parts, *names) == logged(whole, *names)


def test_a_finished_run_only_reports(tmp_path):
    run(tmp_path)
    before = saved(tmp_path, "trainable")
    run(tmp_path)
    assert steps_of(tmp_path) == [6] and len(logged(tmp_path)) == 6
    assert_same(saved(tmp_path, "trainable"), before)


@pytest.mark.processes
def test_sigterm_saves_and_exits_with_143(tmp_path):
    """A process of its own, stopped from outside; the next start continues."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_json(tiny(tmp_path / "run", trainer__max_steps=100000, model__optim__sched__warmup_steps=2))))
    command = [sys.executable, "train.py", "--config", str(config)]
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.stderr.read())
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    last = steps_of(tmp_path / "run")[-1]
    assert last == logged(tmp_path / "run")[-1][0] >= 3
    run(tmp_path / "run", trainer__max_steps=last + 2)
    assert steps_of(tmp_path / "run")[-1] == last + 2
    assert [step for step, in logged(tmp_path / "run")] == list(range(1, last + 3))


def test_another_architecture_or_batch_size_is_refused(tmp_path):
    run(tmp_path, trainer__max_steps=3)
    with pytest.raises(UserError, match=r"model\.ffn_hidden_size was 32 and is 48"):
        run(tmp_path, model__ffn_hidden_size=48)
    with pytest.raises(UserError, match=r"model\.global_batch_size was 4 and is 8"):
        run(tmp_path, model__global_batch_size=8)


def test_a_run_does_not_need_the_run_it_started_from(tmp_path):
    """Projector alone on towers of another run, which then goes away; the towers stay as they were, bit for bit."""
    towers, second = tmp_path / "towers", tmp_path / "second"
    run(towers, trainer__max_steps=3)
    frozen = {path: array for path, array in saved(towers, "trainable").items() if not path.startswith("projector/")}
    settings = {"restore_from_path": str(towers), "model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True}
    start = saved(towers, "trainable")
    run(second, trainer__max_steps=3, **settings)
    shutil.rmtree(towers)
    assert_same(saved(second, "base"), frozen)
    trained = saved(second, "trainable")
    assert trained.keys() == {"projector/0/kernel", "projector/0/bias", "projector/2/kernel", "projector/2/bias"}
    assert all((trained[path] != start[path]).any() for path in trained)
    assert {path.split("/")[0] for path in saved(second, "optimizer")} == {"opt_state", "skipped"}
    assert not any("llm" in path or "vision_encoder" in path for path in saved(second, "optimizer"))
    run(second, trainer__max_steps=5, **(settings | {"restore_from_path": None}))
    assert_same(saved(second, "base"), frozen)
    third = tmp_path / "third"
    run(third, trainer__max_steps=3, restore_from_path=str(second))
    assert_same(saved(third, "base") if (third / "base").exists() else {}, {})
    assert saved(third, "trainable").keys() == start.keys()


def test_a_defective_record_ends_a_run_with_what_it_saved(tmp_path, monkeypatch):
    """The checkpoint that is being written when a record's error ends the run is whole, and the run goes on from it."""
    original = Split.batches

    def batches(self, start, stop):
        for i, batch in enumerate(original(self, start, stop)):
            if start + i == 4:
                raise DataError("data.json: record 7: image 'a.png': is empty")
            yield batch

    intervals = {"exp_manager__checkpoint_callback_params__every_n_train_steps": 2, "exp_manager__checkpoint_callback_params__dirpath": str(tmp_path / "kept")}
    with monkeypatch.context() as patched, pytest.raises(DataError, match="record 7"):
        patched.setattr(Split, "batches", batches)
        run(tmp_path / "run", **intervals)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["4"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tmp_path / "run", **intervals)
    assert [step for (step,) in logged(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_with_its_checkpoints_elsewhere_is_a_run(tmp_path):
    run(tmp_path / "one", exp_manager__checkpoint_callback_params__dirpath=str(tmp_path / "kept"), trainer__max_steps=3)
    assert is_run(tmp_path / "one") and not is_run(tmp_path)
    run(tmp_path / "two", restore_from_path=str(tmp_path / "one"), trainer__max_steps=3)
    assert (tmp_path / "two" / "metrics.jsonl").exists()


def test_data_that_changed_is_told(tmp_path, caplog):
    settings = {"trainer__max_steps": 3, "exp_manager__explicit_log_dir": str(tmp_path)}
    run(tmp_path, **settings)
    run(tmp_path, **settings | {"trainer__max_steps": 4})
    assert "has changed since the checkpoint" not in caplog.text
    run(tmp_path, **settings | {"trainer__max_steps": 5, "model__data__length_grouping": False})
    assert "has changed since the checkpoint" in caplog.text
