"""Each notebook, top to bottom in a kernel of its own, within two minutes of two cores: no error, its pictures, and what it says is so."""

import base64
import io
import json
import os
import re
import resource

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

FOLDER = ROOT / "notebooks"
CPU_SECONDS = 2 * 120  # two minutes of two cores: a busy machine makes a notebook late, not this sum larger
NOTEBOOKS = {  # name: pictures
    "01_quickstart": 5,
    "02_bring_your_weights": 3,
    "03_evaluate": 6,
    "04_plan": 6,
}
VALUES = {  # name: {what: an expression over the notebook's names when it has run}
    "01_quickstart": {
        "losses": "[row['reduced_train_loss'] for row in steps]",
        "val_loss": "validation[-1][1]",
        "accuracy": "accuracy",
        "num_questions": "report['num_questions']",
        "right": "sum(a == t for a, t in zip(answers, truths))",
        "upright": "spoken[0].text",
    },
    "02_bring_your_weights": {
        "difference": "difference",
        "equal": "equal",
        "changed": "changed",
        "answers": "[answer.text for answer in spoken['hf']]",
        "digits": "[record['digits'] for record in held_out]",
        "ranks": "[sorted(set(held)) for held in columns.values()]",
        "exported": "exported",
    },
    "03_evaluate": {
        "accuracy": "accuracy",
        "marks": "right.tolist()",
        "confusion": "confusion.tolist()",
        "looked": "found.tolist()",
        "counted": "counted",
        "kinds": "sorted(shares)",
    },
    "04_plan": {
        "fits": "{name: found['fits'] for name, found in plans.items()}",
        "memory": "{name: found['memory_gib']['total'] for name, found in plans.items()}",
        "speeds": "{name: found['samples_per_second_per_gpu'] for name, found in plans.items()}",
        "compiled": "any(found['compiled'] for found in plans.values())",
        "errors": "errors.tolist()",
        "cells": "len(speeds)",
        "swept": "len(sweep)",
    },
}


def read(name: str):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def outputs(notebook) -> list:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def pictures(notebook) -> list[Image.Image]:
    found = ["".join(output["data"]["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def check_outputs(notebook, name: str) -> None:
    assert not [output for output in outputs(notebook) if output["output_type"] == "error" or output.get("name") == "stderr"]
    shown = pictures(notebook)
    assert len(shown) == NOTEBOOKS[name]
    for picture in shown:
        assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 10, "a plot, and not an empty one"


def run(name: str, folder, timeout: int = 600) -> tuple[dict, dict]:
    """A copy of the notebook, executed with `folder` as its working directory -> the copy, {what: value}."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    values = ", ".join(f"{what!r}: {expression}" for what, expression in VALUES[name].items())
    asked = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{values}}}, default=float))")
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    notebook.cells.append(asked)
    client.execute(env={key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")})
    (said,) = notebook.cells.pop().outputs
    return json.loads(nbformat.writes(notebook)), json.loads(said.text)


def listing() -> set[str]:
    """What a notebook could leave in the repository."""
    top = {str(path) for path in ROOT.iterdir()}
    return top | {str(path) for folder in ("notebooks", "examples", "benchmarks") for path in (ROOT / folder).rglob("*") if "__pycache__" not in str(path)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed(name):
    """Small, in order, with its pictures and no trace of the machine that it ran on; it opens with what the reader will learn."""
    path, notebook = FOLDER / f"{name}.ipynb", read(name)
    assert path.stat().st_size < 300_000
    check_outputs(notebook, name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    first = "".join(notebook["cells"][0]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown" and first.startswith("# ") and "You will learn" in first
    texts = [*("".join(output.get("text", "")) for output in outputs(notebook)), *("".join(cell["source"]) for cell in notebook["cells"])]
    assert not [text for text in texts if re.search(r"/tmp\b|/home/|/root/|\\Users\\", text)]


def test_all_notebooks_are_here():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name):
    before, start = listing(), resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook, values = run(name, FOLDER if name < "04" else ROOT)  # from either place
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    assert seconds < CPU_SECONDS
    assert listing() == before, "nothing is left behind"
    check_outputs(notebook, name)
    CHECKS[name](values)


def quickstart(values) -> None:
    losses = values["losses"]
    assert len(losses) == 360 and np.mean(losses[:5]) > 2 and np.median(losses[-40:]) < 0.25
    assert values["val_loss"] < 0.3 and values["accuracy"] > 84 and values["num_questions"] == 1061
    assert values["right"] >= 9 and values["upright"] == "seven"


def bring_your_weights(values) -> None:
    assert values["difference"] < 1e-4 and values["equal"] == {"run": True, "hf": True, "tp2_pp2.nemo": True}
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    truths = [[words[digit] for digit in digits] for digits in values["digits"]]
    right = sum([word for word in answer.replace(",", " ").split() if word in words] == truth for answer, truth in zip(values["answers"], truths, strict=True))
    assert values["changed"] == [] and right >= 5
    heads = [[[kind, head] for kind in "kqv" for head in part] for part in ((0, 1, 2, 3), (0, 1), (2, 3))]
    assert values["ranks"] == heads, "each rank has two heads, of query, key and value"
    assert values["exported"]["tokens_equal"] and values["exported"]["max_logit_difference"] < 1e-4


def evaluate(values) -> None:
    marks, confusion = np.array(values["marks"]), np.array(values["confusion"])
    assert values["accuracy"] == pytest.approx(100 * marks.mean()) and values["accuracy"] > 80 and len(marks) == 1016
    assert values["kinds"] == ["above_four", "count", "largest", "parity", "smallest", "which"]
    assert confusion.trace() > 0.7 * confusion.sum() > 0
    looked = np.array(values["looked"])
    np.testing.assert_allclose(looked.sum(1), 1, atol=1e-5)
    assert values["counted"] > 50
    assert looked[0, 0] > looked[0, 1] and looked[1, 1] > looked[1, 0], "the first number from the first digit, the second from the second"


def plan(values) -> None:
    fits, memory, speeds = values["fits"], values["memory"], values["speeds"]
    assert not values["compiled"] and values["swept"] > 10 and values["cells"] > 40
    assert {name for name, fit in fits.items() if not fit} == {name for name in fits if "stage 2" in name and "fsdp" not in name}
    for size in ("7B", "13B"):
        assert memory[f"{size} stage 1, 1 GPU, FP8"] < memory[f"{size} stage 1, 1 GPU"] < memory[f"{size} stage 2, 8 GPUs, each with all weights"]
        assert speeds[f"{size} stage 1, 1 GPU, FP8"] > 1.3 * speeds[f"{size} stage 1, 1 GPU"]
    assert np.abs(values["errors"]).max() < 0.15 and len(values["errors"]) == 28


CHECKS = {"01_quickstart": quickstart, "02_bring_your_weights": bring_your_weights, "03_evaluate": evaluate, "04_plan": plan}
