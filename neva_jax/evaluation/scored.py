"""What a scorer returns, and the means that all of them take."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Scored:
    """scores: what `--json` prints, accuracies in percent; marks: for each question how right its answer is, the more the better."""

    scores: dict
    marks: list[float]


def mean(values: Sequence[float], *, empty: float = 0.0) -> float:
    return sum(values) / len(values) if values else empty


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where there is no whole: most originals crash there."""
    return part / whole if whole else 0.0


def grouped(names: Iterable, values: Iterable) -> dict[object, list]:
    groups = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        groups[name].append(value)
    return dict(groups)


def means_by(names: Iterable, values: Iterable[float]) -> dict[object, float]:
    """{name: percent}, of values from 0 to 1."""
    return {name: 100 * mean(group) for name, group in grouped(names, values).items()}
