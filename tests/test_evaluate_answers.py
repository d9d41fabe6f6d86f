"""Answers as they are made: what is asked, how it is written, and a command that was killed. A stand-in answers, but for one run of a real tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import models_of_ours
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from test_evaluate import command, dump, lines  # noqa: F401 (a fixture)

from neva_jax import evaluate
from neva_jax.errors import UserError
from neva_jax.evaluation import asking

SHORT = "Answer the question using a single word or phrase."


class StandIn:
    """Answers a question by its length and its pictures' sizes. stop_after: batches that it answers before it is killed."""

    def __init__(self):
        self.asked, self.loads, self.stop_after, self.options = [], 0, None, None

    def from_pretrained(self, path, **options):
        self.loads, self.options = self.loads + 1, options
        return self

    def answers(self, prompts, images, *, batch_size, **options):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.options = options
        self.asked.append(prompts)
        for i, pictures in enumerate(images):
            for j, data in enumerate(pictures):
                if not data.startswith(b"\x89PNG"):
                    raise UserError(f"prompt {i}: picture {j}: is no picture")
        texts = [f"{len(prompt)} {[len(data) for data in pictures]}" for prompt, pictures in zip(prompts, images, strict=True)]
        return [SimpleNamespace(text=text, tokens=[1, 2], logprobs=[0.0, 0.0], finish="stop") for text in texts]


@pytest.fixture
def model(monkeypatch):
    import neva_jax.vlm

    found = StandIn()
    monkeypatch.setattr(neva_jax.vlm, "from_pretrained", found.from_pretrained)
    return found


