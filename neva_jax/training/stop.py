"""SIGTERM and SIGINT as a wish to stop, agreed between processes: each puts its wish into the step's input, and all read the same answer from its metrics."""

import signal
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopRequest:
    """Catches the signals; a second one ends the process at once. agreed: the signal that all processes stopped for, once they have."""

    def __init__(self):
        self.signal = self.agreed = 0
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number, frame):
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number

    def array(self, mesh: Mesh) -> jax.Array:
        """int32[devices]: the signal's number on every device of a process that wants to stop, 0 on the others."""
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        local = np.full(len(mesh.local_devices), self.signal, np.int32)
        return jax.make_array_from_process_local_data(sharding, local, (mesh.size,))

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)
