"""The compatibility modes beside their tokens (tests/golden): what they take and note, what they refuse, and where pictures stand in broken records."""

import functools
import pickle

import numpy as np
import pytest
from template_tokenizers import extended, open_for
from written_out import ONE, TEXT

from neva_jax.data.compat import ENCODERS
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.encoder import Encoder
from neva_jax.data.record import RecordError
from neva_jax.data.tokenize import IGNORE, shift
from neva_jax.errors import DataError, UserError

S = 4  # text positions of a picture
WHERE = "data.json: record 3"
NEMO, NEMO_OLD, LLAVA = "nemo_v2.0.0", "nemo_v1.23.0", "llava"
OWN = {NEMO: "v1", NEMO_OLD: "v1", LLAVA: "llava:v1"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(mode, template, ...) -> encoder. NeMo v1.23.0 knows its control tokens by their numbers in Llama-2's model, so that it needs that one."""
    directory = tmp_path_factory.mktemp("model")
    small = extended(directory, "digits", with_bytes=True)

    @functools.cache
    def large():
        return extended(directory, "llama2")

    def make(mode, template=None, max_length=4096, **options):
        template, model = template or OWN[mode], large() if mode == NEMO_OLD else small
        return ENCODERS[mode](open_for(model, template, legacy=True), template, S, max_length, **options)

    return make


def record(*turns, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def refused(call, *args, kind=DataError):
    with pytest.raises(kind) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_modes_and_their_templates(make):
    assert set(ENCODERS) == {"exact", NEMO, NEMO_OLD, LLAVA} and ENCODERS["exact"] is Encoder
    neva = {name for name, template in TEMPLATES.items() if not template.llava}
    has = {NEMO: neva, NEMO_OLD: {"plain", "v1", "llama_2", "nvgpt"}, LLAVA: TEMPLATES.keys() - neva}
    for mode, templates in has.items():
        for template in TEMPLATES:
            if template in templates:
                assert make(mode, template).compat == mode
            else:
                message = refused(make, mode, template, kind=UserError)
                assert message.startswith(f"model.data.compat {mode}: it has no template {template!r}; it has ") and all(name in message for name in templates)


def test_harmless_records_are_the_exact_ones(make):
    for mode, template in OWN.items():
        for turns, fields in ((ONE, {"image": "a.png"}), (TEXT, {}), ((*TEXT, *TEXT), {})):
            compat = make(mode)(record(*turns, **fields), WHERE)
            exact = Encoder(make(mode).tokenizer, template, S, 4096)(record(*turns, **fields), WHERE)
            assert compat.note == "" and compat.images == exact.images
            for ours, theirs in zip(shift(exact.stream, mode != LLAVA), shift(compat.stream, mode != LLAVA), strict=True):
                assert ours.tolist() == theirs.tolist()


def test_prompts_are_exact_in_every_mode(make):
    for mode, template in OWN.items():
        assert make(mode).special == Encoder(make(mode).tokenizer, template, S, 4096).special


def test_an_encoder_travels_to_workers(make):
    for mode in ENCODERS:
        encoder = make(mode, OWN.get(mode, "v1"))
        again = pickle.loads(pickle.dumps(encoder))
        assert again.fingerprint() == encoder.fingerprint()
        assert again(record(*TEXT), WHERE).stream.ids.tolist() == encoder(record(*TEXT), WHERE).stream.ids.tolist()


# ---- What is taken and noted

TAKEN = {  # records that exact mode refuses
    "an empty answer": (record(*TEXT, ("human", "Why?"), ("gpt", "")), "conversations[3].value: an empty answer"),
    "gpt first": (record(("gpt", "Hm."), *TEXT), "conversations[0].from: the first turn is gpt's"),
    "<image> without a picture": (record(*ONE), "image: 1 <image> in the human turns but 0 under image"),
    "<image> in an answer": (record(ONE[0], ("gpt", "<image>"), image="a"), "conversations[1].value: found <image> in an answer"),
    "too many pictures": (record(("human", "<image><image>"), TEXT[1], image=["a", "b"]), "image: 2 images, expected at most 1"),
    "a video beside the text": (record(*TEXT, video="a.mp4"), "video: videos are not supported"),
    "a question alone": (record(TEXT[0]), "conversations: no gpt turn"),
}


@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("mode", OWN)
def test_taken_and_noted(make, mode, case):
    """In exact mode's own words; `parse`, which validation asks, is as strict as ever."""
    taken, words = TAKEN[case]
    encoder = make(mode, max_media=1)
    found = encoder(taken, WHERE)
    assert found.note.startswith(f"{WHERE}: {words}") and "\n" not in found.note
    assert refused(encoder.parse, taken, WHERE, kind=RecordError) == found.note == refused(make("exact", OWN[mode], max_media=1), taken, WHERE)


@pytest.mark.parametrize("mode", OWN)
def test_nothing_learnt_is_noted(make, mode):
    long = record(("human", "why " * 50), ("gpt", "so"))
    encoded = make(mode, max_length=40)(long, WHERE)
    assert encoded.note == f"{WHERE}: conversations: no supervised token"
    assert len(shift(encoded.stream, mode != LLAVA)[0]) == 40 and not encoded.stream.supervised.any()


@pytest.mark.parametrize("mode", OWN)
def test_control_strings_of_a_text(make, mode):
    """What the originals do and exact mode never does: </s> in an answer is taken for the token, or its separator ends the learning."""
    said = record(TEXT[0], ("gpt", "one<extra_id_7>two" if mode != LLAVA else "one</s>two"), ("human", "Why?"), ("gpt", "So."))
    encoder = make(mode)
    compat, exact = encoder(said, WHERE), Encoder(encoder.tokenizer, OWN[mode], S, 4096)(said, WHERE)
    eos = encoder.tokenizer.eos_id
    assert ((compat.stream.ids == eos).sum(), (exact.stream.ids == eos).sum()) == (3, 2)
    assert compat.stream.supervised.sum() < exact.stream.supervised.sum()
    assert compat.note == (f"{WHERE}: conversations: no supervised token" if mode == LLAVA else ""), "LLaVA's tokenization mismatch"


def test_system_key(make):
    """NeMo's nvgpt family reads it, and nothing else does."""
    for template in ("v1", "llama_2", "nvgpt", "nv_dpo", "yi_34b"):
        encoder = make(NEMO, template)
        with_key, without = (encoder(record(*TEXT, **fields), WHERE).stream.ids.tolist() for fields in ({"system": "Be brief."}, {}))
        assert (with_key != without) == (template in ("nvgpt", "nv_dpo"))


# ---- What is refused: where the original raises, and where nothing could be read

RAISED = {
    "an unknown role": record(*TEXT, ("tool", "x"), ("gpt", "y")),
    "roles that do not alternate": record(*TEXT, TEXT[1]),
}


@pytest.mark.parametrize("mode", OWN)
@pytest.mark.parametrize("case", RAISED)
def test_where_the_original_raises(make, mode, case):
    message = refused(make(mode), RAISED[case], WHERE)
    assert message.startswith(f"{WHERE}: conversations: ") and message.endswith(f"; {mode} stops at this record too")


@pytest.mark.parametrize(("mode", "template", "raised"), [
    (NEMO, "plain", record(*TEXT, *TEXT)),
    (NEMO, "plain", record(*TEXT, image="a")),
    (NEMO, "llama_2", record(("human", ""), TEXT[1])),
    (NEMO, "yi_34b", record(("human", ""), TEXT[1])),
    (LLAVA, "llava:plain", record(*TEXT)),
    (LLAVA, "llava:plain", record(*ONE, *TEXT, image="a")),
    (LLAVA, "llava:llama_2", record(("human", ""), TEXT[1])),
])  # fmt: skip
def test_where_a_template_of_the_original_raises(make, mode, template, raised):
    assert refused(make(mode, template), raised, WHERE).endswith(f"; {mode} stops at this record too")


def test_sep_image_conv_front_without_a_turn_or_a_tag(make):
    interleaved = make(NEMO, "interleaved", sep_image_conv_front=True)
    assert "an interleaved record has none" in refused(interleaved, {"conversations": "<image>", "image": "a"}, WHERE)
    assert "the first turn has no <image>" in refused(make(NEMO, sep_image_conv_front=True), record(*TEXT, *ONE, image="a"), WHERE)


BROKEN = {
    "a list": ([], "", "found a list of 0, expected an object"),
    "nothing": (None, "", "found nothing or null"),
    "no conversations": ({"image": "a"}, "conversations", "found nothing or null"),
    "no turns": ({"conversations": []}, "conversations", "found a list of 0"),
    "a text": ({"conversations": "Hello"}, "conversations", 'found "Hello", expected a list of turns'),
    "a turn that is text": ({"conversations": ["Hello"]}, "conversations[0]", 'found "Hello"'),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0].value", "found nothing or null"),
    "a role that is a list": ({"conversations": [{"from": ["human"], "value": "a"}]}, "conversations[0].from", "found a list of 1"),
    "half a surrogate": (record(("human", "\ud83d"), TEXT[1]), "conversations[0].value", "half of a surrogate pair"),
    "a label that is a number": ({"conversations": [{"from": "gpt", "value": "a", "label": 4}]}, "conversations[0].label", "found 4"),
    "a system that is a number": (record(*TEXT, system=4), "system", "found 4"),
    "an image that is a number": (record(*TEXT, image=4), "image", "found 4"),
    "an image without a name": (record(*TEXT, image=[""]), "image[0]", "an empty name"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("mode", OWN)
def test_broken_records(make, mode, case):
    broken, field, words = BROKEN[case]
    with pytest.raises(RecordError) as error:
        make(mode)(broken, WHERE)
    assert error.value.field == field and str(error.value).startswith(f"{WHERE}: {field}") and words in str(error.value)


def test_interleaved_records_that_are_none(make):
    encoder = make(NEMO, "interleaved")
    assert encoder({"conversations": "A text."}, WHERE).stream.supervised.any()
    assert "expected a string" in refused(encoder, record(*TEXT), WHERE)
    assert f"{WHERE}: conversations: no text" in refused(encoder, {"conversations": ""}, WHERE), "a row of no tokens could not be padded"


# ---- Where pictures stand


def runs(stream):
    """The media vectors' numbers, run by run."""
    places = np.flatnonzero(stream.media_index >= 0)
    return [run.tolist() for run in np.split(stream.media_index[places], np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


PICTURES = [list(range(k * S, k * S + S)) for k in range(3)]


@pytest.mark.parametrize("start_end", [False, True])
@pytest.mark.parametrize("mode", [NEMO, NEMO_OLD])
def test_tags_and_pictures_of_nemo(make, mode, start_end):
    """The k-th tag has the k-th picture: a surplus tag has no vectors, a surplus picture is never opened; a tag in an answer counts."""
    encoder = make(mode, use_im_start_end=start_end)
    turns = [("human", "<image> and <image>"), ("gpt", "a <image>")]
    for names in (["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]):
        images, stream, note = encoder(record(*turns, image=names), WHERE)
        assert images == tuple(names[:3]) and runs(stream) == PICTURES[: len(names)] and stream.num_media == len(images)
        assert "found <image> in an answer" in note
    images, stream, _ = encoder(record(*turns), WHERE)
    assert images == () and runs(stream) == [] and "<image>" in encoder.tokenizer.decode(stream.ids)


def test_tags_and_pictures_of_llava(make):
    """Of several tags in a turn one is left, in front. A surplus tag has no vectors."""
    encoder = make(LLAVA)
    turns = [("human", "What <image> and <image>?"), TEXT[1], ("human", "<image> this?"), TEXT[1]]
    for names in (["a"], ["a", "b"], ["a", "b", "c"]):
        images, stream, note = encoder(record(*turns, image=names), WHERE)
        assert images == tuple(names[:2]) and runs(stream) == PICTURES[: len(names)][:2] and ("but" in note) == (len(names) < 3)
        tokens, labels, _ = shift(stream, encoder.extra_token)
        assert (tokens[stream.media_index >= 0] == 0).all() and (labels[:-1][stream.media_index[1:] >= 0] == IGNORE).all()
        assert (stream.ids >= 0).all()


@pytest.mark.parametrize("mode", OWN)
def test_cut_pictures(make, mode):
    """NeMo looks for a picture's last token, and shows nothing of one whose end is cut off; LLaVA shows what is left of it."""
    turns, names = [("human", "<image> a"), TEXT[1], ("human", "<image> b"), TEXT[1]], ["a", "b"]
    whole = make(mode)(record(*turns, image=names), WHERE).stream
    second = int((whole.media_index == S).argmax())
    for kept in range(S + 1):
        images, stream, _ = make(mode, max_length=second + kept)(record(*turns, image=names), WHERE)
        read = len(shift(stream, mode != LLAVA)[0])  # NeMo's last id is a target only, and may be the picture's last
        assert read == second + kept and (stream.ids == whole.ids[: len(stream.ids)]).all()
        left = list(range(S, S + kept)) if mode == LLAVA or kept == S else []
        assert runs(stream) == [PICTURES[0], *([left] if left else [])]
        assert len(images) == stream.num_media == (2 if left else 1)


@pytest.mark.parametrize("text", ["<extra_id_5> b", "<extra_id_4> <extra_id_5>", "a" + "<extra_id_5>" * 9])
def test_written_media_tokens(make, text):
    """A text that spells NeMo's END without a picture before it: no vectors, and no picture is opened that no position would show."""
    images, stream, note = make(NEMO)(record(("human", text), TEXT[1], image=["a"]), WHERE)
    assert runs(stream) == [] and images == () and stream.num_media == 0 and "0 <image>" in note
    images, stream, _ = make(NEMO)(
        record(("human", f"{text.replace('<extra_id_5>', '', text.count('<extra_id_5>') - 1)} <image>"), TEXT[1], image=["a", "b"]), WHERE
    )
    assert runs(stream) == [PICTURES[1]] and images == ("a", "b"), "the second END is the second picture's"
