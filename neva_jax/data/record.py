"""One record: a LLaVA or NeVA dictionary in, checked and plain out.

`parse_record` is strict: what the originals drop, misread or crash on is refused with the field's name. `read_loosely` is for the compatibility modes,
which take whatever an original took. `adopt_img_tags` reads NeVA's JSONL, whose pictures are written as `<img src="...">` in the text.
"""

import functools
import json
import re
from dataclasses import dataclass

from neva_jax.data.conversation import PLACEHOLDER as IMAGE_TAG
from neva_jax.data.conversation import Turn
from neva_jax.errors import DataError

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
HUMAN = [role for role, plain in ROLES.items() if plain == "human"]
IMG_TAG = re.compile(r'<img src="([^"]+)">')


class RecordError(DataError):
    """A defect of one record. field: its path in the record ("conversations[1].value", "" for the whole); kind: a word that scripts may count by."""

    def __init__(self, message, field="", kind=""):
        super().__init__(message)
        self.field, self.kind = field, kind


@dataclass(frozen=True)
class Record:
    """images: names relative to the image folder, in the order of the tags. turns: "human" and "gpt" by turns, human first.

    system: a leading system turn's text. system_key: the text under the record's key `system`. None where the record says nothing; "" asks for none.
    """

    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    system: str | None = None
    system_key: str | None = None


def parse_record(record, *, where, max_media=None, interleaved=False) -> Record:
    """Checks one record and brings it into one form. Raises RecordError that opens with `where` (`Records.where(i)`).

    Stricter than the originals where they train on something else than the file says: LLaVA drops a leading gpt turn, takes a missing picture's
    tag as text, and lets a surplus tag eat the next sample's picture.
    max_media: how many images a record may have; None: any number. interleaved: `conversations` is one text.
    """
    fail = functools.partial(_fail, where)
    if not isinstance(record, dict):
        fail("", "type", f"found {shown(record)}, expected an object with image and conversations")
    if record.get("video") is not None:
        fail("video", "video", "videos are not supported; extract frames and list them under image")
    images = _images(record.get("image"), fail)
    if interleaved:
        system, turns = None, (Turn("text", _text(record.get("conversations"), "conversations", fail)),)
    else:
        system, turns = _turns(record.get("conversations"), fail)
    system_key = record.get("system")
    if system_key is not None:
        if system is not None:
            fail("system", "system", "stands beside a system turn; keep one of them")
        _text(system_key, "system", fail)
    if IMAGE_TAG in (system or "") + (system_key or ""):
        fail("system", "image_tag", f"found {IMAGE_TAG} in a system prompt; pictures belong to human turns")
    tags = sum(turn.text.count(IMAGE_TAG) for turn in turns)  # answers have none
    if tags != len(images):
        fail("image", "image_count", f"{tags} {IMAGE_TAG} in the human turns but {len(images)} under image; write one tag for each image")
    if max_media is not None and len(images) > max_media:
        fail("image", "max_media", f"{len(images)} images, expected at most {max_media}; raise model.data.max_media or split the record")
    return Record(images, turns, system, system_key)


def _images(value, fail):
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        fail("image", "type", f"found {shown(value)}, expected a name, a list of names or nothing")
    for i, name in enumerate(names):
        if _text(name, f"image[{i}]", fail) == "":
            fail(f"image[{i}]", "empty", "an empty name; give the image's path or remove the entry")
    return tuple(names)


