"""The pixel cache: always the processor's own pixels, whatever happened to the file, the disk or the other processes."""

import fcntl
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from neva_jax.data import pixel_cache
from neva_jax.data.image import ImageProcessor
from neva_jax.data.pixel_cache import PixelCache
from neva_jax.errors import DataError

SIDE = 64
SLOT = SIDE * SIDE * 3  # bytes of a picture, three blocks
TABLE = pixel_cache._TABLE
PLENTY = 2**40


class Processor(ImageProcessor):
    """Counts the pictures it makes; its repr is ImageProcessor's with another name."""

    def __call__(self, data, where):
        made.append(where)
        return super().__call__(data, where)


made = []


def processor(side=SIDE, **changes):
    return Processor(**{"crop_size": (side, side), "shortest_edge": side} | changes)


def picture(seed=0, height=70, width=90):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    made.clear()
    monkeypatch.setattr(pixel_cache, "_RESERVE", 0)  # the disk of whoever runs the tests may be nearly full


@pytest.fixture
def cache(tmp_path):
    return PixelCache(processor(), tmp_path / "cache", PLENTY)


def right(cache, *pictures):
    """Whether the cache returns what its processor makes; -> how many of them it made for that."""
    expected = [ImageProcessor.__call__(cache.processor, data, "") for data in pictures]
    before = len(made)
    for data, pixels in zip(pictures, expected, strict=True):
        found = cache(data, "here")
        assert found.dtype == np.uint8 and found.flags.writeable and found.flags.owndata
        np.testing.assert_array_equal(found, pixels)
    return len(made) - before


def num_slots(cache):
    return (os.path.getsize(cache.path) - TABLE) / SLOT


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "neva_jax.data.pixel_cache"]


def test_each_picture_is_made_once(cache):
    pictures = [picture(seed) for seed in range(20)]
    assert right(cache, *pictures) == 20
    assert right(cache, *pictures[::-1]) == 0
    assert right(PixelCache(processor(), cache.directory, PLENTY), *pictures) == 0  # as another run would
    assert right(pickle.loads(pickle.dumps(cache)), *pictures) == 0
    assert cache.held() == (20, TABLE + 20 * SLOT)


def test_the_key_is_the_content(cache):
    data = picture()
    cache(data, "a.png")
    assert right(cache, bytes(bytearray(data))) == 0
    assert right(cache, data + b"\0") == 1


def test_the_key_is_the_preprocessing(tmp_path, monkeypatch):
    changes = [{}, {"side": 16}, {"aspect": "pad"}, {"shortest_edge": None}, {"max_pixels": 10**6}, {"mean": (0.1, 0.2, 0.3), "aspect": "pad"}]
    caches = [PixelCache(processor(**change), tmp_path, PLENTY) for change in changes]
    monkeypatch.setattr(pixel_cache.PIL, "__version__", "1.1.7")
    caches.append(PixelCache(processor(), tmp_path, PLENTY))
    assert [right(cache, picture()) for cache in caches] == [1] * 7 and len({cache.path for cache in caches}) == 7


def test_a_bad_picture_is_an_error_each_time(cache):
    for _ in range(2):
        with pytest.raises(DataError, match=r"^record 3: image 'a\.png'"):
            cache(picture()[:80], "record 3: image 'a.png'")
    assert made == ["record 3: image 'a.png'"] * 2 and not os.path.exists(cache.path)


def test_pixels_of_any_shape(tmp_path):
    """NeVA's keep has a size of its own for each picture, LLaVA-NeXT's tiles have an axis more."""
    sizes = [(70, 90), (90, 70), (64, 64), (200, 20)]
    pictures = [picture(0, *size) for size in sizes]
    for aspect, shapes in {
        "keep": [(224, 288, 3), (288, 224, 3), (224, 224, 3), (440, 44, 3)],
        "anyres": [(3, 64, 64, 3)] * 2 + [(2, 64, 64, 3), (3, 64, 64, 3)],
    }.items():
        cache = PixelCache(processor(aspect=aspect, image_grid_pinpoints=((64, 128), (128, 64), (64, 64))), tmp_path, PLENTY)
        assert [cache(data, "").shape for data in pictures] == shapes
        assert right(cache, *pictures) == 0 and cache.held()[0] == 4


