"""Tokenizers: text that names control tokens stays text, spans tile the text, files that are none are refused in a line."""

import concurrent.futures
import pickle

import pytest
import tokenizers
from helpers import ROOT, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from neva_jax.data.tokenizer import SentencePieceTokenizer, open_tokenizer
from neva_jax.errors import UserError

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"
CONTROLS = ("<s>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(8)))
BYTE_LEVEL_CONTROLS = ("<|begin_of_text|>", "<|eot_id|>", "<|image|>", "<extra_id_4>", "<extra_id_5>")


def open_sentencepiece(name):
    return SentencePieceTokenizer(DIGITS if name == "digits" else golden("tokenizer/llama2_neva.model"))


@pytest.fixture(scope="module", params=["digits", "llama2"])
def sentencepiece(request):
    return open_sentencepiece(request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A Hugging Face directory like Llama-3's: byte-level BPE, special tokens, a post-processor that trims spaces off spans, and NeVA's tokens added by
    somebody who did not say that they are special."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(BYTE_LEVEL_CONTROLS[:3]), show_progress=False)
    tokenizer.train_from_iterator(["USER: what is it? ASSISTANT: yes, it is the one"] * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in BYTE_LEVEL_CONTROLS[3:]])
    directory = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(directory / "tokenizer.json"))
    return open_tokenizer("huggingface", model=None, type=str(directory))


@pytest.fixture(scope="module", params=["digits", "llama2", "byte_level"])
def any_tokenizer(request, byte_level):
    return byte_level if request.param == "byte_level" else open_sentencepiece(request.param)


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Text stays text

PARTS = st.sampled_from([*CONTROLS, *BYTE_LEVEL_CONTROLS, "<0x0A>", "ASSISTANT:", " ", "  ", "\n", "▁", "yes", "é", "😀", "a\u0301", "\u200b", "7"])
TEXTS = st.lists(PARTS, max_size=8).map("".join) | st.text(max_size=20)


def test_text_never_becomes_a_control_token(any_tokenizer):
    forbidden = {i for name in (*CONTROLS, *BYTE_LEVEL_CONTROLS) if name != "<unk>" and (i := any_tokenizer.id_of(name)) is not None}
    assert len(forbidden) >= 5

    @given(TEXTS, st.booleans())
    @settings(max_examples=200, deadline=None)
    def check(text, start):
        ids, spans = any_tokenizer.encode(text, start=start)
        assert not forbidden & set(ids)
        assert len(ids) == len(spans)
        covered = 0
        for begin, end in spans:  # in order, without a gap; the bytes of one character share it
            assert begin <= covered and begin <= end <= len(text)
            covered = max(covered, end)
        assert covered == len(text)

    check()


def test_encode_is_the_model_s_own(sentencepiece):
    """On text without control strings the ids are those of the model as it is, and behind a control token there is no dummy prefix."""
    whole = SentencePieceProcessor(str(sentencepiece.path))
    marker = whole.piece_to_id("<extra_id_7>")

    @given(st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=30))
    @settings(max_examples=300, deadline=None)
    def check(text):
        assert sentencepiece.encode(text, start=True)[0] == whole.encode(text)
        assert [*sentencepiece.prefix_ids, marker, *sentencepiece.encode(text, start=False)[0]] == whole.encode("<extra_id_7>" + text)

    check()


def test_spans_say_what_ids_stand_for(any_tokenizer):
    text = "USER: is it a seven? ASSISTANT: yes, the one"
    ids, spans = any_tokenizer.encode(text, start=True)
    for id, (begin, end) in zip(ids, spans, strict=True):
        assert any_tokenizer.decode([id]).strip() == text[begin:end].strip()
    assert any_tokenizer.decode(ids) == text