def _turns(value, fail):
    """-> (system or None, (Turn, ...))"""
    if not isinstance(value, list) or not value:
        fail("conversations", "empty" if value == [] else "type", f"found {shown(value)}, expected a list of turns with from and value")
    system, turns = None, []
    for i, turn in enumerate(value):
        field = f"conversations[{i}]"
        if not isinstance(turn, dict):
            fail(field, "type", f"found {shown(turn)}, expected an object with from and value")
        role, text = _text(turn.get("from"), f"{field}.from", fail), _text(turn.get("value"), f"{field}.value", fail)
        if role == "system" and i == 0:
            system = text
            continue
        if role not in ROLES:
            fail(f"{field}.from", "role", f"found {shown(role)}, expected human (user) or gpt (assistant), or system in the first turn")
        role = ROLES[role]
        if not turns and role == "gpt":
            fail(f"{field}.from", "role_order", "the first turn is gpt's, expected human's; LLaVA and NeVA drop such a turn without a word: remove it")
        if turns and turns[-1].role == role:
            fail(f"{field}.from", "role_order", f"two {role} turns in a row, expected human and gpt by turns; join or split them")
        if role == "gpt" and not text.strip():
            fail(f"{field}.value", "empty", "an empty answer; there is nothing to learn: remove the turn pair")
        if role == "gpt" and IMAGE_TAG in text:
            fail(f"{field}.value", "image_tag", f"found {IMAGE_TAG} in an answer; pictures belong to human turns")
        turns.append(Turn(role, text, _label(turn, field, fail)))
    if not any(turn.role == "gpt" for turn in turns):
        fail("conversations", "no_answer", "no gpt turn, expected at least one answer to learn")
    return system, tuple(turns)


def _label(turn, field, fail):
    return None if turn.get("label") is None else _text(turn["label"], f"{field}.label", fail)


def _text(value, field, fail):
    if not isinstance(value, str):
        fail(field, "type", f"found {shown(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(field, "type", f"found half of a surrogate pair in {shown(value)}, expected text; tokenizers and file systems cannot take it")
    return value


def _fail(where, field, kind, message):
    raise RecordError(f"{where}: {field}: {message}" if field else f"{where}: {message}", field, kind)


def shown(value):
    """A value in a few ASCII characters on one line, whatever is in it."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = json.dumps(value[:40] if isinstance(value, str) else value, default=repr)
    return "nothing or null" if value is None else shown[:60]


# ---- NeVA's and LLaVA's looser ways


def adopt_img_tags(record):
    """`<img src="any/path/name.jpg">` in human turns -> a placeholder, and "name.jpg" under image, as NeVA reads JSONL. A record with `image` stays."""
    turns = record.get("conversations")
    if "image" in record or not isinstance(turns, list):
        return record
    names, adopted = [], []
    for turn in turns:
        if isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in HUMAN:
            names += [path.split("/")[-1] for path in IMG_TAG.findall(turn["value"])]
            turn = {**turn, "value": IMG_TAG.sub(IMAGE_TAG, turn["value"])}
        adopted.append(turn)
    return {**record, "image": names, "conversations": adopted} if names else record


@dataclass(frozen=True)
class LooseRecord:
    """What an original reads of a record. has_image: it has the key `image`. turns: as written, any roles; one "text" turn where `conversations` is a text."""

    images: tuple[str, ...]
    has_image: bool
    turns: tuple[Turn, ...]
    system: str | None


def read_loosely(record, *, where, interleaved=False) -> LooseRecord:
    """Checks types alone. Raises RecordError where every original would crash."""
    fail = functools.partial(_fail, where)
    if not isinstance(record, dict):
        fail("", "type", f"found {shown(record)}, expected an object with image and conversations")
    value = record.get("conversations")
    if interleaved:
        turns = (Turn("text", _text(value, "conversations", fail)),)
    else:
        if not isinstance(value, list) or not value:
            fail("conversations", "empty" if value == [] else "type", f"found {shown(value)}, expected a list of turns with from and value")
        turns = tuple(_loose_turn(turn, f"conversations[{i}]", fail) for i, turn in enumerate(value))
    system = record.get("system")
    return LooseRecord(_images(record.get("image"), fail), "image" in record, turns, None if system is None else _text(system, "system", fail))


def _loose_turn(turn, field, fail):
    if not isinstance(turn, dict):
        fail(field, "type", f"found {shown(turn)}, expected an object with from and value")
    role, text = _text(turn.get("from"), f"{field}.from", fail), _text(turn.get("value"), f"{field}.value", fail)
    return Turn(role, text, _label(turn, field, fail))
