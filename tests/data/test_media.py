"""Pictures by name: the same bytes from a folder and a tar, and every name that points elsewhere refused."""

import concurrent.futures
import io
import os
import pickle
import tarfile
import time

import pytest

from neva_jax.data import media as media_module
from neva_jax.data.media import open_media
from neva_jax.errors import DataError

FILES = {"a.png": b"aaaa", "deep/er/b c.jpg": b"b" * 3000, "é.png": b"c", "photo:1.jpg": b"d"}


def make_tar(path, members, mode="w"):
    """members: [(name, bytes or TarInfo)]"""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(params=["folder", "tar"])
def media(request, folder, tmp_path):
    if request.param == "folder":
        return open_media(folder)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, ".")  # names as `tar -C images -cf images.tar .` writes them: "./a.png"
    return open_media(tmp_path / "images.tar")


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_reads(media):
    for name, content in FILES.items():
        assert media.read(name) == media.read("./" + name) == media.read(name.replace("/", "//")) == content


def test_pickles_small_and_reads_in_threads(media):
    assert len(pickle.dumps(media)) < 500
    again = pickle.loads(pickle.dumps(media))
    names = list(FILES) * 200
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.read, names)) == [FILES[name] for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "//host/share/a.png", "../a.png", "deep/../../a.png", "deep/er/../../a.png", "..", "..\\a.png", "deep\\..\\..\\a.png", "\\\\host\\a.png",
        "C:\\a.png", "c:a.png", "http://x.org/a.png", "HTTPS://x.org/a.png", "file:///etc/passwd", "file:a", "s3://bucket/a.png", "data:image/png;base64,AA",
        "a.png\0.jpg", "", ".", "./", "\ud83d.png",
    ],
)  # fmt: skip
def test_names_that_point_elsewhere(media, name, monkeypatch):
    def forbidden(*_):
        raise AssertionError("looked at the file system")

    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr(os, "pread", forbidden)
    with pytest.raises(DataError, match="points outside|names no file") as error:
        media.read(name)
    one_line(error).encode()


def test_missing_says_name_and_place(media):
    with pytest.raises(DataError, match=r"'deep/no\.png' is missing from .*images"):
        media.read("deep/no.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.jpg", r"'a\.png' is there, so the extension differs"),
        ("images/a.png", "one level up; set model.data.image_folder to"),
        ("coco/a.png", "has no 'coco' at all; model.data.image_folder is likely the wrong folder"),
        ("deep/er/x.png", "not downloaded or not unpacked"),
    ],
)
def test_the_likely_cause(folder, name, words):
    with pytest.raises(DataError, match=words) as error:
        open_media(folder).read(name)
    assert repr(name) in one_line(error) and str(folder) in str(error.value)


def test_links(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images-2").mkdir()
    (tmp_path / "images-2" / "x.png").write_bytes(b"x")
    (folder / "inside.png").symlink_to("deep/er/b c.jpg")
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to("..")
    (folder / "sibling.png").symlink_to(tmp_path / "images-2" / "x.png")  # its path starts with the folder's, as text
    (folder / "loop.png").symlink_to("loop.png")
    media = open_media(folder)
    assert media.read("inside.png") == FILES["deep/er/b c.jpg"]
    for name in ("outside.png", "up/secret.png", "sibling.png"):
        with pytest.raises(DataError, match="outside the folder"):
            media.read(name)
    with pytest.raises(DataError, match="cannot be opened"):
        media.read("loop.png")
    (tmp_path / "link").symlink_to(folder)
    assert open_media(tmp_path / "link").read("a.png") == b"aaaa"


def test_only_regular_files_of_a_sane_size(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").write_bytes(b"")
    media = open_media(folder, max_bytes=10)
    for name, words in [("pipe.png", "not a regular file"), ("deep", "not a regular file"), ("empty.png", "is empty")]:
        with pytest.raises(DataError, match=words):
            media.read(name)
    with pytest.raises(DataError, match="3000 bytes, expected at most 10"):
        media.read("deep/er/b c.jpg")
    with pytest.raises(DataError, match="cannot be opened"):
        media.read("a.png/b.png")


def test_tar_limits_and_odd_members(tmp_path):
    link, device, directory = tarfile.TarInfo(), tarfile.TarInfo(), tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, directory.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    odd = [("dir", directory), ("link.png", link), ("device.png", device), ("empty.png", b""), ("dir", directory)]
    members = [("twice.png", b"1"), ("./twice.png", b"2"), ("big.png", b"x" * 11), ("ok.png", b"ok")]
    media = open_media(make_tar(tmp_path / "odd.tar", odd + members), max_bytes=10)
    assert media.read("ok.png") == b"ok"
    cases = {"link.png": "a link", "device.png": "a device", "twice.png": "twice", "big.png": "11 bytes", "empty.png": "is empty", "dir": "missing"}
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            media.read(name)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/cron.d/evil", "a/../../evil.png", "C:\\evil.png"])
def test_tar_with_names_that_escape_is_refused_whole(tmp_path, name):
    with pytest.raises(DataError, match="points outside"):
        open_media(make_tar(tmp_path / "evil.tar", [("a.png", b"a"), (name, b"e")]))


def test_long_names_in_both_formats(tmp_path):
    name = "x" * 150 + "/" + "é" * 100 + ".png"
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
        assert open_media(path).read(name) == b"ok"


def test_bad_tars(tmp_path):
    good = make_tar(tmp_path / "good.tar", [("a.png", b"a" * 2000), ("b.png", b"b" * 2000)]).read_bytes()
    negative = bytearray(good)
    header = negative[2560:3072]  # of b.png
    header[124:136] = b"\xff" * 10 + b"\xfe\0"  # a size of -512 in base 256: the next header would be this one again, for ever
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    negative[2560:3072] = header
    make_tar(tmp_path / "z.tar", [("a.png", b"a")], "w:gz")
    (tmp_path / "text.tar").write_text("not a tar " * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "negative.tar").write_bytes(negative)
    for name in ("z.tar", "text.tar", "empty.tar", "negative.tar"):
        with pytest.raises(DataError, match="not an uncompressed tar") as error:
            open_media(tmp_path / name)
        one_line(error)
    (tmp_path / "cut.tar").write_bytes(good[: 2560 + 1024])
    with pytest.raises(DataError, match="cut.tar"):
        open_media(tmp_path / "cut.tar").read("b.png")


def test_a_tar_is_indexed_once_a_process(tmp_path):
    media_module._tar_index.cache_clear()
    media = open_media(make_tar(tmp_path / "a.tar", [("a.png", b"a")]))
    for again in (media, open_media(tmp_path / "a.tar"), pickle.loads(pickle.dumps(media))):
        assert again.read("a.png") == b"a"
    assert media_module._tar_index.cache_info().misses == 1


def test_no_folder(tmp_path):
    for folder in (None, "", tmp_path / "none"):
        with pytest.raises(DataError, match="model.data.image_folder"):
            open_media(folder)


def test_threads_share_the_opened_tar(tmp_path, monkeypatch):
    """The first reads of many threads at once: none closes the file that another reads."""
    path = make_tar(tmp_path / "a.tar", [("a.png", b"bytes")]) or tmp_path / "a.tar"
    slow = lambda *args, **options: (time.sleep(0.01), open(*args, **options))[1]  # noqa: E731, SIM115
    monkeypatch.setattr(media_module, "open", slow, raising=False)
    for _ in range(5):
        media = open_media(path)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda _, media=media: media.read("a.png"), range(32))) == {b"bytes"}
