"""Torch's own files as they are found, old and new, of Lightning and of others; and pickles that would run code."""

import os
import pickle
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from test_nemo_file import CONFIG, pack, refused, saved, state

from neva_jax.convert.torch_file import load_torch
from neva_jax.errors import UserError

torch = pytest.importorskip("torch")


def test_lightnings_checkpoints(tmp_path, monkeypatch):
    """Weights lie under state_dict, beside objects of OmegaConf, which are looked past: their classes are neither needed nor asked."""

    class DictConfig:
        def __init__(self):
            self.content = {"a": 1}

        def __setstate__(self, state):
            raise RuntimeError("it ran")

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(DictConfig=DictConfig))
    torch.save({"state_dict": state("model.a"), "hyper_parameters": {"cfg": DictConfig()}, "hparams_type": DictConfig}, tmp_path / "a.ckpt")
    assert list(load_torch(tmp_path / "a.ckpt")) == ["model.a"]


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before 1.6"])
def test_torch_files(options, tmp_path):
    content = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1.5, 2.0]).bfloat16(), "n": 3}
    (tmp_path / "a.bin").write_bytes(saved(content, **options))
    found = load_torch(tmp_path / "a.bin")
    assert list(found) == ["a", "b"] and found["a"].shape == (3, 2)
    np.testing.assert_array_equal(found["a"].read(), np.arange(6.0, dtype=np.float32).reshape(2, 3).T, strict=True)
    assert found["b"].read().dtype.name == "bfloat16" and found["b"].read().astype(float).tolist() == [1.5, 2.0]


def test_files_written_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state("a"), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(load_torch(tmp_path / "a.pt")) == ["a"]


@pytest.mark.parametrize(
    "content, says",
    [
        ([torch.ones(2)], "holds list, expected a dictionary of tensors"),
        ({"model": state("a"), "step": 3}, "no tensors in it, found model, step; expected a state dict, or one under state_dict"),
        ({"a": torch.ones(3).to_sparse()}, "a cannot be read .* expected a plain tensor of float32, float16 or bfloat16"),
        ({"a": torch.ones(3).to(torch.float8_e4m3fn)}, "a cannot be read .* expected a plain tensor of float32, float16 or bfloat16"),
    ],
)
def test_torch_files_of_another_kind(content, says, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt: {says}"):
        load_torch(tmp_path / "a.pt")["a"].read()


class Evil:
    def __init__(self, canary, how):
        self.canary, self.how = str(canary), how

    def __reduce__(self):
        if self.how == "pickle.loads":
            return pickle.loads, (pickle.dumps(Evil(self.canary, "open")),)
        if self.how == "exec":
            return exec, (f"open({self.canary!r}, 'w')",)
        return (os.system, (f"touch {self.canary}",)) if self.how == "os.system" else (open, (self.canary, "w"))


FORMS = {  # what holds the pickle -> its bytes
    "a.pt": saved,
    "b.bin": lambda evil: saved(evil, _use_new_zipfile_serialization=False),
    "plain.pickle": pickle.dumps,
    "lightning.ckpt": lambda evil: saved({"state_dict": state("a"), "hyper_parameters": evil}),
}
NAMES = {"os.system": "posix.system", "open": "io.open", "exec": "exec", "pickle.loads": "pickle.loads"}


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_would_run_code(how, form, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / form).write_bytes(FORMS[form](state("a") | {"b": Evil(canary, how)}))
    with pytest.raises(UserError, match=f"{form}: not a torch file of plain tensors") as error:
        load_torch(tmp_path / form)
    assert not canary.exists() and "\n" not in str(error.value)
    assert f"it names {NAMES[how]})" in str(error.value) or form == "plain.pickle"
    if form == "plain.pickle":
        pickle.loads((tmp_path / form).read_bytes())
        assert canary.exists(), "the pickle is a dangerous one"


@pytest.mark.parametrize("members", [("",), ("mp_rank_00/", "mp_rank_01/"), ("tp_rank_00_pp_rank_000/", "tp_rank_00_pp_rank_001/")], ids=str)
def test_a_nemo_file_that_would_run_code(members, tmp_path):
    canary = tmp_path / "canary"
    content = saved(state("a") | {"b": Evil(canary, "open")})
    refused(pack(tmp_path / "a.nemo", {"model_config.yaml": CONFIG} | {f"{name}model_weights.ckpt": content for name in members}), tmp_path, "it names io.open")
    assert not canary.exists()


def test_records_that_are_packed(tmp_path):
    """A zip bomb is a few bytes that claim to be many; torch.save never packs."""
    (tmp_path / "a.pt").write_bytes(saved(state("a")))
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UserError, match="b.pt: its record a*.*/data.pkl is compressed"):
        load_torch(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "content, says",
    [
        (None, r"cannot be opened \(No such file or directory\)"),
        (b"", "not a torch file of plain tensors"),
        (b"words", "not a torch file of plain tensors"),
        (b"PK\3\4words", "is cut off or damaged"),
    ],
)
def test_what_is_no_torch_file(content, says, tmp_path):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=f"a.pt: {says}"):
        load_torch(tmp_path / "a.pt")


def test_an_old_torch(tmp_path, monkeypatch):
    torch.save(state("a"), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"a.pt: torch's files need torch 2.10 or later, found 2.9.1\+cpu; older ones unpickle unsafely"):
        load_torch(tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"a.pt: torch's files need torch; pip install torch==2.13.0"):
        load_torch(tmp_path / "a.pt")
