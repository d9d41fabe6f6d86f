"""TextVQA: VQA's soft accuracy with another spelling of the answers, as M4C's evaluator computes it; beside it ST-VQA's accuracy and ANLS.

LLaVA's prompts carry what an OCR program read in the picture (`llava_textvqa_val_v051_ocr.jsonl`); without, published models score some 12 points less.
Truth of a Question: ten people's answers.
"""

import json
import re
from pathlib import Path

from neva_jax.errors import DataError
from neva_jax.evaluation.answer_text import evalai_answer
from neva_jax.evaluation.question import SHORT, Question, Row, bare, rows
from neva_jax.evaluation.scored import Scored, mean

SUFFIX = SHORT
PEOPLE = 10
BETWEEN = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def accuracy(answer: str, people: list[str]) -> float:
    """0 to 1: min(1, others who agree / 3), averaged over leaving each of the ten people out."""
    if len(people) != PEOPLE:
        raise DataError(f"found {len(people)} people's answers, expected {PEOPLE}")
    agreeing = [evalai_answer(person) == evalai_answer(answer) for person in people]
    return mean([min(1, (sum(agreeing) - mine) / 3) for mine in agreeing])


def stvqa_accuracy(answer: str, truths: list[str]) -> float:
    return float(evalai_answer(answer) in [evalai_answer(truth) for truth in truths])


def anls(answer: str, truths: list[str]) -> float:
    """Average Normalised Levenshtein Similarity of one answer: that of the likeliest truth, 0 below one half. Two empty texts are alike (M4C divides by 0)."""
    return max(_similarity(answer.lower().strip(), truth.lower().strip()) for truth in truths)


def _similarity(a: str, b: str) -> float:
    similar = 1 - _edits(a, b) / max(len(a), len(b)) if a or b else 1.0
    return similar if similar >= 0.5 else 0.0


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def question_of(prompt: str) -> str:
    """The question that one of LLaVA's TextVQA prompts asks, in lower case. Raises DataError for a prompt of another form."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := BETWEEN.search(prompt):
            return found[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(f"prompt {prompt[:80]!r}: expected a question and a line that asks for a short answer, with a line of OCR tokens or without")


def asked(prompt: str) -> str:
    """`question_of`, of prompts of any form: what an answer is found by."""
    try:
        return bare(question_of(prompt.replace("<image>\n", "")))
    except DataError:
        return bare(prompt)


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """The official file, or LLaVA's lines with the official file as annotations."""
    official = [row for file in annotations or [path] for row in rows(file, "data")]
    if not annotations and "text" in official[0].fields:
        return [_llavas(row, None) for row in official]
    if not annotations:
        return [_official(row) for row in official]
    found = rows(path, "data")
    truths = {(str(row.id("image_id")), row.get("question").lower()): row for row in official}  # of two that are alike the last counts, as in LLaVA's script
    if "text" in found[0].fields:
        return [_llavas(row, truths) for row in found]
    return [_official(row, _truth(row, truths, row.get("question").lower())) for row in found]


def _truth(row: Row, truths: dict, question: str) -> Row:
    name = row.id("question_id" if "text" in row.fields else "image_id")
    if (truth := truths.get((str(name), question))) is None:
        raise DataError(f"{row.where}: the annotations have no question {question!r} of {name!r}; give those of the same split")
    return truth


def _official(row: Row, truth: Row | None = None) -> Question:
    image = row.id("image_id")
    name = row.id("question_id") if "question_id" in row.fields else image
    return Question(name, row.get("question"), ((f"{image}.jpg",),), _people(truth or row), aliases=(image,), where=row.where)


def _llavas(row: Row, truths: dict | None) -> Question:
    text = row.get("text")
    truth = _truth(row, truths, question_of(text)) if truths else None
    aliases = (truth.id(),) if truth and "question_id" in truth.fields else ()  # LLaVA's lines have the picture's id, the server wants the question's
    return Question(row.id(), text, ((row.get("image"),),), _people(truth) if truth else None, aliases, where=row.where)


def _people(row: Row) -> list[str] | None:
    people = row.get("answers", list, default=None)
    if people is not None and (len(people) != PEOPLE or not all(isinstance(person, str) for person in people)):
        raise DataError(f"{row.where}: 'answers' has {len(people)} members, expected {PEOPLE} texts")
    return people


def score(questions: list[Question], answers: list[str]) -> Scored:
    marks = [accuracy(a, q.truth) for q, a in zip(questions, answers, strict=True)]
    return Scored({"accuracy": 100 * mean(marks)}, marks)


def truth(question: Question) -> str:
    return ", ".join(dict.fromkeys(question.truth))


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """The list that EvalAI's server expects."""
    ids = [next((name for name in (q.id, *q.aliases) if isinstance(name, int)), q.id) for q in questions]  # a question's is a number, a picture's is not
    path.write_text(json.dumps([{"question_id": name, "answer": evalai_answer(a)} for name, a in zip(ids, answers, strict=True)]))
    return path
