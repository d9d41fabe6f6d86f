"""`.nemo` files and torch's own files as they are found: old spellings, what else lies in them, damage of every kind, and hostile ones."""

import gzip
import io
import shutil
import tarfile

import numpy as np
import pytest

from neva_jax.convert.nemo_file import NemoFile
from neva_jax.errors import UserError

torch = pytest.importorskip("torch")

CONFIG = b"num_layers: 2\nactivation: fast-swiglu\n"
LAYER = "model.decoder.layers.{}.mlp.linear_fc2.weight"


def saved(tensors, **options):
    file = io.BytesIO()
    torch.save(tensors, file, **options)
    return file.getvalue()


def state(*names, shape=(4, 6)):
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}


MEMBERS = {"model_config.yaml": CONFIG, "0a_tokenizer.model": b"pieces", "model_weights.ckpt": saved(state(LAYER.format(0), LAYER.format(1)))}


def pack(path, members, *infos, mode="w"):
    """A tar of {name: bytes}, then of bare headers."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in infos:
            tar.addfile(info)
    return path


def unpack(path, members):
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tensors(path, tmp_path, name="scratch"):
    (tmp_path / name).mkdir()
    return NemoFile(path).tensors(tmp_path / name)


def refused(path, tmp_path, says):
    """One line, of one kind, whatever is wrong."""
    with pytest.raises(UserError, match=says) as error:
        tensors(path, tmp_path, "refused")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# ---- what is read ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tar", "tar with ./", "gzipped tar", "directory"])
def test_a_tar_or_a_directory(how, tmp_path):
    if how == "directory":
        path = unpack(tmp_path / "model", MEMBERS)
    else:
        members = {f"./{name}": content for name, content in MEMBERS.items()} if "./" in how else MEMBERS
        path = pack(tmp_path / "model.nemo", members, mode="w:gz" if how == "gzipped tar" else "w")
    file = NemoFile(path)
    assert file.config == {"num_layers": 2, "activation": "fast-swiglu"} and file.members == {name: len(content) for name, content in MEMBERS.items()}
    assert file.artifact("nemo:0a_tokenizer.model") == b"pieces" and file.artifact("tokenizer.model") is None and file.artifact(None) is None
    with pytest.raises(UserError, match=r"no 0b_tokenizer.model in it; found 0a_tokenizer.model, "):
        file.artifact("nemo:0b_tokenizer.model")
    found = tensors(path, tmp_path)
    assert list(found) == [f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in (0, 1)]
    np.testing.assert_array_equal(found["decoder.layers.1.mlp.linear_fc2.weight"].read(), state("", LAYER)[LAYER].numpy())


def test_transformer_engines_extra_state_is_dropped(tmp_path):
    """Its entries are io.BytesIO objects, which torch's safe unpickler refuses by default."""
    extra = state(LAYER.format(0)) | {
        "model.decoder.layers.0.mlp.linear_fc2._extra_state": io.BytesIO(b"\x80\x04N."),
        "model.rotary_pos_emb.inv_freq": torch.ones(2),
    }
    found = tensors(pack(tmp_path / "a.nemo", MEMBERS | {"model_weights.ckpt": saved(extra)}), tmp_path)
    assert list(found) == ["decoder.layers.0.mlp.linear_fc2.weight"]


