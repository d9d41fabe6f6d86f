"""GQA: accuracy of balanced questions in many cuts, whether answers are possible and plausible, and whether those to entailed questions agree.

https://cs.stanford.edu/people/dorarad/gqa/evaluate.html. An answer counts only if it is the truth, letter for letter; LLaVA takes full stops off its end
and makes it lower case first. Truth of a Question: the official record, with `choices` {"valid", "plausible"} where that file is given. Gives up:
grounding, which needs attention maps over scene graphs.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

from neva_jax.errors import DataError
from neva_jax.evaluation.question import SHORT, Given, Question, Row, read_json, rows_of
from neva_jax.evaluation.scored import Scored, grouped, mean, means_by, ratio

SUFFIX = SHORT
NO_STEP = ("exist", "query: name", "choose name")  # operations that end a question and are no step of reasoning
COMMON = ("color", "material", "shape")  # what "what do they have in common?" may be answered


def prediction(text: str) -> str:
    """An answer as LLaVA hands it to GQA's evaluator."""
    return text.rstrip(".").lower()


def read(path: Path, annotations: list[Path], **_) -> list[Question]:
    """The official questions, a file or a folder of its chunks; or LLaVA's lines, whose official questions are among the annotations. Choices are, too."""
    files = [file for given in (path, *annotations) for file in (sorted(given.glob("*.json")) if given.is_dir() else [given])]
    official, choices, lines = {}, {}, []
    for file in files:
        value, numbers = read_json(file)
        if isinstance(value, dict) and value and all(isinstance(member, dict) for member in value.values()):
            into = choices if "valid" in next(iter(value.values())) else official
            into |= {row.fields["id"]: row for row in rows_of(file, value)}
        else:
            lines += rows_of(file, value, numbers)
    if not lines:
        return [_question(row, choices.get(name)) for name, row in official.items()]
    if not official:
        return [Question(row.id(), row.get("text"), ((row.get("image"),),), where=row.where) for row in lines]
    return [_of_llavas(row, official, choices) for row in lines]


def _of_llavas(row: Row, official: dict[str, Row], choices: dict[str, Row]) -> Question:
    name = str(row.id())
    if name not in official:
        raise DataError(f"{row.where}: the annotations have no question {name!r}; give those of the same split")
    truth = _question(official[name], choices.get(name)).truth
    return Question(row.id(), row.get("text"), ((row.get("image"),),), truth, where=row.where)


def _question(row: Row, choices: Row | None) -> Question:
    image = row.id("imageId") if "imageId" in row.fields else ""
    if "answer" not in row.fields:  # test and challenge splits
        return Question(row.id("id"), row.get("question"), ((f"{image}.jpg",),), where=row.where)
    types, groups = row.get("types", dict), Row(f"{row.where}: groups", row.get("groups", dict, default={}))
    for name in ("structural", "semantic"):
        Row(f"{row.where}: types", types).get(name)
    Row(f"{row.where}: types", types).get("detailed", default="")
    truth = {
        "answer": row.get("answer"), "balanced": bool(row.fields.get("isBalanced", True)), "entailed": row.get("entailed", list, default=[]),
        "types": types, "group": groups.get("global", default=None), "steps": _steps(row), "words": len(row.get("question").split()),
        "choices": {name: choices.get(name, list) for name in ("valid", "plausible")} if choices else None,
    }  # fmt: skip
    return Question(row.id("id"), row.get("question"), ((f"{image}.jpg",),), truth, where=row.where)


def _steps(row: Row) -> int:
    steps = [Row(f"{row.where}: semantic", step if isinstance(step, dict) else {}) for step in row.get("semantic", list, default=[])]
    said = [f"{step.get('operation')}: {step.get('argument', (str, type(None)))}" for step in steps]
    return sum(not any(end in one for end in NO_STEP) for one in said)


