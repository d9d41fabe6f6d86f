"""Exports as transformers reads them: no key missing or left over, our ids and pixels from their processor, our logits within 1e-4, our greedy answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.template_tokenizers import extended, open_for
from flax import nnx
from helpers import golden, neva_config
from safetensors.numpy import load_file

from neva_jax.convert import hf
from neva_jax.convert.hf_processor import processor_files
from neva_jax.convert.hf_write import TokenIds, write_huggingface
from neva_jax.data.conversation import render
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.tokenize import encode
from neva_jax.inference.generate import Weights, generate
from neva_jax.inference.sampling import Sampling
from neva_jax.layers.attention import attend
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVision, ClipVisionConfig
from neva_jax.models.llama import Llama, LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.parallel.layer_runner import scan_layers
from neva_jax.transforms.select import describe, nest

VISION = ClipVisionConfig(hidden_size=32, ffn_hidden_size=64, num_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
LLAMA = LlamaConfig(
    vocab_size=0, padded_vocab_size=0, num_layers=2, hidden_size=48, ffn_hidden_size=72, num_attention_heads=4, num_query_groups=2, head_dim=20, rope=Rope(20)
)


def llama(vocab_size: int, **changes) -> LlamaConfig:
    return dataclasses.replace(LLAMA, vocab_size=vocab_size, padded_vocab_size=-(-vocab_size // 128) * 128, **changes)


def random_model(make):
    """-> graphdef, {path: array}; norms, biases and rows of padding are random too."""
    rng, (graphdef, weights) = np.random.default_rng(0), describe(make)
    scale = {"kernel": lambda shape: shape[-2] ** -0.5, "embedding": lambda shape: 1.0}
    values = {path: rng.normal(size=weight.shape).astype(np.float32) for path, weight in weights.items()}
    for path, value in values.items():
        name = path.split("/")[-1]
        value *= scale[name](value.shape) if name in scale else 0.3
        value += name == "scale"
    return graphdef, values


def batch_of(stream, media) -> dict:
    """One row of a Stream."""
    positions = np.arange(len(stream.ids), dtype=np.int32)
    row = {"tokens": stream.ids, "media_index": stream.media_index, "segment_ids": np.ones_like(positions), "position_ids": positions, "media": media}
    return {name: value[None] for name, value in row.items()}


# ---- LLaVA -------------------------------------------------------------------------------------------------------------------------------------------

CASES = {  # template, aspect, options of the encoder, changes to the language model, changes to the tower
    "llava:v1, padded pictures": ("llava:v1", "pad", {}, {}, {}),
    "NeVA's llama_2, tied": ("llama_2", "square", {}, {"tied": True}, {"select_layer": -1, "keep_class_token": True}),
    "start and end tokens, Llama-3's rope, biases": (
        "v1", "square", {"use_im_start_end": True}, {"rope": Rope(20, 5e5, llama3=(8.0, 1.0, 4.0, 32)), "bias": True}, {"hidden_act": "gelu"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A live model of ours, its encoder and image processor, and the directory of its export."""
    template, aspect, options, llm, vision = CASES[request.param]
    directory = tmp_path_factory.mktemp("export")
    tokenizer = open_for(extended(directory, "digits", with_bytes=True), template)
    config = NevaConfig(llama(tokenizer.vocab_size, **llm), dataclasses.replace(VISION, **vision), "mlp2x_gelu")
    encoder = Encoder(tokenizer, template, config.media_length, 512, **options)
    images = ImageProcessor(crop_size=(28, 28), shortest_edge=28, aspect=aspect)
    graphdef, params = random_model(lambda: neva(config, rngs=nnx.Rngs(0)))
    processor = processor_files(encoder, config, images)
    report = write_huggingface(directory / "out", config, params, processor.ids, files=processor.files, notes=processor.notes, max_shard_bytes=200_000)
    assert report.notes == () and report.new_rows > 1
    return config, encoder, images, graphdef, params, directory / "out"


