"""A record -> its stream, exactly: the cut, systems, labels, NeMo's and LLaVA's options, and NeVA's JSONL; what is refused, and in which words."""

import dataclasses
import itertools
import json

import pytest
from sentencepiece import SentencePieceProcessor
from template_tokenizers import DIGITS, extended, open_for, spelt
from written_out import ONE, TEXT, THREE, runs_of

from neva_jax.data import encoder as encoder_module
from neva_jax.data.compat import ENCODERS
from neva_jax.data.conversation import DEFAULT_LABEL, SYSTEM_V1, TEMPLATES
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.record import RecordError
from neva_jax.data.records import Records
from neva_jax.data.tokenize import IGNORE, shift
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import DataError, UserError

S = 4  # text positions of a picture
WHERE = "data.json: record 3"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return extended(tmp_path_factory.mktemp("model"), "digits", with_bytes=True)


@pytest.fixture
def made(model):
    """made(record, template, ...) -> its stream."""

    def make(record, template="v1", *, max_length=4096, **options):
        return Encoder(open_for(model, template), template, S, max_length, **options)(record, WHERE).stream

    return make


@pytest.fixture
def text_of(model):
    """text_of(stream) -> what is read, as one text, with <img> for each picture and [..] around what is learnt."""
    sp = SentencePieceProcessor(str(model))

    def write(stream):
        parts = []
        for (medium, learnt), group in itertools.groupby(range(len(stream.ids)), lambda i: (stream.media_index[i] // S, stream.supervised[i])):
            text = "<img>" if medium >= 0 else spelt(sp, stream.ids[list(group)])
            parts.append(f"[{text}]" if learnt else text)
        return "".join(parts)

    return write


def record(*turns, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def refused(call, *args, kind=DataError, **kwargs):
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- The cut


def test_record_without_supervised_token(made):
    long = record(("human", "why " * 200), ("gpt", "so"))
    message = refused(made, long, max_length=256)
    assert message.startswith(f"{WHERE}: conversations: no supervised token; of its ")
    assert message.endswith(" tokens the first 256 hold no answer; raise model.encoder_seq_length")
    assert made(long).supervised.any()


@pytest.mark.parametrize("extra_token", [True, False])
def test_the_limit_counts_tokens(made, extra_token):
    """encoder_seq_length T: T tokens are read. NeMo reads one more id, as a target only; with no_seqlen_plus_one_input_tokens the last token has no target."""
    whole = made(record(*TEXT), extra_token=extra_token)
    n = len(whole.ids) - extra_token
    stream = made(record(*TEXT), extra_token=extra_token, max_length=n)
    assert not stream.answers_cut and len(stream.ids) == len(whole.ids)
    assert [len(part) for part in shift(stream, extra_token)] == [n] * 3
    stream = made(record(*TEXT), extra_token=extra_token, max_length=n - 1)
    assert stream.answers_cut and shift(stream, extra_token)[0].tolist() == whole.ids[: n - 1].tolist()
    labels = shift(whole, extra_token)[1][: n - 1].tolist()
    assert shift(stream, extra_token)[1].tolist() == (labels if extra_token else [*labels[:-1], IGNORE])


@pytest.mark.parametrize("template", [name for name in TEMPLATES if TEMPLATES[name].llava])
def test_llava_reads_no_extra_token(model, template):
    for extra_token in (True, False):
        encoder = Encoder(open_for(model, template), template, S, 40, extra_token=extra_token)
        assert not encoder.extra_token and encoder.limit == 40


def test_pictures_of_what_is_left(model):
    """`images` are the names of the stream's pictures, so that one behind the cut is never opened."""
    names = ["a.png", "b.png", "c.png"]
    encoder = Encoder(open_for(model, "v1"), "v1", S, 4096)
    whole = encoder(record(*THREE, image=names), WHERE).stream
    for number in (2, 3):
        encoder.max_length = int((whole.media_index == S * number - 1).argmax()) + 1
        assert encoder(record(*THREE, image=names), WHERE).images == tuple(names[:number])
        encoder.max_length -= 1
        assert encoder(record(*THREE, image=names), WHERE).images == tuple(names[: number - 1])


# ---- Templates and records


def test_a_text_as_a_caption(made, text_of):
    """NeMo's plain template keeps a text-only record's question; LLaVA's has no use for one."""
    assert text_of(made(record(*TEXT), "plain")) == " Hello[Hi\n]"
    message = refused(made, record(*TEXT), "llava:plain")
    assert message == f"{WHERE}: conversations: LLaVA's plain template needs <image> in the question; a text-only record cannot be a caption"


def test_plain_takes_one_round(made):
    for template in ("plain", "llava:plain"):
        assert f"{WHERE}: conversations: the plain template takes one question" in refused(made, record(*THREE, image=["a", "b", "c"]), template)


def test_defects_of_a_record(made):
    message = refused(made, record(("human", "<image>"), ("gpt", "this <image>"), image="a.png"), kind=RecordError)
    assert message.startswith(f"{WHERE}: conversations[1].value: found <image> in an answer")
    assert "2 images, expected at most 1; raise model.data.max_media" in refused(made, record(("human", "<image>" * 2), TEXT[1], image=["a", "b"]), max_media=1)
    assert f"{WHERE}: conversations: found a list of 2, expected a string" in refused(made, record(*TEXT), "interleaved")
    assert f"{WHERE}: conversations: found " in refused(made, {"conversations": "text"}, "v1")


def test_interleaved(made, text_of):
    assert text_of(made({"conversations": "A <image> and <image>.", "image": ["a", "b"]}, "interleaved")) == "[ A ]<img>[ and ]<img>[.]"


@pytest.mark.parametrize("template", ["nvgpt", "nv_steerlm", "nv_dpo"])
def test_label_of_an_answer(made, text_of, template):
    labelled = record(*TEXT)
    labelled["conversations"][1]["label"] = "quality:1"
    answered = "Assistant\n{}[Hi\n<extra_id_1>]"
    assert text_of(made(labelled, template)).endswith(answered.format("<extra_id_2>quality:1\n"))
    assert text_of(made(record(*TEXT), template)).endswith(answered.format("" if template == "nv_dpo" else f"<extra_id_2>{DEFAULT_LABEL}\n"))
    labelled["conversations"][1]["label"] = 4
    assert f"{WHERE}: conversations[1].label: found 4, expected a string" in refused(made, labelled, template)


# ---- Systems


@pytest.fixture
def warnings(caplog):
    encoder_module._warn_of_system.cache_clear()  # a process warns once
    return caplog


READS_SYSTEM = ("nvgpt", "nv_steerlm", "nv_dpo")


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"interleaved", "llava:plain", "plain"}))
def test_system(made, text_of, warnings, template):
    """A leading system turn is the system text of every template. The key `system` counts where NeMo reads it; elsewhere one warning says that it does not."""
    plain, turned = (text_of(made(one, template)) for one in (record(*TEXT), record(("system", "Be brief."), *TEXT)))
    assert "Be brief." in turned and "Be brief." not in plain and not warnings.records
    if own := TEMPLATES[template].system.strip():
        assert own in plain and own not in turned
    by_key = [text_of(made(record(*TEXT, system="Be brief."), template)) for _ in range(3)]
    if template in READS_SYSTEM:
        assert by_key == [turned] * 3 and not warnings.records
    else:
        assert by_key == [plain] * 3
        (warning,) = warnings.records
        assert f"the template {template} does not read" in warning.getMessage() and "first turn from system" in warning.getMessage()


