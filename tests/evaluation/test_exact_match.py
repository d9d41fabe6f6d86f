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
    words = {1: "one", 2: "two"}

    def count_pictures(batch, max_new_tokens):
        assert max_new_tokens == 64
        return [words[1 + (index.max() >= 4)] for index in batch["media_index"]]

    answers = exact_match.answer(count_pictures, examples, questions, batch_size=16)
    assert answers == [words[len(q.media)] for q in questions]
    assert exact_match.score([q.truth for q in questions], questions) == {"accuracy": 100.0, "num_questions": 40}
    assert exact_match.score([q.truth for q in questions[:10]] + ["?"] * 30, questions)["accuracy"] == 25.0


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
