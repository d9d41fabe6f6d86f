"""SigLIP's files both ways: what transformers 4 and 5 write is read, what is written they read, alone and in a LLaVA with its processor, bit for bit."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from data.template_tokenizers import extended, open_for
from flax import nnx
from helpers import Array, golden, randomise
from safetensors.numpy import load_file, save_file
from test_export import batch_of, llama, load, random_model
from test_siglip import BASE, PROCESSOR, channels_first, features, our_siglip, pictures, torch_siglip, tower

from neva_jax.convert import hf, nemo
from neva_jax.convert.hf_processor import image_config, processor_files
from neva_jax.convert.hf_write import TokenIds, write_huggingface
from neva_jax.data.conversation import render
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.tokenize import encode
from neva_jax.errors import UserError
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.models.siglip import SiglipVisionConfig
from neva_jax.transforms.select import nest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a tower, as transformers saves it."""
    directory = tmp_path_factory.mktemp("siglip")
    torch_siglip(directory)
    return directory


# ---- files that are read -----------------------------------------------------------------------------------------------------------------------------


def whole_siglip(directory):
    text = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, bos_token_id=1, eos_token_id=2)
    randomise(transformers.SiglipModel(transformers.SiglipConfig(vision_config=BASE, text_config=text))).save_pretrained(directory)
    return transformers.SiglipVisionModel.from_pretrained(directory).eval()


