"""Several real processes on this machine, which meet over loopback and compute together with gloo: the numbers of one process, files written once, and one end
for all. Slow, since each process imports JAX and compiles: a run of four takes some 15 s on two cores, the others two to five.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from runs import assert_same, logged, run, saved, steps_of

pytestmark = pytest.mark.processes
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=1"
BOUND = 60  # seconds that an end may take


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(count: int, timeout: int = 240, environ: dict | None = None, **arguments) -> list[tuple[int, str, str]]:
    """Runs tests/process.py in `count` processes -> [(exit code, standard output, standard error)]. Those that outlive the time are an error."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COORDINATOR")}
    ours |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": FLAGS, **(environ or {})}
    command = [sys.executable, str(ROOT / "tests" / "process.py"), json.dumps(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env={**ours, "JAX_PROCESS_ID": str(i)}, **pipes) for i in range(count)]
    deadline = time.monotonic() + timeout
    try:
        words = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, words, strict=True)]


def succeeded(ended: list) -> None:
    assert [code for code, _, _ in ended] == [0] * len(ended), ended[0][2] + ended[-1][2]


def causes(ended: list) -> list[str]:
    """The last line of each process' standard error that says why it ended."""
    return [([line for line in errors.splitlines() if line.startswith("error: ")] or [""])[-1] for _, _, errors in ended]


# ---- the same numbers --------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run on 60 records of one picture each, so that one shape is compiled."""
    directory = tmp_path_factory.mktemp("few")
    records = [record for record in json.loads((ROOT / "examples/digits/train.json").read_text()) if isinstance(record.get("image"), str)]
    for name, some in (("train", records[:48]), ("validation", records[48:60]), ("questions", records[60:64])):
        (directory / f"{name}.json").write_text(json.dumps(some))
    return {
        "trainer__max_steps": 5, "model__data__data_path": str(directory / "train.json"), "model__data__validation": str(directory / "validation.json"),
        "evaluation__questions": str(directory / "questions.json"), "evaluation__batch_size": 4,
    }  # fmt: skip


TWO = {"trainer__devices": 2, "model__micro_batch_size": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few):
    directory = tmp_path_factory.mktemp("alone")
    run(directory, **few)
    return directory


def losses(directory) -> np.ndarray:
    return np.array([loss for _, loss in logged(directory, "reduced_train_loss")])


def test_four_processes(tmp_path, alone, few):
    """Two nodes of two, fsdp 2 x tensor 2: the numbers of one process, and each file once."""
    four = {"trainer__num_nodes": 2, "model__fsdp_parallel_size": 2, "model__tensor_model_parallel_size": 2, "exp_manager__create_tensorboard_logger": True}
    ended = start(4, do="train", directory=str(tmp_path), changes=few | TWO | four)
    succeeded(ended)
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-6)
    last, expected = (json.loads((d / "metrics.jsonl").read_text().splitlines()[-1]) for d in (tmp_path, alone))
    assert last["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert last["samples/s/GPU"] == pytest.approx(4 / last["train_step_timing in s"] / 4, rel=1e-6)  # not what one process has of the batch
    assert (tmp_path / "evaluation.json").read_text() == (alone / "evaluation.json").read_text()

    def names(directory):
        return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not {"checkpoints", "tensorboard"} & set(path.parts))

    assert names(tmp_path) == names(alone)
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
    first, *others = (errors.splitlines() for _, _, errors in ended)
    assert "process 0 of " in first[0] and any("reduced_train_loss" in line for line in first)
    assert all(f"process {i} of " in lines[0] and len(lines) == 1 for i, lines in enumerate(others, 1)), others


def test_two_are_stopped_and_one_goes_on(tmp_path, alone, few):
    """SIGTERM to one of them stops both at one step; what they saved is what one process loads."""
    ended = start(2, do="train", directory=str(tmp_path), changes=few | TWO | {"trainer__max_steps": 1000}, fault=[1, 2, "asked to stop"])
    assert [code for code, _, _ in ended] == [143, 143], ended
    [step] = steps_of(tmp_path)
    assert 3 <= step <= 5 and logged(tmp_path)[-1] == (step,) and "stopped by signal 15" in ended[0][2]
    np.testing.assert_allclose(losses(tmp_path)[:2], losses(alone)[:2], rtol=1e-6)
    before = saved(tmp_path, "trainable")
    still = {"trainer__max_steps": step + 1, "model__optim__lr": 0.0, "model__optim__sched__min_lr": 0.0}
    run(tmp_path, **few | still | {"evaluation__questions": None, "model__data__validation": None})  # loaded, a step of rate 0 made, saved
    assert steps_of(tmp_path)[-1] == step + 1
    assert_same(saved(tmp_path, "trainable"), before)


