"""Learning rates against NeMo v2.0.0's own schedulers, the first 60 steps of each."""

import json

import numpy as np
import pytest
from helpers import golden

from neva_jax.training.schedules import Schedule, make_schedule

DEFAULTS = {"SquareAnnealing": {"min_lr": 1e-5}}  # the original's own default differs there


def cases():
    try:
        return json.loads(golden("lr_schedules.json").read_text())["cases"]
    except pytest.skip.Exception:
        return []


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c['name']}-{c['base_lr']}")
def test_nemo(case):
    schedule = Schedule(lr=case["base_lr"], **(DEFAULTS.get(case["name"], {}) | case["kwargs"]))
    rates = [make_schedule(case["name"], schedule)(t) for t in range(60)]
    np.testing.assert_allclose(rates, case["lrs"], rtol=1e-6, atol=1e-12)
