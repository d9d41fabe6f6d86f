"""Hugging Face directories and GPT-2's files: the ids of transformers, exact spans, what a directory says about its tokens, and what is refused."""

import json
import pickle

import pytest
import tokenizer_files
import tokenizers
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from neva_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, open_tokenizer
from neva_jax.errors import UserError

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"
CONTROLS = ("<unk>", "<s>", "</s>", *(f"<extra_id_{i}>" for i in range(8)))
KINDS = ("byte_level", "nfc", "prepend", "first", "always", "never")
RESTARTS = ("prepend", "always")
PLAIN = st.lists(st.sampled_from(["yes", " ", "  ", "\n", "▁", "é", "😀", "USER:", "7", "<", "a\u0301", "\u200b"]), max_size=5).map("".join)


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def open_at(directory, **options):
    return open_tokenizer("huggingface", type=str(directory), **options)


@pytest.fixture(scope="module", params=KINDS)
def fast(request, tmp_path_factory):
    """-> (kind, a directory with a tokenizer.json alone)"""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param in ("byte_level", "nfc"):
        tokenizer = tokenizer_files.byte_level()
        tokenizer.normalizer = tokenizers.normalizers.NFC() if request.param == "nfc" else None  # as Qwen's
        tokenizer.enable_truncation(4)  # left behind by whoever saved it; transformers lifts it too
        tokenizer.enable_padding(length=16, pad_token="<|eot_id|>")
        return request.param, write(directory, tokenizer=json.loads(tokenizer.to_str()))
    return request.param, write(directory, tokenizer=tokenizer_files.llama(DIGITS.read_bytes(), prefix=request.param, controls=CONTROLS))


def test_as_transformers(fast):
    """`whole` is what transformers gives, with a token added behind the vocabulary; and plain pieces around control tokens join to it."""
    kind, directory = fast
    tokenizer = open_at(directory, special_tokens=("<image>",))
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    controls = [name for name in tokenizer.special if name != "<unk>"]
    assert tokenizer.vocab_size == len(theirs) and tokenizer.restarts == (kind in RESTARTS) and tokenizer.prefix_ids == [] and len(controls) >= 6
    assert tokenizer.adds_bos == (kind not in ("byte_level", "nfc"))

    @given(PLAIN, st.lists(st.tuples(st.sampled_from(controls), PLAIN), max_size=4))
    @settings(max_examples=150, deadline=None)
    def check(text, pieces):
        joined = text + "".join(name + behind for name, behind in pieces)
        ids = tokenizer.encode(text, start=True)[0]
        for name, behind in pieces:
            ids += [tokenizer.id_of(name), *tokenizer.encode(behind, start=tokenizer.restarts)[0]]
        assert ids == tokenizer.whole(joined) == theirs.convert_tokens_to_ids(theirs.tokenize(joined))

    check()


def test_spans_and_plain_text(fast):
    kind, directory = fast
    tokenizer = open_at(directory, special_tokens=("<image>",))
    forbidden = {tokenizer.id_of(name) for name in tokenizer.special if name != "<unk>"}

    @given(st.lists(PLAIN | st.sampled_from(tokenizer.special), max_size=4).map("".join), st.booleans())
    @settings(max_examples=150, deadline=None)
    def check(text, start):
        ids, spans = tokenizer.encode(text, start=start)
        assert not forbidden & set(ids) and len(ids) == len(spans)
        covered = 0
        for begin, end in spans:  # in order, without a gap; the bytes of one character share it
            assert begin <= covered and begin <= end <= len(text)
            covered = max(covered, end)
        assert covered == len(text)

    check()


