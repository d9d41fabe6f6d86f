"""Against Hugging Face's peft on live models: its adapters here (logits, loss, gradients within 1e-4), ours there (names, logits), merging on both sides."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise
from parity.test_llava import IMAGE, TEXT, VISION, make_batch, outputs, text

from neva_jax.build.export_lora import to_nemo, to_peft
from neva_jax.build.lora import with_adapters
from neva_jax.build.opened import open_model
from neva_jax.errors import UserError
from neva_jax.models.multimodal import neva
from neva_jax.transforms.lora import is_adapter
from neva_jax.transforms.select import describe

pytestmark = pytest.mark.peft
QKV_DOWN = r".*language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj)|mlp\.down_proj)"
ALL = r".*language_model\.layers\.\d+\..*_proj"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A directory of transformers' tiny LLaVA with random weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=4
    )
    directory = tmp_path_factory.mktemp("llava")
    randomise(transformers.LlavaForConditionalGeneration(config)).save_pretrained(directory)
    return directory


def theirs(directory):
    import transformers

    return transformers.LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()


def adapted(llava, output, **options):
    """peft's model with random adapters on it, saved in `output`."""
    import peft

    options = {"r": 4, "lora_alpha": 6, "target_modules": QKV_DOWN} | options
    model = peft.get_peft_model(theirs(llava), peft.LoraConfig(**options))
    for number, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            p.data = _random(p, number)
    model.save_pretrained(output)
    return model.eval()


def _random(p, number: int):
    import torch

    return torch.from_numpy(0.1 * np.random.default_rng(number).normal(size=tuple(p.shape))).to(p.dtype)


ROW = [1, *text(5, 1), *[IMAGE] * 4, *text(6, 2)]
PIXELS = np.random.default_rng(3).normal(size=(1, 3, 28, 28)).astype(np.float32)


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ROW]), pixel_values=torch.from_numpy(PIXELS)).logits.numpy()[0]


def ours(opened):
    """An opened model with its adapters beside the weights, as training runs it -> graphdef, {path: array}, batch"""
    llm, vision = (dataclasses.replace(part, dtype="float32") for part in (opened.neva.llm, opened.neva.vision))
    config = dataclasses.replace(opened.neva, llm=dataclasses.replace(llm, residual_dtype="float32"), vision=vision)
    graphdef, weights = describe(lambda: with_adapters(neva(config, rngs=nnx.Rngs(0)), opened.lora, 0))
    arrays = {path: jnp.asarray(np.asarray(array), jnp.float32) for path, array in opened.arrays().items()}
    assert arrays.keys() == weights.keys()
    return graphdef, arrays, make_batch([(np.array(ROW), np.array([-100] * 8 + ROW[8:]))], PIXELS, 4)


def our_logits(opened):
    graphdef, arrays, batch = ours(opened)
    return np.asarray(outputs(graphdef, batch)(arrays)[1][2])[0, :, : TEXT["vocab_size"]]


def opened_here(adapter, base):
    return open_model(adapter, bases=[str(base)])


KINDS = {
    "q, k, v and down": {},
    "all, rank-stabilised, with the projector": {"target_modules": ALL, "use_rslora": True, "modules_to_save": ["multi_modal_projector"]},
    "one layer": {"target_modules": r".*language_model\.layers\.1\.self_attn\.(q_proj|v_proj)"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_their_adapters(llava, tmp_path, kind):
    model = adapted(llava, tmp_path / "adapter", **KINDS[kind])
    opened, expected = opened_here(tmp_path / "adapter", llava), their_logits(model)
    assert np.max(np.abs(expected - their_logits(theirs(llava)))) > 0.1, "the adapters say something"
    np.testing.assert_allclose(our_logits(opened), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(our_logits(opened.merged()), our_logits(opened), rtol=0, atol=1e-5)
    np.testing.assert_allclose(our_logits(opened.merged()), their_logits(model.merge_and_unload()), rtol=0, atol=1e-4)


def test_loss_and_gradients(llava, tmp_path):
    """Of adapters, at random values of both factors, and of the projector beside them."""
    import torch

    model = adapted(llava, tmp_path / "adapter", target_modules=ALL, modules_to_save=["multi_modal_projector"])
    opened = opened_here(tmp_path / "adapter", llava)
    labels = torch.tensor([[-100] * 8 + ROW[8:]])
    loss = model(input_ids=torch.tensor([ROW]), pixel_values=torch.from_numpy(PIXELS), labels=labels).loss
    loss.backward()
    graphdef, arrays, batch = ours(opened)
    (found, _), grads = jax.value_and_grad(outputs(graphdef, batch), has_aux=True)(arrays)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    expected = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for path in filter(is_adapter, grads):
        *_, module, projection, factor = path.split("/")
        for layer in range(TEXT["num_hidden_layers"]):
            name = f"base_model.model.model.language_model.layers.{layer}.{module}.{projection}.{factor}.default.weight"
            np.testing.assert_allclose(np.asarray(grads[path][layer]), expected[name].T, rtol=0, atol=1e-4, err_msg=name)
            compared += np.max(np.abs(expected[name])) > 1e-3
    assert compared > 20
    for number, ours_ in ((1, "0"), (2, "2")):
        name = f"base_model.model.model.multi_modal_projector.modules_to_save.default.linear_{number}.weight"
        np.testing.assert_allclose(np.asarray(grads[f"projector/{ours_}/kernel"]), expected[name].T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_our_adapters_there(llava, tmp_path, kind):
    """Written here, read by peft on the base: every weight taken, none of the tower touched, the same logits; and bit for bit what came in."""
    import peft
    from safetensors.numpy import load_file

    adapted(llava, tmp_path / "first", **KINDS[kind])
    opened = opened_here(tmp_path / "first", llava)
    to_peft(opened, tmp_path / "second")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    model = peft.PeftModel.from_pretrained(theirs(llava), tmp_path / "second").eval()
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "vision" in name]
    np.testing.assert_allclose(their_logits(model), our_logits(opened), rtol=0, atol=1e-4)


def test_through_nemo_and_back(llava, tmp_path):
    """peft -> NeMo's canonical adapters -> peft: q and v alone get a k of zeros on the way, which changes no logit."""
    adapted(llava, tmp_path / "first", **KINDS["one layer"])
    first = opened_here(tmp_path / "first", llava)
    to_nemo(first, tmp_path / "adapter.nemo")
    second = opened_here(tmp_path / "adapter.nemo", llava)
    assert second.lora.layers == (1,) and second.lora.scale == first.lora.scale
    np.testing.assert_array_equal(our_logits(second), our_logits(first))


def test_a_language_model_alone(tmp_path):
    """peft's own defaults on a Llama: q and v by name."""
    import peft
    import transformers

    base = tmp_path / "llama"
    randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))).save_pretrained(base)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for number, (name, p) in enumerate(model.named_parameters()):
        p.data = _random(p, number) if "lora_" in name else p.data
    model.save_pretrained(tmp_path / "first")
    opened = opened_here(tmp_path / "first", base)
    to_peft(opened, tmp_path / "second")
    written = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"] and written["modules_to_save"] is None
    again = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "second")
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), q.detach().numpy(), err_msg=name)


REFUSED = [
    ({"use_dora": True}, r"use_dora True \(expected False\)"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"bias": "lora_only"}, "bias 'lora_only'"),
    ({"target_modules": r".*self_attn\.q_proj"}, "adapts the vision tower"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[told.split()[0] for _, told in REFUSED])
def test_what_is_no_plain_lora_is_refused(llava, tmp_path, options, told):
    adapted(llava, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=told):
        opened_here(tmp_path / "adapter", llava)
