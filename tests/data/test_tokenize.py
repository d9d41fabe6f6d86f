"""Pieces -> ids, labels and media: written out for every template, equal to the whole string encoded at once, and cut without harm."""

import json

import numpy as np
import pytest
from helpers import ROOT, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from neva_jax.data.conversation import SYSTEM_LLAMA_2, SYSTEM_V1, TEMPLATES, render
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.records import RecordError, Records
from neva_jax.data.tokenize import IGNORE, SpecialIds, Stream, encode, shift
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import DataError, UserError

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"
S = 4  # text positions of a picture
UNK, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module", params=["digits", "llama2"])
def tokenizer(request):
    return SentencePieceTokenizer(DIGITS if request.param == "digits" else golden("tokenizer/llama2_neva.model"))


def made(tokenizer, template, turns, start_end=False, system=None):
    return encode(render(template, turns, system), tokenizer, SpecialIds.of(tokenizer, template, use_im_start_end=start_end), S)


def shown(ids, supervised, media_index, sp):
    """A stream as one string: [n] where media vector n stands, <names> of control tokens, «..» what is supervised."""
    parts = []
    for id, marked, medium in zip(ids, supervised, media_index, strict=True):
        part = f"[{medium}]" if medium >= 0 else sp.id_to_piece(int(id)).replace("▁", " ")
        parts.append(f"«{part}»" if marked else part)
    return "".join(parts).replace("»«", "")


# ---- Written out

