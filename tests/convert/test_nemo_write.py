"""What a `.nemo` cannot be written as, where it cannot be written, and what an interruption leaves."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_nemo import EVEN, arrays_of, write, yaml_config

from neva_jax.convert import nemo, nemo_write
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.convert.nemo_write import write_nemo
from neva_jax.errors import UserError

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(tensor_parallel=3), "tensor_parallel 3 does not divide the 4 attention heads"),
        (dict(tensor_parallel=4), r"tensor_parallel 4 does not divide the 2 key and value heads \(num_query_groups\)"),
        (dict(tensor_parallel=2, yaml={"ffn_hidden_size": 41}), "tensor_parallel 2 does not divide ffn_hidden_size 41"),
        (dict(pipeline_parallel=3), "pipeline_parallel 3 does not divide the 4 layers"),
        (dict(tensor_parallel=0), "tensor_parallel 0 and pipeline_parallel 1 are numbers of ranks"),
        (dict(key_format="mcore2"), "key_format 'mcore2' is not one of mcore, legacy"),
        (dict(dtype="float8"), "dtype 'float8' is not one of float32, float16, bfloat16"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused_before_anything_is_read(options, says, tmp_path):
    config = EVEN["gqa"]
    outline = nemo.key_map(config).outline(arrays_of(config))
    changed = yaml_config(config) | options.pop("yaml", {})
    with pytest.raises(UserError, match=says):
        write_nemo(tmp_path / "out.nemo", iter(()), outline, changed, {}, **options)
    assert not any(tmp_path.iterdir())


def test_the_config_says_how_the_file_is_cut(tmp_path):
    config = EVEN["gqa"]
    given = yaml_config(config) | {
        "tensor_model_parallel_size": 8,
        "virtual_pipeline_model_parallel_size": 3,
        "mcore_gpt": True,
        "optim": {"betas": (0.9, 0.98)},
    }
    written = NemoFile(write(tmp_path / "a", config, arrays_of(config), tensor_parallel=2, pipeline_parallel=4, key_format="legacy", yaml=given)).config
    assert written == given | {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": None, "mcore_gpt": False,
        "transformer_engine": False, "optim": {"betas": [0.9, 0.98]},
    }  # fmt: skip


def test_weights_that_do_not_divide_although_the_config_does(tmp_path):
    """The config may speak of another model than the weights."""
    outline = {"decoder.layers.0.mlp.linear_fc2.weight": ((24, 41), np.float32)}
    with pytest.raises(UserError, match=r"tensor_parallel 2 does not divide decoder.layers.0.mlp.linear_fc2.weight \[24, 41\] along dimension 1"):
        write_nemo(tmp_path / "out.nemo", iter(()), outline, yaml_config(EVEN["gqa"]), {}, tensor_parallel=2)


def test_too_little_disk(tmp_path, monkeypatch):
    config = EVEN["gqa"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"out.nemo: needs 0.00 GiB of disk, .* has 0.00"):
        write(tmp_path / "out.nemo", config, arrays_of(config))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", ["out.nemo", "out"])
def test_the_room_asked_for_is_the_room_taken(name, tensor, tmp_path, monkeypatch):
    """What lies on the disk when the first number comes, and when the last has, is near what was asked for, and below."""
    config, asked, seen = EVEN["gqa"], [], []
    original, fill, usage = nemo_write._check_room, nemo_write._fill, shutil.disk_usage(tmp_path)

    def on_disk():
        return sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file())

    def tell(*args):
        for free in range(2**18, 2**26, 2**14):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            try:
                original(*args)
            except UserError:
                continue
            asked.append(free)
            return

    def filled(*args):
        seen.append(on_disk())
        fill(*args)
        seen.append(on_disk())

    monkeypatch.setattr(nemo_write, "_check_room", tell)
    monkeypatch.setattr(nemo_write, "_fill", filled)
    big = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=20000, padded_vocab_size=20000))
    write(tmp_path / name, big, arrays_of(big, ("llm",)), tensor_parallel=tensor)
    assert 0.75 * asked[0] < seen[0] == seen[1] < asked[0]
    kept = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert not kept, "a file that is still mapped could be changed"


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    config = EVEN["gqa"]
    keys, ours = nemo.key_map(config), arrays_of(config)

    def breaks():
        parts = keys.parts(ours)
        yield next(parts)
        assert any(tmp_path.iterdir()) and not (tmp_path / "out.nemo").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_nemo(tmp_path / "out.nemo", breaks(), keys.outline(ours), yaml_config(config), {})
    assert not any(tmp_path.iterdir())


def test_an_output_that_exists_is_kept(tmp_path):
    (tmp_path / "out.nemo").write_text("mine")
    with pytest.raises(UserError, match="out.nemo exists; remove it"):
        write(tmp_path / "out.nemo", EVEN["gqa"], arrays_of(EVEN["gqa"]))
    assert (tmp_path / "out.nemo").read_text() == "mine"


@pytest.mark.parametrize("tensors, says", [([], "1 tensors never came: a"), ([("a", np.zeros(3))], r"a came as float64\[3\], announced as .*float32.*\[3\]")])
def test_a_stream_that_is_not_its_outline(tensors, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        write_nemo(tmp_path / "out", iter(tensors), {"a": ((3,), np.float32)}, yaml_config(EVEN["gqa"]), {})
    assert not any(tmp_path.iterdir())
