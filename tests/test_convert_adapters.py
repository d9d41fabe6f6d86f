"""The converter on runs with LoRA adapters and on other programs' adapters, from its command line; and the models that come of it, asked."""

import json
import re

import numpy as np
import pytest
import runs
from models_of_ours import weights_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_convert_torch import convert, refused

import neva_jax
from neva_jax.build.opened import open_model
from neva_jax.transforms.fp8 import quantise

pytestmark = pytest.mark.peft
pytest.importorskip("torch")

LORA = {
    "model__peft__peft_scheme": "lora", "model__peft__lora_tuning__adapter_dim": 2, "model__mm_cfg__llm__freeze": True,
    "model__mm_cfg__vision_encoder__freeze": True, "model__peft__lora_tuning__target_modules": ("attention", "mlp_fc2"), "model__num_layers": 2,
}  # fmt: skip
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a run that trained everything; lora: adapters on it, far from zero; fp8: the same beside weights in float8."""
    folder = tmp_path_factory.mktemp("runs")
    runs.run(folder / "base", trainer__max_steps=3, model__num_layers=2)
    lora = LORA | {"restore_from_path": str(folder / "base"), "model__optim__lr": 0.05, "trainer__max_steps": 4}
    runs.run(folder / "lora", **lora)
    runs.run(folder / "fp8", **lora, model__fp8=True)
    return folder


def kernels(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in open_model(path).merged().arrays().items()}


def test_merged(folder, tmp_path):
    """Into every format, the same numbers; and logits of the merged model as of the unmerged, which the run's own evaluation asks."""
    report = convert(folder / "lora", tmp_path / "ours", "orbax", "--merge_lora")
    assert report["parts"] == ["llm", "vision_encoder", "projector"]
    expected, base = kernels(folder / "lora"), weights_of(tmp_path / "ours")
    assert base.keys() == expected.keys() and not any("lora" in path for path in base)
    runs.assert_same(base, {path: array.astype(np.float32) for path, array in expected.items()})
    moved = [path for path, array in runs.saved(folder / "lora", "base").items() if np.any(array != base[path])]
    assert sorted(path.split("/")[-2] for path in moved) == ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert convert(folder / "lora", tmp_path / "hf", "hf", "--merge_lora")["max_logit_difference"] == 0
    convert(folder / "lora", tmp_path / "all.nemo", "nemo", "--merge_lora", "--parts=llm,projector,vision_encoder")
    for other in ("hf", "all.nemo"):
        found = kernels(tmp_path / other)
        assert all(np.array_equal(found[path], base[path]) for path in moved), other
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model"]["peft"]["peft_scheme"] is None


def test_a_run_can_be_asked(folder, tmp_path):
    """Merged on opening: what it says is what the merged export says."""
    convert(folder / "lora", tmp_path / "ours", "orbax", "--merge_lora")
    question, options = ["Is the digit even or odd?", "What is written?"], {"max_new_tokens": 6}
    run, merged = (neva_jax.from_pretrained(path).answers(question, [[PICTURE]] * 2, **options) for path in (folder / "lora", tmp_path / "ours"))
    assert [a.tokens for a in run] == [a.tokens for a in merged]


@pytest.mark.parametrize("to", ["hf", "nemo", "orbax"])
def test_adapters_alone_and_back(folder, tmp_path, to):
    """Adapters and the projector that was trained beside them; on the base again they are the run's model, to the bit."""
    report = convert(folder / "lora", tmp_path / "adapter", to)
    if to == "orbax":
        assert report["parts"] == ["llm", "vision_encoder", "projector"]
    else:
        assert report["parts"] == ["adapters"]
        if to == "nemo":
            assert report["num_bytes"] == sum(a.nbytes for a in runs.saved(folder / "lora", "trainable").values())
    if to == "hf":
        assert report["max_logit_difference"] == 0 and report["tokens_equal"]
    again = open_model(tmp_path / "adapter", bases=[] if to == "orbax" else [str(folder / "base")])
    found = {path: np.asarray(array) for path, array in again.merged().arrays().items()}
    runs.assert_same({path: a.astype(np.float32) for path, a in found.items()}, {path: a.astype(np.float32) for path, a in kernels(folder / "lora").items()})