@pytest.mark.parametrize("abbreviated", [False, True])
def test_a_whole_siglip(tmp_path, abbreviated, caplog):
    theirs, media = whole_siglip(tmp_path), pictures(16)
    content = json.loads((tmp_path / "config.json").read_text())
    if abbreviated:
        del content["vision_config"]["model_type"]
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert hf.read_config(tmp_path)["text"] is None
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"logit_scale", "logit_bias", "text_model.head.weight", "vision_model.head.probe"} <= names
    with caplog.at_level(logging.INFO, "neva_jax.convert.hf"):
        _, graphdef, params = our_siglip(tmp_path)
    [line] = [record.getMessage() for record in caplog.records if record.name == "neva_jax.convert.hf"]
    count = sum(name.startswith("vision_model.head.") for name in names)
    assert f"{tmp_path}: the {count} tensors of the tower's pooling head are left out" in line
    with torch.no_grad():
        states = theirs(channels_first(media), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(features(graphdef, params, media), states[-2], atol=1e-5)


PREFIXES = ("", "vision_model.", "vision_tower.", "vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_spelling_of_names(saved, tmp_path, prefix):
    """Of towers alone and of towers in LLaVAs, in transformers 4 and 5 and the original LLaVA."""
    tensors = load_file(saved / "model.safetensors")
    save_file({prefix + name.removeprefix("vision_model."): array for name, array in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, our_siglip(tmp_path)[2], our_siglip(saved)[2])


def test_only_a_pooling_head_is_left_out(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"vision_model.head.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"1 are not part of such a model \(vision_model.head.weight\)"):
        our_siglip(tmp_path)


@pytest.mark.parametrize("given", [{}, dict(hidden_size=1152, num_attention_heads=16, image_size=384, patch_size=14, layer_norm_eps=1e-5)])
def test_keys_left_out_are_transformers_defaults(given):
    c = transformers.SiglipVisionConfig(**given)
    ours = hf.vision_of({"model_type": "siglip_vision_model", **given}, select_layer=-1)
    assert type(ours) is SiglipVisionConfig and ours == SiglipVisionConfig(
        hidden_size=c.hidden_size, ffn_hidden_size=c.intermediate_size, num_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        image_size=c.image_size, patch_size=c.patch_size, hidden_act=c.hidden_act, layernorm_epsilon=c.layer_norm_eps, select_layer=-1,
    )  # fmt: skip
    processor = PROCESSOR()
    assert (ours.image_mean, ours.image_std) == (tuple(processor.image_mean), tuple(processor.image_std))


def test_sides_may_be_written_as_pairs():
    fields = hf.vision_fields({"model_type": "siglip_vision_model", "image_size": [384, 384], "patch_size": [14, 14]})
    assert (fields["image_size"], fields["patch_size"]) == (384, 14)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "siglip2_vision_model"}, "type 'siglip2_vision_model'; this version reads clip_vision_model and siglip_vision_model"),
        ({"model_type": "siglip_vision_model", "patch_size": [14, 16]}, r"patch_size \[14, 16\]; this version computes squares"),
        ({"model_type": "siglip_vision_model", "image_size": [384]}, r"image_size \[384\]; this version computes squares"),
        ({"model_type": "siglip_vision_model", "num_channels": 1}, "num_channels 1; .* 3 channels"),
        ({"model_type": "siglip_vision_model", "hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_towers_that_cannot_be_computed(config, words):
    with pytest.raises(UserError, match=words):
        hf.vision_fields(config)


# ---- tables ------------------------------------------------------------------------------------------------------------------------------------------

TINY = SiglipVisionConfig(hidden_size=32, ffn_hidden_size=64, num_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
LLAVA = NevaConfig(llama(61), TINY, "mlp2x_gelu")


@pytest.mark.parametrize("table", [hf, nemo], ids=["hf", "nemo"])
def test_the_tables_are_bit_equal_both_ways(table):
    keys = table.key_map(LLAVA)
    _, ours = random_model(lambda: neva(LLAVA, rngs=nnx.Rngs(0)))
    ours |= {"llm/embed_tokens/embedding": ours["llm/embed_tokens/embedding"] * (np.arange(128) < 61)[:, None]}  # padding is not written
    ours |= {"llm/lm_head/kernel": ours["llm/lm_head/kernel"] * (np.arange(128) < 61)}
    assert keys.rules.keys() == ours.keys()
    theirs = keys.write(ours)
    tensors = {name: Array(array) for name, array in theirs.items()}
    keys.check(tensors, {path: array.shape for path, array in ours.items()}, "test")
    again = {path: keys.read(tensors, path, array.shape, "test") for path, array in ours.items()}
    jax.tree.map(np.testing.assert_array_equal, again, ours)
    jax.tree.map(np.testing.assert_array_equal, keys.write(again), theirs)


def test_names_in_nemos_files():
    tower = f"model.{nemo.TOWER}."
    names = {nemo.spelt(rule.theirs, "mcore").replace("{i}", "0") for rule in nemo.tower_rules(TINY)}
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8))
    expected = {tower + name.removeprefix("vision_model.") for name, _ in theirs.named_parameters()}
    assert names == {name for name in expected if not name.startswith(f"{tower}head.")}


# ---- files that are written --------------------------------------------------------------------------------------------------------------------------

CASES = {  # aspect, changes to the tower
    "stretched pictures, a layer before the last": ("square", {}),
    "padded pictures and a rest, the last layer": ("pad", {"image_size": 31, "select_layer": -1}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A LLaVA of ours with SigLIP, its encoder and image processor, and the directory of its export."""
    aspect, changes = CASES[request.param]
    directory = tmp_path_factory.mktemp("export")
    tokenizer = open_for(extended(directory, "digits", with_bytes=True), "v1")
    vision = dataclasses.replace(TINY, **changes)
    config = NevaConfig(llama(tokenizer.vocab_size), vision, "mlp2x_gelu")
    encoder = Encoder(tokenizer, "v1", config.media_length, 512)
    images = ImageProcessor(crop_size=(vision.image_size,) * 2, shortest_edge=None, aspect=aspect, mean=(0.5,) * 3, std=(0.5,) * 3)
    graphdef, params = random_model(lambda: neva(config, rngs=nnx.Rngs(0)))
    files = processor_files(encoder, config, images)
    assert write_huggingface(directory / "out", config, params, files.ids, files=files.files, notes=files.notes).notes == ()
    return config, encoder, images, graphdef, params, directory / "out"


def test_a_llava_and_its_processor(exported):
    """No key missing or left over, their processor's ids and pixels are ours, and so are the logits."""
    from PIL import Image
    from transformers import AutoProcessor

    config, encoder, images, graphdef, params, directory = exported
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "It says 7."), ("human", "And here? <image>")]
    paths = sorted(golden("images").iterdir())[:2]
    stream = encode(render(encoder.template, turns), encoder.tokenizer, encoder.special, config.media_length)
    media = np.stack([images(path.read_bytes(), path.name) for path in paths])

    processor = AutoProcessor.from_pretrained(directory)
    messages = [{"role": "user" if role == "human" else "assistant", "content": value} for role, value in turns]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    assert type(processor.image_processor).__name__.startswith("Siglip" if images.aspect == "square" else "Llava")
    np.testing.assert_array_equal(inputs["input_ids"][0], np.where(stream.media_index >= 0, processor.image_token_id, stream.ids))
    assert (stream.media_index >= 0).sum() == 2 * config.media_length == 8
    np.testing.assert_allclose(inputs["pixel_values"], channels_first(tower(config.vision)().normalize(media)), atol=1e-6)

    theirs, batch = load(directory, "AutoModelForImageTextToText"), batch_of(stream, media)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration" and type(theirs.model.vision_tower).__name__ == "SiglipVisionModel"

    def logits(params):
        model = nnx.merge(graphdef, nest(params))
        return model.llm.logits(model(batch))

    with torch.no_grad():
        out = theirs(**inputs).logits[0].numpy()
    vocab = config.llm.vocab_size
    np.testing.assert_allclose(out[:, :vocab], jax.jit(logits)(params)[0, :, :vocab], atol=1e-4)


def test_what_they_save_of_it_reads_back_bit_for_bit(exported, tmp_path):
    """Their names and configs are not ours: transformers 5 leaves out what 4 writes."""
    config, *_, params, directory = exported
    load(directory, "AutoModelForImageTextToText").save_pretrained(tmp_path)
    found = hf.read_config(tmp_path)
    assert hf.vision_of(found["vision"], select_layer=found["top"]["vision_feature_layer"]) == config.vision
    text = hf.text_fields(found["text"])
    again = NevaConfig(LlamaConfig(**text, padded_vocab_size=text["vocab_size"]), config.vision, config.projector)
    tensors = hf.open_tensors(tmp_path)
    keys = hf.key_map(again, tensors)
    keys.check(tensors, list(keys.rules), "test")
    for path, array in params.items():
        if path not in ("llm/embed_tokens/embedding", "llm/lm_head/kernel"):  # they have rows for new tokens
            np.testing.assert_array_equal(keys.read(tensors, path, array.shape, "test"), array, err_msg=path)


def test_a_tower_alone(tmp_path):
    graphdef, params = random_model(tower(TINY))
    write_huggingface(tmp_path / "out", NevaConfig(None, TINY, "mlp2x_gelu"), {f"vision_encoder/{path}": w for path, w in params.items()}, TokenIds())
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["architectures"], content["vision_use_head"]) == (["SiglipVisionModel"], False)
    assert all(name.startswith("vision_model.") for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert hf.vision_of(hf.read_config(tmp_path / "out")["vision"]) == TINY
    theirs = load(tmp_path / "out", "SiglipVisionModel")
    with torch.no_grad():
        states = theirs(channels_first(pictures(28)), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(states[-2], features(graphdef, params, pictures(28)), atol=1e-4)


def test_oblong_pictures_are_not_padded_and_stretched():
    with pytest.raises(UserError, match="stretches pictures to 56 x 28 cannot be exported with model.data.image_aspect_ratio pad"):
        image_config(ImageProcessor(crop_size=(28, 56), shortest_edge=None, aspect="pad"))
