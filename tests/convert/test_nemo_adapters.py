"""NeMo's LoRA files: names, layouts and ranks against the formulas of its layers written down in numpy, and there and back bit for bit."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from models_of_ours import ours

from neva_jax.build.export_lora import to_nemo
from neva_jax.build.lora import targets_of, with_adapters
from neva_jax.build.opened import open_model
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.errors import UserError
from neva_jax.models.multimodal import neva
from neva_jax.transforms.lora import Lora, is_adapter
from neva_jax.transforms.select import describe

HEADS, GROUPS, WIDTH, FFN, RANK = 4, 2, 8, 48, 4
SHAPE = {
    "model.num_layers": 4, "model.hidden_size": 32, "model.ffn_hidden_size": FFN, "model.num_attention_heads": HEADS, "model.num_query_groups": GROUPS,
}  # fmt: skip
LAYER = "model.decoder.layers.{}.{}.adapter_layer.lora_{}_adapter"


class Arrays:
    """A source of arrays that are in memory."""

    published = recorded_base = None

    def __init__(self, arrays):
        self.arrays, self.shapes = arrays, {path: array.shape for path, array in arrays.items()}

    def check(self, shapes):
        assert all(self.shapes[path] == shape for path, shape in shapes.items())

    def lazy(self, path, shape):
        return self.arrays[path]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ours(tmp_path_factory.mktemp("base") / "model", **SHAPE)


def with_lora(base, variant="nemo", targets=("all",), layers=None, **fields):
    """The base opened, with random adapters and a projector beside them."""
    opened = open_model(base)
    lora = Lora(RANK, 6.0, targets_of(targets, variant), layers)
    weights = describe(lambda: with_adapters(neva(opened.neva, rngs=nnx.Rngs(0)), lora, 0))[1]
    rng, arrays = np.random.default_rng(1), {}
    for path, weight in weights.items():
        if is_adapter(path) or path.startswith("projector/"):
            arrays[path] = rng.normal(size=weight.shape).astype(np.float32)
            if is_adapter(path) and layers is not None:
                arrays[path][[n for n in range(4) if n not in layers]] = 0
    config = opened.config
    config.model.peft.peft_scheme = "lora"
    config.model.peft.lora_tuning.update({"adapter_dim": RANK, "alpha": 6.0, "variant": variant, "target_modules": targets})
    config.model.peft.lora_tuning.layer_selection = None if layers is None else tuple(n + 1 for n in layers)
    return dataclasses.replace(opened, weights=weights, lora=lora, origin=opened.origin | dict.fromkeys(arrays, Arrays(arrays)), config=config), arrays


def ranks(file) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """{(stage, tensor rank): {name: array}}, as torch reads the members."""
    import io
    import tarfile

    import torch

    with tarfile.open(file) as tar:
        return {
            rank: {name: t.numpy() for name, t in torch.load(io.BytesIO(tar.extractfile(f"./{member}").read()), weights_only=True).items()}
            for rank, member in NemoFile(file).ranks().items()
        }


def delta(linear_in, linear_out, x):
    """NeMo's adapter: (x in^T) out^T alpha / dim."""
    return x @ linear_in.T @ linear_out.T * (6.0 / RANK)


def ours_delta(arrays, name, owner, x, layer):
    where = "self_attn" if name[0] in "qkvo" else "mlp"
    return x @ arrays[f"llm/layers/{where}/{owner}_proj/lora_A"][layer] @ arrays[f"llm/layers/{where}/{name}_proj/lora_B"][layer] * (6.0 / RANK)