def test_empty_systems(made, text_of):
    """An empty one asks for none."""
    assert text_of(made(record(("system", ""), *TEXT), "v1")) == "  USER: Hello ASSISTANT:[ Hi</s>]"
    assert text_of(made(record(*TEXT, system=""), "nvgpt")).startswith(" <extra_id_0>System\n<extra_id_1>User\nHello")
    assert text_of(made(record(*TEXT, system=None), "v1")).startswith(" " + SYSTEM_V1)


def test_both_systems(made):
    assert f"{WHERE}: system: stands beside a system turn" in refused(made, record(("system", "a"), *TEXT, system="b"), "nvgpt")


# ---- NeMo's options


def test_sep_image_conv_front(made, text_of):
    """The first turn's pictures stand before its words, with another "USER: " between."""
    asked = record(("human", "What <image> is it?\n"), ("gpt", "A cat."), *THREE[2:], image=["a", "b", "c"])
    found = text_of(made(asked, sep_image_conv_front=True))
    rest = " ASSISTANT:[ A cat.</s>] USER: Why? ASSISTANT:[ It purrs.</s>] USER: And <img> in <img>? ASSISTANT:[ Dogs.</s>]"
    assert found == f" {SYSTEM_V1} USER: <img> USER: What  is it?{rest}"
    assert text_of(made(asked)) == f" {SYSTEM_V1} USER: What <img> is it?\n{rest}"
    assert text_of(made(record(*TEXT), sep_image_conv_front=True)) == text_of(made(record(*TEXT))), "a text stays as it is"
    late = record(*TEXT, *ONE, image="a")
    assert "USER: <img>\nWhat" in text_of(made(late))
    message = refused(made, late, sep_image_conv_front=True)
    assert message.startswith(f"{WHERE}: conversations: model.data.sep_image_conv_front needs <image> in the first turn")
    message = refused(made, {"conversations": "<image> a text", "image": "a"}, "interleaved", sep_image_conv_front=True)
    assert message.startswith(f"{WHERE}: conversations: model.data.sep_image_conv_front needs turns, and an interleaved record has none")


