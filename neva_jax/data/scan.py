"""Where each record of a file lies: the byte ranges of a JSON list's elements, or of the lines of a JSONL file, in one pass over the bytes.

Counts quotes and brackets, a chunk at a time and only where they stand, at hundreds of MB/s and in a few MB of memory. It does not check JSON
inside a record: whoever reads the record does.
"""

import numpy as np

from neva_jax.errors import DataError

FORMAT = 1  # of the offsets; part of an index's name, so that an index of another version is never read
_CHUNK = 2**18  # bytes; its arrays stay in the cache
_SPACE = b" \t\r\n"
_MARKS = bytes(byte in b'"\\[]{},' for byte in range(256))
_SOLID = bytes(byte not in _SPACE for byte in range(256))
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


def scan(path):
    """-> offsets: int64[N + 1]. Record i is the bytes [offsets[i], offsets[i + 1] - 1): one byte, comma or newline, lies between two records."""
    with open(path, "rb") as file:
        start, first = _first_solid(file, 3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        if not first:
            raise DataError(f"{path}: is empty, expected LLaVA records")
        if path.endswith(".jsonl"):
            if first == b"[":
                raise DataError(f"{path}: starts with '[', expected one object a line; it looks like a JSON list: name it .json")
            return _scan_lines(file, start)
        if first == b"{":
            raise DataError(f"{path}: starts with '{{', expected a list; it looks like JSONL: name it .jsonl")
        if first != b"[":
            raise DataError(f"{path}: starts with byte 0x{first.hex()} at {start}, expected '[', the start of a list of records, in UTF-8")
        return _scan_list(file, start, path)


def _chunks(file, start):
    """Yields (offset in the file, bytes) from `start` to the end."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        yield start, chunk
        start += len(chunk)


def _first_solid(file, start):
    """-> (offset, byte) of the first byte from `start` on that is not white space; (end of file, b"") if there is none."""
    for base, chunk in _chunks(file, start):
        if rest := chunk.lstrip(_SPACE):
            return base + len(chunk) - len(rest), rest[:1]
    return file.tell(), b""


def _scan_lines(file, start):
    """Offsets of the lines that hold anything but white space."""
    parts, line, solid = [], start, False  # the open line: where it starts, whether it holds anything yet
    for base, chunk in _chunks(file, start):
        edges = np.concatenate(([0], np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1))
        holds = np.logical_or.reduceat(np.frombuffer(chunk.translate(_SOLID) + b"\0", bool), edges)
        starts = base + edges
        starts[0], holds[0] = line, holds[0] or solid
        parts.append(starts[:-1][holds[:-1]])
        line, solid = starts[-1], holds[-1]
    return np.concatenate([*parts, [line] * bool(solid), [file.tell() + 1]]).astype(np.int64)


def _scan_list(file, start, path):
    """Offsets of the elements of the list that opens at `start`: what lies between its '[', its own commas, and its ']'."""
    separators, depth, in_string, escape = [np.array([start])], 0, 0, False
    chunks = _chunks(file, start)
    for base, chunk in chunks:
        at = np.flatnonzero(np.frombuffer(chunk.translate(_MARKS), bool))
        mark = np.frombuffer(chunk, np.uint8)[at]
        escaped = _escaped(at[mark == ord("\\")], escape)
        escape = len(escaped) > 0 and escaped[-1] == len(chunk)
        mark[np.isin(at, escaped, assume_unique=True)] = 0
        quote = mark == ord('"')
        quotes = np.cumsum(quote, dtype=np.uint8) + np.uint8(in_string)  # wraps at 256, which is even: only the parity is read
        in_string = (in_string + np.count_nonzero(quote)) % 2
        outside = (quotes % 2 == 0) & ~quote
        at, mark = at[outside], mark[outside]
        level = depth + np.cumsum(_STEP[mark], dtype=np.int64)
        separators.append(base + at[(mark == ord(",")) & (level == 1)])
        if (closed := np.flatnonzero(level <= 0)).size:
            end = int(at[closed[0]])
            rest = chunk[end + 1 :].strip(_SPACE) or next((True for _, later in chunks if later.strip(_SPACE)), False)
            return _closed_list(file, np.concatenate(separators), base + end, rest, path)
        depth = level[-1] if len(level) else depth
    count = sum(map(len, separators)) - 1
    raise DataError(f"{path}: the list is never closed: the file ends inside record {count}; it was cut off, or a quote or bracket is missing")


def _closed_list(file, separators, end, rest, path):
    """The offsets, once the list closes at byte `end`. separators: int64[N], '[' and commas; rest: whether anything but white space follows."""
    separators = separators[separators < end]  # commas behind the end belong to the garbage that is reported here
    if _first_solid(file, end)[1] != b"]":
        raise DataError(f"{path}: brackets do not match in or before record {len(separators) - 1}: a '}}' at byte {end} closes the list")
    if rest:
        raise DataError(f"{path}: something follows the list that ends at byte {end}; expected one list and nothing else (two files joined together?)")
    if _first_solid(file, int(separators[-1]) + 1)[0] == end:
        problem = "holds no records" if len(separators) == 1 else f"has a comma but no record before the ']' at byte {end}; remove the comma"
        raise DataError(f"{path}: the list {problem}")
    return np.append(separators, end) + 1


def _escaped(backslashes, carried):
    """Offsets of the bytes that an odd run of backslashes precedes. backslashes: int64[M], ascending; carried: such a byte opens this chunk."""
    if carried:
        backslashes = np.concatenate(([-1], backslashes))
    last = np.flatnonzero(np.diff(backslashes, append=-2) != 1)
    length = np.diff(last, prepend=-1)
    return backslashes[last[length % 2 == 1]] + 1


