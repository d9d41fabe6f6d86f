"""Every kind of defect is found, in every record that has it, once, by any number of processes; and what is sound is left in peace."""

import json
import pickle
import re
import tarfile
from collections import Counter

import pytest
from pictures import encoded, noise
from PIL import Image
from template_tokenizers import extended, open_for

from neva_jax.data import sweep as sweep_module
from neva_jax.data import validate as validate_module
from neva_jax.data.compat import ENCODERS
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.media import open_media
from neva_jax.data.pixel_cache import PixelCache
from neva_jax.data.records import Records
from neva_jax.data.validate import Defect, Validator, validate
from neva_jax.errors import DataError, UserError

S, LIMIT, MAX_BYTES, MAX_PIXELS = 4, 400, 40_000, 100_000
JPEG = encoded(Image.fromarray(noise(48, 64)), "JPEG")
PNG = encoded(Image.fromarray(noise(48, 64)))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return extended(tmp_path_factory.mktemp("model"), "digits", with_bytes=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "a folder.png").mkdir(parents=True)
    files = {
        "a.jpg": JPEG, "b.png": PNG, "cut.jpg": JPEG[:-600], "cut.png": PNG[: len(PNG) // 2], "empty.jpg": b"", "page.jpg": b"<html>404</html>",
        "heavy.png": PNG + bytes(MAX_BYTES), "huge.png": encoded(Image.new("1", (1000, 1000))), "film.jpg": b"\0\0\0\x20ftypisom" + bytes(100),
        "bomb.png": encoded(Image.new("1", (14000, 14000))), "head.jpg": JPEG[:12], "../beside.png": PNG,
        "cut.tif": encoded(Image.fromarray(noise(48, 64)), "TIFF")[:50],
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(folder.parent / "beside.png")
    return folder


@pytest.fixture
def made(tmp_path, images, model):
    """made(records, ...) -> Examples. records: dictionaries, or the lines of a .jsonl file as texts; several files as a list of such lists."""

    def make(*files, template="v1", compat="exact", folder=images, limit=LIMIT, **options):
        sources = []
        for i, records in enumerate(files):
            lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
            path = tmp_path / f"{i}.jsonl"
            path.write_text("\n".join(lines) + "\n")
            sources.append(Records(path, tmp_path / "cache"))
        encoder = ENCODERS[compat](open_for(model, template), template, S, limit, **options)
        media = folder and open_media(folder, MAX_BYTES)
        return Examples(tuple(sources), media, ImageProcessor((8, 8), 8, max_pixels=MAX_PIXELS), encoder)

    return make


def turns(*texts):
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt") * len(texts), texts, strict=False)]


def sound(**changes):
    return {"image": "a.jpg", "conversations": turns("<image>\nWhat is it?", "A dog.")} | changes


def places(defects):
    return [(defect.index, defect.field, defect.kind) for defect in defects]


# ---- what is found

DEFECTS = {
    "broken json": ("{", "", "json", r"not valid JSON"),
    "no object": ("[1]", "", "json", r"found a list of 1, expected an object"),
    "a video": (sound(video="a.mp4"), "video", "video", r"extract frames"),
    "too few pictures": (sound(conversations=turns("<image><image>", "Dogs.")), "image", "image_count", r"2 <image>.*1 under image; write one"),
    "a wrong role": (sound(conversations=[*turns("<image>", "A dog."), {"from": "robot", "value": "x"}]), "conversations[2].from", "role", r'"robot".*gpt'),
    "an empty answer": (sound(conversations=turns("<image>", " ")), "conversations[1].value", "empty", r"an empty answer.*remove"),
    "no answer": (sound(conversations=turns("<image>")), "conversations", "no_answer", r"no gpt turn"),
    "cut answers": (sound(conversations=turns("<image>", "A dog. " * 300)), "conversations", "too_long", r"\d{4} tokens, expected at most 400.*encoder_seq"),
    "a long question": (sound(conversations=turns("<image>" + "why " * 300, "A dog.")), "conversations", "no_label", r"no supervised token.*encoder_seq"),
    "special in a question": (sound(conversations=turns("<image> a <extra_id_4> b", "c")), "conversations[0].value", "special_token", '"<extra_id_4>"'),
    "special in an answer": (sound(conversations=turns("<image>", "A dog.</s>")), "conversations[1].value", "special_token", r'found "</s>", which'),
    "a separator": (sound(conversations=turns("<image> ASSISTANT: a", "b")), "conversations[0].value", "special_token", r'" ASSISTANT: "'),
    "missing": (sound(image="c.jpg"), "image", "missing", r"image 'c\.jpg' is missing from .*images: likely not downloaded"),
    "another extension": (sound(image="b.jpg"), "image", "missing", r"'b\.png' is there, so the extension differs; rename"),
    "outside": (sound(image="../beside.png"), "image", "outside", r"points outside; expected a path relative to"),
    "absolute": (sound(image="/etc/passwd"), "image", "outside", r"points outside"),
    "a web address": (sound(image="https://x.org/a.jpg"), "image", "outside", r"points outside"),
    "a link that leaves": (sound(image="link.png"), "image", "outside", r"is a link to .*outside the folder; copy"),
    "no name": (sound(image="."), "image", "outside", r"names no file"),
    "a folder": (sound(image="a folder.png"), "image", "unreadable", r"not a regular file"),
    "a cut JPEG": (sound(image="cut.jpg"), "image", "broken", r"image \"cut\.jpg\": the picture is cut off or damaged.*fetch"),
    "a cut PNG": (sound(image="cut.png"), "image", "broken", r"cut off or damaged"),
    "a cut TIFF": (sound(image="cut.tif"), "image", "no_picture", r"no picture"),  # of which Pillow also warns
    "an empty file": (sound(image="empty.jpg"), "image", "broken", r"is empty"),
    "a page": (sound(image="page.jpg"), "image", "no_picture", r"no picture: it starts with b'<html>404<"),
    "a film": (sound(image="film.jpg"), "image", "no_picture", r"no picture"),
    "only a head": (sound(image="head.jpg"), "image", "broken", r"cut off or damaged"),
    "too many bytes": (sound(image="heavy.png"), "image", "oversized", r"bytes, expected at most 40000; shrink"),
    "too many pixels": (sound(image="huge.png"), "image", "oversized", r"1000 x 1000 pixels, expected at most 100000"),
    "a bomb": (sound(image="bomb.png"), "image", "oversized", r"pixels.*shrink"),
    "one of two": (
        sound(image=["a.jpg", "cut.jpg"], conversations=turns("<image><image>", "Dogs.")), "image[1]", "broken", r"record \d: image\[1\]: image \"cut\.jpg\"",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_nothing_else(made, name, recwarn):
    record, field, kind, message = DEFECTS[name]
    examples = made([sound(), record, sound(image="b.png")])
    (defect,) = validate(examples)
    assert (defect.index, defect.field, defect.kind) == (1, field, kind)
    where = f"{examples.where(1)}: "
    assert defect.message.startswith(where + (f"{field}: " if field else "")) and "\n" not in defect.message
    assert re.search(message, defect.message), defect.message
    assert [str(warning.message) for warning in recwarn.list if warning.category is not ResourceWarning] == []


@pytest.mark.parametrize("compat", ["nemo_v2.0.0", "nemo_v1.23.0"])
def test_as_strict_in_every_mode(made, compat):
    records = [record for record, *_ in DEFECTS.values()]
    assert validate(made(records, compat=compat)) == validate(made(records))


def test_as_strict_in_llavas_mode(made):
    records = [
        sound(conversations=turns("<image>", "A dog. " * 300)),
        sound(conversations=turns("<image>", " ")),
        sound(conversations=[{"from": "gpt", "value": "x"}]),
    ]
    defects = validate(made(records, template="llava:v1", compat="llava"))
    assert defects == validate(made(records, template="llava:v1"))
    assert [defect.kind for defect in defects] == ["too_long", "empty", "role_order"]


def test_a_record_may_have_several(made):
    both = {"id": 7, "image": ["cut.jpg", "a.jpg", 5], "conversations": turns("<image> </s>", "<extra_id_1>", "<extra_id_5>")}
    defects = validate(made([sound(id=7), both, "{", sound(image="c.jpg", conversations="nothing")]))
    assert places(defects) == [
        (1, "image[2]", "type"), (1, "conversations[0].value", "special_token"), (1, "conversations[1].value", "special_token"),
        (1, "conversations[2].value", "special_token"), (1, "image[0]", "broken"), (1, "id", "duplicate_id"), (2, "", "json"),
        (3, "conversations", "type"), (3, "image", "missing"),
    ]  # fmt: skip


@pytest.mark.parametrize(("template", "record"), [
    ("plain", {"image": "a.jpg", "conversations": turns("<image>", "A dog.", "And?", "No.")}), ("llava:plain", {"conversations": turns("What?", "A dog.")}),
])  # fmt: skip
def test_what_a_template_cannot_write(made, template, record):
    assert places(validate(made([record], template=template))) == [(0, "conversations", "template")]


def test_an_interleaved_record_of_pictures_alone_has_no_label(made):
    records = [{"image": "a.jpg", "conversations": "<image>"}, {"image": "a.jpg", "conversations": "<image> a dog </s>"}]
    assert places(validate(made(records, template="interleaved"))) == [(0, "conversations", "no_label"), (1, "conversations", "special_token")]


def test_pictures_without_a_folder_end_it(made):
    with pytest.raises(UserError, match=r"record 1: image: names a picture, but model\.data\.image_folder is not set"):
        validate(made([{"conversations": turns("What?", "A dog.")}, sound()], folder=None))
    assert validate(made([{"conversations": turns("What?", "A dog.")}], folder=None)) == []


def test_of_a_tar(made, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in ("x.png", "x.png", "y.png"):
            (tmp_path / name).write_bytes(PNG)
            tar.add(tmp_path / name, name)
        (tmp_path / "l.png").symlink_to("x.png")
        tar.add(tmp_path / "l.png", "l.png")
    records = [sound(image=name) for name in ("x.png", "y.png", "z.png", "l.png", "../y.png")]
    found = places(validate(made(records, folder=tmp_path / "images.tar")))
    assert found == [(0, "image", "unreadable"), (2, "image", "missing"), (3, "image", "unreadable"), (4, "image", "outside")]


def test_nevas_tags(made):
    record = {"conversations": turns('<img src="data/cut.jpg">\nWhat?', "A dog.")}
    assert places(validate(made([record]))) == [(0, "image[0]", "broken")]


# ---- ids


def test_ids_are_compared_over_all_files(made):
    first = [sound(id="a"), sound(id=1), sound(), sound(id=None), sound(id={"x": [1]})]
    second = [sound(id="1"), sound(id="a"), sound(), sound(id=None), sound(id="a"), sound(id={"x": [1]}), {"id": 1}]
    examples = made(first, second)
    defects = [defect for defect in validate(examples) if defect.kind == "duplicate_id"]
    assert places(defects) == [(i, "id", "duplicate_id") for i in (6, 9, 10, 11)]
    assert defects[0].message.startswith(f'{examples.where(6)}: id: "a" is the id of {examples.where(0)} too; give') and "record 1" in examples.where(6)
    assert f"is the id of {examples.where(0)} too" in defects[1].message and f"1 is the id of {examples.where(1)} too" in defects[3].message


def test_ids_whose_keys_meet_are_compared_themselves(made, monkeypatch):
    monkeypatch.setattr(validate_module, "key_of", lambda raw: 5)
    assert places(validate(made([sound(id="a"), sound(id="b"), sound(id="a"), sound(id="c")]))) == [(2, "id", "duplicate_id")]


# ---- pictures


def test_a_picture_of_many_records_is_read_once(made, monkeypatch):
    examples = made([sound(image=name) for name in ("a.jpg", "cut.jpg", "b.png") * 30])
    read, names = examples.media.read, []
    monkeypatch.setattr(examples.media, "read", lambda name: names.append(name) or read(name), raising=False)
    defects, _ = Validator(examples)(range(90))
    assert places(defects) == [(i, "image", "broken") for i in range(1, 90, 3)]
    assert Counter(names) == {"a.jpg": 1, "cut.jpg": 1, "b.png": 1}


def test_headers_only(made):
    names = ("a.jpg", "cut.jpg", "cut.png", "page.jpg", "huge.png", "c.jpg", "heavy.png")
    defects = validate(made([sound(image=name) for name in names]), headers_only=True)
    assert [(defect.index, defect.kind) for defect in defects] == [(3, "no_picture"), (4, "oversized"), (5, "missing"), (6, "oversized")]


def test_a_pixel_cache_is_not_asked(made, tmp_path):
    examples = made([sound(image="cut.jpg")])
    examples.image_processor = PixelCache(examples.image_processor, tmp_path / "cache", 2**20)
    examples.image_processor._read = None
    assert places(validate(examples)) == [(0, "image", "broken")]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_sound_record_has_no_defect(made, template):
    record = {"image": "a.jpg", "conversations": "<image> a dog" if template == "interleaved" else turns("<image>", "A dog & <b>.")}
    assert validate(made([record], template=template)) == []


# ---- processes


def test_any_number_of_processes_gives_the_same(made, monkeypatch, capfd):
    monkeypatch.setattr(sweep_module, "CHUNK", 4)
    records = [record for record, *_ in DEFECTS.values()] + [sound(id=i % 20) for i in range(30)]
    alone = validate(made(records))
    assert validate(made(records), num_workers=2) == alone and all(type(defect) is Defect for defect in alone)
    assert len(alone) == len(DEFECTS) + 10 and [defect.index for defect in alone] == sorted(defect.index for defect in alone)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_changes_meanwhile_ends_it(made, tmp_path):
    worker = pickle.dumps(made([sound()] * 3))
    (tmp_path / "0.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="changed since"):
        Validator(pickle.loads(worker))(range(3))
