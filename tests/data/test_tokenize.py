"""Pieces -> ids, labels and media: written out for every template, equal to the whole string encoded as the originals do, and cut without harm."""

import re

import numpy as np
import pytest
from helpers import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from template_tokenizers import CONTROLS, extended, open_for, spelt
from written_out import ONE, TABLE, THREE, WRITTEN, around_answer, named, runs_of

from neva_jax.data.conversation import PLACEHOLDER, TEMPLATES, render
from neva_jax.data.tokenize import IGNORE, SpecialIds, Stream, encode, shift
from neva_jax.data.tokenizer import SentencePieceTokenizer

S = 4  # text positions of a picture
UNK, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module", params=["digits", "llama2"])
def model(request, tmp_path_factory):
    return extended(tmp_path_factory.mktemp(request.param), request.param)


def made(tokenizer, template, turns, start_end=False, prompt=True):
    return encode(render(template, turns, prompt=prompt), tokenizer, SpecialIds.of(tokenizer, template, use_im_start_end=start_end), S)


def shown(stream, sp):
    """A stream as one string: [n] where media vector n stands, <names> of control tokens, «..» what is supervised."""
    parts = []
    for number, marked, medium in zip(stream.ids, stream.supervised, stream.media_index, strict=True):
        part = f"[{medium}]" if medium >= 0 else sp.id_to_piece(int(number)).replace("▁", " ")
        parts.append(f"«{part}»" if marked else part)
    return "".join(parts).replace("»«", "").replace("<0x0A>", "\n")


# ---- Written out


def as_read(text, template, restarts):
    """A text of `written_out` -> what `shown` is to give. NeVA: a space, sentencepiece's dummy prefix, opens the stream. LLaVA: <s> does, and a space opens
    each text behind it and behind a picture; where the tokenizer restarts, behind a control token too."""
    if not TEMPLATES[template].llava:
        text = " " + text
    else:
        behind = "^(?:<s>)|<img>" + "|<c:.*?>>»?+" * restarts
        text = re.sub(f"({behind})(«?+)(?!<img>|<c:|$)", r"\1\2 ", "<s>" + text)
    text = named(text)
    for k in range(text.count("<img>")):
        text = text.replace("<img>", "".join(f"[{k * S + n}]" for n in range(S)), 1)
    return text


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_written_out(model, template, turns, expected, legacy):
    if legacy and not TEMPLATES[template].llava:
        return
    tokenizer = open_for(model, template, legacy=legacy)
    assert tokenizer.restarts == legacy
    stream = made(tokenizer, template, turns)
    assert shown(stream, SentencePieceProcessor(str(model))) == as_read(expected, template, legacy)
    assert stream.num_media == sum(text.count("<image>") for _, text in turns)
    assert {stream.ids.dtype, stream.media_index.dtype} == {np.dtype(np.int32)} and stream.supervised.dtype == bool


def test_interleaved(model):
    stream = made(open_for(model, "interleaved"), "interleaved", [("text", "A <image> and <image>.")], prompt=False)
    assert shown(stream, SentencePieceProcessor(str(model))) == "« A »[0][1][2][3]« and »[4][5][6][7]«.»"


def test_what_tokens_and_prefixes_are_written_out():
    """The reading above, read by itself."""
    assert as_read("a <img> b«A<c:<extra_id_7>>»", "v1", False) == " a [0][1][2][3] b«A</s>»"
    assert as_read("a <img>b«A<c:<extra_id_7>>»", "llava:v1", False) == "<s> a [0][1][2][3] b«A</s>»"
    assert as_read("<img>«A<c:<extra_id_7>>»c<c:<|im_end|>>", "llava:v1", True) == "<s>[0][1][2][3]« A</s>» c<|im_end|>"


def test_shift(model):
    stream = made(open_for(model, "v1"), "v1", THREE)
    n = len(stream.ids)
    targets = [number if marked else IGNORE for number, marked in zip(stream.ids.tolist(), stream.supervised, strict=True)]
    for extra_token, length in ((True, n - 1), (False, n)):
        tokens, labels, media_index = shift(stream, extra_token)
        assert tokens.tolist() == stream.ids[:length].tolist() and media_index.tolist() == stream.media_index[:length].tolist()
        assert labels.tolist() == [*targets[1:], IGNORE][:length] and labels.dtype == np.int32
    assert (shift(stream)[1] == EOS).sum() == 3