def test_adapters_merged_into_a_base_that_is_given(folder, tmp_path):
    convert(folder / "lora", tmp_path / "adapter", "hf")
    convert(folder / "base", tmp_path / "base", "hf")
    convert(tmp_path / "adapter", tmp_path / "merged", "hf", f"--base={tmp_path / 'base'}", "--merge_lora")
    convert(folder / "lora", tmp_path / "expected", "hf", "--merge_lora")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    runs.assert_same(found, expected)
    convert(folder / "base", tmp_path / "half", "hf", "--dtype=float16")
    assert open_model(tmp_path / "adapter", bases=[str(tmp_path / "half")]).adapters, "the same base, rounded"


def test_trained_beside_float8(folder, tmp_path, capfd):
    """Merging says into what: the weights before they were rounded, or as training saw them."""
    assert "was trained beside weights in e4m3" in (told := refused(capfd, folder / "fp8", tmp_path / "x", "orbax", "--merge_lora"))
    assert "--merge_into original" in told and "--merge_into dequantized" in told
    for into in ("original", "dequantized"):
        convert(folder / "fp8", tmp_path / into, "orbax", "--merge_lora", f"--merge_into={into}")
    weights, base, path = runs.saved(folder / "fp8", "trainable"), runs.saved(folder / "fp8", "base"), "llm/layers/self_attn/o_proj"
    product = np.matmul(weights[f"{path}/lora_A"], weights[f"{path}/lora_B"])
    kernel = base[f"{path}/kernel"]
    stored = quantise(kernel)
    seen = {"original": kernel, "dequantized": np.asarray(stored.values.astype(np.float32)) * np.asarray(stored.scale)[:, None, None]}
    for into, start in seen.items():
        np.testing.assert_allclose(weights_of(tmp_path / into)[f"{path}/kernel"], start + product, rtol=0, atol=1e-6)
    assert np.max(np.abs(seen["original"] - seen["dequantized"])) > 1e-4


def damaged(folder, tmp_path, change):
    """An export whose files were changed: config and tensors in, both out."""
    convert(folder / "lora", tmp_path / "adapter", "hf")
    config, file = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(file)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    change(fields, tensors)
    config.write_text(json.dumps(fields))
    save_file(tensors, file, metadata=metadata)


A = "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_A.weight"
DAMAGE = {
    "a tensor is missing": (lambda config, tensors: tensors.pop(A), "1 tensors are missing .*o_proj.lora_A|different layers"),
    "another rank": (lambda config, tensors: tensors.update({A: np.zeros((3, 16), np.float32)}), "have another shape .*o_proj.lora_A"),
    "a stranger": (lambda config, tensors: tensors.update({"base_model.model.other.weight": np.zeros(3, np.float32)}), "not part of such a model .*other"),
    "no rank": (lambda config, tensors: config.pop("r"), "adapter_config.json: not the configuration of a LoRA adapter"),
    "DoRA": (lambda config, tensors: config.update(use_dora=True), r"use_dora True \(expected False\)"),
    "PiSSA": (lambda config, tensors: config.update(init_lora_weights="pissa"), r"init_lora_weights 'pissa' \(expected True\)"),
    "a text for a rank": (lambda config, tensors: config.update(r="2"), "not the configuration of a LoRA adapter"),
    "one weight twice": (lambda config, tensors: tensors.update({A.replace(".weight", ".default.weight"): tensors[A]}), "two spellings of one weight"),
    "a head saved along": (lambda config, tensors: tensors.update({"base_model.model.lm_head.weight": np.zeros((3, 16), np.float32)}), "saved along"),
    "the projector adapted": (
        lambda config, tensors: tensors.update({"base_model.model.model.multi_modal_projector.linear_1.lora_A.weight": np.zeros((2, 16), np.float32)}),
        "adapts the projector",
    ),
    "another method": (lambda config, tensors: config.update(peft_type="IA3"), r"peft_type 'IA3' \(expected 'LORA'\)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_adapter(folder, tmp_path, capfd, what):
    change, told = DAMAGE[what]
    damaged(folder, tmp_path, change)
    error = refused(capfd, tmp_path / "adapter", tmp_path / "out", "hf", f"--base={folder / 'base'}", "--merge_lora")
    assert re.search(told, error), error


@pytest.mark.parametrize("record", ["{", "5", '{"kernels": {"a": 5}, "float8_of": null}', '{"kernels": {"a": {"shape": [1], "sample": [1e400]}}}'])
def test_a_damaged_memory(folder, tmp_path, capfd, record):
    convert(folder / "lora", tmp_path / "adapter", "hf")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "neva_jax": record})
    assert "what it says of its base cannot be read" in refused(capfd, tmp_path / "adapter", tmp_path / "out", "hf", f"--base={folder / 'base'}")


