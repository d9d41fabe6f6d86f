"""Reads the numbers of a step that is done, while the next one runs, and ends the run when they say so."""

import jax

from neva_jax.errors import UserError

MAX_SKIPPED_IN_A_ROW = 10


class Watch:
    """describe_batch(index) -> the records of a global batch, in words. values: the newest step's numbers. stopping: the signal for which some
    process asks for an end, or 0."""

    def __init__(self, describe_batch, *, max_bad_images: int):
        self.describe_batch, self.max_bad_images = describe_batch, max_bad_images
        self.values: dict[str, float] = {}
        self.bad_images = 0
        self.stopping = 0

    def read(self, step: int, metrics: dict) -> None:
        """Takes in the metrics of a step, waiting for it."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.stopping = int(values.pop("stop"))
        self.bad_images += values.pop("bad_images")
        self.values = {**values, "bad_images": self.bad_images}
        if self.bad_images > self.max_bad_images:
            raise UserError(
                f"{self.bad_images} pictures could not be read and model.data.max_bad_images is {self.max_bad_images}; "
                f"the last of them in global_step={step}: {self.describe_batch(step - 1)}"
            )
        if values["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, the last in global_step={step}: {self.describe_batch(step - 1)}; "
                "look at these records, lower model.optim.lr, or set trainer.precision=32"
            )
