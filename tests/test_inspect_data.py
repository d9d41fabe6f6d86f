"""The command that looks at data: what each way of asking prints, for a program and for a person, and with which code it ends."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from neva_jax import cli, inspect_data
from neva_jax.evaluation import report

TURNS = [{"from": "human", "value": "<image>\nWhat does the picture show?"}, {"from": "gpt", "value": "three"}]
SOUND = {"image": "a.png", "conversations": TURNS}
BAD = {"image": "b.png", "conversations": [TURNS[0], {"from": "gpt", "value": " "}]}


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    """ask(records, arguments...) -> (exit code, standard output, standard error)"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((32, 32), 80, np.uint8)).save("images/a.png")

    def run(records, *arguments):
        (tmp_path / "data.json").write_text(records if isinstance(records, str) else json.dumps(records))
        data = {"data_path": "data.json", "image_folder": "images", "cache_dir": "cache", "num_workers": 0}
        command = ["inspect_data", "--config", f"{ROOT}/configs/quickstart.py", *(f"--config.model.data.{name}={value}" for name, value in data.items())]
        with pytest.raises(SystemExit) as end:
            cli.run(inspect_data.main, inspect_data.define_flags, [*command, *arguments])
        return end.value.code, *capsys.readouterr()

    return run


# ---- the command line


@pytest.mark.parametrize(("arguments", "message"), [
    ([], r"found none of them, expected one of --show=N, --validate and --lengths"),
    (["--show=1", "--validate"], r"found --show and --validate, expected one"),
    (["--lengths", "--validate", "--json"], r"found --validate and --lengths, expected one"),
    (["--show=0"], r"show"),
    (["--show=1", "--output=a.json"], r"--output belongs to --validate and --lengths"),
    (["--lengths", "--output=a.json"], r"--output a\.json: --lengths draws a PNG"),
    (["--validate", "--output=nowhere/a.json"], r"--output nowhere/a\.json: cannot be written \(No such file"),
    (["--lengths", "--output=images/"], r"--output images/: --lengths draws"),
    (["--lengths", "--headers_only"], r"--headers_only belongs to --validate, found --lengths"),
])  # fmt: skip
def test_wrong_arguments(ask, arguments, message):
    code, out, err = ask([SOUND], *arguments)
    assert (code, out) == (2, "") and re.search(message, err) and err.count("\n") == 1 and err.startswith("error: ")


UNREADABLE = {"{}": r"data\.json: starts with '\{'", "[]": r"holds no records", json.dumps([SOUND])[:-3]: r"never closed"}


@pytest.mark.parametrize("act", ["--show=1", "--validate", "--lengths"])
@pytest.mark.parametrize(("records", "message"), UNREADABLE.items(), ids=["an object", "empty", "cut"])
def test_a_file_that_cannot_be_scanned(ask, act, records, message):
    code, out, err = ask(records, act, "--json")
    assert (code, out) == (2, "") and re.search(message, err) and err.count("\n") == 1