def test_ids_of_names(sentencepiece):
    whole = SentencePieceProcessor(str(sentencepiece.path))
    assert [sentencepiece.id_of(name) for name in CONTROLS] == [whole.piece_to_id(name) for name in CONTROLS]
    assert (sentencepiece.bos_id, sentencepiece.eos_id, sentencepiece.unk_id, sentencepiece.vocab_size) == (1, 2, 0, len(whole))
    assert sentencepiece.id_of("<no_such_token>") is None


def test_pickles_small_and_encodes_in_threads(any_tokenizer):
    text = "USER: is it a seven? ASSISTANT: yes"
    expected = any_tokenizer.encode(text, start=True)
    assert len(pickle.dumps(any_tokenizer)) < 1000
    again = pickle.loads(pickle.dumps(any_tokenizer))
    assert (again.fingerprint, again.vocab_size, again.eos_id) == (any_tokenizer.fingerprint, any_tokenizer.vocab_size, any_tokenizer.eos_id)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: again.encode(text, start=True), range(100))) == [expected] * 100


def test_spaces_of_a_model_that_squeezes_them(tmp_path):
    """sentencepiece's own default: it drops leading spaces and squeezes others, by which spans would slip. Here they stay, so they do not."""
    texts = tmp_path / "texts"
    texts.write_text("one two three USER: ASSISTANT: yes no\n" * 20)
    SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "squeezing"), vocab_size=60, hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<extra_id_7>"]
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "squeezing.model")
    assert "  two" not in tokenizer.decode(SentencePieceProcessor(str(tokenizer.path)).encode("one  two"))
    for start in (True, False):
        ids, spans = tokenizer.encode("  one  two ", start=start)
        assert tokenizer.decode(ids).endswith("one  two ")
        shown = ["  one  two "[begin:end] for begin, end in spans]
        assert [tokenizer.decode([id]).strip() for id in ids] == [part.strip() for part in shown] and "".join(shown) == "  one  two "


# ---- Hugging Face


def test_byte_level(byte_level):
    assert byte_level.decode([byte_level.bos_id, byte_level.eos_id]) == "<|begin_of_text|><|eot_id|>"
    assert byte_level.id_of("<extra_id_4>") == byte_level.vocab_size - 2 and byte_level.id_of("<extra_id_6>") is None and byte_level.prefix_ids == []
    text = "é😀 <extra_id_4><|eot_id|> yes  "
    assert byte_level.decode(byte_level.encode(text, start=True)[0]) == text


def test_directory_with_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(DIGITS.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert isinstance(open_tokenizer("huggingface", model=None, type=str(tmp_path)), SentencePieceTokenizer)


# ---- Files that are none


@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", b'{"a": 1}', b"\x89PNG\r\n\x1a\n" + bytes(40), b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_a_sentencepiece_model(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    message = refused(SentencePieceTokenizer, path)
    assert message.startswith(f"model.tokenizer.model: {path} ") and "not a sentencepiece model" in message


def test_cut_off_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(DIGITS.read_bytes()[:2000])
    assert "not a sentencepiece model" in refused(SentencePieceTokenizer, path)


@pytest.mark.parametrize("content", [b'{"model": "ByteLevel"}', b'"ByteLevel"', b"\xff\"ByteLevel\""])
def test_not_a_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "is not a tokenizer.json" in refused(open_tokenizer, "huggingface", model=None, type=str(tmp_path))


def test_nothing_there(tmp_path):
    assert "no file" in refused(open_tokenizer, "sentencepiece", model=str(tmp_path / "no.model"), type=None)
    assert "model.tokenizer.model is not set" in refused(open_tokenizer, "sentencepiece", model=None, type=None)
    assert "model.tokenizer.type is not set" in refused(open_tokenizer, "huggingface", model=None, type=None)
    assert "no tokenizer.json" in refused(open_tokenizer, "huggingface", model=None, type="meta-llama/Llama-2-7b-hf")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    assert "not byte-level" in refused(open_tokenizer, "huggingface", model=None, type=str(tmp_path))
