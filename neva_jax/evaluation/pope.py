"""POPE: is there a ... in the image? Accuracy, precision, recall, F1 and the share of yes, for each of its splits: random, popular, adversarial.

An answer is no if its first sentence, without commas, has the word No, no or not between spaces, and yes otherwise, whatever it says: LLaVA's script, as
POPE's own. Truth of a Question: "yes" or "no"; group: the split.
"""

import json
from pathlib import Path

from neva_jax.errors import DataError
from neva_jax.evaluation.question import ID_FIELDS, SHORT, Given, Question, Row, bare, given_of, rows
from neva_jax.evaluation.scored import Scored, mean, ratio

SUFFIX = SHORT
PREFIX = "coco_pope_"


def parse(text: str) -> str:
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """POPE's lines, with their labels, from one file or a folder of coco_pope_SPLIT.json; or LLaVA's, whose labels stand in the annotations, split by split
    in the same order."""
    if not annotations:
        found = [(row, split_of(file)) for file in _files(path) for row in rows(file)]
        repeated = len({str(row.id()) for row, _ in found}) < len(found)  # POPE counts from 1 in each file
        return [_labelled(row, split, several=repeated and path.is_dir()) for row, split in found]
    labels = {split_of(file): [_labelled(row, split_of(file)) for row in rows(file)] for given in annotations for file in _files(given)}
    found = [_of_llavas(row, labels) for row in rows(path)]
    for split, left in labels.items():
        if left:
            raise DataError(f"{path}: lacks {len(left)} of the questions of {split}, the first is {left[0].text!r} ({left[0].where})")
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.startswith(PREFIX) and file.suffix in (".json", ".jsonl"))
    if not files:
        raise DataError(f"{path}: no {PREFIX}*.json in this folder, such as {PREFIX}random.json")
    return files


def split_of(path: Path) -> str:
    return path.stem.removeprefix(PREFIX)


def _labelled(row: Row, split: str, several: bool = False) -> Question:
    label = row.get("label")
    if label not in ("yes", "no"):
        raise DataError(f"{row.where}: 'label' is {label!r}, expected yes or no")
    group = row.get("category", default=split)
    name = f"{split}_{row.id()}" if several else row.id()
    return Question(name, row.get("text"), ((row.get("image"), f"val2014/{row.get('image')}"),), label, group=group, where=row.where)


def _of_llavas(row: Row, labels: dict[str, list[Question]]) -> Question:
    split = row.get("category")
    if not labels.get(split):
        raise DataError(f"{row.where}: category {split!r} has no label left in the annotations, which have {', '.join(labels)}")
    label = labels[split].pop(0)
    if bare(label.text) != bare(row.get("text")) or label.images[0][0] != row.get("image"):
        raise DataError(f"{row.where}: asks about {row.get('image')} what {label.where} does not; questions and labels must be in the same order")
    return Question(row.id(), row.get("text"), label.images, label.truth, group=split, where=row.where)


def read_answers(path: Path, questions: list[Question]) -> list[Given]:
    """LLaVA's lines; or POPE's {question, answer}, which have no ids and stand in the order of the questions."""
    found = rows(path)
    if any(name in row.fields for row in found for name in ID_FIELDS) or not all("question" in row.fields for row in found):
        return [given_of(row) for row in found]
    if len(found) > len(questions):
        raise DataError(f"{found[len(questions)].where}: answers one question more than the {len(questions)} that there are; score it with its own questions")
    for row, question in zip(found, questions, strict=False):
        if bare(row.get("question")) != bare(question.text):
            raise DataError(f"{row.where}: answers another question than {question.where} asks; answers without ids must be in the order of the questions")
    return [Given(str(question.id), row.get("answer"), where=row.where) for row, question in zip(found, questions, strict=False)]


def rates(predictions: list[str], truths: list[str]) -> dict[str, float]:
    """Counts, and percentages. 0 where the original divides by 0: nothing predicted yes, or nothing that is."""
    pairs = list(zip(predictions, truths, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    rates = {
        "accuracy": ratio(tp + tn, len(pairs)), "precision": precision, "recall": recall, "f1": ratio(2 * precision * recall, precision + recall),
        "yes_share": ratio(tp + fp, len(pairs)),
    }  # fmt: skip
    return {name: 100 * rate for name, rate in rates.items()} | {"TP": tp, "FP": fp, "TN": tn, "FN": fn}


def score(questions: list[Question], answers: list[str]) -> Scored:
    """The mean of the splits, as papers report it, and each split's own."""
    said = [parse(a) for a in answers]
    splits = {}
    for split in dict.fromkeys(q.group for q in questions):
        chosen = [i for i, q in enumerate(questions) if q.group == split]
        splits[split] = rates([said[i] for i in chosen], [questions[i].truth for i in chosen]) | {"num_questions": len(chosen)}
    means = {name: mean([split[name] for split in splits.values()]) for name in ("accuracy", "precision", "recall", "f1", "yes_share")}
    return Scored(means | {"splits": splits}, [float(a == q.truth) for a, q in zip(said, questions, strict=True)])


def truth(question: Question) -> str:
    return question.truth


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """Lines of {question, answer}, as POPE's evaluate.py reads them."""
    path.write_text("".join(json.dumps({"question": q.text, "answer": a}) + "\n" for q, a in zip(questions, answers, strict=True)))
    return path