ONE = (("human", "<image>\nWhat is it?"), ("gpt", "A cat."))
TEXT = (("human", "Hello"), ("gpt", "Hi"))
THREE = (*ONE, ("human", "Why?"), ("gpt", "It purrs."), ("human", "And <image> in <image>?"), ("gpt", "Dogs."))
THREE_TEXT = (*TEXT, ("human", "Why?"), ("gpt", "It purrs."), ("human", "And?"), ("gpt", "Dogs."))
P = ["[0][1][2][3]", "[4][5][6][7]", "[8][9][10][11]"]
V1, LLAMA_2 = f" {SYSTEM_V1} USER: ", f"  [INST] <<SYS>>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n"  # the first space is sentencepiece's dummy prefix
TABLE = [
    ("plain", ONE, f" {P[0]}«A cat.\n»"),
    ("v1", ONE, f"{V1}{P[0]}\nWhat is it? ASSISTANT:« A cat.</s>»"),
    ("v1", TEXT, f"{V1}Hello ASSISTANT:« Hi</s>»"),
    ("v1", THREE, f"{V1}{P[0]}\nWhat is it? ASSISTANT:« A cat.</s>» USER: Why? ASSISTANT:« It purrs.</s>» USER: And {P[1]} in {P[2]}? ASSISTANT:« Dogs.</s>»"),
    ("v1", THREE_TEXT, f"{V1}Hello ASSISTANT:« Hi</s>» USER: Why? ASSISTANT:« It purrs.</s>» USER: And? ASSISTANT:« Dogs.</s>»"),
    ("llama_2", ONE, f"{LLAMA_2}{P[0]}\nWhat is it? [/INST]« A cat. </s>»"),
    ("llama_2", TEXT, f"{LLAMA_2}Hello [/INST]« Hi </s>»"),
    (
        "llama_2", THREE,
        f"{LLAMA_2}{P[0]}\nWhat is it? [/INST]« A cat. </s>»<s> [INST] Why? [/INST]« It purrs. </s>»<s> [INST] And {P[1]} in {P[2]}? [/INST]« Dogs. </s>»",
    ),
    ("llama_2", THREE_TEXT, f"{LLAMA_2}Hello [/INST]« Hi </s>»<s> [INST] Why? [/INST]« It purrs. </s>»<s> [INST] And? [/INST]« Dogs. </s>»"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_written_out(tokenizer, template, turns, expected):
    sp = SentencePieceProcessor(str(tokenizer.path))
    stream = made(tokenizer, template, turns)
    assert shown(stream.ids, stream.supervised, stream.media_index, sp).replace("<0x0A>", "\n") == expected
    assert stream.num_media == sum(text.count("<image>") for _, text in turns)
    assert {stream.ids.dtype, stream.media_index.dtype} == {np.dtype(np.int32)} and stream.supervised.dtype == bool
    tokens, labels, media_index = shift(stream)
    assert tokens.tolist() == stream.ids[:-1].tolist() and media_index.tolist() == stream.media_index[:-1].tolist()
    assert labels.tolist() == [id if marked else IGNORE for id, marked in zip(stream.ids[1:], stream.supervised[1:], strict=True)]
    assert labels.dtype == np.int32
    answers = [text for role, text in turns if role == "gpt"]
    end = "\n" if template == "plain" else ""
    assert tokenizer.decode(labels[labels != IGNORE]).split() == "".join(f"{answer}{end} " for answer in answers).split()
    assert (labels == EOS).sum() == (len(answers) if template != "plain" else 0)


def test_bytes_of_a_character():
    """Llama spells an emoji in four byte pieces, of which sentencepiece says that three stand for nothing: all are learnt in an answer, none in a question."""
    tokenizer = SentencePieceTokenizer(golden("tokenizer/llama2_neva.model"))
    spelt, _ = tokenizer.encode("😀", start=False)
    assert len(spelt) == 4
    stream = made(tokenizer, "v1", (("human", "Who 😀"), ("gpt", "😀"), ("human", "😀"), ("gpt", "so 😀 so")))
    starts = [i for i in range(len(stream.ids) - 3) if stream.ids[i : i + 4].tolist() == spelt]
    assert [stream.supervised[i : i + 4].tolist() for i in starts] == [[False] * 4, [True] * 4, [False] * 4, [True] * 4]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_a_picture(tokenizer, template):
    """What stands in a picture's place is NeVA's: START, patches, END, and media vectors replace all of it, or only the patches with use_im_start_end."""
    start, end, patch = (tokenizer.id_of(f"<extra_id_{i}>") for i in (4, 5, 3))
    patch = patch if template == "plain" else UNK
    for start_end, ids, numbers in (
        (False, [start, patch, patch, end], [0, 1, 2, 3]),
        (True, [start, patch, patch, patch, patch, end], [-1, 0, 1, 2, 3, -1]),
    ):
        stream = made(tokenizer, template, (("human", "<image><image>"), ("gpt", "A")), start_end)
        first = int(np.flatnonzero(stream.ids == start)[0])
        length = len(ids)
        assert stream.ids[first : first + 2 * length].tolist() == ids * 2
        assert stream.media_index[first : first + 2 * length].tolist() == [*numbers, *(n + S if n >= 0 else n for n in numbers)]
        assert (np.delete(stream.media_index, np.r_[first : first + 2 * length]) == -1).all() and stream.num_media == 2
        assert not stream.supervised[first : first + 2 * length].any()


@pytest.mark.parametrize("length", [1, 2, 3, 576])
def test_length_of_a_picture(tokenizer, length):
    for start_end in (False, True):
        special = SpecialIds.of(tokenizer, "v1", use_im_start_end=start_end)
        stream = encode(render("v1", ONE), tokenizer, special, length)
        assert stream.media_index[stream.media_index >= 0].tolist() == list(range(length)) and stream.num_media == 1


# ---- Control tokens


def test_special_ids(tokenizer):
    start, end, patch = (tokenizer.id_of(f"<extra_id_{i}>") for i in (4, 5, 3))
    assert SpecialIds.of(tokenizer, "v1", use_im_start_end=True) == SpecialIds(BOS, EOS, UNK, start, end, True)
    assert SpecialIds.of(tokenizer, "plain", use_im_start_end=False) == SpecialIds(BOS, EOS, patch, start, end, False)


class Bare:
    """A tokenizer without NeVA's tokens."""

    path, bos_id, eos_id = "bare.model", None, 7

    def id_of(self, token):
        return None


def test_tokenizer_without_neva_tokens():
    assert SpecialIds.of(Bare(), "plain", use_im_start_end=False) == SpecialIds(bos=7, eos=7, patch=0, start=0, end=0)
    with pytest.raises(UserError, match=r"use_im_start_end needs <extra_id_4> and <extra_id_5>.*bare\.model"):
        SpecialIds.of(Bare(), "v1", use_im_start_end=True)
    endless = Bare()
    for endless.eos_id in (None, -1):
        with pytest.raises(UserError, match="no end-of-sequence token"):
            SpecialIds.of(endless, "v1", use_im_start_end=False)


PARTS = ["ASSISTANT:", " USER: ", "</s>", "<s>", "[INST]", " [/INST]", "<<SYS>>", *(f"<extra_id_{i}>" for i in range(8)), " ", "\n", "a", "é", "😀"]
NASTY = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
def test_adversarial_texts(tokenizer, template):
    """Whatever is said, control ids stand where the template put them and nowhere else, and supervised ids spell the answers."""
    sp = SentencePieceProcessor(str(tokenizer.path))
    special = SpecialIds.of(tokenizer, template, use_im_start_end=False)
    control = {BOS, EOS, *(tokenizer.id_of(f"<extra_id_{i}>") for i in range(8))}
    rounds = 1 if template == "plain" else 2

    @given(st.lists(NASTY, min_size=4, max_size=4))
    @settings(max_examples=150, deadline=None)
    def check(texts):
        turns = [("human", "<image>" + texts[0]), ("gpt", texts[1]), ("human", texts[2]), ("gpt", texts[3])][: 2 * rounds]
        stream = encode(render(template, turns), tokenizer, special, S)
        text = stream.media_index < 0
        found = [int(i) for i in stream.ids[text] if i in control]
        assert found == {"plain": [], "v1": [EOS, EOS], "llama_2": [EOS, BOS, EOS]}[template]
        if "é" in "".join(texts) or "😀" in "".join(texts):
            return  # bytes and unknown pieces do not spell themselves
        runs = "".join(sp.id_to_piece(int(i)) if marked else "|" for i, marked in zip(stream.ids, stream.supervised, strict=True))
        runs = [run.replace("▁", " ").replace("<0x0A>", "\n") for run in runs.split("|") if run]
        end = {"plain": "\n", "v1": "</s>", "llama_2": " </s>"}[template]
        assert "".join(runs) == "".join(("" if template == "plain" else " ") + answer + end for _, answer in turns[1::2])
        assert len(runs) == rounds

    check()


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_the_whole_string(tokenizer, template, start_end):
    """NeVA writes one string, control tokens by name, and encodes it at once with the model as it is: on harmless texts the ids are the same."""
    sp = SentencePieceProcessor(str(tokenizer.path))
    special = SpecialIds.of(tokenizer, template, use_im_start_end=start_end)
    names = {sp.piece_to_id(f"<extra_id_{i}>"): i for i in range(8)}
    picture = "<extra_id_4>" + "<extra_id_3>" * (S if start_end else S - 2) + "<extra_id_5>"
    parts = st.sampled_from(["one", " two", "  ", "\n", "it's", "é", "😀", ",", "A", "\t"]) | st.text("abc 12?é\n", min_size=1, max_size=5)
    texts = st.lists(parts, min_size=1, max_size=5)

    @given(st.lists(texts.map("".join), min_size=4, max_size=4), st.booleans(), st.integers(0, 1))
    @settings(max_examples=100, deadline=None)
    def check(words, first, second):
        question = ("<image>" if template == "plain" else "<image>" * first) + words[0]
        turns = [("human", question), ("gpt", words[1]), ("human", words[2] + "<image>" * second + "?"), ("gpt", words[3])]
        pieces = render(template, turns[:2] if template == "plain" else turns)
        string = "".join({"text": p.value, "control": p.value, "image": picture}[p.kind] for p in pieces)
        to_ours = {4: special.start, 5: special.end, 3: special.patch, 6: BOS, 7: EOS}
        whole = [to_ours[names[i]] if i in names else i for i in sp.encode(string)]
        assert encode(pieces, tokenizer, special, S).ids.tolist() == whole

    check()


# ---- The cut


@pytest.mark.parametrize("start_end", [False, True])
def test_every_cut(tokenizer, start_end):
    """Whatever the limit, the tokens hold whole pictures, num_media counts these, the rest is the beginning of the record, and lost answers are told."""
    whole = made(tokenizer, "v1", THREE, start_end)
    assert whole.truncate(len(whole.ids)) is whole and not whole.answers_cut
    first_answer, last_answer = np.flatnonzero(whole.supervised)[[0, -1]]
    counts = set()
    for limit in range(1, len(whole.ids)):
        stream = whole.truncate(limit)
        n = len(stream.ids)
        assert n <= limit and (stream.ids == whole.ids[:n]).all() and (stream.supervised == whole.supervised[:n]).all()
        tokens, labels, media_index = shift(stream)
        positions = media_index[media_index >= 0]
        assert positions.tolist() == list(range(S * stream.num_media)), limit
        assert limit - n <= S and (n == limit or whole.media_index[limit - 1] >= 0)
        assert not whole.supervised[n:limit].any()  # what a picture's place costs holds no answer
        assert stream.answers_cut and (labels != IGNORE).any() == (limit > first_answer)
        counts.add(stream.num_media)
    assert counts == {0, 1, 2, 3}
    assert limit == last_answer


def test_cut_without_loss():
    """A last question that nobody answered is cut in silence: nothing to learn is lost."""
    stream = Stream(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0], bool), np.full(6, -1, np.int32), S)
    assert not stream.truncate(4).answers_cut and stream.truncate(3).answers_cut


