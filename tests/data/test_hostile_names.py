"""Names of pictures that lead elsewhere, watched from below: Python's audit hook sees every file that is opened, and nothing outside the folder is.

In processes of their own, since an audit hook cannot be taken away again. What each name is answered is in test_media.
"""

import json
import struct
import subprocess
import sys
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from digit_data import record
from helpers import ROOT
from PIL import Image

PROGRAM = """
import json, sys
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.media import open_media
from neva_jax.data.records import Records
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import DataError

data, images, cache, model = sys.argv[1:]
def examples():
    return Examples((Records(data, cache),), open_media(images), ImageProcessor((8, 8), 8), Encoder(SentencePieceTokenizer(model), "v1", 4, 256))
examples()[0]  # what is imported and indexed once
watched, events = examples(), []
watched.stream(0)
kinds = "open", "socket", "urllib", "subprocess", "os.exec", "os.posix_spawn"
sys.addaudithook(lambda event, args: event.startswith(kinds) and events.append([event, str(args[0])]))
answers = []
for i in range(len(watched)):
    try:
        answers.append(list(watched[i].media.shape))
    except DataError as error:
        answers.append(str(error))
opened = list(events)
print(json.dumps([answers, opened, int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])]))
"""


def watched(tmp_path, names, images):
    """-> (what each record is answered, [(event, file), ...], KiB at most)"""
    (tmp_path / "data.json").write_text(json.dumps([record(name) for name in names]))
    arguments = [tmp_path / "data.json", images, tmp_path / "cache", ROOT / "examples" / "digits" / "tokenizer.model"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path):
    """images/ with a picture, and links to a picture beside it that is nobody's business."""
    picture = BytesIO()
    Image.new("RGB", (8, 8), (250, 120, 1)).save(picture, "PNG")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for place in ("images/good.png", "images/deep/good.png", "secret.png"):
        (tmp_path / place).write_bytes(picture.getvalue())
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "up").symlink_to("..")
    return tmp_path / "images"


def outside(tmp_path):
    secret = str(tmp_path / "secret.png")
    return [
        secret, "../secret.png", "deep/../../secret.png", "good.png/../../secret.png", "..\\secret.png", f"file://{secret}", f"file:{secret}", f"deep/{secret}",
        "http://localhost/secret.png", "C:\\secret.png", "/proc/self/environ", "/dev/stdin", "../secret.png\0.png", "good.png\0../secret.png", "..", ".",
        "~/secret.png", "link.png", "up/secret.png", "up/images/../secret.png",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_nothing_outside_is_opened(folder, tmp_path, kind):
    images, names = folder, outside(tmp_path)
    if kind == "tar":
        images = tmp_path / "images.tar"
        with tarfile.open(images, "w") as tar:
            tar.add(folder, ".")
    answers, events, _ = watched(tmp_path, ["good.png", *names, "deep/good.png"], images)
    assert answers[0] == answers[-1] == [1, 8, 8, 3]
    for i, name in enumerate(names, 1):
        assert isinstance(answers[i], str) and answers[i].startswith(f"{tmp_path / 'data.json'}: record {i}: image "), name
        assert "\n" not in answers[i]
    assert {event for event, _ in events} == {"open"}
    opened = {Path(path).resolve() for _, path in events}
    if kind == "tar":
        assert opened == {images}
    else:
        assert {folder / "good.png", folder / "deep" / "good.png"} == {path for path in opened if path.exists()}
        assert all(path.is_relative_to(folder) for path in opened), "a name without a file is tried, inside"


def test_a_link_to_the_folder_itself_is_no_way_out(folder, tmp_path):
    """A name that goes up and comes back is refused too, though it would end inside."""
    answers, events, _ = watched(tmp_path, ["good.png", "../images/good.png", "up/images/good.png"], folder)
    assert answers[0] == [1, 8, 8, 3] and "points outside" in answers[1] and answers[2] == [1, 8, 8, 3]
    assert [path for _, path in events] == [str(folder / "good.png")] * 2


def test_a_bomb_is_never_unpacked(folder, tmp_path):
    """A whole and valid picture of some kilobytes that would be 412 MiB: refused by its header, in the memory that a small one takes."""
    side = 12_000

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # black and white
    rows = zlib.compress(bytes(side * (1 + side // 8)))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    _, _, before = watched(tmp_path, ["good.png"], folder)
    answers, _, peak = watched(tmp_path, ["good.png", "bomb.png"], folder)
    assert "record 1: image 'bomb.png': 12000 x 12000 pixels, expected at most 33554432" in answers[1]
    assert peak - before < 30 * 2**10, (before, peak)
