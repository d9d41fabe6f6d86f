"""Asks a model all questions of a task, streams its answers to disk, and goes on where a killed command stopped."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.media import Folder, open_media
from neva_jax.errors import DataError, UserError
from neva_jax.evaluation.answers_file import AnswersFile
from neva_jax.evaluation.question import Question

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".model", ".yaml")
ENDS = ("Short answer:",)  # of prompts that ask for no suffix


def prompt_of(question: Question, suffix: str) -> str:
    """What is asked, without tags: the question, and the suffix on a line of its own unless it ends with it."""
    text = question.text.replace(PLACEHOLDER, "").strip()
    return text if not suffix or text.endswith((suffix, *ENDS)) else f"{text}\n{suffix}"


def open_folder(folder: str | None, questions: list[Question]):
    """The pictures' folder or tar; None where no question has a picture. Raises UserError for pictures that are not there, before anything is asked."""
    pictured = [question for question in questions if question.images]
    if not pictured:
        return None
    if not folder:
        raise UserError(f"--image_folder is required: {len(pictured)} of {len(questions)} questions have pictures, such as {pictured[0].images[0][0]}")
    media = open_pictures(folder)
    if isinstance(media, Folder):  # a tar knows its members, and says so when they are read
        for question in pictured:
            for names in question.images:
                if not any(os.path.exists(os.path.join(media.path, name)) for name in names):
                    picture(media, names, question)
    return media


def open_pictures(folder: str):
    try:
        return open_media(folder)
    except UserError as error:
        raise UserError(str(error).replace("model.data.image_folder", "--image_folder")) from None


def picture(media, names: tuple[str, ...], question: Question) -> bytes:
    """The bytes of the first of `names` that is there."""
    for name in names[:-1]:
        try:
            return media.read(name)
        except DataError:
            continue
    try:
        return media.read(names[-1] if len(names) == 1 else next((n for n in names if _exists(media, n)), names[0]))
    except DataError as error:
        raise UserError(f"{question.where}: question {question.id!r}: {str(error).replace('model.data.image_folder', '--image_folder')}") from None


def _exists(media, name: str) -> bool:
    return isinstance(media, Folder) and os.path.exists(os.path.join(media.path, name))


def batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def ask(answers: Callable, questions: list[Question], prompts: list[str], file: AnswersFile, media, *, batch_size: int, model: str, tagged: bool) -> None:
    """Asks what `file` does not hold, questions with as many pictures and prompts of about one length together.

    answers(prompts, images, batch_size=) -> [object with text, tokens, finish], see Vlm.answers. prompts: without tags. tagged: the file's have them.
    """
    left = sorted((i for i in range(len(questions)) if i not in file.done), key=lambda i: (len(questions[i].images), len(prompts[i])))
    with tqdm(total=len(questions), initial=len(questions) - len(left), unit="questions", disable=not sys.stderr.isatty()) as bar:
        for chosen in batches(left, batch_size):
            tagged_prompts = [f"{PLACEHOLDER}\n" * len(questions[i].images) + prompts[i] for i in chosen]
            images = [[picture(media, names, questions[i]) for names in questions[i].images] for i in chosen]
            try:
                found = answers(tagged_prompts, images, batch_size=batch_size)
            except UserError as error:
                raise UserError(_named(str(error), [questions[i] for i in chosen])) from None
            for i, shown, answer in zip(chosen, tagged_prompts, found, strict=True):
                file.write(i, shown if tagged else prompts[i], answer.text, model, finish=answer.finish, num_tokens=len(answer.tokens))
                file.flush()
            bar.update(len(chosen))


def _named(message: str, questions: list[Question]) -> str:
    """An error about "prompt 3" as one about the question and its pictures."""
    if not (found := re.search(r"prompt (\d+)", message)) or int(found[1]) >= len(questions):
        return message
    question = questions[int(found[1])]
    pictures = f" ({', '.join(names[0] for names in question.images)})" if question.images else ""
    return f"{question.where}: question {question.id!r}{pictures}: {message}"


def digest_of_weights(path: Path) -> list[tuple]:
    """What changes when the weights under a path do: names, sizes and times of change of their files, which are not read."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if _holds_weights(file.relative_to(path))] or files  # of a run: not what it logged
    return [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _holds_weights(file: Path) -> bool:
    return file.suffix in WEIGHTS or file.name == "config.json" or file.parts[:1] in (("base",), ("checkpoints",))
