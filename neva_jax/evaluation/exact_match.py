"""Exact match: every question of a LLaVA file is asked by itself, with its record's pictures before it, and the answer must be the given one
(case, surrounding space and a final full stop aside)."""

import dataclasses

import numpy as np

from neva_jax.data.conversation import PLACEHOLDER, render
from neva_jax.data.example import Example, Examples
from neva_jax.data.pipeline import pad_examples
from neva_jax.data.plan import Bucket
from neva_jax.data.tokenize import IGNORE, encode

GRAIN = 16  # prompt lengths are padded to a multiple


@dataclasses.dataclass(frozen=True)
class Question:
    """index: of the record in its file; media: uint8[N, H, W, 3]"""

    index: int
    text: str
    truth: str
    media: np.ndarray


def questions_of(examples: Examples, indices=None) -> list[Question]:
    """Every question of every record, or of those, in order."""
    questions = []
    for index in range(len(examples)) if indices is None else indices:
        record = examples.record(index)
        media = examples[index].media
        tags = f"{PLACEHOLDER}\n" * len(record.images)
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=False):
            questions.append(Question(index, tags + question.text.replace(PLACEHOLDER, "").strip(), answer.text, media))
    return questions


def answer(generate, examples: Examples, questions: list[Question], *, batch_size: int = 64, max_new_tokens: int = 64) -> list[str]:
    """The model's answer to each question, asked alone under the examples' template. generate(batch, max_new_tokens) -> texts, one a row."""
    prompts = [_prompt(examples, question) for question in questions]
    length = -(-max((len(p.tokens) for p in prompts), default=1) // GRAIN) * GRAIN
    answers: list[str] = [""] * len(prompts)
    order = np.argsort([len(p.media) for p in prompts], kind="stable")  # rows with as many pictures stand together
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        bucket = Bucket(length, 1, max(len(prompts[i].media) for i in chosen))
        rows = [prompts[i] for i in chosen] + [None] * (batch_size - len(chosen))
        batch = pad_examples(rows, bucket, examples.no_media)
        batch = {name: batch[name] for name in ("tokens", "segment_ids", "position_ids", "media_index", "media")}
        for i, text in zip(chosen, generate(batch, max_new_tokens), strict=False):
            answers[i] = text
    return answers


def _prompt(examples: Examples, question: Question) -> Example:
    encoder = examples.encoder
    stream = encode(render(encoder.template, (("human", question.text),)), encoder.tokenizer, encoder.special, encoder.media_length)
    return Example(stream.ids, np.full(len(stream.ids), IGNORE, np.int32), stream.media_index, question.media)


def matches(found: str, truth: str) -> bool:
    return _plain(found) == _plain(truth)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def score(answers: list[str], questions: list[Question]) -> dict[str, float]:
    """{"accuracy": percent, "num_questions": count}"""
    right = sum(matches(found, question.truth) for found, question in zip(answers, questions, strict=True))
    return {"accuracy": 100 * right / max(1, len(questions)), "num_questions": len(questions)}
