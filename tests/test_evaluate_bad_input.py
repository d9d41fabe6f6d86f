"""python -m neva_jax.evaluate: what is wrong, in one line that names file, place and field, and exit code 2."""

import json
import sys

import pytest
from test_evaluate import command, dump, lines  # noqa: F401 (a fixture)

GOOD = [{"question_id": i, "image": "a.jpg", "text": f"Is there {i}?", "label": "yes"} for i in range(3)]
ANSWERS = [{"question_id": i, "prompt": "?", "text": "yes"} for i in range(3)]


@pytest.fixture
def pope(tmp_path, command):  # noqa: F811
    def run(questions=GOOD, answers=ANSWERS, *more):
        paths = []
        for name, content in (("q.jsonl", questions), ("a.jsonl", answers)):
            (path := tmp_path / name).write_bytes(content) if isinstance(content, bytes) else lines(path := tmp_path / name, content)
            paths.append(path)
        return command("--task", "pope", "--questions", paths[0], "--score_only", "--answers", paths[1], *more)

    return run


def test_the_good_one_is_good(pope):
    assert pope()["scores"]["accuracy"] == 100


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "--task is required"),
    (["--task", "vqa"], "should be one of <captions|vqav2|gqa|textvqa|scienceqa|pope|mme|exact_match>"),
    (["--task", "pope"], "--questions is required"),
    (["--task", "pope", "--questions", "q.jsonl"], "--model is required, or --score_only"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", "m"], "--output is required"),
    (["--task", "pope", "--questions", "q.jsonl", "--score_only"], "--score_only needs --answers"),
    (["--task", "pope", "--questions", "q.jsonl", "--answers", "a.jsonl"], "add --score_only"),
    (["--task", "pope", "--questions", "gone.jsonl", "--score_only", "--answers", "a.jsonl"], "--questions gone.jsonl: there is no such file"),
    (["--task", "pope", "--questions", "q.jsonl", "--score_only", "--answers", "gone.jsonl"], "--answers gone.jsonl: there is no such file"),
    (["--task", "pope", "--questions", "q.jsonl", "--annotations", "gone", "--score_only", "--answers", "a.jsonl"], "--annotations gone: there is no such"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", "gone", "--output", "o.json"], "--model: there is no gone"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", ".", "--output", "o.json"], "--image_folder is required: 3 of 3 questions have pictures"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", ".", "--output", "o.json", "--image_folder", "gone"], "--image_folder gone: there is no such"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", ".", "--output", "gone/o.json"], "--output gone/o.json: its folder does not exist"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", ".", "--output", "."], "--output .: is a folder"),
    (["--task", "pope", "--questions", "q.jsonl", "--model", ".", "--output", "o.json", "--batch_size", "0"], "--batch_size is 0, expected at least 1"),
    (["--task", "pope", "--questions", "q.jsonl", "--score_only", "--answers", "a.jsonl", "--output", "./a.jsonl"], "./a.jsonl: is what --answers reads"),
    (["--task", "mme", "--questions", "q.jsonl", "--score_only", "--answers", "a.jsonl"], "is no folder of CATEGORY.txt"),
])  # fmt: skip
def test_arguments(tmp_path, monkeypatch, command, arguments, words):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "q.jsonl", GOOD)
    lines(tmp_path / "a.jsonl", ANSWERS)
    assert words in command(*arguments)


