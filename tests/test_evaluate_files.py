"""python -m neva_jax.evaluate: the files that POPE's, TextVQA's and MME's own tools and LLaVA's scripts leave, beside those of test_evaluate."""

import json
from pathlib import Path

import pytest
from test_evaluate import cases, close, command, dump, lines, pope_files  # noqa: F401 (a fixture)


def pope_items() -> tuple[dict, list]:
    splits = cases("evaluation/pope.json.gz")["splits"]
    return splits, [(split, item) for split, found in splits.items() for item in found["items"]]


def test_pope_folder_whose_ids_do_not_repeat(tmp_path, command):  # noqa: F811
    splits, items = pope_items()
    (folder := tmp_path / "coco").mkdir()
    for split, found in splits.items():
        rows = [{"question_id": item["question_id"], "image": item["image"], "text": item["question"], "label": item["label"]} for item in found["items"]]
        lines(folder / f"coco_pope_{split}.json", rows)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": item["question_id"], "text": item["text"]} for _, item in items])
    scores = command("--task", "pope", "--questions", folder, "--score_only", "--answers", answers)["scores"]
    assert {split: scores["splits"][split]["f1"] for split in splits} == {split: close(100 * found["result"]["f1"]) for split, found in splits.items()}


def test_popes_own_answers_have_no_ids(tmp_path, command):  # noqa: F811
    splits, items = pope_items()
    arguments = ("--task", "pope", "--questions", pope_files(tmp_path / "coco", splits), "--score_only", "--answers")
    rows = [{"question": item["question"], "answer": item["text"]} for split in sorted(splits) for item in splits[split]["items"]]
    found = command(*arguments, lines(tmp_path / "a.jsonl", rows), "--output", tmp_path / "out.json")
    assert found["scores"]["f1"] == close(sum(100 * split["result"]["f1"] for split in splits.values()) / len(splits))
    assert command(*arguments, tmp_path / "out.submission.jsonl")["scores"] == found["scores"]
    assert "line 1: answers another question" in command(*arguments, lines(tmp_path / "a.jsonl", [rows[0] | {"question": "Is it?"}, *rows[1:]]))
    assert "answers one question more" in command(*arguments, lines(tmp_path / "a.jsonl", rows + rows[:1]))
    assert "lacks 1 of" in command(*arguments, lines(tmp_path / "a.jsonl", rows[:-1]))


def textvqa_of_three(folder: Path) -> tuple[str, list[dict]]:
    data = [{"question_id": 34602 + i, "image_id": f"im{i // 2}", "question": f"What is {i}?", "answers": [f"word{i}"] * 10} for i in range(3)]
    return dump(folder / "val.json", {"data": data}), data


def test_textvqa_submission_has_the_ids_of_questions(tmp_path, command):  # noqa: F811
    official, data = textvqa_of_three(tmp_path)
    rows = [{"question_id": d["image_id"], "image": "a.jpg", "text": d["question"] + "\nAnswer the question using a single word or phrase."} for d in data]
    files = ("--task", "textvqa", "--questions", lines(tmp_path / "q.jsonl", rows), "--annotations", official, "--score_only", "--answers")
    given = [{"question_id": r["question_id"], "prompt": r["text"], "text": f"Word{i}."} for i, r in enumerate(rows)]
    scores = command(*files, lines(tmp_path / "a.jsonl", given), "--output", tmp_path / "out.json")["scores"]
    assert scores["accuracy"] == 100
    uploaded = json.loads((tmp_path / "out.submission.json").read_text())
    assert uploaded == [{"question_id": 34602 + i, "answer": f"word{i}"} for i in range(3)]
    assert command(*files, tmp_path / "out.submission.json")["scores"] == scores


def test_textvqa_official_file_as_questions_and_as_annotations(tmp_path, command):  # noqa: F811
    official, data = textvqa_of_three(tmp_path)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": d["question_id"], "text": f"word{i}"} for i, d in enumerate(data)])
    assert command("--task", "textvqa", "--questions", official, "--annotations", official, "--score_only", "--answers", answers)["scores"]["accuracy"] == 100
    other = dump(tmp_path / "other.json", {"data": data[:2]})
    error = command("--task", "textvqa", "--questions", official, "--annotations", other, "--score_only", "--answers", answers)
    assert "the annotations have no question 'what is 2?' of 'im1'" in error


