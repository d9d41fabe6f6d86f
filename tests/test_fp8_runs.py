"""Runs in FP8: what is asked for is what runs; resumed to the bit; weights in e4m3 are never saved; losses near those without it."""

import logging
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import assert_same, logged, run, run_until_stopped, saved, tiny

from configs import quickstart
from neva_jax.build import fp8 as build_fp8
from neva_jax.build.data import build_tokenizer
from neva_jax.build.model import build_model, neva_config
from neva_jax.build.run import build_mesh
from neva_jax.build.weights import start_weights
from neva_jax.checkpoint.base import SavedTree
from neva_jax.checkpoint.stream import open_lazily
from neva_jax.errors import UserError
from neva_jax.transforms.fp8 import Quantised
from neva_jax.vlm import from_pretrained

BAND = 0.05  # nats between the smoothed losses of FP8 and bf16; 0.03 to 0.04 were found
FROZEN = {"model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True}


def state_of(directory, step=None) -> dict[str, np.ndarray]:
    """The scales and histories of a checkpoint."""
    return {path: array for path, array in saved(directory, "optimizer", step).items() if path.split("/")[0] in ("scales", "amax_histories")}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A run in FP8 that trains everything."""
    directory = tmp_path_factory.mktemp("towers")
    run(directory, model__fp8=True, model__num_layers=4, model__fp8_amax_history_len=4, trainer__max_steps=3)
    return directory


@pytest.mark.parametrize("settings", [{}, FROZEN], ids=["trained", "frozen"])
def test_resumes_to_the_bit(tmp_path, monkeypatch, towers, settings):
    settings = {"model__fp8": True, "model__num_layers": 4, "model__fp8_amax_history_len": 3, "model__micro_batch_size": 2, **settings}
    settings |= {"restore_from_path": str(towers)} if "model__mm_cfg__llm__freeze" in settings else {}
    run(tmp_path / "whole", **settings)
    assert run_until_stopped(monkeypatch, tmp_path / "parts", after=2, **settings) == 143
    run(tmp_path / "parts", **settings)
    for item in ("trainable", "optimizer"):
        assert_same(saved(tmp_path / "parts", item), saved(tmp_path / "whole", item))
    names = ("reduced_train_loss", "grad_norm")
    assert logged(tmp_path / "parts", *names) == logged(tmp_path / "whole", *names)
    operands = {path.split("/")[-1] for path in state_of(tmp_path / "whole")}
    assert operands == {"input_scale", "grad_scale"} | ({"kernel_scale"} if settings.get("restore_from_path") is None else set())


def test_frozen_weights_are_saved_as_they_were(tmp_path, towers):
    """Not a file of the run holds float8, and its base is what the towers were, bit for bit."""
    run(tmp_path, model__fp8=True, model__num_layers=4, restore_from_path=str(towers), trainer__max_steps=3, **FROZEN)
    base, theirs = saved(tmp_path, "base"), saved(towers, "trainable")
    assert_same(base, {path: theirs[path] for path in base})
    assert any("q_proj/kernel" in path for path in base)
    folders = [tmp_path / "base", *(tmp_path / "checkpoints" / "3" / item for item in ("trainable", "optimizer"))]
    dtypes = {str(array.dtype) for folder in folders for array in open_lazily(folder).values()}
    assert dtypes == {"float32", "int32"}
    plain = from_pretrained(tmp_path, dtype="float32")
    assert_same({path: np.asarray(plain.params[path]) for path in base}, base)


def test_published_weights_are_quantised_as_they_are_read(tmp_path, towers, monkeypatch):
    """One after the other, so that no second kernel is there in the dtype it was read in; those that a run must copy first are left as they are."""
    config = tiny(tmp_path, model__fp8=True, model__num_layers=4, restore_from_path=str(towers), **FROZEN)
    model = build_model(config, neva_config(config, build_tokenizer(config).vocab_size), build_mesh(config))
    load, store, events = SavedTree.load, build_fp8.store, []
    monkeypatch.setattr(SavedTree, "load", lambda self, targets: events.append(len(targets)) or load(self, targets))
    monkeypatch.setattr(build_fp8, "store", lambda kernel, target: events.append("stored") or store(kernel, target))
    as_read = start_weights(config, model)[1]
    assert "stored" not in events and not any(isinstance(array, Quantised) for array in as_read.values())
    monkeypatch.setattr(SavedTree, "published", {})
    events.clear()
    found = start_weights(config, model)[1]
    assert events == [len(model.weights) - 7] + [1, "stored"] * 7
    expected = model.stored(as_read)
    assert found.keys() == expected.keys() and sum(isinstance(array, Quantised) for array in found.values()) == 7
    for path in found:
        assert jax.tree.structure(found[path]) == jax.tree.structure(expected[path]) == jax.tree.structure(model.target(path))
        for array, other, target in zip(*(jax.tree.leaves(tree[path]) for tree in (found, expected)), jax.tree.leaves(model.target(path)), strict=True):
            assert (array.dtype, array.shape, array.sharding) == (target.dtype, target.shape, target.sharding)
            np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(other, np.float32))


# ---- fields --------------------------------------------------------------------------------------------------------------------------------------------


def config_of(directory, **changes) -> ConfigDict:
    return tiny(directory, **{f"model__{name}": value for name, value in changes.items()})


def test_fp8_implies_frozen_weights(tmp_path):
    assert config_of(tmp_path, fp8=True).model.fp8_frozen_weights is True
    assert config_of(tmp_path).model.fp8_frozen_weights is False
    assert config_of(tmp_path, fp8=True, fp8_frozen_weights=False).model.fp8_frozen_weights is False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fp8": True, "fp8_e4m3": True, "fp8_hybrid": True}, r"fp8_e4m3 and model\.fp8_hybrid are both True.*set one of them"),
        ({"fp8_frozen_weights": True}, r"model\.fp8_frozen_weights is True and model\.fp8 False.*set model\.fp8 to True"),
        ({"fp8": True, "fp8_interval": 2}, r"model\.fp8_interval is 2, but .*every step; set it to 1"),
        ({"fp8": True, "reduce_amax": False}, r"model\.reduce_amax is False, but .*all devices.*set it to True"),
        ({"fp8": True, "fp8_amax_compute_algo": "mean"}, r"model\.fp8_amax_compute_algo is 'mean', expected one of most_recent, max"),
        ({"fp8": True, "fp8_scaling": "static"}, r"model\.fp8_scaling is 'static', expected one of delayed, current"),
        ({"fp8": True, "fp8_amax_history_len": 0}, r"model\.fp8_amax_history_len is 0, expected a number of steps from 1"),
        ({"fp8": True, "fp8_margin": -1}, r"model\.fp8_margin is -1, expected a whole number from 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else ", ".join(value),
)
def test_what_cannot_be_done_is_refused(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config_of(tmp_path, **changes)


def test_fields_that_do_nothing_say_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        config_of(tmp_path, fp8_margin=2, fp8_hybrid=True)
        config_of(tmp_path, fp8=True, fp8_scaling="current", fp8_amax_history_len=16)
        config_of(tmp_path, fp8=True, fp8_amax_history_len=16, fp8_margin=2, fp8_hybrid=True)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "model.fp8_hybrid is True, which does nothing here: read only with fp8",
        "model.fp8_margin is 2, which does nothing here: read only with fp8",
        "model.fp8_amax_history_len is 16, which does nothing here: read only with fp8_scaling delayed",
    ]


def test_the_log_says_which_gemms_are_fp8(tmp_path, caplog):
    config = tiny(tmp_path, model__fp8=True, model__fp8_e4m3=True, **FROZEN)
    with caplog.at_level(logging.INFO):
        build_model(config, neva_config(config, 300), build_mesh(config))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("FP8")]
    assert "emulates it on a CPU" in said[0]
    assert said[1] == (
        "FP8: down_proj, gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj of every layer of the language model, forward in e4m3, gradients in e4m3, "
        "delayed scaling; weights are frozen and stored in e4m3; all other GEMMs are in the compute dtype"
    )


@pytest.mark.parametrize("changes", [{}, {"model__fp8": True}, {"model__fp8": True, "model__fp8_scaling": "current"}], ids=["bf16", "history", "current"])
def test_another_precision_does_not_resume(towers, changes):
    with pytest.raises(UserError, match=r"checkpoints/3/optimizer: .*amax_histories/.*as model\.fp8, fp8_scaling, .* and fp8_amax_history_len say"):
        run(towers, model__num_layers=4, **changes)


# ---- devices and compiled programs ------------------------------------------------------------------------------------------------------------------------


def mesh_of(platform: str, **attributes):
    device = types.SimpleNamespace(platform=platform, device_kind="NVIDIA A100", **attributes)
    return types.SimpleNamespace(devices=np.array([device], object))


def test_devices_without_fp8_are_refused():
    with pytest.raises(UserError, match=r"model\.fp8 is True, and NVIDIA A100 \(compute capability 8\.0\) has no FP8.*8\.9.*set model\.fp8 to False"):
        build_fp8.check_devices(mesh_of("gpu", compute_capability="8.0"))
    for capability in ("8.9", "9.0", "10.0"):
        build_fp8.check_devices(mesh_of("gpu", compute_capability=capability))
    build_fp8.check_devices(mesh_of("cpu"))


LINE = '  %{name} = bf16[64,64]{{1,0}} {call}, metadata={{op_name="jit(train_step)/while/body/fp8_gemm.{proj}.{way}/dot_general"}}'
CUBLAS = 'custom-call(%a, %b), custom_call_target="{}"'
GOOD = CUBLAS.format("__cublas$lt$matmul$f8")


def program(*gemms) -> str:
    lines = [LINE.format(name=f"gemm.{i}", call=call, proj=proj, way=way) for i, (proj, way, call) in enumerate(gemms)]
    return "\n".join(["HloModule jit_train_step", "", "ENTRY %main (a: bf16[64,64]) -> bf16[64,64] {", *lines, "}"])


def test_a_step_that_lost_its_fp8_is_refused():
    both = [(proj, way, GOOD) for proj in ("q_proj", "v_proj") for way in ("forward", "backward")]
    build_fp8.check_compiled(program(*both), ["q_proj", "v_proj"])
    for call, kind in ((CUBLAS.format("__cublas$lt$matmul"), r"__cublas\$lt\$matmul"), ("dot(%a, %b)", "dot")):
        with pytest.raises(UserError, match=rf"to something else: v_proj backward \({kind}\); remove XLA_FLAGS"):
            build_fp8.check_compiled(program(*both[:3], ("v_proj", "backward", call)), ["q_proj", "v_proj"])
        with pytest.raises(UserError, match=rf"to something else: v_proj backward \({kind}\)"):  # a weight's gradient, beside one that is right
            build_fp8.check_compiled(program(*both, ("v_proj", "backward", call)), ["q_proj", "v_proj"])
    with pytest.raises(UserError, match=r"k_proj backward \(not to be found\), k_proj forward \(not to be found\)"):
        build_fp8.check_compiled(program(*both), ["q_proj", "v_proj", "k_proj"])


def test_a_program_is_checked_once_for_each_shape_before_it_runs():
    seen = []
    step = build_fp8.CheckedStep(jax.jit(lambda x: x + 1), seen.append)
    assert [float(step(np.zeros(n))[0]) for n in (1, 1, 2, 1)] == [1.0] * 4
    assert len(seen) == 2 and all("HloModule" in text for text in seen)

    def refuse(text):
        raise UserError("no")

    with pytest.raises(UserError):
        build_fp8.CheckedStep(jax.jit(lambda x: x + 1), refuse)(np.zeros(1))


# ---- losses --------------------------------------------------------------------------------------------------------------------------------------------


def test_losses_stay_within_the_band(tmp_path):
    """The quickstart's own model in bf16 on its captions, 30 steps of 8 records, which take the loss from 6.5 to 1: FP8's is never further than the band from
    it, once both are smoothed."""
    size = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_layers": 2, "micro_batch_size": 8, "global_batch_size": 8}
    captions = {"data_path": str(quickstart.DIGITS / "pretrain.json"), "validation": None, "conv_template": "plain", "buckets": (32,)}
    settings = {f"model__{name}": value for name, value in (size | {f"data__{name}": value for name, value in captions.items()}).items()}
    settings |= {"trainer__precision": "bf16", "trainer__max_steps": 30, "model__optim__sched__warmup_steps": 20}
    curves = []
    for name, fp8 in (("bf16", False), ("fp8", True)):
        run(tmp_path / name, **settings, model__fp8=fp8)
        curves.append(np.convolve([loss for _, loss in logged(tmp_path / name, "reduced_train_loss")], np.ones(10) / 10, mode="valid"))
    bf16, fp8 = curves
    assert bf16[-1] < bf16[0] / 2
    assert 0 < np.abs(fp8 - bf16).max() < BAND
