"""Pictures that cannot be read: an error that names the record, or a black row that keeps its slot; other defects are never skipped."""

import io
import tarfile

import pytest
from digit_data import DIGITS, SIZE, digits, planned, read, record

from neva_jax.data.tokenize import IGNORE
from neva_jax.errors import DataError, UserError


def bad_images(tmp_path):
    """Eight records; the pictures of records 2 and 5 are missing or not pictures."""
    with tarfile.open(DIGITS / "images.tar") as tar:
        good = tar.extractfile("test/00000.png").read()
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, content in {"good.png": good, "bad.png": b"<html>404</html>"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = ["good.png"] * SIZE
    images[2], images[5] = "missing.png", ["good.png", "bad.png"]
    return [record(image, answer=f"number {i}") for i, image in enumerate(images)], tmp_path / "images.tar"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_image_raises(tmp_path, num_workers):
    records, images = bad_images(tmp_path)
    examples = digits(tmp_path, records, images)
    with pytest.raises(UserError) as error:
        read(examples, planned(examples, seed=None), 0, 1, num_workers=num_workers)
    message = str(error.value)
    assert error.type is DataError and "\n" not in message and not hasattr(error.value, "__notes__")
    assert message.startswith(f"{tmp_path / 'data.json'}: record 2: image 'missing.png'")


def test_bad_image_is_named_whole(tmp_path):
    records, images = bad_images(tmp_path)
    examples = digits(tmp_path, records, images)
    for index, name in ((2, "missing.png"), (5, "bad.png")):
        with pytest.raises(DataError) as error:
            examples[index]
        assert str(error.value).startswith(f"{examples.where(index)}: image {name!r}") and str(error.value).count(name) == 1
        assert str(error.value).count("record ") == 1


def test_bad_image_keeps_its_slot(tmp_path):
    records, images = bad_images(tmp_path)
    examples = digits(tmp_path, records, images, on_bad_image="skip")
    (batch,) = read(examples, planned(examples, seed=None), 0, 1)
    rows = {name: value.reshape(SIZE, *value.shape[2:]) for name, value in batch.items()}
    assert rows["bad_image"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    for r, bad in enumerate(rows["bad_image"]):
        stream = examples.stream(r)
        length = len(stream.ids) - 1
        assert rows["tokens"][r, :length].tolist() == stream.ids[:-1].tolist() and rows["segment_ids"][r].sum() == length
        assert rows["media_index"][r, :length].tolist() == stream.media_index[:-1].tolist()
        assert rows["media"][r].any() == (not bad) and (rows["labels"][r] == IGNORE).all() == bad
        assert rows["loss_mask"][r].any() == (not bad) and (rows["supervised_positions"][r] == -1).all() == bad


def test_other_defects_are_never_skipped(tmp_path):
    examples = digits(tmp_path, [record("test/00000.png"), record("test/00000.png", question="why " * 200)], on_bad_image="skip")
    with pytest.raises(DataError, match="record 1: conversations: no supervised token"):
        examples[1]