@pytest.mark.parametrize(("questions", "words"), [
    (b"", "is empty, expected JSON"),
    (b" \n", "is empty, expected JSON"),
    (b"\xff\xfe", "not UTF-8 at byte 0"),
    (b"hello", "q.jsonl: not valid JSON"),
    (b"[]", "found a list of 0, expected a list of objects"),
    (b"3", "found 3, expected a list of objects"),
    (b"[1, 2]", "record 0: found 1, expected an object"),
    (json.dumps(GOOD[0]).encode() + b"\n{\n", "line 2 is not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (GOOD[:2] + [{"question_id": 2, "image": "a.jpg", "text": "?"}], "line 3: has no 'label'; found question_id, image, text"),
    ([{**GOOD[0], "label": "Yes"}], "line 1: 'label' is 'Yes', expected yes or no"),
    ([GOOD[0], {**GOOD[1], "text": None}], "line 2: 'text' is nothing or null, expected a text"),
    ([GOOD[0], {**GOOD[1], "question_id": 1.5}], "line 2: 'question_id' is 1.5, expected a text or a whole number"),
    ([GOOD[0], {**GOOD[1], "question_id": 0}, GOOD[2]], "2 questions have the id '0'"),
])  # fmt: skip
def test_questions(pope, questions, words):
    assert words in pope(questions)


@pytest.mark.parametrize(("answers", "words"), [
    (ANSWERS[:1], "a.jsonl: lacks 2 of 3 answers, the first to question 1"),
    (b"[]", "expected a list of objects, at least one"),
    (ANSWERS + [{"question_id": 7, "text": "no"}], "line 4: answers question '7', which is not among the 3 questions"),
    (ANSWERS + [{"question_id": 2, "text": "no"}], "line 4: a second answer to question '2'"),
    (ANSWERS[:2] + [{"question_id": 2}], "line 3: has none of text, answer, prediction, caption; found question_id"),
    (ANSWERS[:2] + [{"text": "no"}], "line 3: has none of question_id, questionId, image_id, id"),
    (ANSWERS[:2] + [{"question_id": 2, "text": 3}], "line 3: 'text' is 3, expected a text"),
    (b'{"question_id": 0, "text": "yes"}\n{"question_id": 1, "te', "line 2 is not valid JSON"),
])  # fmt: skip
def test_answers(pope, answers, words):
    assert words in pope(answers=answers)


def test_missing_as_wrong(pope):
    assert pope(GOOD, ANSWERS[:1] + [{"question_id": 1, "text": "no"}], "--missing_as_wrong")["num_questions"] == 3


def test_what_the_originals_let_pass(tmp_path, command):  # noqa: F811
    """GQA and ScienceQA leave out answers to other questions, and of two answers take the last; so do we, and say it."""
    asked = dump(tmp_path / "p.json", {"1": {"question": "?", "choices": ["a", "b"], "answer": 1}})
    given = [{"question_id": "1", "text": "A"}, {"question_id": "2", "text": "A"}, {"question_id": "1", "text": "B"}]
    found = command("--task", "scienceqa", "--questions", asked, "--score_only", "--answers", lines(tmp_path / "a.jsonl", given))
    assert found["scores"]["accuracy"] == 100
    assert "1 answers to other questions are left out" in command.err and "1 answers take the place of earlier ones" in command.err


VQA_ANSWERS = [{"answer": "yes", "answer_id": i} for i in range(10)]


@pytest.mark.parametrize(("task", "questions", "annotations", "words"), [
    ("vqav2", {"questions": [{"question_id": 1, "image_id": 2}]}, None, "q.json: questions: record 0: has no 'question'"),
    ("vqav2", {"questions": [{"question_id": 1, "image_id": 2, "question": "?"}]}, {"annotations": [{"question_id": 2, "answers": VQA_ANSWERS}]},
     "the annotations have no question 1"),
    ("vqav2", {"questions": [{"question_id": 1, "image_id": 2, "question": "?"}]},
     {"annotations": [{"question_id": i, "answers": VQA_ANSWERS} for i in (1, 2)]}, "lacks 1 questions of the annotations, the first is '2'"),
    ("vqav2", {"questions": [{"question_id": 1, "image_id": 2, "question": "?"}]}, {"annotations": [{"question_id": 1, "answers": []}]}, "'answers' is empty"),
    ("vqav2", {"questions": [{"question_id": 1, "image_id": 2, "question": "?"}]}, {"annotations": [{"question_id": 1, "answers": [{}]}]},
     "record 0: answer 0: has no 'answer'"),
    ("gqa", {"1": {"question": "?", "answer": "yes", "isBalanced": True}}, None, "record '1': has no 'types'"),
    ("gqa", {"1": {"question": "?", "answer": "yes", "types": {"structural": "verify"}}}, None, "record '1': types: has no 'semantic'"),
    ("gqa", {"1": {"question": "?", "answer": "yes", "types": {"structural": "verify", "semantic": "obj"}, "groups": {"global": ["x"]}}}, None,
     "record '1': groups: 'global' is a list of 1, expected a text"),
    ("gqa", {"1": {"question": "?", "answer": "yes", "types": {"structural": "verify", "semantic": "obj", "detailed": 3}}}, None,
     "record '1': types: 'detailed' is 3, expected a text"),
    ("gqa", {"1": {"question": "?", "answer": "yes", "types": {"structural": "verify", "semantic": "obj"},
                   "semantic": [{"operation": "exist", "argument": None}, {"operation": "select", "argument": 3}]}}, None,
     "record '1': semantic: 'argument' is 3, expected a text or null"),
    ("textvqa", {"data": [{"question_id": 1, "image_id": "a", "question": "?", "answers": ["x"] * 9}]}, None, "'answers' has 9 members, expected 10 texts"),
    ("scienceqa", {"1": {"question": "?", "answer": 0}}, None, "record '1': has no 'choices'"),
    ("scienceqa", {"1": {"question": "?", "choices": ["a"], "answer": 1}}, None, "'answer' is 1, expected the index of one of its 1 choices"),
    ("scienceqa", {"1": {"question": "?", "choices": ["a"], "answer": 0}}, {"train": ["1"]}, "no problem of split 'test'; found train"),
    ("scienceqa", {"1": {"question": "?", "choices": ["a"], "answer": 0}}, {"test": ["1", "5"]}, "lacks 1 problems of split 'test', the first is '5'"),
    ("captions", {"images": [{"file_name": "a.jpg"}]}, None, "images: record 0: has no 'id'"),
    ("captions", {"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "x"}]}, None, "image 1 has no caption"),
    ("captions", [{"question_id": 1, "image": "a.jpg", "text": "?"}], 3, "t.json: found 3, expected a list of objects"),
    ("captions", [{"question_id": 1, "image": "a.jpg", "text": "?"}], [{"question_id": 1, "text": "x"}], "t.json: record 0: has no 'image_id'"),
    ("exact_match", [{"conversations": [{"from": "human", "value": "?"}]}], None, "q.json: record 0: conversations"),
])  # fmt: skip
def test_each_benchmarks_own_files(tmp_path, command, task, questions, annotations, words):  # noqa: F811
    if task == "captions":
        pytest.importorskip("pycocoevalcap")
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "yes"}])
    more = ["--annotations", dump(tmp_path / "t.json", annotations)] if annotations else []
    assert words in command("--task", task, "--questions", dump(tmp_path / "q.json", questions), *more, "--score_only", "--answers", answers)


