"""The files beside the weights, without transformers: what they say of pictures and tokens, and what is noted of what they cannot do."""

import json

import pytest
from data.template_tokenizers import extended, open_for

from neva_jax.convert.hf_processor import image_config, processor_files
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from neva_jax.errors import UserError
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig

CONFIG = NevaConfig(None, ClipVisionConfig(16, 20, 3, 2, 28, 14), "mlp2x_gelu")
IMAGES = ImageProcessor(crop_size=(28, 28), shortest_edge=28)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return extended(tmp_path_factory.mktemp("pieces"), "digits", with_bytes=True)


def files_of(pieces, template, images=IMAGES, **options):
    return processor_files(Encoder(open_for(pieces, template), template, 4, 77, **options), CONFIG, images)


# ---- files -------------------------------------------------------------------------------------------------------------------------------------------


def test_both_generations_of_transformers_find_their_files(pieces):
    made = files_of(pieces, "v1")
    read = {name: json.loads(content) for name, content in made.files.items() if name.endswith(".json")}
    assert made.files.keys() - read.keys() == {"chat_template.jinja", "tokenizer.model"} and made.files["tokenizer.model"] == pieces.read_bytes()
    assert read.keys() == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    }  # fmt: skip
    assert read["chat_template.json"]["chat_template"] == made.files["chat_template.jinja"].decode()
    assert read["processor_config.json"] == {
        "processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1, "image_token": "<image>",
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    config, tokenizer = read["tokenizer_config.json"], SentencePieceTokenizer(pieces)
    assert (config["model_max_length"], config["pad_token"], config["eos_token"], config["add_bos_token"]) == (77, "<pad>", "</s>", False)
    assert config["model_input_names"] == ["input_ids", "attention_mask"], "else transformers 4 adds token_type_ids, which its LLaVA refuses"
    size = tokenizer.vocab_size
    assert (made.ids.image, made.ids.pad, made.ids.bos, made.ids.ends) == (size, size + 1, 1, (2,))
    assert config["added_tokens_decoder"][str(size)]["content"] == "<image>" and all(t["special"] for t in config["added_tokens_decoder"].values())


def test_a_language_model_alone_has_no_pictures(pieces):
    made = files_of(pieces, "v1", images=None)
    assert made.files.keys() == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model"}
    assert (made.ids.image, made.ids.pad) == (None, None) and b"<image>" not in made.files["tokenizer.json"]
    assert json.loads(made.files["tokenizer_config.json"])["chat_template"] == made.files["chat_template.jinja"].decode()


def test_tokens_that_are_there_are_not_added_again(tmp_path, pieces):
    """As in a model that came from llava-hf."""
    tokenizer = SentencePieceTokenizer(pieces, style="huggingface", added=("<image>", "<pad>"), roles={"pad_token": "<pad>"})
    ids = processor_files(Encoder(tokenizer, "llava:v1", 4, 77), CONFIG, IMAGES).ids
    assert (ids.image, ids.pad) == (tokenizer.id_of("<image>"), tokenizer.pad_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)


@pytest.mark.parametrize("template, stop", [("v1", None), ("nv_dpo", "<extra_id_1>"), ("llama_3", "<|eot_id|>"), ("yi_34b", "<|im_end|>")])
def test_what_generation_stops_at(pieces, template, stop):
    made = files_of(pieces, template)
    assert made.ids.ends == (2, *([SentencePieceTokenizer(pieces).id_of(stop)] if stop else [])) and made.notes == ()


# ---- notes -------------------------------------------------------------------------------------------------------------------------------------------


def test_what_another_program_does_not_do_is_noted(pieces):
    turned = ImageProcessor(crop_size=(28, 28), shortest_edge=28, exif=True)
    assert [note[:28] for note in files_of(pieces, "v1", turned).notes] == ["pictures are not turned as t"]
    assert "sep_image_conv_front" in files_of(pieces, "v1", sep_image_conv_front=True).notes[0]
    assert "stop_strings=['###']" in files_of(pieces, "llava:v0").notes[0]
    interleaved = files_of(pieces, "interleaved")
    assert "no chat template" in interleaved.notes[0] and not [name for name in interleaved.files if "chat" in name]


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------------------


def test_gpt_2s_two_files_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = HuggingFaceTokenizer(tmp_path / "vocab.json", merges=tmp_path / "merges.txt", roles={"eos_token": "<|endoftext|>"})
    with pytest.raises(UserError, match="vocab.json: only a tokenizer.json or a sentencepiece model can be exported"):
        processor_files(Encoder(tokenizer, "v1", 4, 77), CONFIG, IMAGES)


def test_a_tokenizer_that_json_cannot_repeat_is_refused(pieces, monkeypatch):
    tokenizer = open_for(pieces, "v1")
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(SentencePieceTokenizer, "encode", lambda self, text, start: ([7], [(0, 1)]) if "12345" in text else encode(self, text, start=start))
    with pytest.raises(UserError, match=r"would give .* for '0.5, 12345!', expected \[7\]"):
        processor_files(Encoder(tokenizer, "v1", 4, 77), CONFIG, IMAGES)


# ---- pictures ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        ImageProcessor(), ImageProcessor(crop_size=(336, 336), shortest_edge=336, aspect="pad", mean=(0.1, 0.2, 0.3)),
        ImageProcessor(crop_size=(384, 384), shortest_edge=None, mean=(0.5,) * 3, std=(0.5,) * 3),
    ],
)  # fmt: skip
def test_an_image_processor_reads_back_as_it_was(tmp_path, images):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_config(images)))
    assert ImageProcessor.from_pretrained(tmp_path) == images


@pytest.mark.parametrize("aspect", ["keep", "anyres"])
def test_aspects_that_transformers_llava_does_not_have(aspect):
    with pytest.raises(UserError, match=f"image_aspect_ratio '{aspect}' cannot be exported"):
        image_config(ImageProcessor(aspect=aspect))