def load(directory, kind: str):
    """transformers' model of an export: it took all that is there, and missed nothing."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


TURNS = [("human", "<image>\nWhat do </s> and É say, and <s>?"), ("gpt", "It says 7."), ("human", "And here? <image>")]


@pytest.mark.parametrize("count", [1, 2])
def test_llava(exported, count):
    import torch
    from PIL import Image
    from transformers import AutoProcessor

    config, encoder, images, graphdef, params, directory = exported
    turns = TURNS[: 2 * count - 1]
    paths = sorted(golden("images").iterdir())[:count]
    stream = encode(render(encoder.template, turns), encoder.tokenizer, encoder.special, config.media_length)
    media = np.stack([images(path.read_bytes(), path.name) for path in paths])

    processor = AutoProcessor.from_pretrained(directory)
    messages = [{"role": "user" if role == "human" else "assistant", "content": value} for role, value in turns]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    np.testing.assert_array_equal(inputs["input_ids"][0], np.where(stream.media_index >= 0, processor.image_token_id, stream.ids))
    tower = ClipVision.normalize(type("Tower", (), {"config": config.vision}), jnp.asarray(media))
    np.testing.assert_allclose(inputs["pixel_values"], np.transpose(tower, (0, 3, 1, 2)), atol=1e-6)

    theirs = load(directory, "AutoModelForImageTextToText")
    assert type(theirs).__name__ == "LlavaForConditionalGeneration" and next(theirs.parameters()).dtype == torch.float32
    batch = batch_of(stream, media)

    def logits(params):
        model = nnx.merge(graphdef, nest(params))
        return model.llm.logits(model(batch))

    with torch.no_grad():
        out = theirs(**inputs).logits[0].numpy()
        answer = theirs.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].numpy()
    vocab = config.llm.vocab_size
    np.testing.assert_allclose(out[:, :vocab], jax.jit(logits)(params)[0, :, :vocab], atol=1e-4)
    assert out.shape[1] % 64 == 0 and (out[:, vocab:].max(1) < out[:, :vocab].max(1)).all(), "a new row is never the answer"
    stop = encoder.tokenizer.eos_id
    ours = generate(Weights(graphdef, jax.tree.map(jnp.asarray, params)), batch, Sampling(12), (stop,))[0]
    np.testing.assert_array_equal(answer, ours[ours >= 0])
    assert len(answer) == 12 or answer[-1] == stop


def test_a_conversation_with_pictures_as_parts(exported):
    """Content as a list, as most programs send it: pictures stand before their text, a line each, and <image> in a text is no picture."""
    from PIL import Image
    from transformers import AutoProcessor

    config, encoder, *_, directory = exported
    processor = AutoProcessor.from_pretrained(directory)
    parts = [{"type": "image", "image": Image.new("RGB", (30, 40))}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True)
    stream = encode(render(encoder.template, [("human", "<image>\nWhat is it?")]), encoder.tokenizer, encoder.special, config.media_length)
    assert inputs["input_ids"][0] == np.where(stream.media_index >= 0, processor.image_token_id, stream.ids).tolist()
    parts[1]["text"] = "Is this <image>?"
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(processor.image_token_id) == config.media_length


# ---- language models and towers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {}),
        ("llama", {"tied": True, "rope": Rope(20, 1e6, interpolation=2.0), "layernorm_epsilon": 1e-2}),
        ("llama", {"bias": True, "activation": "fast-geglu", "rope": Rope(20, 5e5, llama3=(8.0, 1.0, 4.0, 32))}),
        ("mistral", {"rope": Rope(20, 1e6), "num_query_groups": 1}),
    ],
)
def test_a_language_model_alone(tmp_path, kind, changes):
    import torch

    config = NevaConfig(llama(61, **changes), None, "mlp2x_gelu")
    graphdef, params = random_model(lambda: Llama(config.llm, attend=attend, runner=scan_layers, rngs=nnx.Rngs(0)))
    arrays = {f"llm/{path}": value for path, value in params.items()}
    report = write_huggingface(tmp_path / "out", config, arrays, TokenIds(bos=1, ends=(2,)), kind=kind)
    assert report.new_rows == 0
    theirs = load(tmp_path / "out", "AutoModelForCausalLM")
    assert theirs.config.model_type == kind and theirs.config.vocab_size == 61
    ids = np.random.default_rng(1).integers(3, 61, (2, 70))
    ours = jax.jit(lambda params: nnx.merge(graphdef, nest(params))(jnp.asarray(ids)))(params)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(ids)).logits, ours[..., :61], atol=1e-4)


def test_a_language_model_with_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = open_for(extended(tmp_path, "digits", with_bytes=True), "llama_2")
    config = NevaConfig(llama(tokenizer.vocab_size), None, "mlp2x_gelu")
    _, params = random_model(lambda: Llama(config.llm, attend=attend, runner=scan_layers, rngs=nnx.Rngs(0)))
    encoder = Encoder(tokenizer, "llama_2", 1, 512)
    files = processor_files(encoder, config)
    write_huggingface(tmp_path / "out", config, {f"llm/{path}": value for path, value in params.items()}, files.ids, files=files.files)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs.apply_chat_template([{"role": "user", "content": "Is it 7?"}], add_generation_prompt=True, return_dict=False)
    assert ids == encode(render("llama_2", [("human", "Is it 7?")]), tokenizer, encoder.special, 1).ids.tolist()
    assert theirs.decode(tokenizer.encode("Is it 7?", start=True)[0]) == "Is it 7?" and theirs.eos_token_id == tokenizer.eos_id


def test_a_tower_alone(tmp_path):
    import torch

    config = NevaConfig(None, VISION, "mlp2x_gelu")
    graphdef, params = random_model(lambda: ClipVision(VISION, attend=attend, runner=scan_layers, rngs=nnx.Rngs(0)))
    write_huggingface(tmp_path / "out", config, {f"vision_encoder/{path}": value for path, value in params.items()}, TokenIds())
    theirs = load(tmp_path / "out", "CLIPVisionModel")
    pixels = np.random.default_rng(1).normal(size=(2, 28, 28, 3)).astype(np.float32)
    ours = jax.jit(lambda params: nnx.merge(graphdef, nest(params))(jnp.asarray(pixels)))(params)
    with torch.no_grad():
        hidden = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(hidden[-2][:, 1:], ours, atol=1e-4)


# ---- files of the originals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parts, ids",
    [("llava", "both", TokenIds(159, 0)), ("llama_gqa", "llm", TokenIds()), ("llama_mha", "llm", TokenIds()), ("clip_vision", "vision", TokenIds())],
)
def test_what_was_read_is_written_back_bit_for_bit(tmp_path, name, parts, ids):
    directory = golden(f"checkpoints/{name}")
    config = neva_config(directory)
    config = dataclasses.replace(config, llm=config.llm if parts != "vision" else None, vision=config.vision if parts != "llm" else None)
    tensors = hf.open_tensors(directory)
    keys = hf.key_map(config, tensors)
    _, weights = describe(lambda: neva(neva_config(directory), rngs=nnx.Rngs(0)))
    arrays = {path: keys.lazy(tensors, path, weights[path].shape, name) for path in keys.rules}
    write_huggingface(tmp_path / "out", config, arrays, ids)
    theirs, ours = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
        assert ours[key].dtype == array.dtype
    again = hf.read_config(tmp_path / "out")
    for part, fields in (("text", hf.text_fields), ("vision", hf.vision_fields)):
        before = hf.read_config(directory)[part]
        assert (before and fields(before)) == (again[part] and fields(again[part]))


# ---- chat templates ----------------------------------------------------------------------------------------------------------------------------------