def test_spans_say_what_ids_stand_for(fast):
    kind, directory = fast
    tokenizer = open_at(directory, special_tokens=("<image>",))
    text = "is it a seven? yes, the one "
    anchor = tokenizer.encode("7", start=True)[0]
    for start in (True, False):
        ids, spans = tokenizer.encode(text, start=start)
        shown = [tokenizer.decode([*anchor, i])[1:] for i in ids]  # a decoder drops the space that opens a text
        assert "".join(shown) == " " * (start and kind in (*RESTARTS, "first")) + text
        assert shown[1:] == [text[begin:end] for begin, end in spans[1:]]
    behind = " " * (not tokenizer.restarts) + text
    joined = [*tokenizer.encode(text, start=True)[0], tokenizer.id_of("<image>"), *tokenizer.encode(behind, start=tokenizer.restarts)[0]]
    assert tokenizer.decode(joined) == f"{text}<image>{behind}"


def test_sentencepiece_and_its_export_agree(tmp_path):
    """transformers' fast Llama tokenizer cuts and prefixes as the slow one does with legacy True; two programs of ours, one answer."""
    exported = open_at(write(tmp_path, tokenizer=tokenizer_files.llama(DIGITS.read_bytes(), controls=CONTROLS)))
    slow = SentencePieceTokenizer(DIGITS, style="huggingface", legacy=True, added=CONTROLS)
    assert (exported.bos_id, exported.eos_id, exported.vocab_size) == (slow.bos_id, slow.eos_id, slow.vocab_size)

    @given(st.lists(st.sampled_from([*CONTROLS, "yes", " ", "USER:", "7", "is it", "<", "é"]), max_size=8).map("".join))
    @settings(max_examples=200, deadline=None)
    def check(text):
        assert exported.whole(text) == slow.whole(text)
        (ids, spans), (expected, expected_spans) = exported.encode(text, start=True), slow.encode(text, start=True)
        assert ids == expected and [end for _, end in spans[1:]] == [end for _, end in expected_spans[1:]]

    check()


def test_gpt2_files(tmp_path):
    """megatron's GPT2BPETokenizer is a vocabulary and merges; additional tokens stand behind it."""
    original = tokenizer_files.byte_level()
    original.add_special_tokens(["<|endoftext|>"])
    spec = json.loads(original.to_str())["model"]
    write(tmp_path, vocab=spec["vocab"] | {"<|endoftext|>": len(spec["vocab"])})
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in spec["merges"])]) + "\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    extra_ids = [f"<extra_id_{i}>" for i in range(8)]
    tokens = {"additional_special_tokens": extra_ids, "pad_token": "<extra_id_0>"}
    tokenizer = open_tokenizer("megatron", type="GPT2BPETokenizer", special_tokens=tokens, **files)
    end = len(spec["vocab"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (end, end, end, end + 1)
    assert [tokenizer.id_of(name) for name in extra_ids] == list(range(end + 1, end + 9)) and tokenizer.vocab_size == end + 9
    text = "USER: it's\n\n  é😀 "
    assert tokenizer.encode(text, start=True)[0] == original.encode(text, add_special_tokens=False).ids and not tokenizer.adds_bos
    assert tokenizer.whole(f"{text}<extra_id_7>{text}") == [*tokenizer.whole(text), end + 8, *tokenizer.whole(text)]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.fingerprint, again.whole(text)) == (tokenizer.fingerprint, tokenizer.whole(text))


# ---- what a directory says


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture
def slow(tmp_path):
    """A directory with a tokenizer.model and a tokenizer.json that is not to be read."""
    (tmp_path / "tokenizer.model").write_bytes(DIGITS.read_bytes())
    return write(tmp_path, tokenizer={"model": "not read"})


def size():
    return SentencePieceTokenizer(DIGITS).vocab_size


@pytest.mark.parametrize(("legacy", "restarts"), [({}, True), ({"legacy": None}, True), ({"legacy": True}, True), ({"legacy": False}, False)])
def test_slow_llama(slow, legacy, restarts):
    tokenizer = open_at(write(slow, tokenizer_config=LLAMA | legacy), special_tokens=("<image>",))
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.restarts == restarts and tokenizer.adds_bos
    behind = tokenizer.encode("yes", start=restarts)[0]
    assert tokenizer.whole("<s>yes</s>yes<image>") == [1, *behind, 2, *behind, size()] and behind != tokenizer.encode("yes", start=not restarts)[0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 0, None, size() + 1)


def test_no_config_at_all(slow):
    tokenizer = open_at(slow)
    assert tokenizer.restarts and tokenizer.special[:3] == ("<s>", "</s>", "<unk>")


def test_added_tokens_by_id(slow):
    """added_tokens_decoder counts alone, in the order of ids; what is not special there keeps the prefix that opens a string."""
    decoder = {
        str(size() + 1): {"content": "<b>", "special": False},
        str(size()): {"content": "<a>", "special": True},
        "2": {"content": "</s>", "special": True},
    }
    write(slow, added_tokens={"<z>": size()}, special_tokens_map={"pad_token": "<z>"})
    config = LLAMA | {"legacy": False, "pad_token": "<a>", "added_tokens_decoder": decoder, "additional_special_tokens": ["<c>"], "add_bos_token": False}
    tokenizer = open_at(write(slow, tokenizer_config=config))
    assert [tokenizer.id_of(name) for name in ("<a>", "<b>", "<c>", "<z>")] == [size(), size() + 1, size() + 2, None]
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.adds_bos) == (size(), size() + 3, False)
    assert tokenizer.whole("<a>") == [size()] and tokenizer.whole("<b>") == [tokenizer.id_of("▁"), size() + 1]


