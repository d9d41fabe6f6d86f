"""One of several processes of a test: python tests/process.py '{"do": "train" | "sum" | "compare", ...}'. See test_processes.py, which starts them."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from neva_jax import cli  # noqa: E402
from neva_jax.errors import DataError, UserError  # noqa: E402
from neva_jax.parallel import distributed  # noqa: E402


def go_wrong(how: str | None) -> None:
    if how == "bad record":
        raise DataError("data.json: record 7: its picture is broken")
    if how == "defect":
        raise ValueError("a defect of ours")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(5)
    if how == "asked to stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "asked twice":
        raise SystemExit(143)  # what a second signal does


def train(directory: str, changes: dict, at: int, how: str | None) -> None:
    """A tiny run; this process goes wrong when it reads its batch `at`."""
    from runs import tiny

    import train
    from neva_jax.build import data
    from neva_jax.build.data import Split

    original, read_lengths = Split.batches, data.read_lengths
    if how == "other records":
        data.read_lengths = lambda *arguments: read_lengths(*arguments).select(slice(None, None, -1))

    def batches(self, start, stop):
        for i, batch in enumerate(original(self, start, stop)):
            go_wrong(how if i == at else None)
            yield batch

    Split.batches = batches
    train.main(tiny(Path(directory), **changes))


def add_up(directory: str, changes: dict, at: int, how: str | None) -> None:
    """Ten sums over all devices; no model, so it starts in a second or two."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    with distributed.joined():
        distributed.check_processes(jax.device_count(), 1)
        distributed.check_same("the config", "ours")
        distributed.check_shared(Path(directory))
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
        total = jax.jit(lambda x: x.sum())
        for i in range(10):
            go_wrong(how if i == at else None)
            mine = np.ones(len(jax.local_devices()), np.float32)
            result = float(total(jax.make_array_from_process_local_data(sharding, mine, (jax.device_count(),))))
        print(json.dumps({"process": jax.process_index(), "sum": result}))
        go_wrong(how if at == 10 else None)


def compare(directory: str, changes: dict, at: int, how: str | None) -> None:
    """What must be one and is not: the errors are printed, all but that of the directory, which ends both."""
    import jax

    with distributed.joined():
        processes, same = distributed.check_processes, distributed.check_same
        for check in (lambda: processes(16, 2), lambda: processes(2, 3), lambda: same("the config", str(how))):
            try:
                check()
            except UserError as error:
                print(error)
        distributed.check_shared(Path(directory, str(jax.process_index())))


def main(do: str, directory: str = "", changes: dict | None = None, fault: list | None = None, meeting: int = 45, patience: int = 6) -> None:
    """fault: [process, batch, how]; meeting, patience: seconds to wait for the others"""
    distributed.MEETING, distributed.HEARTBEAT, distributed.PATIENCE = meeting, 20, patience
    with contextlib.suppress(KeyError):
        process = int(os.environ.get("RANK") or os.environ["JAX_PROCESS_ID"])
    who, at, how = fault or (None, 0, None)
    if how == "absent" and process == who:
        return
    {"train": train, "sum": add_up, "compare": compare}[do](directory, changes or {}, at, how if fault and process == who else None)


if __name__ == "__main__":
    cli.run(lambda: main(**json.loads(sys.argv[1])), argv=["process.py"], with_config=False)
