"""MME: two yes-or-no questions about each picture, in fourteen categories of perception and cognition. A category's score is the percentage of right
answers plus the percentage of pictures with both right, so at most 200.

An answer is yes if "yes" is in its first four letters, no if "no" is, and other (always wrong) otherwise, as in MME's eval_tool. Truth of a Question:
"yes" or "no"; group: the category; the two questions of a picture follow each other.
"""

import dataclasses
from collections import Counter
from glob import escape
from pathlib import Path, PurePosixPath

from neva_jax.errors import DataError
from neva_jax.evaluation.question import SHORT, Given, Question, Row, bare, read_text, rows
from neva_jax.evaluation.scored import Scored, mean, ratio

SUFFIX = SHORT
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SPACES = str.maketrans("\t\n\r", "   ")  # one for one, as the first four letters of an answer count


def parse(text: str) -> str:
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """A folder of CATEGORY.txt with lines `picture, question, truth` between tabs, as eval_tool's, or of category folders with PICTURE.txt and lines
    `question, truth`, as the release's; or LLaVA's lines, with such a folder as annotations."""
    if path.is_dir():
        return [question for file in _files(path) for question in _category(file)]
    if not annotations:
        raise DataError(f"{path}: is no folder of CATEGORY.txt; name one, or give it by --annotations where this is LLaVA's llava_mme.jsonl")
    prompts: dict[tuple[str, str], list[Row]] = {}
    for row in rows(path):
        prompts.setdefault((_stem(row.get("image").replace("/images/", "/")), bare(row.get("text"))), []).append(row)
    questions = []
    for question in (question for given in annotations for file in _files(given) for question in _category(file)):
        if found := prompts.get((question.aliases[-1], bare(question.text))):
            row = found.pop(0)
            aliases = (row.id(), *question.aliases)
            images = ((row.get("image"), *question.images[0]),)
            questions.append(dataclasses.replace(question, text=row.get("text"), images=images, aliases=aliases, where=row.where))
    if left := next((found[0] for found in prompts.values() if found), None):
        raise DataError(f"{left.where}: the annotations do not ask this about {left.get('image')!r}")
    for name, count in Counter(question.group for question in questions).items():
        if count % 2:
            raise DataError(f"{path}: asks {count} questions of {name}, expected two about each picture")
    return questions


def _files(path: Path) -> list[Path]:
    there = {file.stem: file for file in sorted(path.glob("*.txt"))} or {folder.name: folder for folder in sorted(path.glob("*")) if _texts(folder)}
    if not there:
        raise DataError(f"{path}: no CATEGORY.txt in this folder, such as existence.txt")
    names = [name for name in (*PERCEPTION, *COGNITION) if name in there]
    return [there[name] for name in names + [name for name in there if name not in names]]


def _texts(category: Path) -> list[Path]:
    """PICTURE.txt of a category's folder in MME's release."""
    return sorted(category.glob("questions_answers_YN/*.txt")) or sorted(category.glob("*.txt"))


def _stem(name: str) -> str:
    """CATEGORY/PICTURE without the picture's extension: LLaVA's script writes PICTURE.txt into its results."""
    return name.removesuffix(PurePosixPath(name).suffix)


def _fields(category: Path):
    """(where, picture, question, truth, answer or None) of each line."""
    for file in _texts(category) if category.is_dir() else [category]:
        pictures = (*category.glob(f"images/{escape(file.stem)}.*"), *category.glob(f"{escape(file.stem)}.*"))
        before = [next((picture.name for picture in pictures if picture.suffix != ".txt"), file.stem)] if category.is_dir() else []
        for number, line in enumerate(read_text(file).rstrip("\n").split("\n"), 1):
            where, fields = f"{file}: line {number}", [*before, *line.split("\t")]
            if len(fields) not in (3, 4):
                raise DataError(f"{where}: has {len(fields)} fields between tabs, expected picture, question, truth and perhaps an answer")
            if fields[2].strip().lower() not in ("yes", "no"):
                raise DataError(f"{where}: truth is {fields[2]!r}, expected Yes or No")
            yield where, *fields[:3], (fields[3] if len(fields) == 4 else None)


def _category(file: Path) -> list[Question]:
    questions = []
    for where, image, text, truth, _ in _fields(file):
        names = tuple(f"{folder}{image}" for folder in (f"{file.stem}/", f"{file.stem}/images/", ""))
        aliases = (f"{file.stem}/{image}", _stem(f"{file.stem}/{image}"))
        questions.append(Question(f"{file.stem}/{image}/{len(questions)}", text, (names,), truth.strip().lower(), aliases, file.stem, where))
    if len(questions) % 2:
        raise DataError(f"{file}: has {len(questions)} lines, expected two for each picture")
    return questions


def read_answers(path: Path) -> list[Given]:
    """Of a folder of CATEGORY.txt whose lines have a fourth field."""
    given = []
    for file in _files(path):
        for where, image, text, _, answer in _fields(file):
            if answer is None:
                raise DataError(f"{where}: has no fourth field, expected an answer")
            given.append(Given(_stem(f"{file.stem}/{image}"), answer, text, where=where))
    return given


def category(answers: list[str], truths: list[str]) -> dict[str, float]:
    """answers: parsed, two after two. Precision and recall leave out other, and are 0 where nothing is left."""
    right = [a == t for a, t in zip(answers, truths, strict=True)]
    pairs = list(zip(answers, truths, strict=True))
    tp, fn, tn, fp = (pairs.count(pair) for pair in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no")))
    acc, acc_plus = 100 * mean(right), 100 * mean([a and b for a, b in zip(right[::2], right[1::2], strict=True)])
    return {
        "score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus, "precision": 100 * ratio(tp, tp + fp), "recall": 100 * ratio(tp, tp + fn),
        "TP": tp, "FN": fn, "TN": tn, "FP": fp, "other_num": answers.count("other"),
    }  # fmt: skip


def score(questions: list[Question], answers: list[str]) -> Scored:
    """perception and cognition: the sums of their categories' scores; None while one of them is missing."""
    said = [parse(a) for a in answers]
    categories = {}
    for name in dict.fromkeys(q.group for q in questions):
        chosen = [i for i, q in enumerate(questions) if q.group == name]
        categories[name] = category([said[i] for i in chosen], [questions[i].truth for i in chosen])
    sums = {
        kind: sum(categories[name]["score"] for name in names) if set(names) <= categories.keys() else None
        for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return Scored(sums | {"categories": categories}, [float(a == q.truth) for a, q in zip(said, questions, strict=True)])


def truth(question: Question) -> str:
    return question.truth


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """A folder of CATEGORY.txt as eval_tool's calculation.py reads it: --results_dir PATH."""
    path.mkdir(exist_ok=True)
    lines = {}
    for question, answer in zip(questions, answers, strict=True):
        text = question.text.replace(SHORT, "").strip()
        fields = (question.images[0][0].split("/")[-1], text, question.truth.title(), answer)
        lines.setdefault(question.group, []).append("\t".join(field.translate(SPACES) for field in fields))
    for name, found in lines.items():
        (path / f"{name}.txt").write_text("\n".join(found) + "\n", encoding="utf-8", errors="replace")
    return path
