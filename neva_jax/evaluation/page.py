"""The end of an evaluation: a page of pictures with question, answer and truth, the worst first, and a table of scores for a terminal."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from neva_jax.errors import DataError, UserError
from neva_jax.evaluation.asking import picture
from neva_jax.evaluation.question import Question
from neva_jax.evaluation.report import printable
from neva_jax.evaluation.sheet import BLACK, GREEN, GREY, RED, SIDE, sheet

AMBER = (190, 120, 0)  # neither wrong nor right
LONGEST = 400  # letters shown of a text


def page(questions: list[Question], answers: list[str | None], marks: list[float], truths: list[str], media, num_shown: int = 24) -> np.ndarray:
    """-> uint8[H, W, 3]. media: where the pictures are, None to show none; marks: see Scored."""
    best = max([1.0, *marks])
    cells = []
    for i in sorted(range(len(questions)), key=lambda i: marks[i])[:num_shown]:
        colour = RED if marks[i] <= 0 else GREEN if marks[i] >= best else AMBER
        said = answers[i] if answers[i] else "(no answer)"
        told = f"truth: {_short(truths[i])}\n{marks[i]:.2f}  {questions[i].id}"
        cells.append((_pictures(questions[i], media), [(_short(questions[i].text) + "\n", BLACK), (_short(said) + "\n", colour), (told, GREY)]))
    return sheet(cells, columns=3)


def _short(text: str) -> str:
    text = printable(text).strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _pictures(question: Question, media) -> list[np.ndarray]:
    shown = []
    for names in question.images[:2] if media else ():
        try:
            image = Image.open(io.BytesIO(picture(media, names, question))).convert("RGB")
            shown.append(np.asarray(ImageOps.pad(image, (SIDE, SIDE), color="white")))
        except (UserError, DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # a score needs no picture
            shown.append(np.full((SIDE, SIDE, 3), 230, np.uint8))
    return shown


def table(scores: dict, indent: str = "") -> Iterator[str]:
    """Lines of names and numbers, parts of a score under it."""
    numbers = {name: value for name, value in scores.items() if not isinstance(value, dict)}
    width = max((len(str(name)) for name in numbers), default=0)
    for name, value in numbers.items():
        yield f"{indent}{name:<{width}}  {_number(value)}"
    for name, value in scores.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from table(value, indent + "  ")


def _number(value) -> str:
    if isinstance(value, list):
        return f"{_number(value[0])}  ({value[1]} questions)"
    return "-" if value is None else f"{value:8.2f}" if isinstance(value, float) else f"{value!s:>8}"
