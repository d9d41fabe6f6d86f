"""Several processes as one run: they meet (jax.distributed), agree on what must be one, and end together, whatever ends one of them.

A process that fails leaves its cause with process 0's key-value store, which every process asks once a second; all then print it and exit with its code. One
that dies without a word is missed by JAX's heartbeats, or named here by those who notice first. Given up: going on with fewer processes.
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax._src.distributed import global_state  # the store has no public door; jax.experimental.multihost_utils opens it so too

from neva_jax.errors import UserError
from neva_jax.parallel.launchers import ClusterSpec, detect

log = logging.getLogger(__name__)

# Seconds.
MEETING = 300  # outlasts the start of the slowest node
HEARTBEAT = 50  # a process that gives no sign for so long is dead
PATIENCE = 10  # for the others to answer a roll call, or to read a cause
FOREVER = 10**9  # ms: waits end by an answer or by the end of the run
KEYS = "neva_jax"  # of the store: end/cause, end/roll_call, here/ID, read/ID, host/ID, agreed/NAME


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The run inside is one of the processes that a launcher started; without a launcher, or with one process, nothing happens.

    An exception ends all processes with its code (a UserError 2, SystemExit its own, others 1), so nothing behind this block runs then.
    """
    spec = detect(os.environ)
    if spec is None or spec.num_processes == 1:
        yield
        return
    start(spec)
    watch = _Watch(spec)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    _store().wait_at_barrier(f"{KEYS} done", FOREVER)  # one that fails so late still ends all
    watch.close()
    jax.distributed.shutdown()


def start(spec: ClusterSpec) -> None:
    """Meets the other processes, before any device is touched. Where they do not come in time, the process ends (exit code 2): JAX would abort it."""
    what = f"process {spec.process_id} of {spec.num_processes} ({spec.launcher}) on {socket.gethostname()}, coordinator {spec.coordinator}"
    devices = "all devices of its node" if spec.local_device_ids is None else f"devices {', '.join(map(str, spec.local_device_ids))} of its node"
    log.info(f"{what}, with {devices}")
    if spec.process_id == 0:
        _check_port(spec.coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from training/stop.py
    advice = "look for the first error in the logs of the others; see that all run, each with a number of its own, and that they reach the coordinator's port"
    timer = threading.Timer(MEETING, _give_up, [f"{what}: not all processes came within {MEETING} s; {advice}"])
    timer.start()
    try:
        jax.distributed.initialize(
            spec.coordinator, spec.num_processes, spec.process_id, local_device_ids=spec.local_device_ids, cluster_detection_method="deactivate",
            initialization_timeout=2 * MEETING, heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split(' [type.googleapis')[0].split())}; {advice}") from None
    finally:
        timer.cancel()
    if spec.process_id:
        logging.disable(logging.WARNING)  # process 0 speaks for all; errors carry their process' number


def _check_port(coordinator: str) -> None:
    """JAX crashes where it cannot listen."""
    port = int(coordinator.rsplit(":", 1)[1])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(f"port {port} of {socket.gethostname()}: {error.strerror}; set JAX_COORDINATOR_PORT to a free one, in all processes") from None


def _give_up(words: str) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)
    os._exit(2)


# ---- ending together ---------------------------------------------------------------------------------------------------------------------------------


