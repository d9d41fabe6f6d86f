"""Pictures by name, as bytes, from a folder or an uncompressed tar. Names come from data files, so each is refused before anything is opened if it
points elsewhere: absolute, `..`, a drive, a URL, a symbolic link that leaves the folder.

Gives up: compressed tars (no random access), links inside tars, and image folders stitched together from links to other places. A tar's index is
kept in memory, some 200 bytes a member in each process.
"""

import functools
import os
import posixpath
import re
import stat
import tarfile
import threading

from neva_jax.errors import DataError

MAX_BYTES = 20 * 2**20
FIELD = "model.data.image_folder"

_FOREIGN = re.compile(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://|(data|file):", re.IGNORECASE)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_lock = threading.Lock()


def open_media(folder, max_bytes=MAX_BYTES):
    """-> an object with `read(name) -> bytes`, picklable and safe in threads. folder: a directory or a tar; max_bytes: the largest file to read."""
    path = os.path.abspath(folder) if folder else None
    if path and os.path.isdir(path):
        return Folder(path, max_bytes)
    if path and os.path.isfile(path):
        return Tar(path, max_bytes)
    raise DataError(f"{FIELD} = {folder!r}: neither a folder nor a tar; set it to the folder that the image names start from")


class Folder:
    def __init__(self, path, max_bytes=MAX_BYTES):
        self.path, self.max_bytes = os.path.realpath(path), max_bytes

    def read(self, name) -> bytes:
        """The bytes of one regular file. Raises DataError for a name that leaves the folder, a missing, odd or too large file."""
        name = _named(name, self.path)
        path = os.path.realpath(os.path.join(self.path, name))
        if os.path.commonpath([path, self.path]) != self.path:
            raise DataError(f"image {name!r} in {self.path}: is a link to {path!r}, outside the folder; copy the file, or set {FIELD} to where it lies")
        try:
            # NONBLOCK: a pipe must not be waited for. NOFOLLOW: the resolved path has no link left, unless someone is swapping files.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise DataError(f"image {name!r} is missing from {self.path}: {self._cause(name)}") from None
        except OSError as error:
            raise DataError(f"image {name!r} in {self.path}: cannot be opened ({error.strerror})") from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"image {name!r} in {self.path}: not a regular file, expected a picture")
            _check_size(found.st_size, self.max_bytes, name, self.path)
            return os.pread(descriptor, found.st_size, 0)
        finally:
            os.close(descriptor)

    def _cause(self, name):
        stem = os.path.splitext(name)[0]
        for suffix in _SUFFIXES:
            if os.path.exists(os.path.join(self.path, stem + suffix)):
                return f"{stem + suffix!r} is there, so the extension differs; rename the file or correct the record"
        if os.path.exists(os.path.join(os.path.dirname(self.path), name)):
            return f"it is there one level up; set {FIELD} to {os.path.dirname(self.path)}"
        first = name.split("/")[0]
        if first != name and not os.path.exists(os.path.join(self.path, first)):
            return f"the folder has no {first!r} at all; {FIELD} is likely the wrong folder, or that part was not downloaded"
        return f"likely not downloaded or not unpacked; fetch it, or correct {FIELD} or the record"


class Tar:
    def __init__(self, path, max_bytes=MAX_BYTES):
        self.path, self.max_bytes = path, max_bytes
        found = os.stat(path)
        self._state = found.st_size, found.st_mtime_ns
        self._file = None
        self._index()

    def __getstate__(self):
        return self.__dict__ | {"_file": None}

    def read(self, name) -> bytes:
        """The bytes of one regular member. Raises DataError for a missing, doubled, odd or too large one."""
        index = self._index()
        name = _named(name, self.path)
        place = index.get(name)
        if place is None:
            raise DataError(f"image {name!r} is missing from {self.path}: none of its {len(index)} members has that name; likely a cut-off or another tar")
        if isinstance(place, str):
            raise DataError(f"image {name!r} in {self.path}: {place}")
        offset, size = place
        _check_size(size, self.max_bytes, name, self.path)
        with _lock:  # of two threads that open it, one would close the other's
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (lives as long as this object)
        data = os.pread(self._file.fileno(), size, offset)  # keeps no position, so threads may share the file
        if len(data) < size:
            raise DataError(f"image {name!r} in {self.path}: the tar ends inside it; copy or download the tar again")
        return data

    def _index(self):
        with _lock:
            return _tar_index(self.path, *self._state)


@functools.lru_cache(maxsize=8)
def _tar_index(path, _size, _mtime):
    """-> {name: (offset, size) or a sentence that says why it cannot be read}. Once a process, however many objects read the tar."""
    index = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header
                if member.size < 0:
                    raise tarfile.ReadError("a negative size")  # leads back to an earlier header, and reading on would never end
                name = _inside(member.name, path)
                if name in index:
                    index[name] = "stands in the tar twice, and which one is meant is unknown; remove one"
                elif member.isreg() and not member.issparse():
                    index[name] = (member.offset_data, member.size)
                elif not member.isdir():
                    index[name] = "a link, a device or a sparse file, expected a regular file; make the tar anew with `tar --dereference`"
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise DataError(f"{FIELD} = {path!r}: not an uncompressed tar ({error}); unpack it, or make it with `tar cf`, without z, j or J") from None
    return index


def _inside(name, root):
    """-> the name in its plain form ("./a//b.png" -> "a/b.png"), or DataError if it could point out of `root`."""
    parts = name.replace("\\", "/").split("/")
    if "\0" in name or (name and not parts[0]) or ".." in parts or _FOREIGN.match(name):
        raise DataError(f"image {name[:200]!r} in {root}: points outside; expected a path relative to {FIELD}, with no '..', drive or URL")
    return posixpath.normpath(name)


def _named(name, root):
    """`_inside` for a name that a record gives: it must name a file, in text that a file system can hold."""
    plain = _inside(name, root)
    if plain == "." or plain != plain.encode(errors="ignore").decode():
        raise DataError(f"image {name[:200]!r} in {root}: names no file; expected a path relative to {FIELD}")
    return plain


def _check_size(size, limit, name, root):
    if size < 1:
        raise DataError(f"image {name!r} in {root}: is empty ({size} bytes); fetch it again")
    if size > limit:
        raise DataError(f"image {name!r} in {root}: {size} bytes, expected at most {limit}; shrink the picture")
