"""The answers of an evaluation as they are made: LLaVA's lines {question_id, prompt, text, answer_id, model_id, metadata}, one flushed line each.

Beside `NAME.answers.jsonl` lies `NAME.answers.run.json`, which says what makes the answers what they are: the model, the questions and the options.
A command that was killed finds both, drops a line that was cut off, and answers only what is left; if what makes the answers differs, it refuses.
The lines stand in the order in which they were made, and in that of the questions when all are there. Gives up: writers on several hosts.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

from neva_jax.errors import DataError
from neva_jax.evaluation.question import Question


class AnswersFile:
    """path: NAME.answers.jsonl; identity: {what: value}, JSON. `done`: {index of a question: its line}, of the answers that are there."""

    def __init__(self, path: Path, identity: dict, questions: list[Question]):
        self.path, self.questions = path, questions
        self.beside = path.with_name(path.name.removesuffix(".jsonl") + ".run.json")
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 (lives as long as this object)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); name another --output") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path}: another evaluation is writing it; wait for it, or name another --output") from None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._compare(identity)
        else:
            _replace(self.beside, json.dumps(identity, indent=1) + "\n")
        self._file.truncate(len(whole))
        self.done = dict(self._read(whole))

    def _compare(self, identity: dict) -> None:
        try:
            there = json.loads(self.beside.read_text())
        except (OSError, ValueError):
            raise DataError(f"{self.path}: holds answers, and {self.beside.name} beside it does not say whose; move them, or name another --output") from None
        if differ := [name for name in identity if there.get(name) != identity[name]]:
            pairs = "; ".join(f"{name} was {there.get(name)!r} and is {identity[name]!r}" for name in differ)
            raise DataError(f"{self.path}: holds answers made in another way ({pairs}); delete them to start anew, or name another --output")

    def _read(self, data: bytes):
        for number, line in enumerate(data.splitlines(), 1):
            try:
                fields = json.loads(line)
                index = fields["metadata"]["index"]
                fits = isinstance(fields["text"], str) and 0 <= index < len(self.questions) and fields["question_id"] == self.questions[index].id
            except (ValueError, KeyError, TypeError):
                fits = False
            if not fits:
                raise DataError(f"{self.path}: line {number} is no answer of this evaluation; delete the line, and its question is asked again")
            yield index, fields

    def write(self, index: int, prompt: str, text: str, model: str, **metadata) -> None:
        question = self.questions[index]
        line = {"question_id": question.id, "prompt": prompt, "text": text, "answer_id": f"{index:08d}", "model_id": model}
        line["metadata"] = {"index": index} | metadata
        self.done[index] = line
        self._file.write(json.dumps(line).encode() + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The lines come into the order of the questions, if all are there."""
        self._file.close()
        if len(self.done) == len(self.questions):
            _replace(self.path, "".join(json.dumps(self.done[i]) + "\n" for i in range(len(self.questions))))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def digest(*parts) -> str:
    """A short name of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
