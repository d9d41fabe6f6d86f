"""Exact match on conversations: every question of a NeVA or LLaVA data file, asked by itself with its record's pictures before it; see exact_match."""

import json
from pathlib import Path

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.record import adopt_img_tags, parse_record
from neva_jax.evaluation.question import Question, rows
from neva_jax.evaluation.scored import Scored, mean

SUFFIX = ""


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """ids: the record's, or its number where ids are missing or repeat; a record of several questions gets /0, /1, ... behind it,
    and answers with the record's own id are told apart by their prompts."""
    found = rows(path)
    ids = [row.fields.get("id") for row in found]
    unique = all(isinstance(name, (str, int)) for name in ids) and len({str(name) for name in ids}) == len(ids)
    questions = []
    for i, row in enumerate(found):
        record = parse_record(adopt_img_tags(dict(row.fields)), where=row.where)
        name, images = ids[i] if unique else i, tuple((image,) for image in record.images)
        pairs = list(zip(record.turns[::2], record.turns[1::2], strict=False))
        for turn, (question, answer) in enumerate(pairs):
            text = question.text.replace(PLACEHOLDER, "").strip()
            own, aliases = (f"{name}/{turn}", (name,)) if len(pairs) > 1 else (name, ())
            questions.append(Question(own, text, images, answer.text, aliases, where=row.where))
    return questions


def score(questions: list[Question], answers: list[str]) -> Scored:
    from neva_jax.evaluation.exact_match import matches  # imports JAX, through Grain

    marks = [float(matches(a, q.truth)) for q, a in zip(questions, answers, strict=True)]
    return Scored({"accuracy": 100 * mean(marks)}, marks)


def truth(question: Question) -> str:
    return question.truth


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """Lines of {question_id, answer, truth}: no server expects anything."""
    lines = (json.dumps({"question_id": q.id, "answer": a, "truth": q.truth}) for q, a in zip(questions, answers, strict=True))
    path.write_text("".join(line + "\n" for line in lines))
    return path
