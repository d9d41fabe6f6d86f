"""What `inspect_data` prints for a person: records in colour, defects by kind, lengths as bars and a table. Plain marks take the colours' place in a file."""

import collections
import os
import shutil
import sys
from collections.abc import Iterator

from neva_jax.evaluation.histogram import text_bars

COLOURS = {"text": "", "supervised": "\033[32;1m", "media": "\033[36m"}
MARKS = {"text": ("", ""), "supervised": ("«", "»"), "media": ("", "")}
SHOWN = 20  # defects of a kind


def print_records(found: dict) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"what is learnt is {_mark('green' if colour else 'in these', 'supervised', colour)}; {_mark('[media vectors]', 'media', colour)} stand for pictures")
    print("labels are the next tokens, . where nothing is learnt\n")
    for record in found["records"]:
        print(f"--- record {record['index']}: {len(record['tokens'])} tokens, {sum(record['loss_mask'])} supervised, {record['num_media']} media")
        if record["error"]:
            print(f"error: {record['error']}\n")
            continue
        if record["warning"]:
            print(f"warning: {record['warning']}")
        print("".join(_mark(printable(run["text"]), run["kind"], colour) for run in record["runs"]))
        print(*_rows(record, colour, shutil.get_terminal_size((120, 24)).columns), sep="\n", end="\n\n")


def _mark(text: str, kind: str, colour: bool) -> str:
    before, after = (COLOURS[kind], "\033[0m" if COLOURS[kind] else "") if colour else MARKS[kind]
    return before + text + after


def printable(text: str) -> str:
    """A text that moves no cursor and colours nothing: control characters but newlines as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _rows(record: dict, colour: bool, width: int) -> Iterator[str]:
    """Tokens above labels, in columns as wide as the wider of the two; a row of media is one column."""
    columns = []
    run = 0  # positions of media that are not learnt
    for token, label, media in [*zip(record["tokens"], record["labels"], record["media_index"], strict=True), (None, -1, -1)]:
        if media >= 0 > label:
            run += 1
            continue
        if run:
            columns.append((f"[{run} media]", ".", "media"))
            run = 0
        if token is not None:
            columns.append((str(token), str(label) if label >= 0 else ".", "supervised" if label >= 0 else "text"))
    top, bottom, used = "tokens:", "labels:", 7
    for token, label, kind in columns:
        wide = max(len(token), len(label)) + 1
        if used + wide > width:
            yield from (top, bottom)
            top, bottom, used = " " * 7, " " * 7, 7
        used += wide
        top += f"{token:>{wide}}" if kind != "media" or not colour else _mark(f"{token:>{wide}}", kind, colour)
        bottom += f"{label:>{wide}}" if kind != "supervised" or not colour else _mark(f"{label:>{wide}}", kind, colour)
    yield from (top, bottom)


def print_report(found: dict) -> None:
    kinds = collections.defaultdict(list)
    for defect in found["defects"]:
        kinds[defect["kind"]].append(defect)
    by_size = sorted(kinds, key=lambda kind: -len(kinds[kind]))
    for kind in by_size:
        print(f"{kind}: {len(kinds[kind])}")
        print(*(f"  {printable(defect['message'])}" for defect in kinds[kind][:SHOWN]), sep="\n")
        if (more := len(kinds[kind]) - SHOWN) > 0:
            print(f"  and {more} more; --json or --output FILE gives all")
        print()
    speed = f"{found['seconds']:.1f} s, {found['records_per_second']:.0f} records/s"
    if not kinds:
        print(f"no defect in {found['num_records']} records; {speed}")
        return
    counts = ", ".join(f"{kind} {len(kinds[kind])}" for kind in by_size)
    bad = len({defect["index"] for defect in found["defects"]})
    print(f"{found['num_defects']} defects in {bad} of {found['num_records']} records ({counts}); {speed}")


def print_lengths(found: dict) -> None:
    for name in ("tokens", "supervised", "media"):
        s = found[name]
        print(f"{name}: min {s['min']}, median {s['median']:.0f}, mean {s['mean']:.1f}, p90 {s['p90']:.0f}, p99 {s['p99']:.0f}, max {s['max']}")
        print(text_bars(found["histograms"][name]) + "\n")
    print("bucketing                shapes  padding  token lengths")
    for row in found["padding"]:
        name = f"{row['buckets']} length{'s' * (row['buckets'] != 1)}{'' if row['length_grouping'] else ', not grouped'}"
        lengths = ", ".join(map(str, row["token_lengths"]))
        print(f"{name:<24}{row['shapes']:>7}{row['padding_share']:>9.1%}  {lengths}{'   <- in use' * row['in_use']}")
    left_out = f"; left out: {found['num_defects']} defective, --validate names them all" if found["num_defects"] else ""
    print(f"\n{found['num_records']} records{left_out}")
