"""Prepared pictures kept on disk: what a processor made of a picture's bytes is read back instead of being decoded and resized again.

One file a processor. It begins with a table of 65,536 pages, each with room for 128 entries (key, place, shape, checksum of the pixels); behind the table lie
the pixels, in the order in which they were made. The first two bytes of a picture's key choose the page. Readers take no lock: an entry is written after its
pixels, and pixels that do not fit their checksum (a power cut, a damaged disk) are made anew. Writers hold a lock on the file, which the system frees when a
process dies. Nothing is mapped into memory or kept open, so a file that is cut or removed meanwhile costs time and no more.

A cache that cannot be read or written never stops a run. Gives up: eviction (what does not fit is made anew each time), more than some six million pictures
(a page is full), and speed where `directory` lies on a network: it belongs on a disk of the machine.
"""

import errno
import fcntl
import hashlib
import logging
import math
import os
import struct
import zlib

import numpy as np
import PIL

from neva_jax.data.image import ImageProcessor
from neva_jax.data.sweep import sweep

log = logging.getLogger(__name__)

FORMAT = 1  # of the file, and of the pixels a processor makes: raise it when either changes

_ENTRY = struct.Struct("<16sIHHH2xI")  # key, first block, parts (0: the pixels have three axes), height, width, checksum
_BLOCK = 4096  # bytes; pixels begin at a multiple of it
_PAGE = 128 * _ENTRY.size
_TABLE = 2**16 * _PAGE  # 256 MiB, of which the disk holds only pages in use
_RESERVE = 16 * 2**30  # bytes of the disk that are left to checkpoints and logs


class PixelCache:
    """Stands where its ImageProcessor stands: called alike, the same pixels. Pickles small; safe in threads, in forked and in unrelated processes.

    directory: where the file lies, made when needed; max_bytes: of all pixel caches in it together. When that is reached, or 16 GiB of the disk are left, no
    more is stored, and each process says so once.
    """

    def __init__(self, processor: ImageProcessor, directory: str, max_bytes: int):
        self.processor, self.directory, self.max_bytes = processor, os.path.abspath(directory), max_bytes
        self.crop_size = processor.crop_size
        state = repr((FORMAT, processor, PIL.__version__))  # another Pillow may decode and resize to other bits
        digest = hashlib.sha256(state.encode()).hexdigest()[:16]
        self.path = os.path.join(self.directory, f"pixels-{processor.aspect}-{self.crop_size[0]}x{self.crop_size[1]}-{digest}.bin")
        self._is_storing = True

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        """An encoded picture -> uint8[..., H, W, 3], from the cache or made and stored. Raises what the processor raises; such a picture is not stored."""
        key = hashlib.sha256(data).digest()[:16]  # faster than blake2b where the processor has instructions for it
        pixels = self._read(key)
        if pixels is None:
            pixels = self.processor(data, where)
            if self._is_storing:
                self._store(key, pixels)
        return pixels

    def held(self) -> tuple[int, int]:
        """How many pictures the file holds, and its bytes; 0, 0 where it cannot be read."""
        count = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                for _ in range(0, _TABLE, 2**24):
                    data = file.read(2**24)
                    count += int(np.count_nonzero(np.frombuffer(data, "<u8", len(data) // 8)[:: _ENTRY.size // 8]))
                return count, os.fstat(file.fileno()).st_size
        except OSError:
            return 0, 0

    def _read(self, key):
        """The pixels, or None where they are not, or not whole, or cannot be read."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            return self._lookup(descriptor, key)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _lookup(self, descriptor, key):
        page = os.pread(descriptor, _PAGE, _page_of(key))
        place = page.find(key)
        if place < 0:
            return None
        _, block, parts, *sides, checksum = _ENTRY.unpack_from(page, place)
        shape = (parts, *sides, 3) if parts else (*sides, 3)
        if block * _BLOCK + math.prod(shape) > os.fstat(descriptor).st_size:
            return None
        pixels = np.empty(shape, np.uint8)
        os.preadv(descriptor, [pixels], block * _BLOCK)
        return pixels if zlib.crc32(pixels) == checksum else None

    def _store(self, key, pixels):
        try:
            os.makedirs(self.directory, exist_ok=True)
            # Opened for each picture: a lock belongs to the opening, so threads and forked processes exclude each other too. Closing unlocks.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._lookup(descriptor, key) is None:  # or another process was quicker
                    self._append(descriptor, key, pixels)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._is_storing = False
            system = f"cannot be written ({error.strerror}); set model.data.cache_dir to a folder on a disk with room"
            log.warning(f"{self.path}: {system if error.strerror else error}. Pictures that are not in it are made anew each time")

    def _append(self, descriptor, key, pixels):
        """Under the lock. The file's own size says where the next pixels go, so what a dead process left without an entry is lost and does no harm."""
        page = os.pread(descriptor, _PAGE, _page_of(key))
        place = page.find(key)
        if place < 0:
            place = -(-len(page.rstrip(b"\0")) // _ENTRY.size) * _ENTRY.size
        if place == _PAGE:
            return
        size = os.fstat(descriptor).st_size
        block = -(-max(size, _TABLE) // _BLOCK)
        self._check_room(descriptor, block * _BLOCK + pixels.nbytes - size)
        if os.pwrite(descriptor, pixels, block * _BLOCK) < pixels.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        parts, *sides = pixels.shape[:-1] if pixels.ndim == 4 else (0, *pixels.shape[:-1])
        os.pwrite(descriptor, _ENTRY.pack(key, block, parts, *sides, zlib.crc32(pixels)), _page_of(key) + place)

    def _check_room(self, descriptor, num_bytes):
        with os.scandir(self.directory) as entries:
            held = sum(entry.stat().st_size for entry in entries if entry.name.startswith("pixels-"))
        if held + num_bytes > self.max_bytes:
            limit = f"{self.max_bytes / 2**30:.2f} GiB"
            raise OSError(f"the pixel caches beside it may take {limit} together and are full; raise model.data.pixel_cache_gib, or delete one not in use")
        disk = os.fstatvfs(descriptor)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < _RESERVE:
            raise OSError(errno.ENOSPC, f"less than {_RESERVE / 2**30:.0f} GiB of the disk are free")


def _page_of(key):
    return int.from_bytes(key[:2]) * _PAGE


def fill(examples, num_workers: int = 0) -> int:
    """Reads every example once, whose image_processor is a PixelCache; num_workers: processes to do it with. -> how many had a bad picture.

    Raises the first DataError of an example. Whatever was stored by then stays, and another call goes on from there.
    """
    return sum(sweep(_reader, examples, num_workers, "preparing pictures"))


def _reader(examples):
    return lambda chunk: sum(examples[index].bad_image for index in chunk)
