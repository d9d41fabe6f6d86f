"""Chunks in order from any number of processes, errors that arrive, and control-C without an orphan."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from neva_jax.data import sweep as sweep_module
from neva_jax.data.sweep import sweep
from neva_jax.errors import DataError


def total(numbers):
    """The second record is slow, so that its chunk is done after the others."""
    return lambda chunk: (time.sleep(0.2 * (1 in chunk)), sum(numbers[i] for i in chunk), os.getpid())[1:]


def refusing(numbers):
    def work(chunk):
        if 5 in chunk:
            raise DataError("record 5")
        return len(chunk)

    return work


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sweep_module, "CHUNK", 3)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "data"))  # the functions above live there


@pytest.mark.parametrize("num_workers", [0, 1, 2, 50])
def test_every_record_once_in_order(num_workers):
    answers = list(sweep(total, list(range(10)), num_workers, "test"))
    assert [answer for answer, _ in answers] == [3, 12, 21, 9]
    assert (os.getpid() in {process for _, process in answers}) == (num_workers < 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_arrives(num_workers):
    before = signal.getsignal(signal.SIGINT)
    answers = sweep(refusing, range(10), num_workers, "test")
    assert next(answers) == 3
    with pytest.raises(DataError, match="record 5"):
        list(answers)
    assert signal.getsignal(signal.SIGINT) is before


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background deaf to control-C
sys.path.insert(0, {folder!r})
import neva_jax.data.sweep as module
from slow_work import make
module.CHUNK = 1
try:
    for answer in module.sweep(make, range(100), 2, "test"):
        print(*answer, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


WORK = """
import os, signal, time
def make(_):
    return lambda chunk: (time.sleep(0.1), os.getpid(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN)[1:]
"""


def test_control_c_ends_all_processes(tmp_path):
    (tmp_path / "slow_work.py").write_text(WORK)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", PROGRAM.format(folder=str(ROOT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        workers = {tuple(process.stdout.readline().split()) for _ in range(6)}
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors, len(workers)) == (130, "", 2)
    for worker, is_deaf in workers:
        assert is_deaf == "True"
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)
