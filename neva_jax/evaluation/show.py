"""What people look at: a page of training rows with what is supervised in colour, and the end-of-run evaluation with its sheet of answers."""

import json
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from neva_jax.data.example import Examples
from neva_jax.evaluation import exact_match
from neva_jax.evaluation.sheet import BLACK, GREEN, GREY, RED, sheet

log = logging.getLogger(__name__)


def token_runs(tokens: np.ndarray, supervised: np.ndarray, media_index: np.ndarray, tokenizer) -> list[tuple[str, str]]:
    """One row's text as [(text, kind)], kind: "text", "supervised" or "media". supervised: bool[T], whether the token is a target."""
    kinds = np.where(media_index >= 0, "media", np.where(supervised, "supervised", "text"))
    starts = np.flatnonzero(np.concatenate([[True], kinds[1:] != kinds[:-1]]))
    runs = []
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        kind = str(kinds[begin])
        runs.append((f"[{end - begin} media vectors]" if kind == "media" else _words_of(tokens[begin:end], tokenizer), kind))
    return runs


def _words_of(tokens: np.ndarray, tokenizer) -> str:
    """tokens as they read in the middle of a text, with <s> and </s> visible."""
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    anchor = tokenizer.encode("a", start=False)[0]  # a decoder drops the space that opens a text
    words, run = "", []
    for token in [*tokens.tolist(), None]:
        if token is not None and token not in names:
            run.append(token)
            continue
        words += tokenizer.decode([*anchor, *run])[1:] if run else ""
        words += names.get(token, "")
        run = []
    return words


def batch_sheet(batch: dict[str, np.ndarray], tokenizer, count: int = 8) -> np.ndarray:
    """The first rows of a batch: pictures, text in black, what is learnt in green, media in grey -> uint8[H, W, 3]"""
    colours = {"text": BLACK, "supervised": GREEN, "media": GREY}
    cells = []
    for i in range(min(count, batch["tokens"].shape[1])):
        n = int((batch["segment_ids"][0, i] != 0).sum())
        supervised = np.concatenate([[False], batch["labels"][0, i, : n - 1] >= 0])  # a token is a target if the one before it has a label
        runs = token_runs(batch["tokens"][0, i, :n], supervised, batch["media_index"][0, i, :n], tokenizer)
        cells.append((list(batch["media"][0, i]), [(text + " ", colours[kind]) for text, kind in runs]))
    return sheet(cells)


def samples(generate, examples: Examples, ids, count: int, max_new_tokens: int) -> np.ndarray:
    """The first question of `count` records of `ids`, from the first to the last, as the model answers it now -> uint8[H, W, 3]: pictures, question, answer
    (green where it is right), truth. generate: see exact_match.answer."""
    chosen = sorted({int(ids[int(i)]) for i in np.linspace(0, len(ids) - 1, count)})
    questions = [question for i in chosen for question in exact_match.questions_of(examples, [i])[:1]]
    answers = exact_match.answer(generate, examples, questions, batch_size=count, max_new_tokens=max_new_tokens)
    return sheet([(list(question.media), _question_runs(row)) for question, row in zip(questions, _rows(questions, answers), strict=True)])


def _rows(questions: list[exact_match.Question], answers: list[str]) -> list[dict]:
    right = [exact_match.matches(a, q.truth) for a, q in zip(answers, questions, strict=True)]
    return [{"index": q.index, "question": q.text, "answer": a, "truth": q.truth, "right": r} for q, a, r in zip(questions, answers, right, strict=True)]


def evaluate(run: Path | None, generate, examples: Examples, *, batch_size: int, max_new_tokens: int, num_shown: int = 24) -> dict[str, float]:
    """Asks every question of `examples`, writes evaluation.json and answers.png (wrong answers first) into the run and logs a few answers.

    generate: see exact_match.answer. run None: another process writes.
    """
    questions = exact_match.questions_of(examples)
    answers = exact_match.answer(generate, examples, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
    scores = exact_match.score(answers, questions)
    if run is None:
        return scores
    rows = _rows(questions, answers)
    right = [row["right"] for row in rows]
    (run / "evaluation.json").write_text(json.dumps({**scores, "answers": rows}, indent=1))
    spread = [int(i) for i in np.linspace(0, len(rows) - 1, num_shown)]
    shown = ([i for i, r in enumerate(right) if not r][: num_shown // 3] + [i for i in spread if right[i]])[:num_shown]
    cells = [(list(questions[i].media), _question_runs(rows[i])) for i in shown]
    Image.fromarray(sheet(cells, columns=3)).save(run / "answers.png")
    for i in spread[:: max(1, num_shown // 6)]:
        log.info(f"{_words(rows[i]['question'])!r} -> {rows[i]['answer']!r} (truth: {rows[i]['truth']!r})")
    log.info(f"accuracy {scores['accuracy']:.2f} % exact match on {scores['num_questions']} held-out questions; see answers.png and evaluation.json in {run}")
    return scores


def _words(question: str) -> str:
    return question.replace("<image>", "").strip()


def _question_runs(row: dict) -> list[tuple[str, tuple[int, int, int]]]:
    colour = GREEN if row["right"] else RED
    return [(_words(row["question"]) + "\n", BLACK), (row["answer"] + "\n", colour), (f"truth: {row['truth']}", GREY)]