# ---- damage


def test_damaged_pixels_are_made_anew(cache):
    pictures = [picture(seed) for seed in range(3)]
    right(cache, *pictures)
    with open(cache.path, "r+b") as file:
        file.seek(TABLE + SLOT + 7)
        byte = file.read(1)[0]
        file.seek(TABLE + SLOT + 7)
        file.write(bytes([byte ^ 1]))
    assert right(cache, *pictures) == 1
    assert right(cache, *pictures) == 0


def test_a_damaged_entry_is_written_anew(cache):
    data = picture()
    right(cache, data)
    with open(cache.path, "r+b") as file:
        file.seek(pixel_cache._page_of(hashlib.sha256(data).digest()) + 20)  # behind the key and the place: a shape of 10**15 bytes
        file.write(b"\xff" * 6)
    assert right(cache, data) == 1
    assert right(cache, data) == 0 and cache.held()[0] == 1


@pytest.mark.parametrize("size", [TABLE + SLOT + 5, TABLE, TABLE - 4096, 5000, 0])
def test_a_file_cut_by_a_power_cut_is_filled_again(cache, size):
    pictures = [picture(seed) for seed in range(4)]
    right(cache, *pictures)
    os.truncate(cache.path, size)
    assert cache.held() == (4 if size > 2**22 else 0, size)
    assert right(cache, *pictures) == (3 if size > TABLE else 4)
    right(cache, *pictures)  # a slot that two entries name belongs to one of them: the other one moves
    assert right(cache, *pictures) == 0


def test_entries_without_their_pixels_do_not_name_another_pictures(cache):
    """The table reached the disk, the pixels did not, and the slots behind it were filled with others."""
    lost, others = [picture(seed) for seed in range(3)], [picture(seed) for seed in range(3, 9)]
    right(cache, *lost)
    os.truncate(cache.path, TABLE)
    assert right(cache, *others) == 6
    assert right(cache, *lost) == 3
    assert right(cache, *lost, *others) == 0