@pytest.fixture
def files(tmp_path):
    """Twelve questions about pictures and none, out of the order of their lengths -> arguments."""
    (folder := tmp_path / "pictures").mkdir()
    records = []
    for i in range(12):
        Image.fromarray(np.full((4 + i, 5, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
        images = [f"{i}.png", "0.png"][: i % 3]
        text = "<image>\n" * len(images) + f"What {'really ' * (7 * i % 5)}is {i}?"
        records.append({"id": f"r{i}", "image": images, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": str(i)}]})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"weights")
    asked = dump(tmp_path / "questions.json", records)
    return ["--model", tmp_path / "model", "--task", "exact_match", "--questions", asked, "--image_folder", folder, "--output", tmp_path / "out.json",
            "--batch_size", "2"]  # fmt: skip


def answers_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.answers.jsonl").read_text().splitlines()]


def test_answers_stand_in_the_questions_order(files, model, tmp_path, command):  # noqa: F811
    result = command(*files)
    assert result["num_questions"] == 12
    found = answers_of(tmp_path)
    assert [line["question_id"] for line in found] == [f"r{i}" for i in range(12)]
    assert list(found[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert found[1]["prompt"] == "What really really is 1?" and found[1]["model_id"] == "model"
    assert found[4]["text"].startswith(f"{len('<image>' + chr(10) + found[4]['prompt'])} [")
    asked = [prompt for batch in model.asked for prompt in batch]
    counts = [prompt.count("<image>") for prompt in asked]
    assert counts == sorted(counts) and sorted(counts) == [0] * 4 + [1] * 4 + [2] * 4
    assert all(list(map(len, batch)) == sorted(map(len, batch)) for batch in model.asked)
    assert json.loads((tmp_path / "out.json").read_text())["answers"][3]["truth"] == "3"
    assert Image.open(tmp_path / "out.png").width > 1000
    command(*files)
    assert model.loads == 1  # all is there: nothing is asked, and no model opened


def test_an_interrupted_command_goes_on(files, model, tmp_path, command):  # noqa: F811
    whole = command(*files, "--output", tmp_path / "whole.json")
    uninterrupted = (tmp_path / "whole.answers.jsonl").read_text()
    for stop in (0, 1, 3):
        model.asked, model.stop_after = [], stop
        with pytest.raises(SystemExit) as end:
            evaluate.cli.run(evaluate.main, evaluate.define_flags, ["evaluate", *map(str, files)], with_config=False)
        assert end.value.code == 130
    assert len(answers_of(tmp_path)) == 2 * (0 + 1 + 3)
    with open(tmp_path / "out.answers.jsonl", "a") as file:
        file.write('{"question_id": "r5", "prompt": "What')  # cut off within a line
    model.asked, model.stop_after = [], None
    assert command(*files)["scores"] == whole["scores"]
    assert sum(map(len, model.asked)) == 12 - 8
    assert (tmp_path / "out.answers.jsonl").read_text() == uninterrupted


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: ["--max_new_tokens", "7"], "max_new_tokens was 64 and is 7"),
    (lambda folder: ["--conv_template", "llama_2"], "conv_template was None and is 'llama_2'"),
    (lambda folder: (folder / "model" / "weights.safetensors").write_bytes(b"other") and [], "weights was"),
    (lambda folder: ["--suffix", "Be brief."], "questions was"),
    (lambda folder: (folder / "out.answers.run.json").unlink() or [], "does not say whose"),
    (lambda folder: (folder / "out.answers.jsonl").write_text("{}\n") and [], "line 1 is no answer of this evaluation"),
    (lambda folder: (folder / "out.answers.jsonl").write_text('{"question_id": "r1", "text": "a", "metadata": {"index": 0}}\n') and [], "line 1 is no answer"),
])  # fmt: skip
def test_answers_of_another_kind_are_not_mixed(files, model, tmp_path, command, change, words):  # noqa: F811
    command(*files)
    before = (tmp_path / "out.answers.jsonl").read_text()
    arguments = change(tmp_path)
    changed = (tmp_path / "out.answers.jsonl").read_text()
    error = command(*files, *arguments)
    assert words in error and str(tmp_path / "out.answers.jsonl") in error
    assert (tmp_path / "out.answers.jsonl").read_text() == changed
    assert before


def test_two_writers(files, model, tmp_path, command):  # noqa: F811
    from neva_jax.evaluation.answers_file import AnswersFile

    file = AnswersFile(tmp_path / "out.answers.jsonl", {}, [])
    assert "another evaluation is writing it" in command(*files)
    file._file.close()


def test_a_broken_picture_names_its_question_and_keeps_the_answers(files, model, tmp_path, command):  # noqa: F811
    (tmp_path / "pictures" / "8.png").write_bytes(b"no picture")
    error = command(*files)
    assert "questions.json: record 8: question 'r8' (8.png, 0.png): prompt" in error and "is no picture" in error
    kept = len(answers_of(tmp_path))
    assert 4 <= kept < 12
    Image.new("RGB", (3, 3)).save(tmp_path / "pictures" / "8.png")
    model.asked = []
    assert command(*files)["num_questions"] == 12
    assert sum(map(len, model.asked)) == 12 - kept


def test_a_missing_picture_stops_before_the_model_is_opened(files, model, tmp_path, command):  # noqa: F811
    (tmp_path / "pictures" / "7.png").unlink()
    error = command(*files)
    assert "questions.json: record 7: question 'r7': image '7.png' is missing from" in error and "--image_folder" in error
    assert model.loads == 0


@pytest.mark.parametrize(("text", "prompt"), [
    ("Is it?", f"Is it?\n{SHORT}"), (f"Is it?\n{SHORT}", f"Is it?\n{SHORT}"), (" Is <image>\nit? ", f"Is \nit?\n{SHORT}"),
    ("OCR tokens: a. Question: b? Short answer:", "OCR tokens: a. Question: b? Short answer:"),
])  # fmt: skip
def test_suffix(text, prompt):
    assert asking.prompt_of(asking.Question(1, text), SHORT) == prompt
    assert asking.prompt_of(asking.Question(1, "Is it?"), "") == "Is it?"


def test_scienceqa_asks_as_llava_does(tmp_path, model, command):  # noqa: F811
    problems = {
        "7": {"question": "Which  one?", "choices": ["a", "b"], "answer": 1, "hint": " ", "image": "image.png", "split": "test", "lecture": ""},
        "8": {"question": "And now?", "choices": ["c", "d"], "answer": 0, "hint": "Look.", "image": None, "split": "test"},
        "9": {"question": "?", "choices": ["c"], "answer": 0, "hint": "", "image": None, "split": "train"},
    }
    (tmp_path / "images" / "7").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "7" / "image.png")
    (tmp_path / "model").mkdir()
    result = command("--model", tmp_path / "model", "--task", "scienceqa", "--questions", dump(tmp_path / "problems.json", problems), "--image_folder",
                     tmp_path / "images", "--output", tmp_path / "out.json")  # fmt: skip
    assert [line["prompt"] for line in answers_of(tmp_path)] == [
        "<image>\nContext: N/A\nQuestion: Which one?\nOptions: (A) a (B) b\nAnswer with the option's letter from the given choices directly.",
        "Context: Look.\nQuestion: And now?\nOptions: (A) c (B) d\nAnswer with the option's letter from the given choices directly.",
    ]
    assert (result["num_questions"], result["scores"]["num_img_questions"]) == (2, 1)


def test_mme_and_vqav2_find_their_pictures(tmp_path, model, command):  # noqa: F811
    (tmp_path / "model").mkdir()
    (tmp_path / "mme").mkdir()
    for name, folder in (("existence", "existence"), ("posters", "posters/images")):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / folder / "1.png")
        (tmp_path / "mme" / f"{name}.txt").write_text("1.png\tIs a? Please answer yes or no.\tYes\n1.png\tIs b? Please answer yes or no.\tNo\n")
    arguments = ("--model", tmp_path / "model", "--image_folder", tmp_path / "pictures", "--output", tmp_path / "out.json")
    result = command(*arguments, "--task", "mme", "--questions", tmp_path / "mme")
    assert result["scores"]["categories"].keys() == {"existence", "posters"} and result["scores"]["perception"] is None
    written = (tmp_path / "out.submission" / "posters.txt").read_text().splitlines()
    text = next(line["text"] for line in answers_of(tmp_path))
    assert written[0] == f"1.png\tIs a? Please answer yes or no.\tYes\t{text}"
    (tmp_path / "pictures" / "val2014").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "val2014" / "COCO_val2014_000000000042.jpg", "png")
    asked = dump(tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 42, "question": "What?"}]})
    assert command(*arguments, "--task", "vqav2", "--questions", asked, "--output", tmp_path / "v.json")["scores"] == {}
    assert json.loads((tmp_path / "v.answers.jsonl").read_text())["prompt"] == f"What?\n{SHORT}"


