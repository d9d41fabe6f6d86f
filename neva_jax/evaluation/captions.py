"""Captions: BLEU, ROUGE-L and CIDEr of COCO's caption evaluation, by pycocoevalcap (`pip install pycocoevalcap`), of texts that `ptb` has tokenised.

Gives up: METEOR and SPICE, which are Java programs. Truth of a Question: the captions that people wrote.
"""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from neva_jax.errors import DataError, UserError
from neva_jax.evaluation.ptb import tokenize
from neva_jax.evaluation.question import Question, Row, read_json, rows, rows_of
from neva_jax.evaluation.scored import Scored
from neva_jax.evaluation.vqav2 import coco_names

SUFFIX = ""
PROMPT = "Provide a one-sentence caption for the provided image."


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """COCO's annotations {images, annotations}; or LLaVA's lines, with COCO's annotations beside them or none. Raises UserError without pycocoevalcap."""
    scorers()  # before a model is asked for hours
    value, numbers = read_json(path)
    if isinstance(value, dict) and "images" in value:
        truths = _captions(dict.fromkeys([*([path] if "annotations" in value else []), *annotations]))
        return [_of_coco(row, truths) for row in rows_of(f"{path}: images", value["images"])]
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):  # no list of images: those that the captions are of
        truths = _captions(dict.fromkeys([path, *annotations]))
        named = {str(row.id("image_id")): row for row in rows(path, "annotations")}
        return [Question(row.id("image_id"), PROMPT, (coco_names(name),), truths[name], where=row.where) for name, row in named.items()]
    truths = _captions(annotations)
    found = rows_of(path, value, numbers)
    return [Question(row.id(), row.get("text"), ((row.get("image"),),), _found(row, row.id(), truths), where=row.where) for row in found]


def _of_coco(row: Row, truths: dict) -> Question:
    name = row.id("id")
    images = (row.get("file_name"),) if "file_name" in row.fields else coco_names(name)
    return Question(name, PROMPT, (images,), _found(row, name, truths), where=row.where)


def _captions(files: Iterable[Path]) -> dict[str, list[str]]:
    found = {}
    for file in files:
        for row in rows(file, "annotations"):
            found.setdefault(str(row.id("image_id")), []).append(row.get("caption"))
    return found


def _found(row: Row, name, truths: dict) -> list[str] | None:
    if truths and str(name) not in truths:
        raise DataError(f"{row.where}: image {name!r} has no caption in the annotations")
    return truths.get(str(name))


def score(questions: list[Question], answers: list[str]) -> Scored:
    """On the scales of pycocoevalcap: Bleu_1 to 4 and ROUGE_L up to 1, CIDEr up to 10. Marks: each picture's own CIDEr."""
    tokens, tokenizer = tokenize([text for q in questions for text in q.truth])
    words = iter(tokens)
    references = [[next(words) for _ in q.truth] for q in questions]
    scores, each = measures(references, tokenize(answers)[0])  # in two goes, as the original: see ptb
    return Scored(scores | {"tokenizer": tokenizer}, each["CIDEr"])


def measures(references: list[list[str]], candidates: list[str]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Tokenised texts -> {measure: of all}, {measure: [of each]}. Without any word in the references CIDEr is 0 (the original crashes)."""
    bleu_scorer, rouge_scorer, cider_scorer = scorers()
    truths, said = dict(enumerate(references)), {i: [candidate] for i, candidate in enumerate(candidates)}
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        bleu, bleus = bleu_scorer(4).compute_score(truths, said, verbose=0)
        rouge, rouges = rouge_scorer().compute_score(truths, said)
        any_word = any(text.split() for texts in references for text in texts)
        cider, ciders = cider_scorer().compute_score(truths, said) if any_word else (0.0, [0.0] * len(candidates))
    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
    scores = dict(zip(names, map(float, (*bleu, rouge, cider)), strict=True))
    return scores, {name: [float(value) for value in values] for name, values in zip(names, (*bleus, rouges, ciders), strict=True)}


def scorers() -> tuple[type, type, type]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise UserError("--task captions needs pycocoevalcap, which is not here; install it with `pip install pycocoevalcap`") from None
    return Bleu, Rouge, Cider


def truth(question: Question) -> str:
    return "\n".join(question.truth)


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """The list that COCO's evaluation and its server expect."""
    path.write_text(json.dumps([{"image_id": q.id, "caption": a} for q, a in zip(questions, answers, strict=True)]))
    return path