def test_from_a_shell(tmp_path):
    """With worker processes; standard output has the object and nothing else."""
    (tmp_path / "data.json").write_text(json.dumps([SOUND] * 300 + [BAD]))
    command = [sys.executable, "-m", "neva_jax.inspect_data", "--config=configs/quickstart.py", "--validate", "--json", f"--output={tmp_path / 'report.json'}"]
    data = {"data_path": tmp_path / "data.json", "image_folder": "examples/digits/images.tar", "cache_dir": tmp_path / "cache", "num_workers": 2}
    ended = subprocess.run([*command, *(f"--config.model.data.{k}={v}" for k, v in data.items())], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(ended.stdout)
    assert (ended.returncode, found["num_records"], found["num_defects"], ended.stderr) == (1, 301, 302, "")
    assert found == json.loads((tmp_path / "report.json").read_text())


def test_no_more_processes_than_cores(monkeypatch):
    config = cli.load(f"{ROOT}/configs/quickstart.py")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert [inspect_data.num_workers(config) for config.model.data.num_workers in (0, 2, 64)] == [0, 2, 3]


# ---- --show


def test_show_for_a_program(ask):
    code, out, err = ask([SOUND, BAD, SOUND], "--show=2", "--json")
    good, bad = json.loads(out)["records"]
    assert (code, err) == (0, "")
    assert (good["index"], good["error"], good["num_media"], bad["index"], bad["tokens"]) == (0, None, 1, 1, []) and "an empty answer" in bad["error"]
    learnt = [label for label in good["labels"] if label != -100]
    assert good["loss_mask"] == [int(label >= 0) for label in good["labels"]] and good["labels"][-1] == 2
    assert len(good["tokens"]) == len(good["labels"]) == len(good["media_index"]) and good["text"].endswith("ASSISTANT: three</s>")
    assert learnt[:-1] == good["tokens"][-len(learnt) + 1 :], "a label is the next token"
    assert [i for i in good["media_index"] if i >= 0] == [0, 1, 2, 3]


def test_show_for_a_person(ask):
    code, out, _ = ask([SOUND, BAD], "--show=9")
    assert code == 0 and "\033" not in out
    assert "USER: [4 media vectors]\nWhat does the picture show? ASSISTANT:« three</s>»\n" in out
    assert "--- record 1" in out and re.search(r"error: .*record 1: conversations\[1\]\.value: an empty answer", out)


def columns_of(out):
    """The columns of all rows, as [(above, below)]."""
    rows = [line for line in out.split("\n") if re.match(r"tokens:|labels:| {7}", line)]
    cells = [re.findall(r"\[\d+ media\]|\S+", row.removeprefix("tokens:").removeprefix("labels:")) for row in rows]
    assert all(len(row) == len(below) for row, below in zip(rows[::2], rows[1::2], strict=True)), "aligned"
    return list(zip(sum(cells[::2], []), sum(cells[1::2], []), strict=True)), max(map(len, rows))


def test_tokens_stand_above_their_labels(ask, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    _, out, _ = ask([SOUND], "--show=1", "--json")
    (record,) = json.loads(out)["records"]
    columns, width = columns_of(ask([SOUND], "--show=1")[1])
    assert width <= 90 and columns.count(("[4 media]", ".")) == 1
    shown = [("[4 media]", ".") if media == 0 else (str(token), str(label) if label >= 0 else ".")
             for token, label, media in zip(record["tokens"], record["labels"], record["media_index"], strict=True) if media < 1]  # fmt: skip
    assert columns == shown


def test_media_that_are_learnt_are_shown_one_by_one(capsys):
    """As a compatibility mode may have them."""
    record = {"tokens": [5, 0, 0, 0, 0, 9], "labels": [-100, -100, -100, 0, 9, 2], "media_index": [-1, 0, 1, 2, 3, -1], "loss_mask": [0, 0, 0, 1, 1, 1]}
    shown = record | {"index": 0, "num_media": 1, "error": None, "warning": "odd", "runs": [{"text": "a", "kind": "text"}]}
    report.print_records({"records": [shown]})
    out = capsys.readouterr().out
    assert "warning: odd\na\ntokens: 5 [2 media] 0 0 9\nlabels: .         . 0 9 2\n" in out


def test_colours_in_a_terminal(ask, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    _, out, _ = ask([SOUND], "--show=1")
    assert "\033[36m[4 media vectors]\033[0m" in out and "\033[32;1m three</s>\033[0m" in out and "«" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in ask([SOUND], "--show=1")[1]


def test_a_text_does_not_steer_the_terminal():
    assert report.printable("a\033[2J\tb\r\u202e\nc é 漢") == "a\\x1b[2J\\tb\\r\\u202e\nc é 漢"


# ---- --validate


def test_validate_for_a_program(ask, tmp_path):
    code, out, err = ask([SOUND, BAD, {"conversations": []}], "--validate", "--json", "--output=report.json")
    found = json.loads(out)
    assert (code, err, found["num_records"], found["num_defects"]) == (1, "", 3, 3)
    assert [(d["index"], d["field"], d["kind"]) for d in found["defects"]] == [
        (1, "conversations[1].value", "empty"), (1, "image", "missing"), (2, "conversations", "empty"),
    ]  # fmt: skip
    assert all(d.keys() == {"index", "field", "kind", "message"} for d in found["defects"])
    assert found["seconds"] > 0 and found["records_per_second"] > 0 and json.loads((tmp_path / "report.json").read_text()) == found


def test_validate_without_defects(ask):
    code, out, _ = ask([SOUND] * 3, "--validate")
    assert code == 0 and re.fullmatch(r"no defect in 3 records; \d+\.\d s, \d+ records/s\n", out)
    assert json.loads(ask([SOUND], "--validate", "--json")[1])["defects"] == []


def test_validate_for_a_person(ask):
    code, out, _ = ask([SOUND] + [BAD | {"image": f"{i}\033.png"} for i in range(25)] + [BAD | {"image": "a.png"}], "--validate")
    assert code == 1 and "\033" not in out
    assert re.search(r"^empty: 26\n(  .*record \d+: conversations\[1\].*\n){20}  and 6 more; --json or --output FILE gives all\n\nmissing: 25\n", out, re.M)
    assert re.search(r"^51 defects in 26 of 27 records \(empty 26, missing 25\); \d+\.\d s, \d+ records/s$", out, re.M)


def test_headers_only_misses_what_is_cut(ask, tmp_path):
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    records = [SOUND | {"image": "b.png"}]
    assert (ask(records, "--validate")[0], ask(records, "--validate", "--headers_only")[0]) == (1, 0)


def test_the_template_is_judged_strictly_in_every_mode(ask):
    leading = {"conversations": [{"from": "gpt", "value": "Hello."}, *SOUND["conversations"]], "image": "a.png"}
    code, out, _ = ask([leading], "--validate", "--json", "--config.model.data.compat=nemo_v2.0.0")
    assert code == 1 and [d["kind"] for d in json.loads(out)["defects"]] == ["role_order"]
    assert ask([leading], "--show=1", "--json", "--config.model.data.compat=nemo_v2.0.0")[0] == 0


# ---- --lengths


def test_lengths_for_a_program(ask, tmp_path):
    code, out, err = ask(
        [SOUND, SOUND | {"image": "missing.png"}, BAD, {"conversations": [{**TURNS[0], "value": "What? " * 5}, TURNS[1]]}], "--lengths", "--json"
    )
    found = json.loads(out)
    assert (code, found["num_records"], found["num_defects"]) == (0, 4, 1)
    assert "record 2: conversations[1].value: an empty answer" in err and err.endswith("wrote lengths.png\n")
    assert found["tokens"].keys() == {"min", "median", "mean", "p90", "p99", "max"} and found["media"]["max"] == 1
    assert sum(found["histogram"]["counts"]) == 3 and len(found["histogram"]["edges"]) == len(found["histogram"]["counts"]) + 1
    assert found["histograms"]["tokens"] == found["histogram"] and found["histograms"]["media"] == {"edges": [0, 1, 2], "counts": [1, 2]}
    assert [row["buckets"] for row in found["padding"]] == [1, 2, 4, 8, 1, 1] and [row["in_use"] for row in found["padding"]] == [False] * 4 + [True, False]
    assert all(0 <= row["padding_share"] < 1 and row["shapes"] >= 1 for row in found["padding"])
    assert Image.open(tmp_path / "lengths.png").size == (900, 780)


def test_lengths_for_a_person(ask, tmp_path):
    code, out, err = ask([SOUND, BAD], "--lengths", "--output=other.png", "--config.model.data.buckets=None")
    assert code == 0 and (tmp_path / "other.png").exists() and not (tmp_path / "lengths.png").exists() and "wrote other.png" in err
    assert re.search(r"^media: min 1, median 1, mean 1\.0, p90 1, p99 1, max 1\n1 █{50} 1$", out, re.M)
    assert re.search(r"^8 lengths +1 +\d+\.\d%  \d+   <- in use$", out, re.M) and re.search(r"^8 lengths, not grouped +1 ", out, re.M)
    assert out.endswith("2 records; left out: 1 defective, --validate names them all\n")


def test_lengths_of_files_with_shares(ask, tmp_path):
    (tmp_path / "second.json").write_text(json.dumps([SOUND] * 10))
    shares = ["--config.model.data.data_path=('data.json','second.json')", "--config.model.data.concat_sampling_probabilities=(0.5,0.5)"]
    code, out, _ = ask([SOUND, BAD], "--lengths", "--json", *shares)
    assert code == 0 and json.loads(out)["num_records"] == 12 and json.loads(out)["num_defects"] == 1
