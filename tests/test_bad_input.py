"""Wrong input of every kind ends in one UserError that names the file, record or field and says what to change. (cli.run turns it into exit code 2.)"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from runs import logged, run, saved, tiny

from neva_jax.build.run import log_dir
from neva_jax.errors import UserError
from neva_jax.training.watch import Watch


def record(**changes) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat does the picture show?"}, {"from": "gpt", "value": "three"}]
    return {"id": "0", "image": "a.png", "conversations": turns} | changes


def turns(question="<image>\nWhat?", answer="three") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def data(tmp_path):
    """write(records) -> settings of a run over them; the folder holds a.png and a broken b.png."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.full((32, 32), 80, np.uint8)).save(images / "a.png")
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:60])

    def write(records, **changes):
        path = tmp_path / "data.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        settings = {"model__data__data_path": str(path), "model__data__validation": None, "model__data__image_folder": str(images)}
        return settings | {"model__data__cache_dir": str(tmp_path / "cache"), "trainer__max_steps": 3} | changes

    return write


BAD_DATA = {
    "missing file": (None, {"model__data__data_path": "/nowhere/data.json"}, r"/nowhere/data\.json"),
    "no data_path": (None, {"model__data__data_path": None}, r"model\.data\.data_path is not set"),
    "not a list": ({"id": 1}, {}, r"data\.json.*list"),
    "truncated": (json.dumps([record(), record()])[:-20], {}, r"data\.json"),
    "empty list": ([], {}, r"data\.json"),
    "wrong type": ([record(), record(image=7)], {}, r"record 1: image: found 7"),
    "tags and pictures differ": ([record(), record(conversations=turns("<image><image>\nWhat?"))], {}, r"record 1.*2 <image>.*1 under image"),
    "no answer": ([record(conversations=turns()[:1])], {}, r"record 0.*no gpt turn"),
    "over-long": ([record(conversations=turns("<image>\n" + "What is this? " * 60))], {}, r"record 0.*no supervised token.*model\.encoder_seq_length"),
    "no image folder": ([record()], {"model__data__image_folder": None}, r"record 0.*model\.data\.image_folder is not set"),
    "missing picture": ([record(image="c.png")] * 4, {}, r"record 0.*c\.png.*missing"),
    "broken picture": ([record(image="b.png")] * 4, {}, r"record \d.*b\.png.*(cut off|damaged)"),
    "picture outside": ([record(image="../a.png")] * 4, {}, r"points outside"),
    "too many pictures": ([record(image=["a.png"] * 3, conversations=turns("<image><image><image>\nWhat?"))], {}, r"record 0.*3 images.*at most 2.*max_media"),
    "plain needs a picture": (
        [record(), {"conversations": turns("What is this?")}],
        {"model__data__conv_template": "llava:plain"},
        r"record 1.*plain template needs <image>",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data(data, tmp_path, name):
    records, changes, message = BAD_DATA[name]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **data([record()] if records is None else records, **changes))


def test_a_bad_picture_in_a_worker_process_is_the_same_error(data, tmp_path):
    with pytest.raises(UserError, match=r"record \d.*b\.png"):
        run(tmp_path / "run", **data([record(image="b.png")] * 4, model__data__num_workers=1))


def test_skipped_pictures_are_counted_and_bounded(data, tmp_path):
    records = [record() if i else record(image="b.png") for i in range(4)]
    run(tmp_path / "run", **data(records, model__data__on_bad_image="skip"))
    assert logged(tmp_path / "run", "bad_images") == [(1, 1), (2, 2), (3, 3)]
    with pytest.raises(UserError, match=r"2 pictures could not be read.*max_bad_images is 1"):
        run(tmp_path / "bounded", **data(records, model__data__on_bad_image="skip", model__data__max_bad_images=1))


BAD_CONFIG = {
    "batch sizes": ({"model__global_batch_size": 6}, r"global_batch_size is 6.*would do"),
    "heads by tensor size": ({"trainer__devices": 4, "model__tensor_model_parallel_size": 4}, r"tensor_model_parallel_size is 4.*num_attention_heads 2"),
    "vocabulary by tensor size": (
        {"trainer__devices": 2, "model__tensor_model_parallel_size": 2, "model__make_vocab_size_divisible_by": 5, "model__override_vocab_size": 385},
        r"padded vocabulary 385.*make_vocab_size_divisible_by",
    ),
    "precision": ({"trainer__precision": "16"}, r"precision"),
    "template": ({"model__data__conv_template": "chatml"}, r"conv_template is 'chatml'.*v1"),
    "too many devices": ({"trainer__devices": 64, "model__global_batch_size": 256}, r"asks for 64 devices, JAX sees 8"),
    "a frozen part without weights": ({"model__mm_cfg__llm__freeze": True}, r"frozen without weights: llm.*model\.mm_cfg\.llm\.from_pretrained"),
    "weights that are not there": ({"model__mm_cfg__llm__from_pretrained": "/nowhere"}, r"model\.mm_cfg\.llm\.from_pretrained.*/nowhere"),
    "a pattern that finds nothing": ({"model__trainable": (("^projektor/", 1.0, None),)}, r"'\^projektor/' finds no weight.*projector/"),
    "everything frozen": ({"model__trainable": (("projector", 0.0, None),)}, r"nothing trains"),
    "a tokenizer that is none": ({"model__tokenizer__model": __file__}, r"not a sentencepiece model"),
    "no tokenizer": ({"model__tokenizer__model": None}, r"model\.tokenizer\.model is not set"),
    "select layer": ({"model__mm_cfg__vision_encoder__vision_select_layer": -5}, r"vision_select_layer -5 does not exist in a tower of 1"),
    "a picture longer than a record": ({"model__encoder_seq_length": 3}, r"encoder_seq_length"),
    "no step left to decay": ({"model__optim__sched__warmup_steps": 6}, r"warmup"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_config(tmp_path, name):
    changes, message = BAD_CONFIG[name]
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"exp_manager\.explicit_log_dir: cannot write into .*file/run"):
        log_dir(tiny(tmp_path / "file" / "run"))


def test_ten_bad_gradients_in_a_row_end_the_run_and_name_the_records(tmp_path):
    with pytest.raises(UserError, match=r"10 steps in a row were not finite.*train\.json: record \d+"):
        run(tmp_path, trainer__max_steps=30, model__optim__lr=1e38, model__optim__sched__name="WarmupPolicy")


def test_nine_bad_gradients_do_not():
    watch = Watch(lambda batch: f"batch {batch}", max_bad_images=0)
    numbers = {"stop": np.int32(0), "bad_images": np.int32(0), "reduced_train_loss": np.float32(1)}
    watch.read(9, numbers | {"skipped_in_a_row": np.int32(9)})
    with pytest.raises(UserError, match="batch 9"):
        watch.read(10, numbers | {"skipped_in_a_row": np.int32(10)})


def test_a_run_without_its_base_is_no_run(tmp_path):
    run(tmp_path / "towers", trainer__max_steps=3)
    frozen = {"model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True}
    run(tmp_path / "second", trainer__max_steps=3, restore_from_path=str(tmp_path / "towers"), **frozen)
    before = saved(tmp_path / "second", "trainable")
    (tmp_path / "second" / "base.json").unlink()
    with pytest.raises(UserError, match=r"no base\.json"):
        run(tmp_path / "second", trainer__max_steps=5, **frozen)
    assert (saved(tmp_path / "second", "trainable")["projector/0/bias"] == before["projector/0/bias"]).all(), "nothing is lost"
    shutil.rmtree(tmp_path / "towers")
