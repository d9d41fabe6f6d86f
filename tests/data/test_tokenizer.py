"""Tokenizers: text that names control tokens stays text, spans tile the text, files that are none are refused in a line."""

import concurrent.futures
import pickle

import pytest
import tokenizer_files
from helpers import ROOT, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizer_files import BYTE_LEVEL_CONTROLS

from neva_jax.data.tokenizer import SentencePieceTokenizer, open_tokenizer
from neva_jax.errors import UserError

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"
CONTROLS = ("<s>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(8)))


def open_sentencepiece(name):
    return SentencePieceTokenizer(DIGITS if name == "digits" else golden("tokenizer/llama2_neva.model"))


@pytest.fixture(scope="module", params=["digits", "llama2"])
def sentencepiece(request):
    return open_sentencepiece(request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_level")
    tokenizer_files.byte_level().save(str(directory / "tokenizer.json"))
    return open_tokenizer("huggingface", type=str(directory))


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


def ids_of_pieces(tokenizer, text, pieces):
    """ids of `text` and then of [(control token, text behind it), ...], encoded as a template's pieces are."""
    ids = tokenizer.encode(text, start=True)[0] if text or not pieces else [*tokenizer.prefix_ids]
    for name, behind in pieces:
        ids += [tokenizer.id_of(name), *tokenizer.encode(behind, start=tokenizer.restarts)[0]]
    return ids


IM = ("<im_start>", "<im_end>")
WAYS = {  # options, control tokens, whether text behind them begins with a prefix again
    "nemo": ({}, CONTROLS[-2:], False),
    "nemo, one more token": ({"legacy": True, "added": ["<image>"]}, CONTROLS[-2:], False),
    "nemo legacy": ({"legacy": True, "added": IM}, IM, True),
    "huggingface legacy": ({"style": "huggingface", "legacy": True, "added": IM}, ("</s>", *IM), True),
    "huggingface": ({"style": "huggingface", "legacy": False, "added": IM}, ("</s>", *IM), False),
}


@pytest.mark.parametrize("name", ["digits", "llama2"])
@pytest.mark.parametrize("way", WAYS)
def test_pieces_join_to_the_whole(name, way, tmp_path):
    """Around control tokens the ids of plain text are those that the original program finds in the whole string; and they read as it."""
    options, controls, restarts = WAYS[way]
    path = open_sentencepiece(name).path
    if way == "nemo legacy":
        path = without_user_defined(path, tmp_path / "tokenizer.model")
    tokenizer = SentencePieceTokenizer(path, **options)
    assert tokenizer.restarts == restarts and set(controls) - {"</s>"} <= set(tokenizer.special)
    parts = ["yes", " ", "  ", "\n", "ASSISTANT:", "7", "<", "a", *(["▁", "é", "😀", "a\u0301"] if name == "llama2" else [])]
    plain = st.lists(st.sampled_from(parts), max_size=5).map("".join)

    @given(plain, st.lists(st.tuples(st.sampled_from(controls), plain), max_size=4))
    @settings(max_examples=200, deadline=None)
    def check(text, pieces):
        joined = text + "".join(name + behind for name, behind in pieces)
        ids = ids_of_pieces(tokenizer, text, pieces)
        assert ids == tokenizer.whole(joined)
        if tokenizer.unk_id not in ids:
            assert tokenizer.decode(ids) == joined.replace("▁", " ")

    check()


def without_user_defined(source, target):
    model = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    kept = [piece for piece in model.pieces if piece.type != model.SentencePiece.USER_DEFINED]
    del model.pieces[:]
    model.pieces.extend(kept)
    target.write_bytes(model.SerializeToString())
    return target


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
    slow = SentencePieceTokenizer(tokenizer.path, style="huggingface", legacy=False)  # its legacy False is there to keep a space behind a control token
    assert slow.whole("</s> two") == [2, *slow.encode(" two", start=False)[0]] != slow.whole("</s>two") and slow.whole("one▁▁two") == slow.whole("one  two")
    for start in (True, False):
        ids, spans = tokenizer.encode("  one  two ", start=start)
        assert tokenizer.decode(ids).endswith("one  two ")
        shown = ["  one  two "[begin:end] for begin, end in spans]
        assert [tokenizer.decode([id]).strip() for id in ids] == [part.strip() for part in shown] and "".join(shown) == "  one  two "


def test_tokens_behind_the_vocabulary(tmp_path):
    path = without_user_defined(DIGITS, tmp_path / "tokenizer.model")
    plain, size = SentencePieceTokenizer(path), SentencePieceTokenizer(path).vocab_size
    assert plain.special == () and not plain.restarts and plain.pad_id is None and not plain.adds_bos
    legacy = SentencePieceTokenizer(path, legacy=True, added=("<b>", "<s>", "<a>"), roles={"bos_token": "<a>", "pad_token": "<b>"})
    assert (legacy.vocab_size, legacy.bos_id, legacy.pad_id, legacy.eos_id, legacy.special) == (size + 2, size + 1, size, 2, ("<b>", "<a>"))
    slow = SentencePieceTokenizer(path, style="huggingface", added=("<b>",), roles={"pad_token": "<b>"})
    assert (slow.vocab_size, slow.bos_id, slow.eos_id, slow.unk_id, slow.pad_id, slow.adds_bos) == (size + 1, 1, 2, 0, size, True)
    assert slow.special == ("<s>", "</s>", "<unk>", "<b>") and slow.decode([1, *slow.encode("yes", start=False)[0], size, 2]) == "<s>yes<b></s>"
    assert len({t.fingerprint for t in (plain, legacy, slow)}) == 3


def test_a_prefix_that_the_model_does_not_have(tmp_path):
    """transformers' legacy False writes it itself."""
    model = sentencepiece_model_pb2.ModelProto.FromString(DIGITS.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    for style, legacy, prefixed in (("nemo", False, False), ("huggingface", True, False), ("huggingface", False, True)):
        tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model", style=style, legacy=legacy)
        assert tokenizer.encode("yes", start=True)[0] == tokenizer.whole("yes") and tokenizer.prefix_ids == []
        assert (tokenizer.whole("yes") == SentencePieceTokenizer(DIGITS).whole("yes")) == prefixed


def test_a_token_that_is_no_piece():
    """Says which, and the command that adds it."""
    message = refused(SentencePieceTokenizer, DIGITS, added=("<extra_id_3>", "<image>", "<pad>"))
    assert "has no piece <image>, <pad>;" in message and f"--input {DIGITS} --output NEW.model --tokens '<image>,<pad>'" in message


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


@pytest.mark.parametrize("content", [b'{"model": "ByteLevel"}', b'"ByteLevel"', b'\xff"ByteLevel"', b'{"model": {"type": "BPE", "byte_fallback": true}}'])
def test_not_a_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = refused(open_tokenizer, "huggingface", type=str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in message and message.startswith("model.tokenizer.type: ")


def test_nothing_there(tmp_path):
    assert "no file" in refused(open_tokenizer, "sentencepiece", model=str(tmp_path / "no.model"))
    assert "model.tokenizer.model is not set" in refused(open_tokenizer, "sentencepiece")
    assert "model.tokenizer.type is not set" in refused(open_tokenizer, "huggingface")
    assert "no tokenizer.json" in refused(open_tokenizer, "huggingface", type="meta-llama/Llama-2-7b-hf")