def test_bytes_of_a_character():
    """Llama spells an emoji in four byte pieces, of which sentencepiece says that three stand for nothing: all are learnt in an answer, none in a question."""
    tokenizer = SentencePieceTokenizer(golden("tokenizer/llama2_neva.model"))
    emoji, _ = tokenizer.encode("😀", start=False)
    assert len(emoji) == 4
    stream = made(tokenizer, "v1", (("human", "Who 😀"), ("gpt", "😀"), ("human", "😀"), ("gpt", "so 😀 so")))
    starts = [i for i in range(len(stream.ids) - 3) if stream.ids[i : i + 4].tolist() == emoji]
    assert [stream.supervised[i : i + 4].tolist() for i in starts] == [[False] * 4, [True] * 4, [False] * 4, [True] * 4]


PLAIN_PATCH = ("plain", "llama_3", "nvgpt", "nv_steerlm", "nv_dpo", "yi_34b")  # NeMo leaves <extra_id_3> there, and writes 0 elsewhere


@pytest.mark.parametrize("template", WRITTEN)
def test_ids_of_a_picture(model, template):
    """What stands in a picture's place is NeVA's: START, patches, END, and media vectors replace all of it, or only the patches with use_im_start_end.
    LLaVA has patches alone, and its tokens around them with use_im_start_end, but not in captions."""
    tokenizer, llava = open_for(model, template), TEMPLATES[template].llava
    start, end = (tokenizer.id_of(name) for name in (("<im_start>", "<im_end>") if llava else ("<extra_id_4>", "<extra_id_5>")))
    patch = tokenizer.id_of("<extra_id_3>") if template in PLAIN_PATCH else UNK
    alone = ([patch] * 4 if llava else [start, patch, patch, end]), [0, 1, 2, 3]
    around = ([start, *[patch] * 4, end], [-1, 0, 1, 2, 3, -1]) if template != "llava:plain" else alone
    for start_end, (ids, numbers) in ((False, alone), (True, around)):
        stream = made(tokenizer, template, (("human", "<image><image>"), ("gpt", "A")), start_end)
        for k in range(2):
            first = int(np.flatnonzero(stream.media_index == k * S)[0]) - numbers.index(0)
            assert stream.ids[first : first + len(ids)].tolist() == ids
            assert stream.media_index[first : first + len(ids)].tolist() == [n + k * S if n >= 0 else n for n in numbers]
            assert not stream.supervised[first : first + len(ids)].any()
        assert (stream.media_index >= 0).sum() == 2 * S and stream.num_media == 2
        assert (stream.ids == start).sum() == 2 * (start in ids)


@pytest.mark.parametrize("length", [1, 2, 3, 576])
def test_length_of_a_picture(model, length):
    for template in ("v1", "llava:v1"):
        tokenizer = open_for(model, template)
        for start_end in (False, True):
            special = SpecialIds.of(tokenizer, template, use_im_start_end=start_end)
            stream = encode(render(template, ONE), tokenizer, special, length)
            assert stream.media_index[stream.media_index >= 0].tolist() == list(range(length)) and stream.num_media == 1


# ---- Any text

PARTS = ["ASSISTANT:", " USER: ", "</s>", "[INST]", " [/INST]", "<<SYS>>", "###", *CONTROLS, " ", "\n", "a", "é", "😀"]
NASTY = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("template", WRITTEN)
def test_adversarial_texts(model, template):
    """Whatever is said, control ids stand where the template put them and nowhere else, and supervised ids spell the answers."""
    sp, tokenizer = SentencePieceProcessor(str(model)), open_for(model, template)
    special = SpecialIds.of(tokenizer, template, use_im_start_end=False)
    control = {number for name in CONTROLS if (number := tokenizer.id_of(name))}
    count = 2 if WRITTEN[template][2] else 1

    def encoded(*texts):
        turns = [("human", "<image>" + texts[0]), ("gpt", texts[1]), ("human", texts[2]), ("gpt", texts[3])][: 2 * count]
        stream = encode(render(template, turns), tokenizer, special, S)
        return stream, [int(i) for i in stream.ids[stream.media_index < 0] if int(i) in control]

    @given(st.tuples(NASTY, NASTY, NASTY, NASTY))
    @settings(max_examples=40, deadline=None)
    def check(texts):
        stream, found = encoded(*texts)
        assert found == encoded("Q", "A", "Q", "A")[1]
        if UNK in stream.ids[stream.media_index < 0]:
            return  # unknown pieces do not spell themselves
        runs = np.split(np.arange(len(stream.ids)), np.flatnonzero(np.diff(stream.supervised)) + 1)
        runs = [spelt(sp, stream.ids[run]) for run in runs if stream.supervised[run[0]]]
        wanted = runs_of(template, [texts[1], texts[3]][:count])
        assert len(runs) == count
        for run, text in zip(runs, wanted, strict=True):  # a token that holds a part of an answer is learnt, whatever else it holds
            assert run.endswith(dummy_prefix(template) + text) and around_answer(template)[0].endswith(run.removesuffix(text).strip(" ")), (run, text)

    check()


