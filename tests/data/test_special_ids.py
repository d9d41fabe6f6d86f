"""Control tokens by template and tokenizer: which ids they become, and what is said of a tokenizer that lacks them."""

import logging

import pytest
from helpers import golden
from sentencepiece import sentencepiece_model_pb2
from template_tokenizers import CHAT, DIGITS, extended, open_for
from written_out import TEXT, WRITTEN, named

from neva_jax.data.conversation import TEMPLATES, render
from neva_jax.data.tokenize import SpecialIds, encode
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import UserError
from neva_jax.extend_tokenizer import extend

UNK, BOS, EOS = 0, 1, 2
EXTRA_TEMPLATES = ("nvgpt", "nv_steerlm", "nv_dpo")  # whose turns open and end with <extra_id_0>, 1 and 2
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in (3, 4, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return extended(tmp_path_factory.mktemp("model"), "digits")


class Bare:
    """A tokenizer without any of the templates' tokens."""

    path, bos_id, eos_id = "bare.model", None, 7

    def id_of(self, token):
        return None


def test_neva(model):
    tokenizer = open_for(model, "v1")
    start, end, patch = (tokenizer.id_of(f"<extra_id_{i}>") for i in (4, 5, 3))
    assert SpecialIds.of(tokenizer, "v1", use_im_start_end=True) == SpecialIds(BOS, EOS, UNK, start, end, True)
    assert SpecialIds.of(tokenizer, "plain", use_im_start_end=False) == SpecialIds(BOS, EOS, patch, start, end, False)
    special = SpecialIds.of(tokenizer, "llama_3", use_im_start_end=False)
    assert special == SpecialIds(BOS, EOS, patch, start, end, False, False, tuple((name, tokenizer.id_of(name)) for name in CHAT[:4]))
    assert special.control("<|eot_id|>") == tokenizer.id_of("<|eot_id|>") and special.control("<|im_end|>") is None
    assert (special.control("<extra_id_6>"), special.control("<extra_id_7>")) == (BOS, EOS)


def test_llava(model):
    tokenizer = open_for(model, "llava:v1")
    start, end = tokenizer.id_of("<im_start>"), tokenizer.id_of("<im_end>")
    assert min(start, end) >= 384
    assert SpecialIds.of(tokenizer, "llava:v1", use_im_start_end=True) == SpecialIds(BOS, EOS, 0, start, end, True, True)
    assert not SpecialIds.of(tokenizer, "llava:plain", use_im_start_end=True).use_im_start_end, "LLaVA wraps no picture of a caption"


def test_media_tokens_of_llama_3(tmp_path):
    """Named by mm_cfg.llm.model_type, whatever the template, and kept as they are."""
    path = tmp_path / "reserved.model"
    path.write_bytes(extend(DIGITS.read_bytes(), RESERVED + CHAT))
    tokenizer = SentencePieceTokenizer(path)
    patch, start, end = map(tokenizer.id_of, RESERVED)
    for template in ("llama_3", "v1"):
        special = SpecialIds.of(tokenizer, template, use_im_start_end=False, model_type="llama_3")
        assert (special.patch, special.start, special.end) == (patch, start, end)
        assert special.media(4) == ([start, patch, patch, end], [0, 1, 2, 3])


# ---- Tokenizers that lack tokens


@pytest.fixture(params=["llama2", "tiny160"])
def without(request):
    """Models as published: <extra_id_4> is several pieces to them."""
    tokenizer = SentencePieceTokenizer(golden(f"tokenizer/{request.param}.model"))
    assert len(tokenizer.whole("<extra_id_4>")) > 1 and tokenizer.id_of("<extra_id_4>") is None
    return tokenizer


def refused(*args, **kwargs):
    with pytest.raises(UserError) as error:
        SpecialIds.of(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


COMMAND = "add them with python -m neva_jax.extend_tokenizer (sentencepiece), or list them in model.tokenizer.additional_special_tokens (huggingface)"


def test_start_and_end_that_are_not_single_pieces(without):
    """Only where they are seen: else media vectors replace them."""
    special = SpecialIds.of(without, "v1", use_im_start_end=False)
    assert (special.patch, special.start, special.end) == (0, 0, 0)
    message = refused(without, "v1", use_im_start_end=True)
    assert (
        message
        == f"model.mm_cfg.use_im_start_end needs <extra_id_4> and <extra_id_5> in the tokenizer; {without.path} lacks <extra_id_4>, <extra_id_5>; {COMMAND}"
    )
    message = refused(without, "llava:v1", use_im_start_end=True)
    assert message.startswith("model.mm_cfg.use_im_start_end needs <im_start> and <im_end> in the tokenizer; ") and message.endswith(COMMAND)


@pytest.mark.parametrize("template", EXTRA_TEMPLATES)
def test_extra_ids_that_are_not_single_pieces(without, template):
    message = refused(without, template, use_im_start_end=False)
    names = "<extra_id_0>, <extra_id_1>, <extra_id_2>"
    assert message == f"the template {template} needs {names} as single pieces; {without.path} lacks {names}; {COMMAND}"


def test_one_extra_id_that_is_missing(tmp_path):
    """The message names what is missing, and no more."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(DIGITS.read_bytes())
    next(piece for piece in proto.pieces if piece.piece == "<extra_id_1>").piece = "<other>"
    (tmp_path / "a.model").write_bytes(proto.SerializeToString())
    message = refused(SentencePieceTokenizer(tmp_path / "a.model"), "nvgpt", use_im_start_end=False)
    assert message == f"the template nvgpt needs <extra_id_1> as single pieces; {tmp_path / 'a.model'} lacks <extra_id_1>; {COMMAND}"


CHATS = {"llama_3": CHAT[:4], "yi_34b": CHAT[4:], "llava:mpt": CHAT[4:], "llava:chatml_direct": CHAT[4:]}


@pytest.mark.parametrize("template", CHATS)
def test_chat_tokens_that_are_not_single_pieces(template, caplog):
    """NeMo and LLaVA train with such a tokenizer, the tokens in pieces; so do we, and say so once: here, before the first record."""
    tokenizer = SentencePieceTokenizer(golden("tokenizer/llama2.model"))
    special = SpecialIds.of(tokenizer, template, use_im_start_end=False)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    names, words = warning.getMessage().removeprefix(f"the template {template} writes ").split(f", which {tokenizer.path} spells in pieces")
    assert set(names.split(", ")) == set(CHATS[template]) and "tokenizer" in words and special.controls == ()
    pieces = render(template, TEXT)
    stream = encode(pieces, tokenizer, special, 4)
    assert len(caplog.records) == 1
    assert tokenizer.decode(stream.ids).strip() == named(WRITTEN[template][1]).replace("«", "").replace("»", "").strip()
    assert tokenizer.decode(stream.ids[stream.supervised]) == "Hi" + CHATS[template][-1], "the stop is learnt, in pieces"


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - CHATS.keys() - set(EXTRA_TEMPLATES)))
def test_templates_that_need_nothing(template, caplog):
    special = SpecialIds.of(Bare(), template, use_im_start_end=False)
    assert special == SpecialIds(bos=7, eos=7, patch=0, start=0, end=0, llava=template.startswith("llava:")) and not caplog.records


@pytest.mark.parametrize("eos_id", [None, -1])
def test_no_end_of_sequence(eos_id):
    endless = Bare()
    endless.eos_id = eos_id
    ends = {name for name, texts in WRITTEN.items() if "</s>" in named(texts[0])}
    assert {"v1", "llama_2", "mistral", "llava:v1"} <= ends
    for template in TEMPLATES.keys() - CHATS.keys() - set(EXTRA_TEMPLATES):
        if template in ends:
            assert refused(endless, template, use_im_start_end=False) == "bare.model has no end-of-sequence token, and the template ends answers with it"
        else:
            SpecialIds.of(endless, template, use_im_start_end=False)
