"""The house has floors: every import of the package, nested ones too, points downward. Read from the source, so that a lazy import hides nothing."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

# A unit is a subpackage or a file at the root of neva_jax. Units of one floor are siblings: none knows another.
FLOORS = [
    {"errors"},
    {"parallel"},
    {"layers"},
    {"models", "transforms", "data"},
    {"checkpoint"},
    {"training", "inference", "evaluation", "convert"},
    {"fields", "hub", "mesh_sizes"},
    {"config"},
    {"build"},
    {"cli", "vlm"},
]
FLOOR = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
TOP = len(FLOORS)  # what a person runs: every other file at the root, train.py, convert_torch.py
FLOOR["__init__"] = TOP + 1  # the package's own door: what it offers is imported when it is asked for
SEE_CONFIG = {"fields", "config", "build", "cli"}
FILES = {path: path.relative_to(ROOT / "neva_jax").parts[0].removesuffix(".py") for path in sorted((ROOT / "neva_jax").rglob("*.py"))}
FILES |= {path: path.stem for path in sorted(ROOT.glob("*.py"))}


def imports(source):
    """Every module that is imported anywhere in `source`, names included: `from neva_jax import build` is neva_jax.build."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read here; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(source, unit):
    """What a file of `unit` must not import."""
    floor = FLOOR.get(unit, TOP)
    for name in imports(source):
        library, *rest = name.split(".")
        if library == "neva_jax" and rest and rest[0] != unit and FLOOR.get(rest[0], TOP) >= floor:
            yield f"{unit} imports {name}"
        if library in ("train", "convert_torch", "configs", "tests") and floor < TOP and (unit, library) != ("config", "configs"):
            yield f"{unit} imports {name}"
        if library == "torch" and unit != "convert":
            yield f"{unit} imports {name}"
        if (library in ("jax", "jaxlib", "flax", "optax") and unit == "data") or (library == "ml_collections" and unit not in SEE_CONFIG):
            yield f"{unit} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    assert list(violations(path.read_text(), FILES[path])) == []


@pytest.mark.parametrize(("unit", "line"), [
    ("layers", "from neva_jax.models.llama import Llama"), ("models", "from neva_jax.data import plan"), ("models", "from neva_jax.transforms import lora"),
    ("evaluation", "def f():\n    from neva_jax.inference.generate import greedy"), ("data", "import jax.numpy as jnp"), ("data", "from flax import nnx"),
    ("training", "from ml_collections import ConfigDict"), ("hub", "from neva_jax import build"), ("errors", "from neva_jax import cli"),
    ("generate", "import torch"), ("generate", "from neva_jax import evaluate"), ("build", "import train"), ("checkpoint", "import neva_jax.training.step"),
])  # fmt: skip
def test_the_test_sees(unit, line):
    assert list(violations(line, unit))


@pytest.mark.parametrize("module", ["neva_jax", "neva_jax.data", "neva_jax.data.example", "neva_jax.errors"])
def test_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*{{'jax', 'flax', 'optax', 'orbax', 'torch', 'ml_collections'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("\n", "")
