"""`neva_jax.from_pretrained`: every format gives the same model, sharded or not, and the answers that transformers gives from an export."""

import jax
import numpy as np
import pytest
from helpers import golden
from models_of_ours import FAMILIES, ours, weights_of
from test_convert_torch import convert

import neva_jax
from neva_jax.convert.weights import Tensor
from neva_jax.errors import UserError

pytest.importorskip("torch")
PROMPTS = ["What digit is it?", "<image>\nAnd these two, <image>?", "No picture."]


def pictures():
    first, second, *_ = sorted(golden("images").iterdir())
    return [[first], [second, first], []]


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    directory = tmp_path_factory.mktemp("formats")
    made = ours(directory / "ours", **FAMILIES["grouped"])
    convert(made, directory / "hf", "hf")
    convert(made, directory / "m.nemo", "nemo", "--tensor_parallel=2", "--pipeline_parallel=2", "--parts=llm,vision_encoder,projector")
    return directory


def test_every_format_answers_alike(formats):
    answers = [
        neva_jax.from_pretrained(formats / name, dtype="float32").generate(PROMPTS, pictures(), max_new_tokens=12) for name in ("ours", "hf", "m.nemo")
    ]
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) == 3


def test_weights_shared_by_devices_answer_alike(formats):
    alone = neva_jax.from_pretrained(formats / "hf", dtype="float32")
    shared = neva_jax.from_pretrained(formats / "hf", dtype="float32", tensor_parallel=2)
    kernel = shared.params["llm/layers/mlp/up_proj/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(*kernel.shape[:2], kernel.shape[2] // 2)}
    assert shared.generate(PROMPTS, pictures(), max_new_tokens=12) == alone.generate(PROMPTS, pictures(), max_new_tokens=12)
    np.testing.assert_array_equal(kernel, weights_of(formats / "ours")["llm/layers/mlp/up_proj/kernel"])


def test_a_device_reads_its_slices(formats, monkeypatch):
    """Of a file nothing but the blocks that devices ask for becomes an array; the rest is a view of the mapped file."""
    seen = []

    class View(np.ndarray):
        def __getitem__(self, index):
            part = np.ndarray.__getitem__(self, index)
            seen.append((self.shape, part.shape))
            return part

    read = Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda self: read(self).view(View) if self.name.endswith("gate_proj.weight") else read(self))
    neva_jax.from_pretrained(formats / "hf", tensor_parallel=2)
    assert [part for whole, part in seen if whole == (32, 32)] == [(32, 16)] * 4  # two layers, two devices: half of the columns of the transposed matrix each


def test_transformers_answers_alike(formats):
    """A batch of one prompt a time through their processor and their model, in float32: the very tokens."""
    transformers = pytest.importorskip("transformers")
    import torch
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(formats / "hf")
    model = transformers.AutoModelForImageTextToText.from_pretrained(formats / "hf", attn_implementation="eager").eval()
    vlm = neva_jax.from_pretrained(formats / "hf", dtype="float32")
    for prompt, images in zip(PROMPTS, pictures(), strict=True):
        tags = prompt if "<image>" in prompt else "<image>\n" * len(images) + prompt
        text = processor.apply_chat_template([{"role": "user", "content": tags}], add_generation_prompt=True)
        inputs = processor(text=text, images=[Image.open(path).convert("RGB") for path in images] or None, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ids = [i for i in ids.tolist() if i > 2]  # <unk>, <s>, </s>
        assert vlm.processor.encoder.tokenizer.decode(ids).strip() == vlm.generate([prompt], [images], max_new_tokens=12)[0]


def test_precision(formats):
    assert {array.dtype.name for array in neva_jax.from_pretrained(formats / "m.nemo").params.values()} == {"float32"}, "on a CPU, which is slow in bfloat16"
    vlm = neva_jax.from_pretrained(formats / "m.nemo", dtype="bfloat16")
    assert {array.dtype.name for array in vlm.params.values()} == {"bfloat16"}
    assert vlm.model.llm.norm.scale[...].dtype.name == "bfloat16" and jax.tree.leaves(vlm.params)


WRONG = {
    "pictures for other prompts": (lambda vlm: vlm.generate(["a", "b"], [[]]), "2 prompts and pictures for 1"),
    "pictures without a place": (lambda vlm: vlm.generate(["<image> and"], [pictures()[1]]), "prompt 0 has 1 <image> and 2 pictures"),
    "no picture": (lambda vlm: vlm.generate(["a"], [[b"no picture"]]), "prompt 0: picture 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_questions(case, formats):
    ask, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        ask(neva_jax.from_pretrained(formats / "ours"))


@pytest.mark.parametrize(("path", "message"), [
    ("checkpoints/llama_mha", "no weights of vision_encoder in it; give --base PATH"),
    ("nemo_ckpt/neva_llava_mcore_tp1.nemo", "its files say that it lies in"), ("tokenizer", "is none of these"), ("nowhere", "there is no"),
])  # fmt: skip
def test_what_is_no_whole_model(path, message):
    root = golden("checkpoints").parent
    with pytest.raises(UserError, match=message):
        neva_jax.from_pretrained(root / path)