def test_added_tokens_of_old(slow):
    """Without added_tokens_decoder, special_tokens_map.json and added_tokens.json count."""
    write(slow, tokenizer={}, tokenizer_config=LLAMA | {"pad_token": None}, special_tokens_map={"pad_token": "[PAD]"})
    tokenizer = open_at(write(slow, added_tokens={"<image>": size() + 1, "[PAD]": size()}))
    assert (tokenizer.pad_id, tokenizer.id_of("<image>"), tokenizer.vocab_size) == (size(), size() + 1, size() + 2)
    assert tokenizer.whole("yes[PAD]<image>")[-2:] == [size(), size() + 1]


def test_roles_of_a_fast_tokenizer(tmp_path):
    """tokenizer_config.json decides which token ends an answer; another class than Llama's is read from tokenizer.json, also beside a tokenizer.model."""
    (tmp_path / "tokenizer.model").write_bytes(b"of another program")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|image|>", "pad_token": "<pad>"}
    spec = json.loads(tokenizer_files.byte_level().to_str())
    tokenizer = open_at(write(tmp_path, tokenizer=spec, tokenizer_config=config))
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.eos_id == tokenizer.id_of("<|image|>")
    assert tokenizer.pad_id == tokenizer.vocab_size - 1 and tokenizer.bos_id == tokenizer.id_of("<|begin_of_text|>")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").unlink()
    assert open_at(tmp_path).eos_id == tokenizer.id_of("<|eot_id|>")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": LLAMA | {"added_tokens_decoder": {"9999": {"content": "<a>"}}}}, "give <a> the id 9999, its vocabulary"),
        ({"tokenizer_config": LLAMA | {"added_tokens_decoder": {"5": {"content": "<a>", "rstrip": True}}}}, "<a> in "),
        ({"tokenizer_config": LLAMA | {"added_tokens_decoder": {"5": "<a>"}}}, "not as transformers writes them"),
        ({"tokenizer_config": []}, "expected a JSON object"),
        ({"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}, "tokenizer": {"added_tokens": []}}, "is not a tokenizer.json"),
    ],
)
def test_refused(slow, files, expected):
    with pytest.raises(UserError, match=expected) as error:
        open_at(write(slow, **files))
    assert "\n" not in str(error.value) and str(slow) in str(error.value)


def test_kinds_that_are_not_read(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    with pytest.raises(UserError, match=r"neither byte-level nor Llama's kind of BPE \(found WordPiece, BertPreTokenizer\)"):
        open_at(write(tmp_path, tokenizer=json.loads(tokenizer.to_str())))
