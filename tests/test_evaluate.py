"""python -m neva_jax.evaluate: official files in, the official evaluators' scores out; what is refused, and in which words."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, golden
from PIL import Image

from neva_jax import cli, evaluate

EXACT = 1e-9


def cases(name: str) -> dict:
    with gzip.open(golden(name)) as file:
        return json.load(file)


def close(value):
    return pytest.approx(value, rel=EXACT, abs=EXACT)


def dump(path: Path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def lines(path: Path, values) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture
def command(capsys):
    def run(*arguments) -> dict | str:
        """What the command prints with --json, or its one line of error."""
        with pytest.raises(SystemExit) as end:
            cli.run(evaluate.main, evaluate.define_flags, ["evaluate", "--json", *map(str, arguments)], with_config=False)
        out, run.err = capsys.readouterr()
        if end.value.code == 0:
            return json.loads(out)
        assert end.value.code == 2 and out == ""
        (line,) = [line for line in run.err.splitlines() if not line.startswith("warning: ")]
        return line.removeprefix("error: ")

    return run


# ---- official files ------------------------------------------------------------------------------------------------------------------------------------


def vqav2_files(folder: Path, found: list[dict]) -> tuple:
    questions = [{"question_id": case["question_id"], "image_id": 42, "question": f"What is {i}?"} for i, case in enumerate(found)]
    answers = [
        {"question_id": case["question_id"], "image_id": 42, "question_type": case["question_type"], "answer_type": case["answer_type"],
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(case["gt_answers"], 1)]}
        for case in found
    ]  # fmt: skip
    asked = dump(folder / "questions.json", {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "questions": questions})
    return "--task", "vqav2", "--questions", asked, "--annotations", dump(folder / "annotations.json", {"annotations": answers})


def test_vqav2(tmp_path, command):
    found = cases("evaluation/vqav2.json.gz")
    files = vqav2_files(tmp_path, found["cases"])
    official = dump(tmp_path / "answers.json", [{"question_id": case["question_id"], "answer": case["answer"]} for case in found["cases"]])
    result = command(*files, "--score_only", "--answers", official, "--output", tmp_path / "out.json")
    assert (result["task"], result["num_questions"]) == ("vqav2", len(found["cases"]))
    assert result["scores"]["accuracy"] == close(found["overall"]["n10"]["overall"])
    assert result["scores"]["per_answer_type"] == close(found["overall"]["n10"]["perAnswerType"])
    assert result["scores"]["submission"]["per_question_type"] == close(found["overall_llava_submission"]["n10"]["perQuestionType"])
    uploaded = json.loads((tmp_path / "out.submission.json").read_text())
    assert uploaded == [{"question_id": case["question_id"], "answer": case["llava_submission_answer"]} for case in found["cases"]]
    again = command(*files, "--score_only", "--answers", tmp_path / "out.submission.json")
    assert again["scores"]["accuracy"] == close(found["overall_llava_submission"]["n10"]["overall"])
    marks = [answer["mark"] for answer in json.loads((tmp_path / "out.json").read_text())["answers"]]
    assert marks == [close(case["accuracy"]) for case in found["cases"]]


def test_a_test_split_has_no_truth(tmp_path, command):
    asked = lines(tmp_path / "test.jsonl", [{"question_id": 7, "image": "a.jpg", "text": "Two?\nAnswer the question using a single word or phrase."}])
    answers = lines(tmp_path / "answers.jsonl", [{"question_id": 7, "prompt": "Two?", "text": "Two."}])
    result = command("--task", "vqav2", "--questions", asked, "--score_only", "--answers", answers, "--output", tmp_path / "out.json")
    assert result["scores"] == {}
    assert json.loads((tmp_path / "out.submission.json").read_text()) == [{"question_id": 7, "answer": "2"}]
    assert not (tmp_path / "out.png").exists()


def gqa_record(case: dict) -> dict:
    return {
        "question": case["question"], "imageId": "2405722", "answer": case["answer"], "isBalanced": case["is_balanced"], "types": case["types"],
        "groups": {"global": case["group_global"], "local": None}, "entailed": case["entailed"],
        "semantic": [{"operation": operation, "argument": argument, "dependencies": []} for operation, argument in case["semantic"]],
    }  # fmt: skip


@pytest.mark.parametrize("form", ["LLaVA's lines", "predictions"])
def test_gqa(tmp_path, command, form):
    found = cases("evaluation/gqa.json.gz")
    questions = dump(tmp_path / "questions.json", {case["question_id"]: gqa_record(case) for case in found["cases"]})
    choices = dump(tmp_path / "choices.json", {case["question_id"]: {"valid": case["valid"], "plausible": case["plausible"]} for case in found["cases"]})
    if form == "predictions":
        answers = dump(tmp_path / "a.json", [{"questionId": case["question_id"], "prediction": case["converted_prediction"]} for case in found["cases"]])
    else:
        answers = lines(tmp_path / "a.jsonl", [{"question_id": case["question_id"], "prompt": "?", "text": case["raw_prediction"]} for case in found["cases"]])
    arguments = ("--task", "gqa", "--questions", questions, "--score_only", "--answers", answers, "--output", tmp_path / "out.json")
    scores = command(*arguments, "--annotations", choices)["scores"]
    for name in ("accuracy", "binary", "open", "validity", "plausibility", "consistency", "distribution"):
        assert scores[name] == close(found["result_consistency"][name]), name
    assert scores["per_words"] == {name: close(cut) for name, cut in found["result"]["accuracyPerLength"].items()}
    assert command(*arguments)["scores"]["validity"] == found["result_without_choices_file"]["validity"]
    uploaded = json.loads((tmp_path / "out.submission.json").read_text())
    assert uploaded == [{"questionId": case["question_id"], "prediction": case["converted_prediction"]} for case in found["cases"]]


def test_gqa_edges(tmp_path, command):
    for i, case in enumerate(cases("evaluation/gqa.json.gz")["edge_cases"]):
        (folder := tmp_path / str(i)).mkdir()
        questions = dump(folder / "questions.json", {name: {"imageId": "1"} | record for name, record in case["questions"].items()})
        yes_no = {"valid": ["yes", "no"], "plausible": ["yes", "no"]}
        choices = dump(folder / "choices.json", {name: yes_no for name in case["questions"]})
        answers = dump(folder / "answers.json", [{"questionId": name, "prediction": text} for name, text in case["predictions"]])
        found = command("--task", "gqa", "--questions", questions, "--annotations", choices, "--score_only", "--answers", answers)
        if "error" in case["result"]:
            assert isinstance(found, str) and "lacks 1 of 2 answers, the first to question '2'" in found, case["tag"]
            continue
        scores, official = found["scores"], case["result"]
        for name in {"accuracy", "binary", "open", "distribution", "consistency"} & official.keys():
            assert scores[name] == close(official[name]), (case["tag"], name)
        assert scores["per_structural_type"] == {name: close(cut) for name, cut in official["accuracyPerStructuralType"].items()}


@pytest.mark.parametrize("asked", ["official", "LLaVA's"])
def test_textvqa(tmp_path, command, asked):
    """Ten questions a picture, so that answers are told apart by their prompts, and not in the questions' order."""
    found = cases("evaluation/textvqa.json.gz")
    data = [
        {"question_id": i, "image_id": f"im{i // 10}", "question": f"What is {i}?", "answers": case["gt_answers"]} for i, case in enumerate(found["cases"])
    ]
    official = dump(tmp_path / "val.json", {"dataset_type": "val", "data": data})
    short = "Answer the question using a single word or phrase."
    texts = [f"{d['question'].lower()}\nReference OCR token: {d['question']}\n{short}" for d in data]
    rows = [{"question_id": d["image_id"], "image": d["image_id"] + ".jpg", "text": text} for d, text in zip(data, texts, strict=True)]
    given = [{"question_id": r["question_id"], "prompt": r["text"], "text": c["pred_answer"]} for r, c in zip(rows, found["cases"], strict=True)]
    answers = lines(tmp_path / "a.jsonl", given[::-1])
    questions = ("--questions", official) if asked == "official" else ("--questions", lines(tmp_path / "q.jsonl", rows), "--annotations", official)
    result = command("--task", "textvqa", *questions, "--score_only", "--answers", answers)
    assert result["scores"] == {"accuracy": close(100 * found["overall_accuracy"])}