# ---- a real model, killed ------------------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from neva_jax import cli, evaluate
from neva_jax.evaluation.answers_file import AnswersFile
write, written = AnswersFile.write, []
def killed(self, *arguments, **metadata):
    written.append(arguments)
    if len(written) > 5:
        self._file.write(b'{"question_id": "r')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments, **metadata)
AnswersFile.write = killed
cli.run(evaluate.main, evaluate.define_flags, with_config=False)
"""


@pytest.mark.processes
def test_a_killed_evaluation_of_a_real_model(files, tmp_path, command):  # noqa: F811
    models_of_ours.ours(tmp_path / "tiny")
    arguments = list(map(str, [*files, "--model", tmp_path / "tiny", "--max_new_tokens", "4", "--batch_size", "4", "--json"]))

    def run(*start):
        return subprocess.run([sys.executable, *start, *arguments], cwd=ROOT, capture_output=True, text=True)

    assert run("-c", KILLED).returncode == -9
    torn = (tmp_path / "out.answers.jsonl").read_bytes()
    assert torn.count(b"\n") == 5 and not torn.endswith(b"\n")
    resumed = run("-m", "neva_jax.evaluate")
    assert resumed.returncode == 0, resumed.stderr
    kept = {json.loads(line)["question_id"] for line in torn.splitlines()[:5]}
    assert len(kept) == 5
    whole = command(*arguments, "--output", tmp_path / "whole.json")
    assert whole["scores"] == json.loads(resumed.stdout)["scores"]
    assert (tmp_path / "out.answers.jsonl").read_text() == (tmp_path / "whole.answers.jsonl").read_text()
    assert [line["question_id"] for line in answers_of(tmp_path)] == [f"r{i}" for i in range(12)]
