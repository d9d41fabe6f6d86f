"""NeMo's learning-rate schedules under NeMo's names. A schedule is a function of t, the number of steps done, computed on the host in float64 and
handed to the step as a number.

The formulas are those of nemo/core/optim/lr_scheduler.py (v2.0.0), its oddities included: the first step is warmup's (t + 1) / (W + 1), past max_steps the
rate is min_lr, and CosineAnnealing with constant_steps warms up from zero.
"""

import dataclasses
import math

from neva_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """lr: base rate. All lengths in optimizer steps."""

    lr: float
    max_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0
    constant_steps: int = 0
    hold_steps: int = 0
    power: float = 1.0
    decay_rate: float = 0.5
    d_model: int = 1


def _cosine(s, t):
    if s.lr < s.min_lr:
        raise UserError(f"model.optim.lr {s.lr} is below model.optim.sched.min_lr {s.min_lr}; CosineAnnealing goes down to min_lr")
    decay = s.max_steps - s.constant_steps - s.warmup_steps
    if t > s.warmup_steps + decay:
        return s.min_lr
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * (t - s.warmup_steps) / decay))


def _square(s, t):
    return max(s.min_lr, s.lr * ((s.max_steps - t) / (s.max_steps - s.warmup_steps)) ** 2)


def _square_root(s, t):
    return max(s.min_lr, s.lr * math.sqrt((s.max_steps - t) / s.max_steps))


def _linear(s, t):
    return s.min_lr + (1 - (t - s.warmup_steps) / (s.max_steps - s.warmup_steps)) * (s.lr - s.min_lr)


def _inverse_square_root(s, t):
    return s.lr / math.sqrt((t + 1) / (s.warmup_steps + 1))


def _t5(s, t):
    return max(t, s.constant_steps, 1) ** -0.5


def _noam(s, t):
    t = max(1, t)
    lr = s.lr * s.d_model**-0.5 * (min(t**-0.5, t * s.warmup_steps**-1.5) if s.warmup_steps else t**-0.5)
    return max(lr, s.min_lr) if t > s.warmup_steps else lr


def _noam_hold(s, t):
    if not s.warmup_steps:
        raise UserError("model.optim.sched.warmup_steps must be above 0 for NoamHoldAnnealing")
    if s.hold_steps and t < s.hold_steps + s.warmup_steps:
        return s.lr
    return max(s.min_lr, s.lr * max(1, s.warmup_steps**s.decay_rate) / max(1, (t - s.hold_steps) ** s.decay_rate))


def _polynomial(s, t, start=None):
    start = s.warmup_steps if start is None else start
    length = s.max_steps - max(s.warmup_steps, start)
    return s.min_lr + (s.lr - s.min_lr) * (1 - min(t - start, length) / length) ** s.power


def _polynomial_hold(s, t):
    hold = s.hold_steps + s.warmup_steps if s.hold_steps else s.warmup_steps
    return s.lr if t < hold else _polynomial(s, t, hold)


WARMED = {  # the formula once warmup is over; before, lr * (t + 1) / (W + 1), after max_steps, min_lr
    "WarmupPolicy": lambda s, t: s.lr,
    "WarmupHoldPolicy": lambda s, t: s.lr,
    "CosineAnnealing": _cosine,
    "SquareAnnealing": _square,
    "SquareRootAnnealing": _square_root,
    "WarmupAnnealing": _linear,
    "InverseSquareRootAnnealing": _inverse_square_root,
    "NoamHoldAnnealing": _noam_hold,
    "PolynomialDecayAnnealing": _polynomial,
    "PolynomialHoldDecayAnnealing": _polynomial_hold,
    "T5InverseSquareRootAnnealing": _t5,
}
SCHEDULES = (*WARMED, "NoamAnnealing")


def make_schedule(name: str, schedule: Schedule):
    """-> function of t -> learning rate."""
    s = schedule
    if name == "NoamAnnealing":
        return lambda t: _noam(s, t)
    if name not in WARMED:
        raise UserError(f"model.optim.sched.name {name!r} is unknown; known are {', '.join(SCHEDULES)}")
    if s.warmup_steps + s.constant_steps * (name == "CosineAnnealing") >= s.max_steps:
        raise UserError(
            f"model.optim.sched: {s.warmup_steps} warmup and {s.constant_steps} constant steps leave nothing of {s.max_steps} steps; lower them"
        )
    from_zero = name == "CosineAnnealing" and s.constant_steps > 0

    def rate(t: int) -> float:
        if s.warmup_steps and t <= s.warmup_steps:
            return s.lr * t / s.warmup_steps if from_zero else s.lr * (t + 1) / (s.warmup_steps + 1)
        return s.min_lr if t > s.max_steps else WARMED[name](s, t)

    return rate