@pytest.mark.parametrize("inner", ["", "questions_answers_YN"])
def test_mme_release_and_llavas_converted_answers(tmp_path, command, inner):  # noqa: F811
    """PICTURE.txt in a folder for each category, as the release has them; results in which LLaVA's script named pictures PICTURE.txt, in another order."""
    (results := tmp_path / "results").mkdir()
    release, pictures = tmp_path / "release" / "scene" / inner, tmp_path / "release" / "scene" / ("images" if inner else "")
    for folder in (release, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (release / f"{i}.txt").write_text(f"Is a{i}? Please answer yes or no.\tYes\nIs b{i}? Please answer yes or no.\tNo\n")
        (pictures / f"{i}.jpg").touch()
    said = [(i, letter, "Yes" if letter == "a" or i == 1 else "No") for i in (2, 0, 1) for letter in "ba"]
    truth = {"a": "Yes", "b": "No"}
    (results / "scene.txt").write_text("\n".join(f"{i}.txt\tIs {x}{i}?  Please answer yes or no.\t{truth[x]}\t{a}" for i, x, a in said))
    given = [{"question_id": f"scene/{i}.jpg", "prompt": f"Is {x}{i}? Please answer yes or no.", "text": a} for i, x, a in said]
    asked = [{"question_id": g["question_id"], "image": f"scene/{'images/' * bool(inner)}{g['question_id'][6:]}", "text": g["prompt"]} for g in given]
    answers, chat = lines(tmp_path / "a.jsonl", given), lines(tmp_path / "q.jsonl", asked)
    for questions in (("--questions", tmp_path / "release"), ("--questions", chat, "--annotations", tmp_path / "release")):
        for made in (answers, results):
            scene = command("--task", "mme", *questions, "--score_only", "--answers", made)["scores"]["categories"]["scene"]
            assert (scene["acc"], scene["acc_plus"], scene["FP"]) == (close(500 / 6), close(200 / 3), 1)


def test_mme_submission_keeps_where_an_answer_begins(tmp_path, command):  # noqa: F811
    (folder := tmp_path / "mme").mkdir()
    (folder / "OCR.txt").write_text("1.jpg\tA?\tYes\n1.jpg\tB?\tYes\n")
    texts = ["    yes", "\nyes\t\ud800"]  # the first is other, as yes does not begin in its first letters
    given = [{"question_id": "OCR/1.jpg", "prompt": prompt, "text": text} for prompt, text in zip(("A?", "B?"), texts, strict=True)]
    arguments = ("--task", "mme", "--questions", folder, "--score_only", "--answers")
    found = command(*arguments, lines(tmp_path / "a.jsonl", given), "--output", tmp_path / "out.json")["scores"]
    assert found["categories"]["OCR"]["other_num"] == 1
    assert command(*arguments, tmp_path / "out.submission")["scores"] == found


def test_several_questions_of_one_conversation_are_told_apart_by_their_prompts(tmp_path, command):  # noqa: F811
    turns = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Red."}, {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "2"}]
    asked = dump(tmp_path / "q.json", [{"id": "a", "conversations": turns}])
    given = [{"question_id": "a", "prompt": "How many?", "text": "2"}, {"question_id": "a", "prompt": "Colour?", "text": "red"}]
    arguments = ("--task", "exact_match", "--questions", asked, "--score_only", "--answers")
    assert command(*arguments, lines(tmp_path / "a.jsonl", given))["scores"]["accuracy"] == 100
    assert "2 questions have the id 'a'" in command(*arguments, lines(tmp_path / "b.jsonl", [{"question_id": "a", "text": "red"}] * 2))


def test_a_score_needs_no_pictures(tmp_path, command):  # noqa: F811
    """Neither VQAv2's image_id nor COCO's list of images; a model cannot be asked then."""
    questions = dump(tmp_path / "q.json", {"questions": [{"question_id": 7, "question": "Is it?"}]})
    truth = dump(tmp_path / "t.json", {"annotations": [{"question_id": 7, "answers": [{"answer": "yes", "answer_id": i} for i in range(10)]}]})
    vqa = ("--task", "vqav2", "--questions", questions, "--annotations", truth)
    assert command(*vqa, "--score_only", "--answers", lines(tmp_path / "a.jsonl", [{"question_id": 7, "text": "yes"}]))["scores"]["accuracy"] == 100
    assert "names no picture to ask a model about" in command(*vqa, "--model", tmp_path, "--output", tmp_path / "out.json")
    pytest.importorskip("pycocoevalcap")
    people = [{"image_id": i, "caption": f"a {word} on a mat"} for i, word in ((3, "cat"), (3, "pet"), (9, "dog"))]
    captions = dump(tmp_path / "c.json", {"annotations": people})
    answers = lines(tmp_path / "said.jsonl", [{"image_id": 9, "caption": "a dog on a mat"}, {"image_id": 3, "caption": "a cat on a mat"}])
    assert command("--task", "captions", "--questions", captions, "--score_only", "--answers", answers)["scores"]["Bleu_1"] == close(1.0)


def test_questions_given_for_answers(tmp_path, command):  # noqa: F811
    row = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}
    questions = lines(tmp_path / "q.json", [row, row | {"question_id": 2, "text": "Is that?"}])
    assert "every answer is its own question" in command("--task", "pope", "--questions", questions, "--score_only", "--answers", questions)
