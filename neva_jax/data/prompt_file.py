"""NeVA's file of questions, .json (a list) or .jsonl: {"image": name, "prompt": text, ...} a record; and the answers as NeVA writes them."""

import json
from pathlib import Path

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.record import shown
from neva_jax.errors import DataError

TEXTS = ("prompt", "text", "question")  # the first that a record has


def read(path: str) -> list[tuple[str, dict]]:
    """-> [(the words that name a record in an error, the record)]. DataError for what is no such file."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a .json or .jsonl file of questions") from None
    if path.endswith(".jsonl"):
        found = [(f"{path}, line {i}", line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]  # a text may hold U+2028
    elif path.endswith(".json"):
        whole = _parsed(content, path)
        if not isinstance(whole, list):
            raise DataError(f"{path}: holds {shown(whole)}, expected a list of records; one record a line belongs into a .jsonl file")
        found = [(f"{path}, record {i}", record) for i, record in enumerate(whole)]
    else:
        raise DataError(f"{path}: unknown extension, expected .json (a list of records) or .jsonl (one a line)")
    records = [(where, _parsed(record, where) if isinstance(record, str) else record) for where, record in found]
    if not records:
        raise DataError(f"{path}: holds no question")
    if bad := [(where, record) for where, record in records if not isinstance(record, dict)]:
        raise DataError(f"{bad[0][0]}: found {shown(bad[0][1])}, expected an object with image and prompt")
    return records


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}); write one object with image and prompt") from None


def question(record: dict, where: str, insert: str | None = None, separator: str = "") -> tuple[str, tuple[str, ...]]:
    """-> what is asked, and the names of its pictures. insert: "left" or "right", where NeMo's insert_media_token puts a picture's tag; as there, every tag
    stands on a line of its own (NeMo adds a line break even where there is one already)."""
    text = next((record[name] for name in TEXTS if name in record), None)
    if not isinstance(text, str):
        raise DataError(f"{where}: has no question; expected a text under {', '.join(TEXTS)}, found the keys {', '.join(map(str, record)) or 'none'}")
    if record.get("video") is not None:
        raise DataError(f"{where}: asks about a video, which is not read here; take frames out of it and list them under image")
    images = record.get("image")
    images = () if images in (None, "") else tuple(images) if isinstance(images, list) else (images,)
    if bad := [name for name in images if not isinstance(name, str)]:
        raise DataError(f"{where}: image holds {shown(bad[0])}, expected a file name or a list of them")
    tags = (PLACEHOLDER + separator) * len(images) if insert else ""
    text = tags + text if insert == "left" else text + tags
    return text.replace(PLACEHOLDER, f"{PLACEHOLDER}\n").replace(f"{PLACEHOLDER}\n\n", f"{PLACEHOLDER}\n"), images


def answered(record: dict, prompt: str, rendered: str, answer, model: str) -> dict:
    """A record as NeVA writes it: all it had, and full_text, pred_answer, model_id, answer_id, metadata."""
    space = "" if rendered[-1:].isspace() else " "
    full = {"prompt": prompt, "full_text": rendered + space + answer.text, "pred_answer": answer.text, "model_id": model}
    return {**record, **full, "answer_id": record.get("answer_id", 0), "metadata": record.get("metadata", {})}