class _Watch:
    """The thread that asks whether the run has ended elsewhere, and the way to say that it has ended here."""

    def __init__(self, spec: ClusterSpec):
        self.id, self.others = spec.process_id, [i for i in range(spec.num_processes) if i != spec.process_id]
        self._set(f"host/{self.id}", socket.gethostname())
        self.closing, self.answered = threading.Event(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """The thread must not be inside JAX when Python ends."""
        self.closing.set()
        self.thread.join()

    def fail(self, error: BaseException) -> None:
        """Ends all processes, this one first of all in words. Does not return."""
        code = 2 if isinstance(error, UserError) else error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        words, culprits = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", [self.id]
        if self._cause() is None and isinstance(error, Exception) and not isinstance(error, UserError):
            traceback.print_exception(error)
            if gone := self._roll_call():
                words, culprits = f"died without a word (killed, out of memory, a lost node?); process {self.id} noticed by {words}", gone
        self._set("end/cause", json.dumps([culprits, code, " ".join(words.split())]))
        self.close()
        self._end(*(self._cause() or (culprits, code, words)))

    def _run(self) -> None:
        while not self.closing.wait(1):
            try:
                found = dict(_store().key_value_dir_get(f"{KEYS}/end"))
            except Exception:  # process 0 is gone: JAX ends this process with its own words
                continue
            if f"{KEYS}/end/cause" in found:
                self._end(*json.loads(found[f"{KEYS}/end/cause"]))
            elif f"{KEYS}/end/roll_call" in found and not self.answered:
                self.answered = True
                self._set(f"here/{self.id}", "")

    def _roll_call(self) -> list[int]:
        """Which of the others do not answer any more."""
        self._set("end/roll_call", "")
        return self._absent("here")

    def _absent(self, folder: str, besides: Sequence[int] = ()) -> list[int]:
        """Which of the others have left no word in a folder of the store, after a while."""
        absent, deadline = [i for i in self.others if i not in besides], time.monotonic() + PATIENCE
        while absent and time.monotonic() < deadline:
            time.sleep(0.2)
            with contextlib.suppress(Exception):
                there = {key.rsplit("/", 1)[1] for key, _ in _store().key_value_dir_get(f"{KEYS}/{folder}")}
                absent = [i for i in absent if str(i) not in there]
        return absent

    def _end(self, culprits: list[int], code: int, words: str) -> None:
        """Prints the cause and exits at once: the ways out of Python wait for processes that will not come."""
        print(f"error: {' and '.join(map(self._name, culprits))}: {words}", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        self._set(f"read/{self.id}", "")
        if self.id == 0:  # the store ends with this process, and JAX aborts those that are still there
            self._absent("read", besides=culprits)
            time.sleep(1)
        os._exit(code or 1)

    def _cause(self) -> list | None:
        with contextlib.suppress(Exception):
            return json.loads(_store().key_value_try_get(f"{KEYS}/end/cause"))

    def _name(self, process: int) -> str:
        with contextlib.suppress(Exception):
            return f"process {process} on {_store().key_value_try_get(f'{KEYS}/host/{process}')}"
        return f"process {process}"

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception):  # another was first, or the store is gone
            _store().key_value_set(f"{KEYS}/{key}", value)


def _store():
    return global_state.client


# ---- agreeing ----------------------------------------------------------------------------------------------------------------------------------------


def from_first(name: str, make: Callable[[], str]) -> str:
    """make() of process 0, in all processes. name: given away once a run."""
    if jax.process_count() == 1:
        return make()
    if jax.process_index() == 0:
        _store().key_value_set(f"{KEYS}/agreed/{name}", make())
    return _store().blocking_key_value_get(f"{KEYS}/agreed/{name}", FOREVER)


def check_same(name: str, value: bytes | str) -> None:
    """Refuses a process for which `name` is not what it is for process 0: it would compute something else, or wait for ever."""
    mine = hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()
    if from_first(name, lambda: mine) != mine:
        raise UserError(f"{name} of this process differ from those of process 0; start all processes with the same command, files and package versions")


def check_shared(directory: Path) -> None:
    """Refuses a directory of which each process has its own."""
    if jax.process_count() == 1:
        return
    name = from_first("marker", lambda: f".seen-by-all-{os.getpid()}-{time.time_ns()}")
    marker = directory / name
    if jax.process_index() == 0:
        marker.touch()
    _store().wait_at_barrier(f"{KEYS} {name} made", FOREVER)
    deadline = time.monotonic() + PATIENCE  # a network's directories come late
    while not marker.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{directory} is not the same place for this process and process 0; set exp_manager.exp_dir to a folder that all nodes share")
        time.sleep(0.2)
    _store().wait_at_barrier(f"{KEYS} {name} seen", FOREVER)
    if jax.process_index() == 0:
        marker.unlink()


def check_processes(wanted: int, num_nodes: int) -> None:
    """Refuses processes and devices that are not what the config counts on. wanted: devices of all processes together."""
    processes = jax.process_count()
    if num_nodes > processes:
        ask = "start one process a node, with srun or as launch/README.md says" if processes == 1 else "set it to the number of nodes"
        raise UserError(f"trainer.num_nodes is {num_nodes}, and {processes} process{'es run' if processes > 1 else ' runs'}; {ask}")
    if processes == 1:
        return
    counts = [sum(device.process_index == i for device in jax.devices()) for i in range(processes)]
    seen = f"the {processes} processes see {sum(counts)} devices ({_listed(counts)})"
    if len(set(counts)) > 1:
        raise UserError(f"{seen}; expected as many in each: look for a device that has failed, or for other jobs on its node")
    if wanted != sum(counts):
        raise UserError(
            f"trainer.devices x trainer.num_nodes asks for {wanted} devices, and {seen}; set them to the devices of a node and the number of nodes, or see why "
            "some are missing: a launcher that starts too few processes, or gives them too few devices (JAX_LOCAL_DEVICE_IDS says which)"
        )


def _listed(counts: list[int]) -> str:
    if len(set(counts)) == 1:
        return f"{counts[0]} each"
    usual = max(set(counts), key=counts.count)
    return f"{usual} each, but " + ", ".join(f"process {i} {count}" for i, count in enumerate(counts) if count != usual)