def test_death_between_pixels_and_entry_costs_a_slot(cache, monkeypatch):
    right(cache, picture(0))
    write = os.pwrite

    def dies(descriptor, data, offset):
        if offset < TABLE:
            raise KeyboardInterrupt
        return write(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", dies)
        with pytest.raises(KeyboardInterrupt):
            cache(picture(1), "")
    assert right(cache, picture(0), picture(1)) == 1
    assert right(cache, picture(0), picture(1)) == 0 and num_slots(cache) == 3


def test_a_page_holds_128_pictures(cache, monkeypatch):
    monkeypatch.setattr(pixel_cache, "_page_of", lambda key: 4096)
    monkeypatch.setattr(pixel_cache, "zlib", SimpleNamespace(crc32=lambda pixels: zlib.crc32(pixels) & 255))  # entries that end in zeros are entries too
    pictures = [picture(seed) for seed in range(130)]
    assert right(cache, *pictures) == 130
    assert right(cache, *pictures) == 2 and num_slots(cache) == 128


# ---- limits


def test_size_is_bounded_over_all_caches_of_a_directory(tmp_path, caplog):
    pictures = [picture(seed) for seed in range(6)]
    limit = 2 * TABLE + 5 * SLOT
    square, padded = (PixelCache(processor(aspect=aspect), tmp_path, limit) for aspect in ("square", "pad"))
    assert right(square, *pictures[:3]) == 3
    assert right(padded, *pictures) == 6 and right(padded, *pictures) == 4
    assert [num_slots(square), num_slots(padded)] == [3, 2] and warnings(caplog) == [
        f"{padded.path}: the pixel caches beside it may take 0.50 GiB together and are full; raise model.data.pixel_cache_gib, or delete one not in use. "
        "Pictures that are not in it are made anew each time"
    ]
    assert right(square, *pictures) == 3 and len(warnings(caplog)) == 2 and sum(map(os.path.getsize, (square.path, padded.path))) == limit
    assert right(PixelCache(square.processor, tmp_path, PLENTY), *pictures) == 3 and num_slots(square) == 6  # it goes on where it was


def no_space(descriptor, data, offset):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("pwrite", [no_space, lambda descriptor, data, offset: SLOT - 1], ids=["error", "part"])
def test_a_full_disk(cache, monkeypatch, caplog, pwrite):
    right(cache, picture(0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        assert right(cache, picture(0), picture(1), picture(2), picture(1)) == 3
    assert len(warnings(caplog)) == 1 and "No space left on device" in warnings(caplog)[0] and "model.data.cache_dir" in warnings(caplog)[0]
    assert right(pickle.loads(pickle.dumps(cache)), picture(0), picture(1)) == 1 and len(warnings(caplog)) == 1  # a worker born of it does not try


def test_some_of_the_disk_is_left_to_others(cache, monkeypatch, caplog):
    disk = os.statvfs(ROOT)
    monkeypatch.setattr(pixel_cache, "_RESERVE", disk.f_blocks * disk.f_frsize * 1000)
    assert right(cache, picture(), picture()) == 2
    assert len(warnings(caplog)) == 1 and "GiB of the disk are free" in warnings(caplog)[0]


# ---- places that cannot hold it


def test_a_place_that_is_no_folder(tmp_path, caplog):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "inside"):
        cache = PixelCache(processor(), directory, PLENTY)
        assert right(cache, picture(), picture()) == 2 and cache.held() == (0, 0)
    assert len(warnings(caplog)) == 2


def test_a_folder_that_may_only_be_read(cache, monkeypatch, caplog):
    right(cache, picture(0))
    opened = os.open

    def read_only(path, flags, *mode):  # the tests may run as root, whom permissions do not stop
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    assert right(cache, picture(0), picture(1), picture(1)) == 2
    assert len(warnings(caplog)) == 1 and "Permission denied" in warnings(caplog)[0]


def test_reads_that_fail(cache, monkeypatch, caplog):
    right(cache, picture(0))

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    assert right(cache, picture(0), picture(0)) == 2 and len(warnings(caplog)) == 1


def test_a_folder_that_is_removed_meanwhile(cache, caplog):
    right(cache, picture(0))
    shutil.rmtree(cache.directory)
    assert [right(cache, picture(0)) for _ in range(2)] == [1, 0] and not warnings(caplog)


# ---- several at once


def test_writers_wait_for_each_other_and_readers_do_not(cache):
    right(cache, picture(0))
    with open(cache.path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = threading.Thread(target=cache, args=(picture(1), ""))
        writer.start()
        assert right(cache, picture(0)) == 0
        writer.join(0.2)
        assert writer.is_alive() and num_slots(cache) == 1
    writer.join(10)
    assert not writer.is_alive() and num_slots(cache) == 2


def test_threads_share_it(cache):
    pictures = [picture(seed, 33, 33) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: cache(data, ""), pictures * 4))
    assert num_slots(cache) == 60 and right(cache, *pictures) == 0


WRITER = """
import os, pickle, random, sys
from neva_jax.data import pixel_cache
pixel_cache._RESERVE = 0
with open(sys.argv[1], "rb") as file:
    cache, pictures = pickle.load(file)
random.Random(sys.argv[2]).shuffle(pictures)
write = os.pwrite
for number, data in enumerate(pictures):
    if number == int(sys.argv[3]):
        os.pwrite = lambda descriptor, data, offset: (write(descriptor, bytes(data)[:100], offset), os.kill(os.getpid(), 9))
    cache(data, "")
"""


def test_processes_share_it_and_may_be_killed(tmp_path):
    """One is killed in the middle of its eleventh picture; then three at once write all pictures, each in an order of its own."""
    cache = PixelCache(ImageProcessor((SIDE, SIDE), SIDE), tmp_path / "cache", PLENTY)
    pictures = [picture(seed) for seed in range(150)]
    (tmp_path / "work").write_bytes(pickle.dumps((cache, pictures)))
    command = [sys.executable, "-c", WRITER, str(tmp_path / "work")]
    assert subprocess.run([*command, "killed", "10"], cwd=ROOT).returncode == -9
    assert num_slots(cache) == 10 + 100 / SLOT
    writers = [subprocess.Popen([*command, name, "-1"], cwd=ROOT) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0] * 3 and num_slots(cache) == 150 + 4096 / SLOT
    expected, cache.processor = [cache.processor(data, "") for data in pictures], None
    for data, pixels in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(cache(data, ""), pixels)
