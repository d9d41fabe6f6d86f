"""VQAv2: ten people's answers to each question; an answer is as right as others agree with it, min(1, agreeing / 3), averaged over leaving each person out.

https://visualqa.org/evaluation.html. The official evaluator compares answers as `answer_text.vqa_answer` writes them, unless all ten people gave the same
one: then it compares them as they are. Truth of a Question: {"answers": [{"answer": text, ...}, ...], "question_type", "answer_type"}.
"""

import json
from pathlib import Path

from neva_jax.errors import DataError
from neva_jax.evaluation.answer_text import evalai_answer, one_line, vqa_answer
from neva_jax.evaluation.question import SHORT, Question, Row, by_id, rows
from neva_jax.evaluation.scored import Scored, mean, means_by

SUFFIX = SHORT


def accuracy(answer: str, truth: list[dict]) -> float:
    """0 to 1. truth: the people's answers as the official file has them; two that are equal in every field are one person."""
    people = [person | {"answer": one_line(person["answer"])} for person in truth]
    answer = one_line(answer)
    if len({person["answer"] for person in people}) > 1:
        people = [person | {"answer": vqa_answer(person["answer"])} for person in people]
        answer = vqa_answer(answer)
    agreeing = (sum(other["answer"] == answer for other in people if other != person) for person in people)
    return mean([min(1, count / 3) for count in agreeing])


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """The official questions file, or LLaVA's lines; annotations: the official one, or none for a test split."""
    truths = by_id([row for annotation in annotations for row in rows(annotation, "annotations")])
    asked = rows(path, "questions")
    questions = [_question(row, truths.pop(str(row.id()), None), bool(annotations)) for row in asked]
    if truths:
        raise DataError(f"{path}: lacks {len(truths)} questions of the annotations, the first is {next(iter(truths))!r}; give the questions of the same split")
    return questions


def _question(row: Row, truth: Row | None, expected: bool) -> Question:
    if expected and truth is None:
        raise DataError(f"{row.where}: the annotations have no question {row.id()!r}; give those of the same split")
    text = row.get("text") if "text" in row.fields else row.get("question")
    return Question(row.id(), text, _images(row), _truth(truth) if truth else None, where=row.where)


def _images(row: Row) -> tuple[tuple[str, ...], ...]:
    if "image" in row.fields:
        return ((row.get("image"),),)
    return (coco_names(row.id("image_id")),) if "image_id" in row.fields else ()  # a score needs none


def coco_names(image_id: str | int) -> tuple[str, ...]:
    """The names that COCO's releases give a picture, alone or in their folders."""
    number = str(image_id).zfill(12)
    splits = ("val2014", "train2014", "test2015")
    return (*(f"{folder}COCO_{split}_{number}.jpg" for split in splits for folder in ("", f"{split}/")), f"{number}.jpg")


def _truth(row: Row) -> dict:
    people = row.get("answers", list)
    for i, person in enumerate(people):
        Row(f"{row.where}: answer {i}", person if isinstance(person, dict) else {}).get("answer")
    if not people:
        raise DataError(f"{row.where}: 'answers' is empty, expected people's answers")
    return {"answers": people, "question_type": row.get("question_type", default=""), "answer_type": row.get("answer_type", default="")}


def score(questions: list[Question], answers: list[str]) -> Scored:
    """`accuracy`: of the answers as they are; `submission`: of what LLaVA would upload for them. Percent, overall and by type."""
    scores, marks = _score(questions, answers)
    return Scored(scores | {"submission": _score(questions, [evalai_answer(a) for a in answers])[0]}, marks)


def _score(questions, answers):
    marks = [accuracy(a, q.truth["answers"]) for q, a in zip(questions, answers, strict=True)]
    by = {f"per_{name}": means_by([q.truth[name] for q in questions], marks) for name in ("answer_type", "question_type")}
    return {"accuracy": 100 * mean(marks)} | by, marks


def truth(question: Question) -> str:
    return ", ".join(dict.fromkeys(person["answer"] for person in question.truth["answers"]))


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """The list that EvalAI's server expects."""
    path.write_text(json.dumps([{"question_id": q.id, "answer": evalai_answer(a)} for q, a in zip(questions, answers, strict=True)]))
    return path
