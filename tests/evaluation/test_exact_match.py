"""Questions one by one, answers compared, sheets drawn."""

import numpy as np
import pytest

from configs.quickstart import DIGITS
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.media import open_media
from neva_jax.data.records import Records
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.evaluation import exact_match, show
from neva_jax.evaluation.sheet import GREEN, WIDTH, sheet


@pytest.fixture(scope="module")
def examples():
    return asked(Encoder(SentencePieceTokenizer(DIGITS / "tokenizer.model"), template="v1", media_length=4, max_length=256))


def asked(encoder):
    return Examples((Records(DIGITS / "test.json"),), open_media(DIGITS / "images.tar"), ImageProcessor((32, 32), 32), encoder)


def test_every_question_is_asked_alone_with_its_pictures(examples):
    questions = list(exact_match.questions_of(examples))
    assert len(questions) == sum(len(examples.record(i).turns) // 2 for i in range(len(examples)))
    for question in questions:
        record = examples.record(question.index)
        assert question.text.count("<image>") == len(record.images) == len(question.media)
        assert question.text.startswith("<image>\n")


def test_answers_come_back_in_order_and_are_scored(examples):
    """A stand-in for a model that says how many pictures it was shown; then one that is right."""
    questions = list(exact_match.questions_of(examples))[:40]
    words = {n: examples.encoder.tokenizer.encode(f" {word}", start=False)[0] for n, word in ((1, "one"), (2, "two"))}

    def count_pictures(batch, *, max_new_tokens, stop_id):
        shown = [1 + (index.max() >= 4) for index in batch["media_index"]]
        return np.array([(words[n] + [stop_id] * max_new_tokens)[:max_new_tokens] for n in shown])

    answers = exact_match.answer(count_pictures, examples, questions, batch_size=16)
    assert answers == [{1: "one", 2: "two"}[len(q.media)] for q in questions]
    assert exact_match.score([q.truth for q in questions], questions) == {"accuracy": 100.0, "num_questions": 40}
    assert exact_match.score([q.truth for q in questions[:10]] + ["?"] * 30, questions)["accuracy"] == 25.0


@pytest.mark.parametrize(("template", "stop"), [("v1", "</s>"), ("plain", "\n"), ("nvgpt", "<extra_id_1>"), ("nv_dpo", "<extra_id_1>")])
def test_generation_stops_where_the_template_ends_an_answer(template, stop):
    examples = asked(Encoder(SentencePieceTokenizer(DIGITS / "tokenizer.model"), template, media_length=4, max_length=256))
    tokenizer, stops = examples.encoder.tokenizer, []

    def generate(batch, *, max_new_tokens, stop_id):
        stops.append(stop_id)
        return np.full((len(batch["tokens"]), max_new_tokens), stop_id)

    picture = np.zeros((1, 32, 32, 3), np.uint8)
    assert exact_match.answer(generate, examples, [exact_match.Question(0, "<image>\nWhich?", "one", picture)], batch_size=2) == [""]
    assert stops == [tokenizer.id_of(stop)] and stops[0] is not None


def test_matching():
    assert exact_match.matches(" Three and  nine. ", "three and nine")
    assert not exact_match.matches("three", "three and nine")


def test_sheets_show_pictures_and_colours(examples):
    picture = np.full((32, 32, 3), 200, np.uint8)
    page = sheet([([picture], [("a long answer " * 20, GREEN)]), ([], [("no picture", GREEN)]), ([picture] * 2, [("x", GREEN)])], columns=2)
    assert page.shape[1] == 2 * WIDTH and page.dtype == np.uint8
    assert (page == 200).all(-1).sum() >= 3 * 100 * 100, "three pictures, enlarged"
    assert ((page[..., 1].astype(int) - page[..., 0]) > 90).any(), "green words"


def test_what_is_learnt_is_told_apart(examples):
    stream = examples.stream(0)
    runs = show.token_runs(stream.ids, stream.supervised, stream.media_index, examples.encoder.tokenizer)
    record = examples.record(0)
    learnt = [text for text, kind in runs if kind == "supervised"]
    assert learnt == [f" {turn.text}</s>" for turn in record.turns if turn.role == "gpt"]
    assert [text for text, kind in runs if kind == "media"] == ["[4 media vectors]"] * len(record.images)