# ---- A record, from its file


def examples(tmp_path, records, template="v1", max_length=256):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    tokenizer = SentencePieceTokenizer(DIGITS)
    special = SpecialIds.of(tokenizer, template, use_im_start_end=False)
    processor = ImageProcessor(crop_size=(32, 32), shortest_edge=32)
    return Examples((Records(path, tmp_path / "cache"),), None, processor, tokenizer, special, template, S, max_length)


def record(*turns, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def test_record_without_supervised_token(tmp_path):
    short, long = record(*TEXT), record(("human", "why " * 200), ("gpt", "so"))
    with pytest.raises(DataError) as error:
        examples(tmp_path, [short, long])[1]
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'data.json'}: record 1: conversations: no supervised token; of its ") and "\n" not in message
    assert "the first 256 hold no answer; raise model.encoder_seq_length" in message
    assert examples(tmp_path, [short, long], max_length=4096).stream(1).supervised.any()


def test_the_limit_counts_tokens(tmp_path):
    """encoder_seq_length T: T tokens are read and T targets learnt, of T + 1 ids."""
    whole = examples(tmp_path, [record(*TEXT)])[0]
    n = len(whole.tokens)
    assert not examples(tmp_path, [record(*TEXT)], max_length=n).stream(0).answers_cut
    cut = examples(tmp_path, [record(*TEXT)], max_length=n - 1)
    assert cut.stream(0).answers_cut and cut[0].labels.tolist() == whole.labels[:-1].tolist()


def test_template_refuses_a_record(tmp_path):
    with pytest.raises(DataError, match=r"data\.json: record 0: conversations: the plain template"):
        examples(tmp_path, [record(*TEXT)], template="plain").stream(0)


def test_picture_in_an_answer(tmp_path):
    with pytest.raises(RecordError, match=r"record 0: conversations\[1\]\.value: found <image> in an answer"):
        examples(tmp_path, [record(("human", "<image>"), ("gpt", "this <image>"), image="a.png")]).stream(0)


def test_picture_without_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"record 0: image: names a picture, but model\.data\.image_folder is not set"):
        examples(tmp_path, [record(*ONE, image="a.png")]).stream(0)


def test_system_of_a_record(tmp_path):
    with_system = examples(tmp_path, [record(*TEXT, system="Be brief."), record(("system", "Be brief."), *TEXT), record(*TEXT)])
    streams = [with_system.stream(i).ids.tolist() for i in range(3)]
    assert streams[0] == streams[1] and with_system.tokenizer.decode(streams[0]).startswith("Be brief. USER: Hello")
    assert with_system.tokenizer.decode(streams[2]).startswith(SYSTEM_V1)