def test_what_goes_into_no_adapter(folder, tmp_path, capfd):
    """Weights that trained beside adapters are merged with them, never left behind."""
    table = ((r"/lora_[AB]$", 1.0, None), ("^projector/", 1.0, None), ("^llm/norm/", 1.0, None))
    runs.run(tmp_path / "more", **LORA, restore_from_path=str(folder / "base"), trainer__max_steps=3, model__trainable=table)
    for to in ("hf", "nemo"):
        told = refused(capfd, tmp_path / "more", tmp_path / "out", to)
        assert "other weights trained beside its adapters (llm/norm/scale), which go into no adapter; add --merge_lora" in told
    convert(tmp_path / "more", tmp_path / "merged", "orbax", "--merge_lora")
    trained = runs.saved(tmp_path / "more", "trainable")["llm/norm/scale"]
    np.testing.assert_array_equal(weights_of(tmp_path / "merged")["llm/norm/scale"], trained)


def test_what_an_adapter_remembers_goes_along(folder, tmp_path, capfd):
    """From format to format, without the base: where it belongs, and that its base stood in float8."""
    runs.run(tmp_path / "other", trainer__max_steps=3, model__num_layers=2, model__seed=9)
    convert(folder / "fp8", tmp_path / "first.nemo", "nemo")
    convert(tmp_path / "first.nemo", tmp_path / "second", "hf")
    convert(tmp_path / "second", tmp_path / "third", "orbax", f"--base={folder / 'base'}")
    for adapter, base in ((tmp_path / "second", [f"--base={folder / 'base'}"]), (tmp_path / "third", [])):
        assert "was trained beside weights in e4m3" in refused(capfd, adapter, tmp_path / "out", "orbax", *base, "--merge_lora")
    assert "was trained for another base" in refused(capfd, tmp_path / "second", tmp_path / "out", "hf", f"--base={tmp_path / 'other'}", "--merge_lora")


def test_bad_flags(folder, tmp_path, capfd):
    runs.run(tmp_path / "other", trainer__max_steps=3, model__num_layers=2, model__seed=9)
    convert(folder / "lora", tmp_path / "adapter", "hf")
    out = tmp_path / "out"
    cases = {
        "holds no LoRA adapters; leave the flag out": (folder / "base", "hf", "--merge_lora"),
        "--parts is of whole models": (folder / "lora", "hf", "--parts=llm"),
        "was not trained beside weights in float8": (folder / "lora", "orbax", "--merge_lora", "--merge_into=dequantized"),
        "an adapter does not say what model it is for; give --base PATH": (tmp_path / "adapter", "nemo"),
        "was trained for another base: the checksum of": (tmp_path / "adapter", "hf", f"--base={tmp_path / 'other'}", "--merge_lora"),
        "holds LoRA adapters of its own, and is a base of": (tmp_path / "adapter", "hf", f"--base={folder / 'lora'}", "--merge_lora"),
        "--merge_into original goes with --merge_lora": (folder / "fp8", "orbax", "--merge_into=original"),
        "--tensor_parallel 4 does not divide the rank 2": (folder / "lora", "nemo", "--tensor_parallel=4"),
    }
    for told, (path, to, *flags) in cases.items():
        assert told in refused(capfd, path, out, to, *flags)
    convert(folder / "lora", tmp_path / "adapter.nemo", "nemo")
    assert "holds LoRA adapters without what they stand beside" in refused(capfd, tmp_path / "adapter.nemo", out, "hf", "--merge_lora")
    assert convert(tmp_path / "adapter.nemo", out, "hf")["max_logit_difference"] is None, "names can be changed without the base"