def pope_files(folder: Path, splits: dict) -> str:
    folder.mkdir()
    for split, found in splits.items():
        lines(folder / f"coco_pope_{split}.json", [
            {"question_id": i, "image": item["image"], "text": item["question"], "label": item["label"]} for i, item in enumerate(found["items"], 1)
        ])  # fmt: skip
    return str(folder)


def test_pope(tmp_path, command):
    splits = cases("evaluation/pope.json.gz")["splits"]
    folder = pope_files(tmp_path / "coco", splits)
    items = [(split, item) for split, found in splits.items() for item in found["items"]]
    short = "\nAnswer the question using a single word or phrase."
    rows = [{"question_id": i, "image": item["image"], "text": item["question"] + short, "category": split} for i, (split, item) in enumerate(items)]
    answers = lines(tmp_path / "a.jsonl", [{"question_id": i, "prompt": row["text"], "text": items[i][1]["text"]} for i, row in enumerate(rows)])
    result = command("--task", "pope", "--questions", lines(tmp_path / "q.jsonl", rows), "--annotations", folder, "--score_only", "--answers", answers)
    for split, found in splits.items():
        ours, official = result["scores"]["splits"][split], found["result"]
        assert [ours[n] for n in ("TP", "FP", "TN", "FN")] == [official[n] for n in ("TP", "FP", "TN", "FN")]
        assert (ours["f1"], ours["yes_share"]) == (close(100 * official["f1"]), close(100 * official["yes_ratio"]))
    one = next(iter(splits))
    given = [{"question_id": i, "text": item["text"]} for i, item in enumerate(splits[one]["items"], 1)]
    single = command("--task", "pope", "--questions", f"{folder}/coco_pope_{one}.json", "--score_only", "--answers", lines(tmp_path / "one.jsonl", given))
    assert single["scores"]["splits"] == {one: result["scores"]["splits"][one]}


