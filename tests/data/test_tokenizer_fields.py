"""NeMo's model.tokenizer fields: what they open, in the forms that YAML files and command lines give, and which line refuses what cannot be done."""

import pytest
from helpers import ROOT
from ml_collections import ConfigDict

from configs import base
from neva_jax.build.data import build_tokenizer
from neva_jax.config import assign, check
from neva_jax.data.tokenizer import open_tokenizer, read_special_tokens
from neva_jax.errors import UserError

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "tokens", "roles"),
    [
        (None, (), {}),
        (("<a>", "<b>", "<a>"), ("<a>", "<b>"), {}),
        ({"pad_token": "<p>", "additional_special_tokens": ["<a>"]}, ("<p>", "<a>"), {"pad_token": "<p>"}),
        ('{additional_special_tokens: ["<a>", "<b>"]}', ("<a>", "<b>"), {}),
        ("<a>,<b>", ("<a>", "<b>"), {}),
        ("<a>", ("<a>",), {}),
        ("[<a>, <b>]", ("<a>", "<b>"), {}),
    ],
)
def test_special_tokens(given, tokens, roles):
    assert read_special_tokens(given) == (tokens, roles)


@pytest.mark.parametrize("given", [("<a>", 3), {"pad": "<p>"}, {"pad_token": None}, ("<a>", " "), "{a: [", 7])
def test_special_tokens_that_are_none(given):
    assert refused(read_special_tokens, given).startswith("model.tokenizer.additional_special_tokens ")


def test_fields_reach_the_tokenizer():
    def build(again=False, **fields):
        config = base.get_config()
        for name, value in fields.items():
            assign(config, f"model.{name.replace('__', '.')}", value)
        check(config)
        return build_tokenizer(ConfigDict(config.to_dict()) if again else config)

    model, tokens = {"tokenizer__model": str(DIGITS)}, {"tokenizer__additional_special_tokens": {"pad_token": "<p>"}}
    assert not build(**model).restarts
    legacy = build(**model, **tokens, tokenizer__sentencepiece_legacy=True)
    assert legacy.id_of("<p>") == legacy.pad_id == legacy.vocab_size - 1 and "<s>" not in legacy.special
    assert build(again=True, **model, **tokens, tokenizer__sentencepiece_legacy=True).fingerprint == legacy.fingerprint
    llava = build(**model, **tokens, data__conv_template="llava:v1")
    assert llava.special[:4] == ("<s>", "</s>", "<unk>", "<p>") and not llava.restarts and llava.pad_id == legacy.pad_id
    eos = build(**model, tokenizer__additional_special_tokens={"eos_token": "<e>"}, data__conv_template="llava:v1")
    assert eos.eos_id == eos.vocab_size - 1 and "</s>" in eos.special
    megatron = build(**model, tokenizer__library="megatron", tokenizer__type="GPTSentencePieceTokenizer")
    assert megatron.fingerprint == build(**model).fingerprint
    assert "no piece <p>" in refused(build, **model, **tokens)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"library": "yttm"}, "model.tokenizer.library is 'yttm', which is not read here; expected one of sentencepiece, huggingface, megatron"),
        ({"library": "sentencepiece", "model": str(DIGITS), "vocab_file": "vocab.json"}, "vocab_file and merge_file belong to library megatron"),
        ({"library": "megatron"}, "model.tokenizer.type is not set"),
        ({"library": "megatron", "type": "GPT2BPETokenizer"}, "set model.tokenizer.vocab_file and model.tokenizer.merge_file"),
        ({"library": "megatron", "type": "GPT2BPETokenizer", "vocab_file": "no.json", "merge_file": "no.txt"}, "no file no.json"),
        ({"library": "megatron", "type": "BertWordPieceCase", "vocab_file": "vocab.txt"}, "'BertWordPieceCase', which is neither a local directory nor"),
        ({"library": "megatron", "type": str(ROOT), "vocab_file": "vocab.json"}, "a directory with a tokenizer of its own"),
    ],
)
def test_fields_that_cannot_be_done(fields, expected):
    assert expected in refused(open_tokenizer, **fields)