def test_stages_that_count_all_layers_or_their_own(tmp_path):
    for first in (0, 1):
        ranks = {f"tp_rank_00_pp_rank_{p:03d}/model_weights.ckpt": saved(state(LAYER.format(p * first))) for p in (0, 1)}
        found = tensors(pack(tmp_path / f"{first}.nemo", {"model_config.yaml": CONFIG} | ranks), tmp_path, str(first))
        assert list(found) == [f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in (0, 1)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_of_a_tied_table_is_dropped(tied, tmp_path):
    """Megatron-core's last stage has an output layer in either case; it is the table's copy where the config ties them."""
    ranks = {"tp_rank_00_pp_rank_000": "model.embedding.word_embeddings.weight", "tp_rank_00_pp_rank_001": "model.output_layer.weight"}
    members = {f"{rank}/model_weights.ckpt": saved(state(name)) for rank, name in ranks.items()}
    config = f"share_embeddings_and_output_weights: {tied}".encode()
    found = tensors(pack(tmp_path / "a.nemo", {"model_config.yaml": config} | members), tmp_path)
    assert list(found) == ["embedding.word_embeddings.weight"] + ([] if tied else ["output_layer.weight"])


# ---- hostile -----------------------------------------------------------------------------------------------------------------------------------------


def info(name, kind=tarfile.REGTYPE, link="", size=0):
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, link, size
    return found


OUTSIDE, LINK = "points outside of the file", "is a link or a device"


@pytest.mark.parametrize(
    "member, says",
    [
        (info("../model.yaml"), OUTSIDE),
        (info("a/../../b"), OUTSIDE),
        (info("/etc/passwd"), OUTSIDE),
        (info("..\\b"), OUTSIDE),
        (info("a", tarfile.SYMTYPE, "/etc/passwd"), LINK),
        (info("a", tarfile.LNKTYPE, "model_config.yaml"), LINK),
        (info("a", tarfile.CHRTYPE), LINK),
        (info("a", tarfile.BLKTYPE), LINK),
        (info("a", tarfile.FIFOTYPE), LINK),
        (info("./model_config.yaml"), "is there twice"),
        (info("model_config.yaml"), "is there twice"),
        (info("huge", size=2**50), "is cut off or damaged"),
        (info("bit", size=2**13), "is cut off or damaged"),
        (info("less", size=-1024), "has a negative size"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_members(member, says, tmp_path):
    refused(pack(tmp_path / "a.nemo", MEMBERS, member), tmp_path, says)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nemo", "refused"] and not any((tmp_path / "refused").iterdir())


def test_a_sparse_member(tmp_path):
    """A few bytes that claim to be a terabyte of zeros."""
    with tarfile.open(tmp_path / "a.nemo", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in MEMBERS.items():
            tar.addfile(info(name, size=len(content)), io.BytesIO(content))
        sparse = info("holes")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes", "GNU.sparse.realsize": str(2**40)}
        blocks = b"1\n0\n0\n".ljust(512, b"\0")
        sparse.size = len(blocks)
        tar.addfile(sparse, io.BytesIO(blocks))
    refused(tmp_path / "a.nemo", tmp_path, "the archive is cut off or damaged")


@pytest.mark.parametrize("where", ["mp_rank_00", "model_weights.ckpt"])
def test_a_link_in_a_directory(where, tmp_path):
    path = unpack(tmp_path / "model", MEMBERS)
    (path / where).unlink(missing_ok=True)
    (path / where).symlink_to(tmp_path)
    refused(path, tmp_path, "a link, expected plain files")


@pytest.mark.parametrize(
    "config, says",
    [
        (b"a: !!python/object/apply:os.system ['touch canary']", "only plain YAML is, no tags"),
        (b"a: !!python/name:os.system", "only plain YAML is, no tags"),
        (b"a: !!python/object/new:type\n  args: ['z', !!python/tuple [], {}]", "only plain YAML is, no tags"),
        (b"- a\n- b", "holds list, expected the fields of a model"),
        (b"", "holds NoneType, expected the fields"),
        (b"a: [", "cannot be read"),
        (b"a: \xff", "cannot be read"),
        (b"[" * 5000, "cannot be read"),
        (b"a" * 2**21, "has 2097152 bytes, expected at most 1048576"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_hostile_yaml(config, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(pack(tmp_path / "a.nemo", MEMBERS | {"model_config.yaml": config}), tmp_path, says)
    assert not (tmp_path / "canary").exists()


def test_targets_are_words(tmp_path):
    config = b"target: os.system\n_target_: subprocess.run\nargs: [touch canary]\n"
    assert NemoFile(pack(tmp_path / "a.nemo", MEMBERS | {"model_config.yaml": config})).config["_target_"] == "subprocess.run"


# ---- damaged -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "gzipped"])
def test_a_file_cut_off_anywhere(packed, tmp_path):
    """Down to the last block but one of its end: the very end is padding."""
    content = pack(tmp_path / "whole.nemo", MEMBERS).read_bytes()
    with tarfile.open(tmp_path / "whole.nemo") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512 + 512
    content = gzip.compress(content[:end], 1) if packed else content[:end]
    for cut in [0, 1, 300, 511, 512, 513, *range(600, len(content), 97), len(content) - 1]:
        (tmp_path / "a.nemo").write_bytes(content[:cut])
        with pytest.raises(UserError, match="a.nemo: "):
            NemoFile(tmp_path / "a.nemo").tensors(tmp_path)


def test_bits_that_flip(tmp_path):
    """Everywhere in the file: one error, or the same weights and config (names of owners, padding)."""
    members = {name: content for name, content in MEMBERS.items() if name != "0a_tokenizer.model"}  # artifacts have no checksum
    whole = pack(tmp_path / "a.nemo", members).read_bytes()
    (tmp_path / "scratch").mkdir()
    expected = {name: tensor.read().copy() for name, tensor in NemoFile(tmp_path / "a.nemo").tensors(tmp_path / "scratch").items()}
    start = whole.index(CONFIG) + len(CONFIG)  # neither has the YAML one
    refusals = 0
    end = whole.rindex(b"PK\5\6") + 600  # of the weights, and a little of the tar's own end
    for at in [*range(0, 512, 9), *range(start, end, 7)]:
        (tmp_path / "a.nemo").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").mkdir()
        try:
            found = NemoFile(tmp_path / "a.nemo").tensors(tmp_path / "scratch")
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=f"byte {at}", strict=True)
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 300


@pytest.mark.parametrize(
    "members, says",
    [
        ({}, "no model_config.yaml in it; expected a .nemo file or its unpacked directory"),
        ({"context/model.yaml": b"", "weights/metadata.json": b""}, r"a checkpoint of NeMo 2 \(context/, weights/\)"),
        ({"model_config.yaml": CONFIG}, "no model_weights.ckpt in it, alone or under mp_rank_00"),
        ({"model_config.yaml": CONFIG, "model_weights.ckpt": b"words"}, "not a torch file of plain tensors"),
        ({"model_config.yaml": CONFIG, "model_weights.ckpt": b""}, "not a torch file of plain tensors"),
        (
            {"model_config.yaml": CONFIG} | {f"mp_rank_{t:02d}/model_weights.ckpt": saved(state("a")) for t in (0, 2)},
            "the weights of tensor rank 1, pipeline rank 0 are missing of 3 x 1",
        ),
        (
            {"model_config.yaml": b"tensor_model_parallel_size: 2", "mp_rank_00/model_weights.ckpt": saved(state("a"))},
            "the weights of tensor rank 1, pipeline rank 0 are missing of 2 x 1",
        ),
        (
            {"model_config.yaml": CONFIG} | {f"tp_rank_0{t}_pp_rank_00{p}/model_weights.ckpt": saved(state("a")) for t, p in ((0, 0), (1, 0), (0, 1))},
            "the weights of tensor rank 1, pipeline rank 1 are missing of 2 x 2",
        ),
        (
            {"model_config.yaml": CONFIG} | {f"mp_rank_{t:02d}/model_weights.ckpt": saved(state("a", f"b{t}")) for t in (0, 1)},
            r"its tensor ranks hold different tensors \(b0, b1\)",
        ),
        (
            {"model_config.yaml": CONFIG} | {f"mp_rank_{t:02d}/model_weights.ckpt": saved(state("a", shape=(4, 6 + t))) for t in (0, 1)},
            r"a is \[4, 6\] on one tensor rank and \[4, 7\] on another",
        ),
        (MEMBERS | {"model_config.yaml": b"megatron_legacy: true"}, "megatron_legacy True orders its queries, keys and values in another way"),
    ],
)
def test_what_is_not_whole(members, says, tmp_path):
    refused(pack(tmp_path / "a.nemo", members), tmp_path, says)
    refused_directory = unpack(tmp_path / "unpacked", members or {"readme": b""})
    shutil.rmtree(tmp_path / "refused")
    refused(refused_directory, tmp_path, says)


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "none.nemo", tmp_path, "not a .nemo file .*No such file")
    (tmp_path / "words.nemo").write_text("words " * 1000)
    shutil.rmtree(tmp_path / "refused")
    refused(tmp_path / "words.nemo", tmp_path, "not a .nemo file")


def test_too_little_scratch_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(pack(tmp_path / "a.nemo", MEMBERS, mode="w:gz"), tmp_path, "its weights need 0.0 GiB of scratch space in .*, which has 0.0; set TMPDIR")
    assert not any((tmp_path / "refused").iterdir())
    assert tensors(pack(tmp_path / "b.nemo", MEMBERS), tmp_path), "what is not packed is read where it lies"
    assert not any((tmp_path / "scratch").iterdir())
