"""ScienceQA: multiple choice, half of it with a picture. An answer is a letter alone, a letter with ". " behind it, or the one place in a longer text that
says "The answer is X." with any character for the full stop; everything else has failed and is wrong. As LLaVA's eval_science_qa.py, which never guesses.

Truth of a Question: {"answer": index, "num_choices", "has_image"}.
"""

import json
import re
from pathlib import Path

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.errors import DataError
from neva_jax.evaluation.question import LETTER, Given, Question, Row, by_id, read_json, rows_of
from neva_jax.evaluation.scored import Scored, mean

SUFFIX = LETTER
LETTERS = "ABCDE"
FAILED = "FAILED"
SAID = re.compile(r"The answer is ([A-Z]).")
TOLD = re.compile(r"(?:The answer is|ANSWER:) ([A-E])\.")
OPTION = re.compile(r"\(([A-E])\) ")


def parse(text: str) -> str:
    """The letter, A to Z, or FAILED."""
    if text in tuple(LETTERS):
        return text
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    said = SAID.findall(text)
    return said[0] if len(said) == 1 else FAILED


def index_of(letter: str, num_choices: int) -> int:
    """Of a choice, or -1 where the letter is of none."""
    return LETTERS.find(letter) if letter in LETTERS[:num_choices] else -1


def read(path: Path, annotations: list[Path], split: str = "test", **_) -> list[Question]:
    """problems.json (or its folder), whose split is told by pid_splits.json, beside it or among the annotations, or by its own `split` fields; or LLaVA's
    llava_test_CQM-A.json, whose truth stands in problems.json among the annotations, else in its own answers."""
    path = path / "problems.json" if path.is_dir() else path
    files = [path, *(folder / "problems.json" if folder.is_dir() else folder for folder in annotations)]
    if (beside := path.parent / "pid_splits.json").exists() and beside not in files:
        files.append(beside)
    chat, problems, splits = [], {}, None
    for file in files:
        value, numbers = read_json(file)
        if isinstance(value, dict) and value and all(isinstance(member, list) for member in value.values()):
            splits = value
        elif isinstance(value, dict):
            problems |= by_id(rows_of(file, value), "id")
        else:
            chat += rows_of(file, value, numbers)
    if chat:
        return [_of_llavas(row, problems) for row in chat]
    return [_of_problem(problems[name]) for name in _names(path, problems, splits, split)]


def _names(path: Path, problems: dict[str, Row], splits: dict | None, split: str) -> list[str]:
    told = {}
    for name, row in problems.items():
        told.setdefault(row.get("split", default=split), []).append(name)
    splits = told if splits is None else splits
    chosen = [str(name) for name in splits.get(split, [])]
    if not chosen:
        raise DataError(f"{path}: no problem of split {split!r}; found {', '.join(splits) or 'none'}")
    if missing := [name for name in chosen if name not in problems]:
        raise DataError(f"{path}: lacks {len(missing)} problems of split {split!r}, the first is {missing[0]!r}")
    return chosen


def _truth(row: Row) -> dict:
    choices, answer = row.get("choices", list), row.get("answer", int)
    if not 0 <= answer < min(len(choices), len(LETTERS)):
        raise DataError(f"{row.where}: 'answer' is {answer}, expected the index of one of its {len(choices)} choices (at most {len(LETTERS)})")
    return {"answer": answer, "num_choices": len(choices), "has_image": bool(row.fields.get("image"))}


def _of_problem(row: Row) -> Question:
    name, truth = str(row.fields["id"]), _truth(row)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row.fields["choices"], strict=False))
    text = f"Context: {row.get('hint', default='').strip() or 'N/A'}\nQuestion: {row.get('question', default='')}\nOptions: {options}".replace("  ", " ")
    image = row.fields.get("image")
    images = ((f"{name}/{image}", f"{row.fields.get('split', 'test')}/{name}/{image}", f"images/test/{name}/{image}"),) if image else ()
    return Question(name, text if row.fields.get("question") else "", images, truth, group=row.get("subject", default=""), where=row.where)


def _of_llavas(row: Row, problems: dict[str, Row]) -> Question:
    turns = row.get("conversations", list)
    values = [Row(f"{row.where}: conversations[{i}]", turn if isinstance(turn, dict) else {}).get("value") for i, turn in enumerate(turns)] or [""]
    name, image = row.id("id"), row.get("image", default=None)
    text = values[0].replace(PLACEHOLDER, "").strip()
    if problems and str(name) not in problems:
        raise DataError(f"{row.where}: the annotations have no problem {name!r}")
    truth = _truth(problems[str(name)]) | {"has_image": image is not None} if problems else _told(text, values[1:], image is not None)
    return Question(name, text, ((image,),) if image else (), truth, where=row.where)


def _told(text: str, answers: list[str], has_image: bool) -> dict | None:
    """Truth that the question file itself tells, in the second turn and the list of options."""
    told, options = TOLD.findall(answers[0] if answers else ""), OPTION.findall(text.rpartition("Options: ")[2].split("\n")[0])
    return {"answer": LETTERS.index(told[-1]), "num_choices": len(options) or len(LETTERS), "has_image": has_image} if told else None


def score(questions: list[Question], answers: list[str | None], given: list[Given | None] = ()) -> Scored:
    """Percent: accuracy, and img_accuracy of the questions with a picture (None where there are none; the original divides by 0).

    A question has a picture if the prompt that came with its answer has <image>, as in the original; where no prompt came, if its problem names one.
    """
    indices = [-1 if a is None else index_of(parse(a), q.truth["num_choices"]) for q, a in zip(questions, answers, strict=True)]
    marks = [float(i == q.truth["answer"]) for i, q in zip(indices, questions, strict=True)]
    pictured = [mark for mark, shows in zip(marks, _pictured(questions, answers, given), strict=True) if shows]
    scores = {"accuracy": 100 * mean(marks), "img_accuracy": 100 * mean(pictured) if pictured else None, "num_img_questions": len(pictured)}
    return Scored(scores | {"num_correct": int(sum(marks)), "num_failed": sum(a is None or parse(a) == FAILED for a in answers)}, marks)


def _pictured(questions, answers, given):
    for question, answer, one in zip(questions, answers, given or [None] * len(questions), strict=True):
        yield PLACEHOLDER in one.prompt if one and one.prompt else answer is not None and question.truth["has_image"]


def truth(question: Question) -> str:
    return LETTERS[question.truth["answer"]]


def write(path: Path, questions: list[Question], answers: list[str | None]) -> Path:
    """What LLaVA's script leaves: {acc, correct, count, results: {id: index}, outputs: {id: text}}."""
    outputs = {str(q.id): FAILED if a is None else a for q, a in zip(questions, answers, strict=True)}
    counts = [q.truth["num_choices"] if q.truth else len(LETTERS) for q in questions]
    results = {name: index_of(parse(text), count) for (name, text), count in zip(outputs.items(), counts, strict=True)}
    found = {"acc": None, "correct": None, "count": len(questions), "results": results, "outputs": outputs}
    if all(q.truth for q in questions):
        correct = sum(results[str(q.id)] == q.truth["answer"] for q in questions)
        found |= {"acc": 100 * correct / len(questions), "correct": correct}
    path.write_text(json.dumps(found, indent=1))
    return path