def test_mme(tmp_path, command):
    for i, found in enumerate(cases("evaluation/mme.json.gz")["sets"]):
        (folder := tmp_path / str(i)).mkdir()
        for name, text in found["files"].items():
            (folder / f"{name}.txt").write_text(text)
        out = tmp_path / f"out{i}.json"
        scores = command("--task", "mme", "--questions", folder, "--score_only", "--answers", folder, "--output", out)["scores"]
        assert (scores["perception"], scores["cognition"]) == (close(found["result"]["perception"]), close(found["result"]["cognition"]))
        again = command("--task", "mme", "--questions", folder, "--score_only", "--answers", tmp_path / f"out{i}.submission")["scores"]
        assert again == scores


def test_mme_as_llava_asks_it(tmp_path, command):
    """Two questions with one id, told apart by their prompts; the official folder has the truth."""
    files = cases("evaluation/mme.json.gz")["sets"][0]["files"]
    (folder := tmp_path / "official").mkdir()
    rows, answers = [], []
    for name, text in files.items():
        found = [line.split("\t") for line in text.rstrip("\n").split("\n")]
        (folder / f"{name}.txt").write_text("".join("\t".join(fields[:3]) + "\n" for fields in found))
        for image, question, _, answer in found:
            prompt = f"{question}\nAnswer the question using a single word or phrase."
            rows.append({"question_id": f"{name}/{image}", "image": f"{name}/{image}", "text": prompt, "category": name})
            answers.append({"question_id": f"{name}/{image}", "prompt": prompt, "text": answer})
    asked, given = lines(tmp_path / "llava_mme.jsonl", rows), lines(tmp_path / "a.jsonl", answers)
    scores = command("--task", "mme", "--questions", asked, "--annotations", folder, "--score_only", "--answers", given)["scores"]
    result = cases("evaluation/mme.json.gz")["sets"][0]["result"]
    assert (scores["perception"], scores["cognition"]) == (close(result["perception"]), close(result["cognition"]))


def sqa_files(folder: Path, found: list[dict]) -> tuple:
    problems = {
        row["question_id"]: {"question": "Which?", "choices": row["choices"], "answer": row["answer"], "image": "i.png" if row["has_image"] else None}
        for row in found
    }
    dump(folder / "pid_splits.json", {"train": ["1"], "test": list(problems)})
    return "--task", "scienceqa", "--questions", dump(folder / "problems.json", problems | {"1": problems["4"]})


@pytest.mark.parametrize("prompts", [True, False])
def test_scienceqas_published_answers(tmp_path, command, prompts):
    found = cases("sqa_labelled.json.gz")
    given = [
        {"question_id": row["question_id"], "text": row["prediction"]} | ({"prompt": "<image>\nWhich?" if row["has_image"] else "Which?"} if prompts else {})
        for row in found["rows"]
    ]
    answers = lines(tmp_path / "a.jsonl", given + [{"question_id": "99999", "prompt": "of another split", "text": "A"}])
    result = command(*sqa_files(tmp_path, found["rows"]), "--score_only", "--answers", answers, "--output", tmp_path / "out.json")
    assert result["scores"]["accuracy"] == close(91.13573407202216)
    assert result["scores"]["img_accuracy"] == close(89.22155688622755)
    written = json.loads((tmp_path / "out.submission.json").read_text())
    assert written["results"] == {row["question_id"]: row["pred"] for row in found["rows"]}
    again = command(*sqa_files(tmp_path, found["rows"]), "--score_only", "--answers", tmp_path / "out.submission.json")
    assert again["scores"] == result["scores"]