@pytest.mark.parametrize("tensor", [1, 2])
def test_fused_adapters_as_nemos_layers_read_them(base, tmp_path, tensor):
    """Each tensor rank's own formulas: qkv in blocks of query groups, gate and up one half each, rows of dense and fc2 summed over ranks."""
    opened, arrays = with_lora(base)
    to_nemo(opened, tmp_path / "a.nemo", tensor_parallel=tensor)
    files, rng = ranks(tmp_path / "a.nemo"), np.random.default_rng(2)
    x, wide, file = rng.normal(size=(5, 32)), rng.normal(size=(5, FFN)), [files[0, rank] for rank in range(tensor)]
    names = {name.split("adapter_layer.")[1] for name in file[0] if "lora_" in name}
    assert names == {f"lora_{a}_adapter.linear_{way}.weight" for a in ("kqv", "dense_attention", "hto4h", "4htoh") for way in ("in", "out")}
    for layer in (0, 3):
        a = lambda module, name, end, layer=layer: [one[LAYER.format(layer, module, name) + f".linear_{end}.weight"] for one in file]  # noqa: E731
        whole_in = np.concatenate(a("self_attention", "kqv", "in"))  # ColumnParallelLinear, gathered
        for rank, out in enumerate(a("self_attention", "kqv", "out")):
            blocks = delta(whole_in, out, x).reshape(5, GROUPS // tensor, (HEADS // GROUPS + 2) * WIDTH)
            q, k, v = np.split(blocks, [HEADS // GROUPS * WIDTH, (HEADS // GROUPS + 1) * WIDTH], axis=2)
            for part, name in ((q, "q"), (k, "k"), (v, "v")):
                expected = np.split(ours_delta(arrays, name, "k", x, layer), tensor, axis=1)[rank]
                np.testing.assert_allclose(part.reshape(5, -1), expected, rtol=0, atol=1e-10)
        whole_in = np.concatenate(a("mlp", "hto4h", "in"))
        for rank, out in enumerate(a("mlp", "hto4h", "out")):
            halves = np.split(delta(whole_in, out, x), 2, axis=1)
            for part, name in zip(halves, ("gate", "up"), strict=True):
                np.testing.assert_allclose(part, np.split(ours_delta(arrays, name, "gate", x, layer), tensor, axis=1)[rank], rtol=0, atol=1e-10)
        for module, adapter, name, seen in (("self_attention", "dense_attention", "o", x), ("mlp", "4htoh", "down", wide)):
            inside = sum(part @ w.T for part, w in zip(np.split(seen, tensor, axis=1), a(module, adapter, "in"), strict=True))  # RowParallelLinear
            found = inside @ np.concatenate(a(module, adapter, "out")).T * (6.0 / RANK)
            np.testing.assert_allclose(found, ours_delta(arrays, name, name, seen, layer), rtol=0, atol=1e-10)


WRITTEN = {
    "fused, mcore": ("nemo", ("all",), None, {}),
    "fused, legacy names, two ranks": ("nemo", ("attention",), None, {"key_format": "legacy", "tensor_parallel": 2}),
    "canonical, two ranks of two stages": ("canonical", ("all",), None, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "fused, some layers, two stages": ("nemo", ("attention_qkv", "mlp_fc2"), (1, 3), {"pipeline_parallel": 2}),
    "canonical, layers of one stage alone": ("canonical", ("mlp",), (2,), {"pipeline_parallel": 2}),
    "one projection of each": ("canonical", ("attention_dense", "mlp_fc2"), None, {}),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_there_and_back(base, tmp_path, how):
    variant, targets, layers, options = WRITTEN[how]
    opened, arrays = with_lora(base, variant, targets, layers)
    to_nemo(opened, tmp_path / "a.nemo", **options)
    again = open_model(tmp_path / "a.nemo", bases=[str(base)])
    assert again.lora.layers == layers and again.lora.scale == 1.5 and again.adapters == opened.adapters
    found = again.arrays()
    for path, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)
    section = NemoFile(tmp_path / "a.nemo").config["peft"]
    assert section["peft_scheme"] == "lora" and section["lora_tuning"]["adapter_dim"] == RANK and section["lora_tuning"]["alpha"] == 6.0
    assert section["lora_tuning"]["layer_selection"] == (None if layers is None else [n + 1 for n in layers])


def test_canonical_names(base, tmp_path):
    """As NeMo's converter from peft spells them."""
    to_nemo(with_lora(base, "canonical")[0], tmp_path / "a.nemo")
    names = {name.split("layers.0.")[1] for name in ranks(tmp_path / "a.nemo")[0, 0] if "layers.0." in name}
    kqv, hto4h = "self_attention.adapter_layer.lora_unfused_kqv_adapter", "mlp.adapter_layer.lora_unfused_hto4h_adapter"
    prefixes = [f"{kqv}.{name}_adapter" for name in "qkv"] + [f"{hto4h}.{name}_adapter" for name in ("gate", "up")]
    prefixes += ["self_attention.adapter_layer.lora_dense_attention_adapter", "mlp.adapter_layer.lora_4htoh_adapter"]
    assert names == {f"{prefix}.linear_{way}.weight" for prefix in prefixes for way in ("in", "out")}
    assert NemoFile(tmp_path / "a.nemo").config["peft"]["lora_tuning"]["variant"] == "canonical"


def test_what_nemo_adapts_together_is_filled_up(base, tmp_path):
    opened, arrays = with_lora(base, "canonical", ("q_proj", "up_proj"))
    to_nemo(opened, tmp_path / "a.nemo")
    again = open_model(tmp_path / "a.nemo", bases=[str(base)])
    found = again.arrays()
    for path in filter(is_adapter, found):
        known = arrays.get(path)
        np.testing.assert_array_equal(np.asarray(found[path]), np.zeros(found[path].shape) if known is None else known, err_msg=path)
    assert {path.split("/")[-2] for path in again.adapters} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_another_base_is_refused(base, tmp_path):
    to_nemo(with_lora(base)[0], tmp_path / "a.nemo")
    other, deeper = ours(tmp_path / "other", seed=3, **SHAPE), ours(tmp_path / "deeper", **SHAPE | {"model.num_layers": 6})
    with pytest.raises(UserError, match=r"another base: the checksum of llm/\S+/down_proj/kernel was \w+, that of the base that is given is \w+ \(shape"):
        open_model(tmp_path / "a.nemo", bases=[str(other)])
    with pytest.raises(UserError, match=r"shape|layer"):
        open_model(tmp_path / "a.nemo", bases=[str(deeper)]).arrays()


def test_the_rank_is_shared_by_tensor_ranks(base, tmp_path):
    with pytest.raises(UserError, match="--tensor_parallel 3 does not divide the rank 4"):
        to_nemo(with_lora(base)[0], tmp_path / "a.nemo", tensor_parallel=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "told"), [
    ({"peft_scheme": "ia3"}, "peft_scheme 'ia3'"), ({"lora_tuning": {"adapter_dim": 4, "weight_tying": True}}, "weight_tying True"),
    ({"lora_tuning": None}, "adapter_dim None"), ({"lora_tuning": {"adapter_dim": "4"}}, "adapter_dim '4'"),
])  # fmt: skip
def test_other_schemes_are_refused(base, tmp_path, changes, told):
    import yaml

    to_nemo(with_lora(base)[0], tmp_path / "folder")
    file = tmp_path / "folder" / "model_config.yaml"
    config = yaml.safe_load(file.read_text())
    config["peft"] |= changes
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=told):
        open_model(tmp_path / "folder", bases=[str(base)])
