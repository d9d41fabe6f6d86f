"""Captions: words and measures against pycocoevalcap's own, with Java and without."""

import random

import pytest
from test_scorers_golden import EXACT, cases

from neva_jax.errors import UserError
from neva_jax.evaluation import captions, ptb
from neva_jax.evaluation.question import Question

SENTINEL = "a quiet harbor"
TOKENIZERS = {"rules": ptb.by_rules, "java": lambda texts: ptb.by_java(texts, ptb.find_jar())}


@pytest.fixture(params=TOKENIZERS)
def words(request):
    if request.param == "java" and ptb.find_jar() is None:
        pytest.skip("no Java, or no pycocoevalcap, whose Stanford tokenizer it runs")
    return TOKENIZERS[request.param]


def test_words_of_each_case(words):
    found = [case for case in cases("captions")["tokenizer_cases"] if case["aligned"]]
    tokens = words([text for case in found for text in (case["text"], SENTINEL)])
    assert tokens[1::2] == [SENTINEL] * len(found)
    assert {case["text"]: ours for case, ours in zip(found, tokens[::2], strict=True)} == {case["text"]: case["tokens"] for case in found}


def test_words_of_captions(words):
    images = cases("captions")["images"]
    assert words([text for image in images for text in image["references"]]) == [text for image in images for text in image["tokenized_references"]]
    assert words([image["prediction"] for image in images]) == [image["tokenized_prediction"] for image in images]


def test_a_full_stop_depends_on_the_next_caption(words):
    assert words(["the lane B.", "A bus"]) == ["the lane b", "a bus"]
    assert words(["the lane B.", "Buses stop"]) == ["the lane b.", "buses stop"]


@pytest.mark.parametrize("end", "\n\r\v\f\x85\u2028\u2029")
def test_line_ends_in_a_caption_shift_nothing(end):
    tokens, _ = ptb.tokenize([f"two{end}lines", SENTINEL, f"{end}{end}", SENTINEL])
    assert tokens == ["two lines", SENTINEL, "", SENTINEL]


def test_what_is_no_text_stops_nothing(monkeypatch):
    texts = ["a \ud800 dog", "", "\0 cat"]
    assert ptb.tokenize(texts)[0] == ["a dog", "", "cat"]
    monkeypatch.setattr(ptb, "find_jar", lambda: None)
    assert ptb.tokenize(texts) == (["a dog", "", "cat"], "neva_jax")


def scored(references: list[list[str]], predictions: list[str]):
    questions = [Question(i, "?", truth=texts) for i, texts in enumerate(references)]
    return captions.score(questions, predictions)


@pytest.mark.parametrize("java", [False, True], ids=TOKENIZERS)
def test_corpus(monkeypatch, java):
    pytest.importorskip("pycocoevalcap")
    if not java:
        monkeypatch.setattr(ptb, "find_jar", lambda: None)
    found = cases("captions")
    result = scored([image["references"] for image in found["images"]], [image["prediction"] for image in found["images"]])
    expected = {name: pytest.approx(value, rel=EXACT, abs=EXACT) for name, value in found["corpus"].items()}
    assert {name: value for name, value in result.scores.items() if name != "tokenizer"} == expected
    assert result.marks == [pytest.approx(image["scores"]["CIDEr"], rel=EXACT, abs=EXACT) for image in found["images"]]


def test_small_corpora():
    pytest.importorskip("pycocoevalcap")
    for case in cases("captions")["small_corpora"]:
        names = list(case["references"])
        if "corpus" not in case or "error" in case["corpus"]:
            scored([case["references"][name] for name in names], [case["predictions"][name] for name in names])  # defined: it does not crash
            continue
        scores, each = captions.measures([case["tokenized_references"][n] for n in names], [case["tokenized_predictions"][n] for n in names])
        assert scores == pytest.approx(case["corpus"], rel=EXACT, abs=EXACT), case["tag"]
        for i, name in enumerate(names):
            assert {measure: values[i] for measure, values in each.items()} == pytest.approx(case["per_image"][name], rel=EXACT, abs=EXACT), case["tag"]


def test_no_words_at_all():
    """CIDEr, whose original crashes, is 0; ROUGE-L finds the empty text in the empty text, as ever."""
    pytest.importorskip("pycocoevalcap")
    scores = scored([["..."], [""]], ["", "?"]).scores
    assert (scores["CIDEr"], scores["ROUGE_L"]) == (0, 1)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UserError, match="pip install"):
        captions.measures([["a"]], ["a"])


WORDS = """
a an the man woman dog's sign reads stop. bus No no. St. Mr. U.S. a.m. p.m. T-shirt two-tone O'Brien it's don't can't isn't they're 's cannot gonna
5 10 3.5 1,000 1990s '90s 1/2 10:30 12:30pm #1 $5 50% café A B. I The There etc. vs. Jan. in. ft. and/or w/ black & 'hello' "quote" (in) [b] -- - ... …
– 5'10" ½ © 2x4 B-52 www.x.com a@b.com &amp; <b> ° ? ! ; : , Ave. no. 7 y'all rock'n'roll goin' 'tis o'clock wow!!! <3 :) #hash @user AT&T ma'am x-ray
it’s o’clock don’t rock’n’roll dogs’ “hi” ‘so’ (555) 123-4567 ;-) U.S.-based AT&amp;T
"""


def test_rules_agree_with_stanfords_tokenizer_on_random_sentences():
    if (jar := ptb.find_jar()) is None:
        pytest.skip("no Java, or no pycocoevalcap")
    random_words = random.Random(0)
    texts = [" ".join(random_words.choices(WORDS.split(), k=random_words.randint(1, 12))) for _ in range(1000)]
    assert ptb.by_rules(texts) == ptb.by_java(texts, jar)