@pytest.mark.parametrize("answer", ["LECTURE: l\n###\nANSWER: {}.", "l s The answer is {}."])
def test_scienceqas_4241_answers(tmp_path, command, answer):
    """All that LLaVA published, with its own chat file for questions: each parses to the index that stands in LLaVA's results."""
    rows = cases("sqa.json.gz")["rows"]
    options = "(A) a (B) b (C) c (D) d (E) e"
    asked = dump(tmp_path / "q.json", [
        {"id": name, "conversations": [{"from": "human", "value": f"Which?\nContext: N/A\nOptions: {options}"},
                                       {"from": "gpt", "value": answer.format("ABCDE"[max(0, index)])}]}
        for name, _, _, index in rows
    ])  # fmt: skip
    answers = lines(tmp_path / "a.jsonl", [{"question_id": name, "prompt": "Which?", "text": text} for name, text, *_ in rows])
    result = command("--task", "scienceqa", "--questions", asked, "--score_only", "--answers", answers, "--output", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.submission.json").read_text())["results"] == {name: index for name, _, _, index in rows}
    failed = sum(index == -1 for *_, index in rows)
    assert (result["num_questions"], result["scores"]["num_correct"]) == (4241, 4241 - failed)
    assert result["scores"]["img_accuracy"] is None


def test_scienceqa_missing_answers_are_wrong_and_said(tmp_path, command):
    found = cases("evaluation/scienceqa_parse.json.gz")
    problems = {case["id"]: {"question": "?", "choices": case["choices"], "answer": case["answer_index"]} for case in found["cases"]}
    given = [
        {"question_id": case["id"], "prompt": "<image>" * case["is_multimodal"], "text": case["text"]} for case in found["cases"] if case["text"] is not None
    ]
    asked, answers = dump(tmp_path / "problems.json", problems), lines(tmp_path / "a.jsonl", given[:-1])
    result = command("--task", "scienceqa", "--questions", asked, "--score_only", "--answers", answers)
    lost = found["cases"][-1]["correct"] if found["cases"][-1]["text"] is not None else False
    assert result["scores"]["accuracy"] == close(100 * (found["correct"] - lost) / found["count"])
    assert "questions have no answer" in command.err


def test_captions(tmp_path, command):
    pytest.importorskip("pycocoevalcap")
    found = cases("evaluation/captions.json.gz")
    coco = {
        "images": [{"id": image["image_id"], "file_name": f"COCO_val2014_{image['image_id']}.jpg"} for image in found["images"]],
        "annotations": [{"image_id": image["image_id"], "id": i, "caption": text} for i, image in enumerate(found["images"]) for text in image["references"]],
    }
    answers = dump(tmp_path / "results.json", [{"image_id": image["image_id"], "caption": image["prediction"]} for image in found["images"]])
    arguments = ("--task", "captions", "--questions", dump(tmp_path / "coco.json", coco), "--score_only", "--answers", answers, "--output", tmp_path / "o.json")
    scores = command(*arguments)["scores"]
    assert {name: scores[name] for name in found["corpus"]} == pytest.approx(found["corpus"], rel=EXACT, abs=EXACT)
    assert json.loads((tmp_path / "o.submission.json").read_text()) == json.loads(Path(answers).read_text())


def test_exact_match(tmp_path, command):
    asked = str(ROOT / "examples" / "digits" / "test.json")
    first = json.loads(Path(asked).read_text())
    answers = []
    for record in first:
        turns = record["conversations"]
        names = [f"{record['id']}/{i}" for i in range(len(turns) // 2)] if len(turns) > 2 else [record["id"]]
        answers += [{"question_id": name, "text": turn["value"].upper() + "."} for name, turn in zip(names, turns[1::2], strict=True)]
    answers[0]["text"] = "something else"
    tar = ROOT / "examples" / "digits" / "images.tar"
    result = command("--task", "exact_match", "--questions", asked, "--score_only", "--answers", lines(tmp_path / "a.jsonl", answers), "--image_folder", tar,
                     "--output", tmp_path / "out.json")  # fmt: skip
    assert result["scores"]["accuracy"] == close(100 * (len(answers) - 1) / len(answers))
    page = Image.open(tmp_path / "out.png")
    assert page.width == 3 * 460 and page.height > 500


def test_scoring_imports_nothing_heavy(tmp_path):
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "yes"}])
    asked = lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}])
    code = ("import sys, atexit; from neva_jax import cli, evaluate; "
            "atexit.register(lambda: print(sorted({'jax', 'flax', 'torch', 'grain', 'orbax'} & set(sys.modules)), file=sys.stderr)); "
            "cli.run(evaluate.main, evaluate.define_flags, with_config=False)")  # fmt: skip
    command = [sys.executable, "-c", code, "--task=pope", "--questions", asked, "--score_only", "--answers", answers, "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert json.loads(result.stdout)["scores"]["accuracy"] == 100
    assert result.stderr == "[]\n"