def test_eod_mask_loss(model):
    """Nothing is learnt at a position that reads the end-of-sequence token: here yi's newline behind an answer, whose end is <|im_end|>."""
    tokenizer = SentencePieceTokenizer(model, roles={"eos_token": "<|im_end|>"})
    answers = ["A cat.", "It purrs.", "Dogs."]
    learnt = {}
    for masked in (False, True):
        encoder = Encoder(tokenizer, "yi_34b", S, 4096, eod_mask_loss=masked)
        stream = encoder(record(*THREE, image=["a", "b", "c"]), WHERE).stream
        tokens, labels, _ = shift(stream)
        learnt[masked] = labels[labels != IGNORE]
        assert ((tokens == tokenizer.eos_id) & (labels != IGNORE)).sum() == (0 if masked else 2)
    assert tokenizer.decode(learnt[False]) == "".join(runs_of("yi_34b", answers))
    assert tokenizer.decode(learnt[True]) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_fingerprint_of_all_that_decides_the_ids(model):
    tokenizer = open_for(model, "v1")
    base = Encoder(tokenizer, "v1", S, 256)
    changes = {
        "template": "llama_2", "media_length": 5, "max_length": 257, "use_im_start_end": True, "model_type": "llama_3", "extra_token": False,
        "sep_image_conv_front": True, "max_media": 2, "eod_mask_loss": True, "tokenizer": SentencePieceTokenizer(DIGITS),
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(Encoder)}
    others = [dataclasses.replace(base, **{name: value}) for name, value in changes.items() if name != "model_type"]
    others.append(ENCODERS["nemo_v2.0.0"](tokenizer, "v1", S, 256, model_type="llama_3"))
    others += [ENCODERS[name](tokenizer, "v1", S, 256) for name in ("nemo_v2.0.0", "nemo_v1.23.0")]
    prints = [encoder.fingerprint() for encoder in [base, *others]]
    assert len(set(prints)) == len(prints) and prints[0] == dataclasses.replace(base).fingerprint()


def test_a_tokenizer_that_cannot_be_the_template_s(tmp_path):
    """Told when the encoder is made, before the first record."""
    assert "needs <im_start> and <im_end>" in refused(Encoder, SentencePieceTokenizer(DIGITS), "llava:v1", S, 256, use_im_start_end=True, kind=UserError)


# ---- From files


def examples(tmp_path, records, name="data.json", template="v1"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    processor = ImageProcessor(crop_size=(32, 32), shortest_edge=32)
    return Examples((Records(path, tmp_path / "cache"),), None, processor, Encoder(SentencePieceTokenizer(DIGITS), template, S, 256))


def test_picture_without_a_folder(tmp_path):
    made = examples(tmp_path, [record(*ONE, image="a.png")])
    assert refused(made.__getitem__, 0).startswith(f"{tmp_path / 'data.json'}: record 0: image: names a picture, but model.data.image_folder is not set")


def test_img_tags_of_jsonl(tmp_path):
    """NeVA's JSONL: <img src="..."> in a question is a picture of that name. In a JSON list, or beside `image`, the tag is text."""
    first = '<img src="some/folder/a.png">What?<img src="b.png">'
    turns = [("human", first), ("gpt", 'No <img src="c.png">.'), ("user", '<img src="/d.png">'), ("gpt", "So.")]
    plain = record(("human", "<image>What?<image>"), turns[1], ("user", "<image>"), turns[3], image=["a.png", "b.png", "d.png"])
    tagged = [record(*turns), record(*TEXT), record(("human", '<img src="a.png"><image>'), TEXT[1], image="x.png"), plain]
    lines = examples(tmp_path, tagged, "data.jsonl")
    assert lines.encoded(0).images == ("a.png", "b.png", "d.png") and lines.record(0).images == lines.encoded(0).images
    assert lines.stream(0).ids.tolist() == lines.stream(3).ids.tolist() and lines.raw(1) == record(*TEXT)
    assert lines.encoded(2).images == ("x.png",)
    listed = examples(tmp_path, tagged)
    assert listed.encoded(0).images == () and listed.stream(0).num_media == 0 and listed.stream(0).ids.tolist() != lines.stream(0).ids.tolist()


def test_where(tmp_path):
    """Of several files: which one, and the record's number in it."""
    one, two = (examples(tmp_path, [record(*TEXT), record(("gpt", "a"))], name) for name in ("a.json", "b.json"))
    both = dataclasses.replace(one, sources=one.sources + two.sources)
    assert len(both) == 4 and both.where(3) == f"{tmp_path / 'b.json'}: record 1"
    assert refused(both.stream, 3).startswith(f"{tmp_path / 'b.json'}: record 1: conversations[0].from: ")
    with pytest.raises(IndexError):
        both.where(4)