@pytest.mark.parametrize(("text", "words"), [
    ("a.png\tQ?\tYes\tyes\n", "has 1 lines, expected two for each picture"),
    ("a.png\tQ?\tYes\n" * 2, "line 1: has no fourth field"),
    ("a.png\tQ?\tMaybe\tyes\n" * 2, "line 1: truth is 'Maybe', expected Yes or No"),
    ("a.png\tQ?\tYes\tyes\n" + "a.png Q? Yes yes\n", "line 2: has 1 fields between tabs"),
    ("", "line 1: has 1 fields between tabs"),
])  # fmt: skip
def test_mmes_files(tmp_path, command, text, words):  # noqa: F811
    (tmp_path / "existence.txt").write_text(text)
    assert words in command("--task", "mme", "--questions", tmp_path, "--score_only", "--answers", tmp_path)


def test_captions_without_the_library_stop_before_anything_is_asked(tmp_path, command, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    asked = dump(tmp_path / "q.json", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]})
    assert "pip install pycocoevalcap" in command("--task", "captions", "--questions", asked, "--model", tmp_path, "--output", tmp_path / "o.json")


def test_what_cannot_be_written(tmp_path, command):  # noqa: F811
    (tmp_path / "o.submission.jsonl").mkdir()
    asked, answers = lines(tmp_path / "q.jsonl", GOOD), lines(tmp_path / "a.jsonl", ANSWERS)
    error = command("--task", "pope", "--questions", asked, "--score_only", "--answers", answers, "--output", tmp_path / "o.json")
    assert f"{tmp_path / 'o.submission.jsonl'} cannot be written (Is a directory)" in error