def dummy_prefix(template):
    return " " if template == "llava:plain" else ""


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_equal_to_the_whole_string(model, template, start_end):
    """NeVA writes one string, control tokens by name, and encodes it at once with the model as it is. LLaVA encodes what is between two pictures, each by
    itself, and cuts the text at its control tokens. On harmless texts the ids are theirs."""
    sp, llava = SentencePieceProcessor(str(model)), TEMPLATES[template].llava
    parts = st.sampled_from(["one", " two", "  ", "\n", "it's", "é", "😀", ",", "A", "\t"]) | st.text("abc 12?é\n", min_size=1, max_size=5)
    words = st.lists(parts, min_size=1, max_size=5).map("".join)

    def whole_neva(tokenizer, special, pieces):
        names = {sp.piece_to_id(f"<extra_id_{i}>"): i for i in range(8)}
        picture = "<extra_id_4>" + "<extra_id_3>" * (S if start_end else S - 2) + "<extra_id_5>"
        string = "".join(picture if piece.kind == "image" else piece.value for piece in pieces)
        ours = {4: special.start, 5: special.end, 3: special.patch, 6: BOS, 7: EOS}
        return [ours.get(names.get(i), i) for i in sp.encode(string)]

    def whole_llava(tokenizer, special, pieces):
        around = ("<im_start>", "<im_end>") if special.use_im_start_end else ("", "")
        names = {"<extra_id_6>": "<s>", "<extra_id_7>": "</s>"}
        string = "".join(PLACEHOLDER.join(around) if piece.kind == "image" else names.get(piece.value, piece.value) for piece in pieces)
        first, *rest = (tokenizer.whole(chunk) for chunk in string.split(PLACEHOLDER))
        return [BOS, *first, *(i for chunk in rest for i in (*[UNK] * S, *chunk))]

    @given(st.lists(words, min_size=4, max_size=4), st.booleans(), st.integers(0, 1), st.booleans())
    @settings(max_examples=40, deadline=None)
    def check(texts, first, second, legacy):
        tokenizer = open_for(model, template, legacy=legacy and llava)
        special = SpecialIds.of(tokenizer, template, use_im_start_end=start_end)
        question = "<image>" * (first or template.endswith("plain")) + texts[0]
        turns = [("human", question), ("gpt", texts[1]), ("human", texts[2] + "<image>" * second + "?"), ("gpt", texts[3])]
        turns = [("text", "".join(text for _, text in turns))] if template == "interleaved" else turns[:2] if template.endswith("plain") else turns
        pieces = render(template, turns, prompt=False)
        whole = (whole_llava if llava else whole_neva)(tokenizer, special, pieces)
        assert encode(pieces, tokenizer, special, S).ids.tolist() == whole

    check()


# ---- The cut


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("extra_token", [True, False])
def test_every_cut(model, start_end, extra_token):
    """Whatever the limit, the tokens hold whole pictures, num_media counts these, the rest is the beginning of the record, and lost answers are told."""
    whole = made(open_for(model, "v1"), "v1", THREE, start_end)
    assert whole.truncate(len(whole.ids)) is whole and not whole.answers_cut
    first_answer, last_answer = np.flatnonzero(whole.supervised)[[0, -1]]
    counts = set()
    for limit in range(1, len(whole.ids)):
        stream = whole.truncate(limit)
        n = len(stream.ids)
        assert n <= limit and (stream.ids == whole.ids[:n]).all() and (stream.supervised == whole.supervised[:n]).all()
        _, labels, media_index = shift(stream, extra_token)
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
