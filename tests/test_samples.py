"""What a run shows of its answers while it trains: a page of pictures with questions, answers and truths at every validation, and a score if asked for."""

import json

import jax
import pytest
from runs import run, tiny
from tensorboardX.proto.event_pb2 import Event

from configs.quickstart import DIGITS
from neva_jax.build.data import build_examples, build_tokenizer
from neva_jax.build.model import build_model, neva_config
from neva_jax.build.run import build_ask, build_mesh
from neva_jax.errors import UserError
from neva_jax.evaluation import exact_match, show
from neva_jax.evaluation.tasks import TASKS
from neva_jax.fields import CHOICES
from neva_jax.training.metrics import Metrics


@pytest.fixture
def questions(tmp_path):
    records = json.loads((DIGITS / "test.json").read_text())[:6]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    return {"evaluation__questions": str(tmp_path / "questions.json"), "evaluation__batch_size": 4, "evaluation__max_new_tokens": 3}


def pictures_of(directory):
    """[(name, step)] of the run's TensorBoard file, read by its framing: length, checksum, event, checksum."""
    (path,) = (directory / "tensorboard").glob("events*")
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step) for value in event.summary.value if value.HasField("image")]
        data = data[16 + size :]
    return found


def test_samples_and_scores_at_every_validation(tmp_path, questions, monkeypatch):
    shown, picture = [], Metrics.picture
    monkeypatch.setattr(Metrics, "picture", lambda self, name, step, page: (shown.append((name, step, page)), picture(self, name, step, page))[1])
    often = {"evaluation__num_samples": 3, "evaluation__every_validation": True, "trainer__val_check_interval": 2}
    report = run(tmp_path / "run", **questions, **often, exp_manager__create_tensorboard_logger=True)
    assert pictures_of(tmp_path / "run") == [("training_pictures", 0), ("samples", 2), ("samples", 4), ("samples", 6)]
    assert all(page.ndim == 3 and page.std() > 10 for _, _, page in shown)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    count = report["num_questions"]
    assert {row["global_step"]: row["val_num_questions"] for row in rows if "val_num_questions" in row} == {2: count, 4: count}, "the last is evaluation.json's"
    assert all(0 <= row["val_accuracy"] <= 100 for row in rows if "val_accuracy" in row)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"] == report["accuracy"]


def test_a_pipeline_answers_as_one_device_does(tmp_path):
    """Without a cache, its layers on virtual stages, and a batch that is no multiple of them: the very answers. (Other meshes: tests/inference.)"""
    fields = {"model__num_layers": 4, "model__micro_batch_size": 2}
    stages = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2, "model__pipeline_round_size": 2}
    answers = []
    for changes in ({}, stages):
        config = tiny(tmp_path, **fields, **changes, trainer__devices=2 if changes else 1)
        mesh, tokenizer = build_mesh(config), build_tokenizer(config)
        with jax.set_mesh(mesh):
            model = build_model(config, neva_config(config, tokenizer.vocab_size), mesh)
            weights = model.pipeline.live(model.random(list(model.weights)))
            examples = build_examples(config, tokenizer, model.config, str(DIGITS / "test.json"))
            questions = exact_match.questions_of(examples, range(5))
            generate = build_ask(model, examples.encoder)(weights)
            answers.append(exact_match.answer(generate, examples, questions, batch_size=7, max_new_tokens=6))
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_a_few_records_from_first_to_last(monkeypatch):
    asked = []

    def questions_of(examples, indices):
        asked.extend(indices)
        return [exact_match.Question(indices[0], "Which?", "three", []), None]

    monkeypatch.setattr(exact_match, "questions_of", questions_of)
    monkeypatch.setattr(exact_match, "answer", lambda generate, examples, questions, **options: ["Three."] * len(questions))
    assert show.samples(None, None, range(10, 90), 3, 8).shape[0] > 0 and asked == [10, 49, 89]


def test_the_score_of_another_task(tmp_path):
    """POPE's questions about the digits' pictures, at every validation and at the end."""
    records = [record for record in json.loads((DIGITS / "test.json").read_text()) if isinstance(record["image"], str)][:6]
    lines = [{"question_id": i, "image": record["image"], "text": f"Is there a {word} in the picture?", "label": label}
             for i, (record, word, label) in enumerate(zip(records, ("one", "two") * 3, ("yes", "no", "no") * 2, strict=True))]  # fmt: skip
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    pope = {"evaluation__task": "pope", "evaluation__questions": str(tmp_path / "coco_pope_random.json"), "evaluation__batch_size": 4}
    often = {"evaluation__every_validation": True, "trainer__val_check_interval": 3, "evaluation__max_new_tokens": 2}
    report = run(tmp_path / "run", **pope, **often)
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert saved["task"] == "pope" and len(saved["answers"]) == 6 and (tmp_path / "run" / "answers.png").exists()
    assert report["accuracy"] == saved["scores"]["accuracy"] and report["num_questions"] == 6
    assert [row["global_step"] for row in rows if "val_accuracy" in row] == [3]
    assert 0 <= rows[2]["val_splits/random/accuracy"] <= 100


@pytest.mark.parametrize(("changes", "message"), [
    ({"evaluation__questions": "nowhere.json"}, r"evaluation\.questions: there is no nowhere\.json"),
    ({"evaluation__annotations": ("nowhere.json",)}, r"evaluation\.annotations: there is no nowhere\.json"),
    ({"evaluation__image_folder": "nowhere"}, r"evaluation\.image_folder = 'nowhere'"),
    ({"evaluation__task": "vqa"}, r"evaluation\.task is 'vqa', expected one of"),
])  # fmt: skip
def test_wrong_questions_are_an_error_at_the_start(tmp_path, changes, message):
    (tmp_path / "q.json").write_text(json.dumps({"question_id": 1, "image": "test/00000.png", "text": "Is it?", "label": "yes"}))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **{"evaluation__task": "pope", "evaluation__questions": str(tmp_path / "q.json")} | changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tasks_are_those_of_the_command():
    assert CHOICES["evaluation.task"] == tuple(TASKS)
