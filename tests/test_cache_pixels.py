"""The command that fills the pixel cache: what training reads afterwards, and how it ends."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from runs import tiny

from neva_jax import cache_pixels
from neva_jax.build.data import build_examples, build_tokenizer, cached_processor
from neva_jax.build.model import neva_config
from neva_jax.data import pixel_cache
from neva_jax.errors import DataError, UserError

TURNS = [{"from": "human", "value": "<image>\nWhat does the picture show?"}, {"from": "gpt", "value": "three"}]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Settings of a run over 70 records with 35 pictures, and a validation file with one more."""
    monkeypatch.setattr(pixel_cache, "_RESERVE", 0)
    (tmp_path / "images").mkdir()
    for i in range(36):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    records = [{"image": f"{i % 35}.png", "conversations": TURNS} for i in range(70)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "test.json").write_text(json.dumps([{"image": "35.png", "conversations": TURNS}]))
    names = {"data_path": "train.json", "validation": "test.json", "image_folder": "images", "cache_dir": "cache"}
    return {f"model__data__{field}": str(tmp_path / name) for field, name in names.items()} | {"model__data__pixel_cache_gib": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_afterwards_no_picture_is_made(tmp_path, data, num_workers):
    config = tiny(tmp_path / "run", **data, model__data__num_workers=num_workers)
    result = cache_pixels.prepare(config)
    assert (result["num_records"], result["num_bad_records"], result["num_pictures"]) == (71, 0, 36)
    tokenizer = build_tokenizer(config)
    examples = build_examples(config, tokenizer, neva_config(config, tokenizer.vocab_size), config.model.data.data_path)
    plain = dataclasses.replace(examples, image_processor=examples.image_processor.processor)
    expected = [plain[i].media for i in range(70)]
    examples.image_processor.processor = None  # what makes pictures
    np.testing.assert_array_equal([examples[i].media for i in range(70)], expected)


def test_it_goes_on_where_it_was(tmp_path, data):
    with (tmp_path / "images" / "20.png").open("r+b") as file:
        file.truncate(60)
    with pytest.raises(DataError, match=r"train\.json: record 20: image '20\.png'"):
        cache_pixels.prepare(tiny(tmp_path / "run", **data, model__data__num_workers=1))
    skipping = tiny(tmp_path / "run", **data, model__data__on_bad_image="skip", model__data__num_workers=0)
    result = cache_pixels.prepare(skipping)
    assert (result["num_bad_records"], result["num_pictures"]) == (2, 35)


def test_without_a_size_there_is_no_cache(tmp_path, data):
    config = tiny(tmp_path / "run", **data | {"model__data__pixel_cache_gib": None})
    with pytest.raises(UserError, match=r"model\.data\.pixel_cache_gib is not set"):
        cache_pixels.prepare(config)
    assert not isinstance(cached_processor(config, tmp_path / "cache"), pixel_cache.PixelCache)


def test_the_command(tmp_path):
    if shutil.disk_usage(tmp_path).free < pixel_cache._RESERVE:
        pytest.skip("the disk is nearly full, and what is left of it belongs to others")
    command = [sys.executable, "-m", "neva_jax.cache_pixels", "--config=configs/quickstart.py:towers", "--config.model.data.pixel_cache_gib=0.5"]
    command += [f"--config.model.data.cache_dir={tmp_path}", "--config.model.data.num_workers=1", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = json.loads(ended.stdout)
    assert result.keys() == {"path", "num_records", "num_bad_records", "num_pictures", "num_bytes", "seconds"}
    assert result["num_pictures"] > 1000 and os.path.getsize(result["path"]) == result["num_bytes"] and ended.stderr == ""


def test_what_a_person_reads(tmp_path, data, capsys):
    cache_pixels.main(tiny(tmp_path / "run", **data, model__data__num_workers=0), json=False)
    assert re.fullmatch(r"71 records, in \d+ s; .*/cache/pixels-square-32x32-[0-9a-f]{16}\.bin holds 36 pictures, 0\.25 of .*\n", capsys.readouterr().out)