# ---- one end for all ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "words"), [
    ("bad record", "data.json: record 7: its picture is broken"), ("other records", "the training records of this process differ from those of process 0"),
])  # fmt: skip
def test_what_is_wrong_in_one_process_ends_all(tmp_path, few, how, words):
    """In a training run, while the other process goes on to compile the step."""
    ended = start(2, do="train", directory=str(tmp_path), changes=few | TWO, fault=[1, 0, how])
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert all(line.startswith(f"error: process 1 on {socket.gethostname()}: {words}") for line in causes(ended)), ended
    assert not any("Traceback" in errors for _, _, errors in ended), ended


FAULTS = {  # how: (process, at, exit codes, what every survivor says)
    "bad record": (1, 3, {2}, "process 1 on HOST: data.json: record 7: its picture is broken"),
    "bad record at the very end": (1, 10, {2}, "process 1 on HOST: data.json: record 7: its picture is broken"),
    "defect": (0, 3, {1}, "process 0 on HOST: ValueError: a defect of ours"),
    "asked twice": (1, 3, {143}, "process 1 on HOST: SystemExit: 143"),
    "killed": (1, 3, {1, -9}, "process 1 on HOST: died without a word"),
    "exits, of three": (2, 3, {1, 5}, "process 2 on HOST: died without a word"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_that_fails_ends_all(tmp_path, name):
    process, at, codes, words = FAULTS[name]
    how = re.split(" of | at |,", name)[0]
    began = time.monotonic()
    patience = {"patience": 1} if how == "killed" else {}  # nobody else is there to answer
    ended = start(3 if "three" in name else 2, BOUND, do="sum", directory=str(tmp_path), fault=[process, at, how], **patience)
    assert {code for code, _, _ in ended} == codes, ended
    said = causes(ended)
    survivors = [line for i, line in enumerate(said) if how not in ("killed", "exits") or i != process]
    assert all(words.replace("HOST", socket.gethostname()) in line for line in survivors), said
    assert time.monotonic() - began < BOUND


def test_without_process_0_the_others_end(tmp_path):
    """It is the one that all others talk to; JAX ends them then, in its own words."""
    ended = start(2, BOUND, do="sum", directory=str(tmp_path), fault=[0, 3, "killed"])
    assert ended[0][0] == -9 and ended[1][0] not in (0, None)
    assert "coordination service" in ended[1][2]


def test_one_that_never_comes(tmp_path):
    ended = start(2, BOUND, do="sum", directory=str(tmp_path), fault=[1, 0, "absent"], meeting=1)
    assert (ended[0][0], ended[1][0]) == (2, 0)
    assert "not all processes came within 1 s" in causes(ended)[0], ended


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(1, BOUND, do="sum", directory=str(tmp_path), environ={"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_PORT": str(port)})
    assert ended[0][0] == 2 and f"port {port} of {socket.gethostname()}: Address already in use" in causes(ended)[0], ended


def test_what_must_be_one_is_compared(tmp_path):
    for process in "01":
        (tmp_path / process).mkdir()
    ended = start(2, BOUND, do="compare", directory=str(tmp_path), fault=[1, 0, "another config"], patience=1)
    assert [code for code, _, _ in ended] == [2, 2], ended
    for _, said, _ in ended:
        assert "asks for 16 devices, and the 2 processes see 2 devices (1 each)" in said and "trainer.num_nodes is 3, and 2 processes run" in said, ended
    assert "the config of this process differ" in ended[1][1] and "the config" not in ended[0][1], ended
    assert all(f"process 1 on {socket.gethostname()}: {tmp_path}/1 is not the same place" in line for line in causes(ended)), ended


def test_torchrun(tmp_path):
    """A real launcher, whose own store listens on MASTER_PORT while its workers run."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", str(ROOT / "tests" / "process.py")]
    environ = {**os.environ, "XLA_FLAGS": FLAGS, "OMP_NUM_THREADS": "1"}
    arguments = json.dumps({"do": "sum", "directory": str(tmp_path)})
    ended = subprocess.run([*command, arguments], env=environ, capture_output=True, text=True, timeout=BOUND)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"sum": 2.0') == 2, ended.stdout
