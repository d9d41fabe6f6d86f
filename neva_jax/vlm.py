"""A model to ask, from Python: `vlm = neva_jax.from_pretrained(PATH)`, then `vlm.generate(["What is this? <image>"], [["cat.jpg"]])`.

PATH: a run of ours, a Hugging Face directory, a .nemo file or directory. Given up for now: sampling, a key/value cache (see inference/generate.py).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from neva_jax.build.data import build_encoder
from neva_jax.build.model import build_model, image_processor
from neva_jax.build.opened import open_model
from neva_jax.convert.source import PARTS
from neva_jax.data.conversation import PLACEHOLDER, TEMPLATES, render
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Example
from neva_jax.data.image import ImageProcessor
from neva_jax.data.pipeline import pad_examples
from neva_jax.data.plan import Bucket
from neva_jax.data.tokenize import IGNORE, encode
from neva_jax.errors import UserError
from neva_jax.inference.generate import greedy
from neva_jax.models.multimodal import MultimodalModel
from neva_jax.parallel.mesh import make_mesh
from neva_jax.transforms.select import nest

GRAIN = 64  # lengths are padded to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prompts and pictures -> a batch for the model. encoder, image_processor: those of the model's training."""

    encoder: Encoder
    image_processor: ImageProcessor

    def __call__(self, prompts: list[str], images=None, *, room: int = 0) -> dict[str, np.ndarray]:
        """prompts: texts, with an <image> where a picture stands (pictures without one come first); images: for each prompt a list of files or of encoded
        bytes -> tokens, segment_ids, position_ids, media_index int32[B, T], media uint8[B, N, H, W, 3]; rows are padded on the right, by at least `room`."""
        images = images or [()] * len(prompts)
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and pictures for {len(images)}; give one list of pictures a prompt, empty for none")
        rows = [self._example(text, pictures, f"prompt {i}") for i, (text, pictures) in enumerate(zip(prompts, images, strict=True))]
        length = -(-(max(len(row.tokens) for row in rows) + room) // GRAIN) * GRAIN
        no_media = np.zeros((0, *self.image_processor.crop_size, 3), np.uint8)
        batch = pad_examples(rows, Bucket(length, 1, max(len(row.media) for row in rows)), no_media)
        return {name: batch[name] for name in ("tokens", "segment_ids", "position_ids", "media_index", "media")}

    def _example(self, text: str, pictures, where: str) -> Example:
        tags = text.count(PLACEHOLDER)
        if tags not in (0, len(pictures)):
            raise UserError(f"{where} has {tags} {PLACEHOLDER} and {len(pictures)} pictures; give as many, or no {PLACEHOLDER} to put them first")
        text = text if tags else f"{PLACEHOLDER}\n" * len(pictures) + text
        stream = encode(render(self.encoder.template, (("human", text),)), self.encoder.tokenizer, self.encoder.special, self.encoder.media_length)
        media = [self.image_processor(p if isinstance(p, bytes) else Path(p).read_bytes(), f"{where}: picture {i}") for i, p in enumerate(pictures)]
        media = np.stack(media) if media else np.zeros((0, *self.image_processor.crop_size, 3), np.uint8)
        return Example(stream.ids, np.full(len(stream.ids), IGNORE, np.int32), stream.media_index, media)


@dataclasses.dataclass(frozen=True)
class Vlm:
    """params: {path: array}, each on its devices; model: the module with them. scratch: files of the tokenizer, which go with this object."""

    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]
    processor: Processor
    mesh: Mesh
    scratch: object

    @functools.cached_property
    def model(self) -> MultimodalModel:
        return nnx.merge(self.graphdef, nest(self.params))

    def generate(self, prompts: list[str], images=None, *, max_new_tokens: int = 64) -> list[str]:
        """The likeliest answer to each prompt. prompts, images: see Processor."""
        encoder = self.processor.encoder
        stop = TEMPLATES[encoder.template].stop
        stop_id = encoder.special.control(stop)
        stop_id = encoder.tokenizer.encode(stop, start=False)[0][-1] if stop_id is None else stop_id
        batch = self.processor(prompts, images, room=max_new_tokens)
        with jax.set_mesh(self.mesh):
            ids = np.asarray(greedy(self.graphdef, self.params, batch, max_new_tokens=max_new_tokens, stop_id=stop_id))
        silent = {stop_id, encoder.tokenizer.bos_id, encoder.tokenizer.eos_id, encoder.tokenizer.pad_id, encoder.tokenizer.unk_id}
        return [encoder.tokenizer.decode([i for i in row if i not in silent]).strip() for row in ids]


def from_pretrained(
    path: str | Path, *, bases=(), tokenizer: str | None = None, conv_template: str | None = None, dtype: str = "bfloat16", tensor_parallel: int = 1,
    devices=None,
) -> Vlm:  # fmt: skip
    """A model in any format. bases: paths of models that have what this one lacks; conv_template: instead of the model's own. dtype: of weights and
    computation, float32 or bfloat16. tensor_parallel: devices that share each weight, of `devices` (default: one, or as many); each reads only its slices.
    Raises UserError for what is no whole model, by one sentence that says what is missing.
    """
    found = open_model(path, bases=bases, tokenizer=tokenizer, template=conv_template, field="from_pretrained")
    found.arrays(PARTS)  # all there, all of the right shape
    if found.tokenizer is None or found.template is None:
        missing = "tokenizer" if found.tokenizer is None else "conv_template"
        raise UserError(f"{path}: no {missing} is in it; give {missing}=...")
    llm, vision = (dataclasses.replace(config, dtype=dtype) for config in (found.neva.llm, found.neva.vision))
    config = dataclasses.replace(found.neva, llm=dataclasses.replace(llm, residual_dtype=dtype), vision=vision)
    mesh = make_mesh(tensor=tensor_parallel, devices=devices or jax.devices()[:tensor_parallel])
    found.config.model.trainable = (("", 0.5, None),)  # which of the weights would train is of no matter here
    model = build_model(found.config, config, mesh)
    targets = {name: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=model.shardings[name]) for name, w in model.weights.items()}
    processor = Processor(build_encoder(found.config, found.tokenizer, config), image_processor(found.config))
    return Vlm(model.graphdef, found.load(targets), processor, mesh, found.scratch)