def score(questions: list[Question], answers: list[str | None]) -> Scored:
    """Percent; `distribution` is chi-square over answers by group, / 100, lower is better. Groups are {name: [percent, questions]}.

    Only balanced questions count, so others may lack an answer (None). consistency: None unless all questions have one and all entailed ones are there.
    """
    truths = [q.truth for q in questions]
    marks = [float(a == t["answer"]) for t, a in zip(truths, answers, strict=True)]
    balanced = [i for i, t in enumerate(truths) if t["balanced"]]
    truths, right = [truths[i] for i in balanced], [marks[i] for i in balanced]
    said = [answers[i] for i in balanced]
    kinds = {"binary": 0.0, "open": 0.0} | means_by(("open" if t["types"]["structural"] == "query" else "binary" for t in truths), right)
    scores = {"accuracy": 100 * mean(right)} | kinds
    for name, column in (("validity", "valid"), ("plausibility", "plausible")):
        scores[name] = 100 * mean([_possible(a, t, column) for a, t in zip(said, truths, strict=True)])
    scores["consistency"] = _consistency(questions, answers, balanced, marks)
    scores["distribution"] = _distribution(truths, said)
    cuts = {
        "per_structural_type": [t["types"]["structural"] for t in truths], "per_semantic_type": [t["types"]["semantic"] for t in truths],
        "per_steps": [str(t["steps"]) for t in truths], "per_words": [str(t["words"]) for t in truths],
    }  # fmt: skip
    for name, labels in cuts.items():
        scores[name] = {label: [100 * mean(group), len(group)] for label, group in sorted(grouped(labels, right).items(), key=_in_order)}
    return Scored(scores, marks)


def _in_order(cut) -> tuple:
    return (int(cut[0]), "") if cut[0].isdigit() else (0, cut[0])


def _possible(answer: str, truth: dict, column: str) -> float:
    if truth["choices"] is None:  # without the choices file the original counts none as possible
        return 0.0
    return float(answer in (COMMON if "Common" in truth["types"].get("detailed", "") else truth["choices"][column]))


def _consistency(questions, answers, balanced: list[int], marks: list[float]) -> float | None:
    """Of the answers to questions that a rightly answered one entails, the share that is right, averaged over those rightly answered ones; percent."""
    place = {str(q.id): i for i, q in enumerate(questions)}
    shares = []
    for i in balanced:
        entailed = [str(name) for name in questions[i].truth["entailed"] if str(name) != str(questions[i].id)]
        if marks[i] and entailed:
            if not all(name in place for name in entailed):
                return None
            shares.append(mean([marks[place[name]] for name in entailed]))
    return None if None in answers else 100 * mean(shares)


def _distribution(truths: list[dict], answers: list[str]) -> float:
    """Chi-square of what is answered against what is true, averaged over groups by their size. 0 without groups, where the original divides by 0."""
    gold, said = defaultdict(Counter), defaultdict(Counter)
    for truth, answer in zip(truths, answers, strict=True):
        if truth["group"] is not None:
            gold[truth["group"]][truth["answer"]] += 1
            said[truth["group"]][answer] += 1
    sizes = {group: counts.total() for group, counts in gold.items()}
    chi = {group: sum((said[group][a] - n) ** 2 / n for a, n in counts.items()) for group, counts in gold.items()}
    return ratio(sum(chi[group] * sizes[group] for group in gold), sum(sizes.values())) / 100


def said(given: Given) -> str:
    """LLaVA's `text` is made a prediction first; a `prediction` is one."""
    return prediction(given.text) if given.field == "text" else given.text


def may_lack(question: Question) -> bool:
    return question.truth is not None and not question.truth["balanced"]


def truth(question: Question) -> str:
    return question.truth["answer"]


def write(path: Path, questions: list[Question], answers: list[str]) -> Path:
    """The list that GQA's evaluator and its server expect."""
    path.write_text(json.dumps([{"questionId": str(q.id), "prediction": a} for q, a in zip(questions, answers, strict=True) if a is not None]))
    return path
