"""Records: the index against json.loads of the whole file, files of every bad kind, and many processes at once."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neva_jax.data import records as records_module
from neva_jax.data import scan as scan_module
from neva_jax.data.records import RecordError, Records
from neva_jax.errors import DataError

GOOD = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}


def written(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def opened(tmp_path, content, name="data.json"):
    return Records(written(tmp_path, content, name), tmp_path / "cache")


# ---- The index

TRICKY = st.text(alphabet=st.sampled_from('ab"\\/[]{},: \n\té€😀\ud83d'), max_size=12) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TRICKY, VALUES, max_size=4), min_size=1, max_size=6)
SPACE = st.text(alphabet=" \t\r\n", max_size=3)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(OBJECTS, st.data())
def test_list_equals_json_loads(tmp_path, monkeypatch, values, data):
    monkeypatch.setattr(scan_module, "_CHUNK", data.draw(st.integers(1, 40)))
    ascii_only = data.draw(st.booleans()) or any("\ud83d" in json.dumps(v, ensure_ascii=False) for v in values)
    texts = [json.dumps(v, ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 1]))) for v in values]
    space = data.draw(SPACE)
    content = data.draw(st.sampled_from(["", "\ufeff"])) + space + "[" + f"{space},{space}".join(texts) + space + "]" + space
    found = opened(tmp_path, content)
    assert list(found) == json.loads(content.removeprefix("\ufeff")) == values
    os.remove(found._index_path)


@FUZZ
@given(OBJECTS, st.data())
def test_lines_equal_json_loads(tmp_path, monkeypatch, values, data):
    monkeypatch.setattr(scan_module, "_CHUNK", data.draw(st.integers(1, 40)))
    blanks = ["", " ", "\t\r", "\n \n"]
    content = "\n".join(data.draw(st.sampled_from(blanks)) + "\n" + json.dumps(v) for v in values) + data.draw(st.sampled_from(["", "\n", "\n \r\n"]))
    found = opened(tmp_path, content, "data.jsonl")
    assert list(found) == values
    os.remove(found._index_path)


@pytest.mark.parametrize("num_backslashes", [1, 2, 3, 4, 5])
def test_backslashes_across_every_chunk_edge(tmp_path, monkeypatch, num_backslashes):
    value = {"a": "\\" * num_backslashes + '"],[{', "b": "\\" * num_backslashes}
    for size in range(1, 24):
        monkeypatch.setattr(scan_module, "_CHUNK", size)
        found = opened(tmp_path, json.dumps([value, value]))
        assert list(found) == [value, value]
        os.remove(found._index_path)


def test_indexing(tmp_path):
    found = opened(tmp_path, json.dumps([{"id": i} for i in range(3)]))
    assert len(found) == 3 and found[np.int64(1)] == {"id": 1} and found[-1] == {"id": 2}
    with pytest.raises(IndexError):
        found[3]


def test_index_is_built_once_and_rebuilt_when_the_file_changes(tmp_path, monkeypatch):
    path = written(tmp_path, json.dumps([GOOD]))
    first = Records(path, tmp_path / "cache")
    calls = []
    monkeypatch.setattr(records_module, "scan", lambda p: calls.append(p) or scan_module.scan(p))
    again = Records(path, tmp_path / "cache")
    assert not calls and again.fingerprint == first.fingerprint and again.cache_dir == str(tmp_path / "cache")
    path.write_text(json.dumps([GOOD, GOOD]))
    changed = Records(path, tmp_path / "cache")
    assert len(calls) == 1 and len(changed) == 2 and changed.fingerprint != first.fingerprint
    with pytest.raises(DataError, match="changed since"):
        len(pickle.loads(pickle.dumps(first)))


@pytest.mark.parametrize("damage", ["empty", "header", "cut", "foreign", "float"])
def test_a_damaged_index_is_built_again(tmp_path, damage):
    found = opened(tmp_path, json.dumps([GOOD] * 5))
    index = found._index_path
    content = index.read_bytes()
    del found
    index.write_bytes({"empty": b"", "header": content[:6]}.get(damage, content[:-8]))
    if damage in ("foreign", "float"):
        np.save(index, np.arange(6) * (10**9 if damage == "foreign" else 1.0))
    assert len(opened_again := Records(tmp_path / "data.json", tmp_path / "cache")) == 5 and opened_again[4] == GOOD
    assert index.read_bytes() == content


def test_default_cache_dir(tmp_path, monkeypatch):
    path = written(tmp_path, json.dumps([GOOD]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Records(path).cache_dir == str(tmp_path / "xdg" / "neva_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Records(path).cache_dir == str(tmp_path / "home" / ".cache" / "neva_jax")
    assert len(list((tmp_path / "home" / ".cache" / "neva_jax").iterdir())) == 1


def test_unwritable_cache_dir_names_the_field(tmp_path):
    path = written(tmp_path, json.dumps([GOOD]))
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(DataError, match=r"model\.data\.cache_dir") as error:
        Records(path, tmp_path / "occupied")
    assert "\n" not in str(error.value)


def test_pickles_small_and_opens_in_spawned_processes_and_threads(tmp_path):
    found = opened(tmp_path, json.dumps([{"id": i} for i in range(1000)]))
    data = pickle.dumps(found)
    assert len(data) < 1000 and len(pickle.loads(data)) == 1000
    results, wanted = [], list(range(1000))
    threads = [threading.Thread(target=lambda: results.append([record["id"] for record in found])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 4


def _build(path, cache):
    return len(Records(path, cache))


def test_several_processes_build_at_once(tmp_path):
    path = written(tmp_path, json.dumps([GOOD] * 20000))
    with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(_build, [path] * 6, [tmp_path / "cache"] * 6)) == [20000] * 6
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_no_jax_is_imported():
    modules = "neva_jax.data.records, neva_jax.data.media, neva_jax.data.image"
    code = f"import sys, {modules}; assert not {{'jax', 'flax'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))))


# ---- Bad files

LIST = json.dumps([GOOD, GOOD])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", "", "is empty"),
        ("data.json", "\ufeff \n", "is empty"),
        ("data.jsonl", " \n\n", "is empty"),
        ("data.csv", "a,b", r"unknown extension.*\.jsonl"),
        ("data.json", json.dumps(GOOD), r"starts with '\{'.*name it \.jsonl"),
        ("data.jsonl", LIST, r"starts with '\['.*name it \.json"),
        ("data.json", "null", "expected '\\['"),
        ("data.json", LIST.encode("utf-16"), "0xff.*UTF-8"),
        ("data.json", "[]", "holds no records"),
        ("data.json", "[ \n ]", "holds no records"),
        ("data.json", LIST[:-1], "never closed.*inside record 1"),
        ("data.json", LIST[:-30], "never closed.*inside record 1"),
        ("data.json", "[", "never closed.*inside record 0"),
        ("data.json", LIST + "x", "something follows"),
        ("data.json", LIST + LIST, "something follows"),
        ("data.json", LIST + " " * 300_000 + ",", "something follows"),
        ("data.json", LIST[:-1] + ",]", "no record before"),
        ("data.json", LIST.replace("]}", "]]}", 1), "brackets do not match in or before record 0: "),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    path = written(tmp_path, content, name)
    with pytest.raises(DataError, match=words) as error:
        Records(path, tmp_path / "cache")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_no_file_at_all(tmp_path):
    for path in (None, ""):
        with pytest.raises(DataError, match="model.data.data_path"):
            Records(path)
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none.json", "No such file"), (tmp_path / "a\0.json", "null")):
        with pytest.raises(DataError, match=words):
            Records(path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="no regular file"):
        Records(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    ("element", "words"),
    [
        (b"17", "found 17, expected an object"),
        (b'"text"', 'found "text"'),
        (b"[1, 2]", "found a list of 2"),
        (b"null", "found nothing or null"),
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a": }', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte"),
        (b'{"a": 1, "b": 2, "a": 3}', '"a" stands twice'),
        (b'{"a": {"b": 1, "b": 1}}', '"b" stands twice'),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
        (b'{"a": [}]', "not valid JSON"),
        (b'{"a": "one\ttab"}', "Invalid control character"),
    ],
)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_bad_record_is_named_and_its_neighbours_are_read(tmp_path, form, element, words):
    if form == "jsonl" and not element:
        pytest.skip("a blank line is no record")
    good = json.dumps(GOOD).encode()
    content = b"[" + b",".join([good, element, good]) + b"]" if form == "json" else b"\n".join([good, element, good])
    found = opened(tmp_path, content, f"data.{form}")
    assert found[0] == found[2] == GOOD and len(found) == 3
    with pytest.raises(RecordError, match=words) as error:
        found[1]
    assert f"data.{form}: record 1: " in str(error.value) and "\n" not in str(error.value)


def test_a_record_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 50)
    found = opened(tmp_path, json.dumps([{"a": "x" * 30}, {"a": "x" * 60}]))
    assert found[0] == {"a": "x" * 30}
    with pytest.raises(DataError, match="record 1: 70 bytes long, expected at most 50"):
        found[1]
