"""Rows of files, which answer belongs to which question, and the page and table at the end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neva_jax.data.media import open_media
from neva_jax.errors import DataError
from neva_jax.evaluation import answer_text, page, pope, scienceqa, vqav2
from neva_jax.evaluation.question import Given, Question, bare, matched, rows
from neva_jax.evaluation.sheet import GREEN, RED


@pytest.mark.parametrize(("name", "text", "wheres"), [
    ("a.json", '[{"a": 1}, {"a": 2}]', ["record 0", "record 1"]), ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', ["line 1", "line 3"]),
    ("a.json", '{"a": 1}\n{"a": 2}', ["line 1", "line 2"]), ("a.json", '{"x": {"a": 1}, "y": {"a": 2}}', ["record 'x'", "record 'y'"]),
    ("a.json", '{"data": [{"a": 1}], "info": 3}', ["data: record 0"]), ("a.json", '\ufeff{"a": 1}', ["line 1"]),
])  # fmt: skip
def test_rows(tmp_path, name, text, wheres):
    (tmp_path / name).write_text(text)
    found = rows(tmp_path / name, "data")
    assert [row.where.removeprefix(f"{tmp_path / name}: ") for row in found] == wheres
    assert [row.get("a", int) for row in found] == [1, 2][: len(found)]


@given(st.permutations(range(8)))
def test_answers_find_their_questions_in_any_order(order):
    """Two questions a picture, as TextVQA and MME have them: by id and prompt."""
    questions = [Question(i // 2, f"Is {i} there?") for i in range(8)]
    given = [Given(str(i // 2), str(i), f"<image>\nIs {i} THERE?\nAnswer the question using a single word or phrase.") for i in order]
    assert [one.text for one in matched(questions, given, "a")] == list("01234567")


def test_an_alias_gives_way_to_an_id():
    questions = [Question(1, "a", aliases=(2,)), Question(2, "b", aliases=(1,))]
    assert [one.text for one in matched(questions, [Given("2", "to b"), Given("1", "to a")], "a")] == ["to a", "to b"]


def test_one_id_and_no_prompt():
    with pytest.raises(DataError, match="2 questions have the id '1'"):
        matched([Question(1, "a"), Question(1, "b")], [Given("1", "yes")], "a")


@given(st.text())
def test_normal_forms_are_plain(text):
    for normal in (answer_text.vqa_answer(text), answer_text.evalai_answer(text)):
        assert normal == " ".join(normal.split())
        assert not set(normal.split()) & set(answer_text.ARTICLES)
    assert bare(bare(text)) == bare(text)


@given(st.lists(st.text(), min_size=1, max_size=12), st.text())
def test_accuracies_are_shares(people, answer):
    assert 0 <= vqav2.accuracy(answer, [{"answer": person, "answer_id": i} for i, person in enumerate(people)]) <= 1


@given(st.text(), st.integers(1, 7))
def test_parsers_take_any_text(text, num_choices):
    assert pope.parse(text) in ("yes", "no")
    assert -1 <= scienceqa.index_of(scienceqa.parse(text), num_choices) < min(num_choices, 5)


def test_page_shows_the_worst_first(tmp_path):
    Image.fromarray(np.full((8, 4, 3), (0, 0, 250), np.uint8)).save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_bytes(b"")
    questions = [Question(i, "Q?", ((name,),)) for i, name in enumerate(("blue.png", "broken.png", "blue.png"))]
    shown = page.page(questions, ["good", None, "bad"], [1.0, 0.5, 0.0], ["t"] * 3, open_media(tmp_path))
    wrong, right = shown[:, :460], shown[:, 920:]
    assert (wrong == RED).all(-1).any() and not (wrong == GREEN).all(-1).any()
    assert (right == GREEN).all(-1).any() and (right == (0, 0, 250)).all(-1).any()


def test_table():
    scores = {"accuracy": 91.13, "none": None, "cut": {"1": [50.0, 2]}, "count": 7}
    assert list(page.table(scores)) == ["accuracy     91.13", "none      -", "count            7", "cut", "  1     50.00  (2 questions)"]
