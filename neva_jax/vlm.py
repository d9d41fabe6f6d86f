"""A model to ask, from Python: `vlm = neva_jax.from_pretrained(PATH)`, then `vlm.generate(["What is this? <image>"], [["cat.jpg"]])`.

PATH: a run of ours, a Hugging Face directory, a .nemo file or directory.
"""

import dataclasses
import difflib
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from neva_jax.build.data import build_encoder
from neva_jax.build.model import build_model, image_processor
from neva_jax.build.opened import Opened, open_model
from neva_jax.convert.source import PARTS
from neva_jax.data.prompt import Processor, Prompt
from neva_jax.errors import UserError
from neva_jax.inference.answers import Answer, Speaker
from neva_jax.inference.generate import GRAIN, row_keys, set_apart, stack
from neva_jax.inference.sampling import Sampling
from neva_jax.models.multimodal import MultimodalModel, NevaConfig
from neva_jax.parallel.mesh import make_mesh
from neva_jax.transforms.select import nest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Vlm:
    """config: shapes and numbers. processor: prompts and pictures -> what the model reads. max_length: positions that the model was made for.

    Prompts, everywhere: a text, with an <image> where a picture stands (pictures without one come first); a conversation, [{"from": "human", "value": ...},
    {"from": "gpt", ...}, ...], that ends with a question; or token ids, which are read as they are. Pictures: for each prompt a list of files, encoded bytes,
    PIL pictures or arrays (uint8[H, W, 3], or float32 that is normalised already). Options: the fields of inference/sampling.py's Sampling.
    Not for several threads at once. Raises UserError, which names the prompt, for what cannot be asked.
    """

    config: NevaConfig
    graphdef: nnx.GraphDef
    speaker: Speaker
    processor: Processor
    mesh: Mesh
    max_length: int
    scratch: object  # files of the tokenizer, which go with this object

    @property
    def params(self) -> dict[str, jax.Array]:
        """{path: array}, layers stacked: a copy of the language model's, made anew each time."""
        return stack(self.speaker.weights)

    @functools.cached_property
    def model(self) -> MultimodalModel:
        """The module with its weights (see `params`)."""
        return nnx.merge(self.graphdef, nest(self.params))

    def render(self, prompt, num_images: int = 0) -> str:
        """A prompt as the model reads it."""
        return self.processor.read(prompt, num_images, "the prompt").text

    def generate(self, prompts: Sequence, images=None, *, seed: int = 0, batch_size: int = 8, **options) -> list[str]:
        """The text of each answer. seed: of draws, where temperature is above 0; an answer depends on it and on its prompt's number, not on the batch."""
        return [answer.text for answer in self.answers(prompts, images, seed=seed, batch_size=batch_size, **options)]

    def answers(self, prompts: Sequence, images=None, *, seed: int = 0, batch_size: int = 8, **options) -> list[Answer]:
        """Texts, tokens, log-probabilities. batch_size: rows at a time; prompts of like length and as many pictures stand together."""
        sampling = _sampling(options)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
        read = self._read(prompts, images, sampling)
        sampling = self._bounded(sampling)
        answers: list = [None] * len(read)
        order = sorted(range(len(read)), key=lambda i: (len(read[i].images), len(read[i].ids)))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = batch_size if len(order) > batch_size else len(order)  # so that the last batch compiles nothing
            batch = self._batch([read[i] for i in chosen], width)
            limits = [self._limit(read[i], sampling) for i in chosen] + [1] * (width - len(chosen))
            keys = _keys(seed, chosen + [0] * (width - len(chosen)))
            for i, answer in zip(chosen, self.speaker.answers(batch, sampling, keys, limits), strict=False):
                answers[i] = answer
        return answers

    def stream(self, prompt, images=(), *, seed: int = 0, **options) -> Iterator[str]:
        """One answer's text, piece by piece, as it comes: the same as `generate`'s."""
        sampling = _sampling(options)
        (read,) = self._read([prompt], [images], sampling)
        yield from self.speaker.stream(self._batch([read], 1), self._bounded(sampling), _keys(seed, [0]), [self._limit(read, sampling)])

    def _read(self, prompts, images, sampling: Sampling) -> list[Prompt]:
        if isinstance(prompts, str | dict):
            raise UserError(f"prompts is one {type(prompts).__name__}, expected a list; write [{prompts!r:.60}]")
        prompts = _listed(prompts, "prompts")
        images = [()] * len(prompts) if images is None else _listed(images, "images")
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and pictures for {len(images)}; give one list of pictures a prompt, empty for none")
        read = [self.processor.read(prompt, pictures, f"prompt {i}") for i, (prompt, pictures) in enumerate(zip(prompts, images, strict=True))]
        for i, prompt in enumerate(read):
            if len(prompt.ids) >= self.max_length:
                pictures = f", {len(prompt.images)} pictures of {self.processor.media_length} among them" if prompt.images else ""
                raise UserError(
                    f"prompt {i} takes {len(prompt.ids)} positions{pictures}, and the model was made for {self.max_length} (model.encoder_seq_length) "
                    "with the answer; shorten it, or ask with fewer pictures"
                )
        if short := [i for i, prompt in enumerate(read) if self._limit(prompt, sampling) < sampling.max_new_tokens]:
            room = self._limit(read[short[0]], sampling)
            log.warning(f"prompt {short[0]}: room for {room} of {sampling.max_new_tokens} new tokens: the model was made for {self.max_length} positions")
        return read

    def _limit(self, prompt: Prompt, sampling: Sampling) -> int:
        return min(sampling.max_new_tokens, self.max_length - len(prompt.ids))

    def _bounded(self, sampling: Sampling) -> Sampling:
        """No more room than the model has positions: a cache has a slot for each token that may come."""
        most = min(sampling.max_new_tokens, self.max_length)
        return dataclasses.replace(sampling, max_new_tokens=most, min_tokens=min(sampling.min_tokens, most))

    def _batch(self, prompts: list[Prompt], width: int) -> dict[str, np.ndarray]:
        return self.processor.batch(prompts, width, -(-max(len(prompt.ids) for prompt in prompts) // GRAIN) * GRAIN)


def from_pretrained(
    path: str | Path, *, bases=(), tokenizer: str | None = None, conv_template: str | None = None, dtype: str | None = None, tensor_parallel: int = 1,
    devices=None,
) -> Vlm:  # fmt: skip
    """A model in any format, with LoRA adapters merged into what they stand beside. bases: paths of models that have what this one lacks; conv_template:
    instead of the model's own. dtype: of weights and computation, float32 or bfloat16 (None: bfloat16, but on a CPU, which is slow in it, float32).
    tensor_parallel: devices that share each weight, of `devices` (default: one, or as many); each reads only its slices. A model without a tokenizer answers
    token ids alone. Raises UserError for what is no whole model, by one sentence that says what is missing.
    """
    bases = [bases] if isinstance(bases, str | Path) else bases
    if not isinstance(tensor_parallel, int) or tensor_parallel < 1:
        raise UserError(f"tensor_parallel is {tensor_parallel!r}, expected a whole number of at least 1")
    if dtype not in (None, "float32", "bfloat16", jnp.float32, jnp.bfloat16):
        raise UserError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
    if tensor_parallel > jax.device_count():
        raise UserError(f"tensor_parallel is {tensor_parallel}, JAX sees {jax.device_count()} ({jax.devices()[0].platform}); give at most as many")
    found = open_model(path, bases=bases, tokenizer=tokenizer, template=conv_template, field="from_pretrained").merged()
    found.arrays(PARTS)  # all there, all of the right shape
    devices = devices or jax.devices()[:tensor_parallel]
    dtype = jnp.dtype(dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")).name
    llm, vision = (dataclasses.replace(config, dtype=dtype) for config in (found.neva.llm, found.neva.vision))
    config = dataclasses.replace(found.neva, llm=dataclasses.replace(llm, residual_dtype=dtype), vision=vision)
    mesh = make_mesh(tensor=tensor_parallel, devices=devices)
    found.config.model.trainable = (("", 0.5, None),)  # which of the weights would train is of no matter here
    model = build_model(found.config, config, mesh)
    targets = {name: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=model.shardings[name]) for name, w in model.weights.items()}
    weights = set_apart(model.graphdef, found.load(targets), mesh)
    encoder, (image_id, ends) = None, _ids_of(found)
    missing = "tokenizer" if found.tokenizer is None else "conv_template" if found.template is None else None
    if missing is None:
        encoder = build_encoder(found.config, found.tokenizer, config)
    ids, texts = encoder.stops if encoder else ((), ())
    speaker = Speaker(weights, found.tokenizer, tuple(dict.fromkeys([*ids, *ends])), texts)
    lacking = f"{path}: no {missing} is in it, so that only token ids can be asked; give {missing}=..." if missing else ""
    processor = Processor(encoder, image_processor(found.config), config.media_length, config.llm.vocab_size, image_id, lacking)
    return Vlm(config, model.graphdef, speaker, processor, mesh, found.config.model.encoder_seq_length, found.scratch)


def _sampling(options: dict) -> Sampling:
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in options if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise UserError(f"{unknown[0]} is no option of an answer; {f'did you mean {near[0]}?' if near else 'known are ' + ', '.join(known)}")
    return Sampling(**options)


def _listed(given, name: str) -> list:
    try:
        return list(given)
    except TypeError:
        raise UserError(f"{name} is one {type(given).__name__}, expected a list, with an entry for each prompt") from None


def _keys(seed: int, numbers: list[int]) -> jax.Array:
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed!r}, expected a whole number of at most 64 bits")
    return row_keys(int(seed), np.array(numbers))


def _ids_of(found: Opened) -> tuple[int | None, tuple[int, ...]]:
    """What a Hugging Face directory's own files say: the id that stands for a picture, and those that end an answer."""
    if found.format != "hf":
        return None, ()
    files = [_object(file) for name in ("generation_config.json", "config.json") if (file := found.path / name).is_file()]
    texts = [part for file in files for part in (file, file.get("text_config") or {})]
    default = 2 if found.tokenizer is None else ()  # Llama's own
    ends = next((part["eos_token_id"] for part in texts if part.get("eos_token_id") is not None), default)
    image = next((part[name] for part in files for name in ("image_token_index", "image_token_id") if part.get(name) is not None), None)
    ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    if not all(isinstance(number, int) for number in ends):
        raise UserError(f"{found.path}: eos_token_id is {list(ends)!r:.80}, expected an id or a list of ids; copy its generation_config.json again")
    return image, ends


def _object(file: Path) -> dict:
    try:
        read = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again") from None
    if not isinstance(read, dict):
        raise UserError(f"{file}: holds {type(read).__name__}, expected a JSON object; copy it again")
    return read
