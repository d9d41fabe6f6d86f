"""The tasks of `python -m neva_jax.evaluate`, one line each: whose file reads, scores and writes, and what of an answers file its original lets pass."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from neva_jax.errors import DataError
from neva_jax.evaluation import captions, conversations, gqa, mme, pope, scienceqa, textvqa, vqav2
from neva_jax.evaluation.question import Given, Question, bare, matched, read_answers
from neva_jax.evaluation.scored import Scored


@dataclasses.dataclass(frozen=True)
class Task:
    """module: its `read`, `score`, `truth`, `write` and `SUFFIX`. submission: what is put behind the stem of the output's name for the server's file.

    extra, repeated, may_lack, asked: see question.matched. tagged: the prompts in its answers file begin with the tags of their pictures, as LLaVA's do.
    pictured: every question has a picture. max_new_tokens: the most that LLaVA's scripts let a model say.
    """

    module: ModuleType
    submission: str
    extra: bool = False
    repeated: bool = False
    may_lack: Callable[[Question], bool] = lambda question: False
    asked: Callable[[str], str] = bare
    tagged: bool = False
    pictured: bool = True
    max_new_tokens: int = 128

    def check(self, questions: list[Question]) -> None:
        """Raises DataError for a question that no model can be asked."""
        for question in questions:
            if not question.text or (self.pictured and not question.images):
                raise DataError(f"{question.where}: {'names no picture' if question.text else 'has no question'} to ask a model about")

    def answers(self, path: Path, questions: list[Question], missing_as_wrong: bool = False) -> list[Given | None]:
        """The answer to each question, from a file or folder of any of the known forms."""
        if self.module is mme and path.is_dir():
            given = mme.read_answers(path)
        else:
            given = pope.read_answers(path, questions) if self.module is pope else read_answers(path)
        may_lack = (lambda question: True) if missing_as_wrong else self.may_lack
        found = matched(questions, given, path, asked=self.asked, extra=self.extra, repeated=self.repeated, may_lack=may_lack)
        if questions[0].text and all(one and self.asked(one.text) == self.asked(q.text) for one, q in zip(found, questions, strict=True)):
            raise DataError(f"{path}: every answer is its own question; likely a file of questions, give the one with what a model said")
        return found

    def texts(self, questions: list[Question], given: list[Given | None]) -> list[str | None]:
        """What is scored. None: no answer, where the scorer knows what that means; elsewhere it is an empty answer."""
        said = getattr(self.module, "said", lambda one: one.text)
        knows = self.module in (gqa, scienceqa)
        return [said(one) if one else None if knows and self.may_lack(question) else "" for question, one in zip(questions, given, strict=True)]

    def score(self, questions: list[Question], given: list[Given | None], texts: list[str | None]) -> Scored | None:
        """None where nobody tells the truth, as of a test split."""
        untold = [question for question in questions if question.truth is None]
        if untold and len(untold) < len(questions):
            raise DataError(f"{untold[0].where}: has no truth to compare answers with, and {len(questions) - len(untold)} other questions have")
        if untold:
            return None
        return scienceqa.score(questions, texts, given) if self.module is scienceqa else self.module.score(questions, texts)


TASKS = {
    "captions": Task(captions, "submission.json"),
    "vqav2": Task(vqav2, "submission.json", repeated=True),
    "gqa": Task(gqa, "submission.json", extra=True, repeated=True, may_lack=gqa.may_lack),
    "textvqa": Task(textvqa, "submission.json", asked=textvqa.asked),
    "scienceqa": Task(
        scienceqa, "submission.json", extra=True, repeated=True, may_lack=lambda question: True, tagged=True, pictured=False, max_new_tokens=1024
    ),
    "pope": Task(pope, "submission.jsonl"),
    "mme": Task(mme, "submission"),
    "exact_match": Task(conversations, "submission.jsonl", pictured=False, max_new_tokens=64),
}


def scored(name: str, questions: list[Question], given: list[Given | None]) -> dict:
    """What the results file holds."""
    task = TASKS[name]
    texts = task.texts(questions, given)
    found = task.score(questions, given, texts)
    marks = found.marks if found else [None] * len(questions)
    rows = [
        {"question_id": q.id, "question": q.text, "answer": text, "truth": task.module.truth(q) if found else None, "mark": mark}
        for q, text, mark in zip(questions, texts, marks, strict=True)
    ]
    return {"task": name, "num_questions": len(questions), "scores": found.scores if found else {}, "answers": rows}
