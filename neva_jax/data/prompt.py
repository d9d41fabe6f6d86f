"""A question and its pictures -> what a model reads to answer it: the same template, ids and pixels as in training, up to where the answer begins."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from neva_jax.data.conversation import PLACEHOLDER, Turn, render
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Example
from neva_jax.data.image import ImageProcessor
from neva_jax.data.media import MAX_BYTES
from neva_jax.data.pipeline import pad_examples
from neva_jax.data.plan import Bucket
from neva_jax.data.tokenize import IGNORE, encode
from neva_jax.errors import UserError

LLAVA_IMAGE = -200  # LLaVA's IMAGE_TOKEN_INDEX, taken for a picture in token ids of any model
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class Prompt(NamedTuple):
    """text: as rendered; ids, media_index: int32[n], see Stream; images: its pictures, unread; where: the words that name it in an error."""

    text: str
    ids: np.ndarray
    media_index: np.ndarray
    images: tuple
    where: str


@dataclasses.dataclass(frozen=True)
class Processor:
    """encoder, image_processor: those of the model's training. encoder None: `lacking` says what there is no tokenizer for; token ids can still be asked.
    media_length: S; image_id: the id that stands for a picture in token ids, besides LLaVA's -200."""

    encoder: Encoder | None
    image_processor: ImageProcessor
    media_length: int
    vocab_size: int
    image_id: int | None = None
    lacking: str = ""

    @property
    def media_shape(self) -> tuple[int, int, int]:
        return *self.image_processor.crop_size, 3

    def read(self, prompt, images=(), where: str = "the prompt") -> Prompt:
        """prompt: a text, a conversation or token ids, see Vlm; images: pictures, or how many there will be."""
        if images is None or isinstance(images, str | bytes | Path | Image.Image) or getattr(images, "ndim", 0) == 3:
            raise UserError(f"{where}: its pictures are one {type(images).__name__}, expected a list of pictures; write [picture], or [] for none")
        images = (None,) * images if isinstance(images, int) else tuple(images)
        if (ids := _ids(prompt)) is not None:
            return self._of_ids(ids, images, where)
        if self.encoder is None:
            raise UserError(self.lacking)
        system, turns = _turns(prompt, where)
        if self.encoder.template == "interleaved" and len(turns) > 1:
            raise UserError(f"{where} has {len(turns)} turns, and the template interleaved is of one text; give that text")
        tags = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        if tags not in (0, len(images)):
            raise UserError(f"{where} has {tags} {PLACEHOLDER} and {len(images)} pictures; give as many, or no {PLACEHOLDER} to put them first")
        if not tags:
            turns[0] = turns[0]._replace(text=f"{PLACEHOLDER}\n" * len(images) + turns[0].text)
        try:
            pieces = render(self.encoder.template, turns, system)
        except UserError as error:  # a template of one round, say
            raise UserError(f"{where}: {error}") from None
        stream = encode(pieces, self.encoder.tokenizer, self.encoder.special, self.media_length)
        if stream.num_media != len(images):
            raise UserError(f"{where}: the template {self.encoder.template} keeps {stream.num_media} of its {len(images)} pictures; put them into a question")
        text = "".join(PLACEHOLDER if piece.kind == "image" else piece.value for piece in pieces)
        return Prompt(text, stream.ids, stream.media_index, images, where)

    def _of_ids(self, ids: np.ndarray, images: tuple, where: str) -> Prompt:
        """Ids as they are; a picture's id stands once for each picture, or once for each of its vectors."""
        size, is_image = self.media_length, (ids == LLAVA_IMAGE) | (ids == self.image_id if self.image_id is not None else False)
        if is_image.sum() == len(images) != len(images) * size:
            ids = np.repeat(ids, np.where(is_image, size, 1))
            is_image = np.repeat(is_image, np.where(is_image, size, 1))
        if is_image.sum() != len(images) * size:
            names = " or ".join(str(name) for name in (self.image_id, LLAVA_IMAGE) if name is not None)
            wanted = f"{len(images)} of them, or {size} times as many"
            raise UserError(f"{where} has {len(images)} pictures and {is_image.sum()} ids that stand for one ({names}); give {wanted}")
        if (bad := ids[~is_image & ((ids < 0) | (ids >= self.vocab_size))]).size:
            raise UserError(f"{where} has the id {bad[0]}, and the model's vocabulary is of {self.vocab_size}; it is another model's prompt")
        media_index = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
        text = self.encoder.tokenizer.decode(ids[~is_image].tolist()) if self.encoder else ""
        return Prompt(text, np.where(is_image, 0, ids).astype(np.int32), media_index, images, where)

    def example(self, prompt: Prompt) -> Example:
        """With its pictures, which are read now."""
        media = [self._pixels(image, f"{prompt.where}: picture {i}") for i, image in enumerate(prompt.images)]
        media = np.stack(media) if media else np.zeros((0, *self.media_shape), np.uint8)
        return Example(prompt.ids, np.full(len(prompt.ids), IGNORE, np.int32), prompt.media_index, media)

    def batch(self, prompts: list[Prompt], width: int, length: int) -> dict[str, np.ndarray]:
        """Prompts as `width` rows of `length` positions -> tokens, segment_ids, position_ids, media_index int32[B, T], media [B, N, H, W, 3]."""
        rows = [self.example(prompt) for prompt in prompts]
        kinds = {row.media.dtype for row in rows if len(row.media)}
        if len(kinds) > 1:
            raise UserError(f"{prompts[0].where}: some pictures are normalised arrays of floats, and some are not; give all alike")
        no_media = np.zeros((0, *self.media_shape), *kinds or {np.dtype(np.uint8)})
        bucket = Bucket(length, 1, max(len(row.media) for row in rows))
        batch = pad_examples(rows + [None] * (width - len(rows)), bucket, no_media)
        return {name: batch[name] for name in ("tokens", "segment_ids", "position_ids", "media_index", "media")}

    def _pixels(self, image, where: str) -> np.ndarray:
        if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
            image = image.transpose(1, 2, 0) if image.shape == (3, *self.media_shape[:2]) else image
            if image.shape != self.media_shape:
                raise UserError(f"{where} is an array of floats of shape {list(image.shape)}, expected pixel values of {list(self.media_shape)}")
            return image.astype(np.float32)
        return self.image_processor(_encoded(image, where), where)


def _ids(prompt) -> np.ndarray | None:
    """int64[n]; None for what are no token ids. An array of any library will do."""
    if isinstance(prompt, str) or not (isinstance(prompt, Sequence) or hasattr(prompt, "__array__")):
        return None
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists in lists, of several lengths or too many
        return None
    return ids.astype(np.int64) if ids.size and ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) else None


def _encoded(image, where: str) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | Path):
        try:
            with open(image, "rb") as file:
                content = file.read(MAX_BYTES + 1)  # not all: a device has no end
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {image} cannot be read ({getattr(error, 'strerror', None) or error}); give the path of a picture") from None
        if len(content) > MAX_BYTES:
            raise UserError(f"{where}: {image} has more than {MAX_BYTES} bytes; shrink the picture")
        return content
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{where} is an array {image.dtype}{list(image.shape)}, expected uint8[height, width, 3]")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"{where} is a {type(image).__name__}, expected a file, bytes, a PIL picture or an array")
    buffer = io.BytesIO()
    try:  # a file that Pillow has only opened is read now
        (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where}: a PIL picture of {image.size} pixels cannot be used ({error}); open it again") from None
    return buffer.getvalue()


def _turns(prompt, where: str) -> tuple[str | None, list[Turn]]:
    """-> the system's words, or None for the template's own, and the turns, human first and last."""
    if isinstance(prompt, str):
        _check_text(prompt, where)
        return None, [Turn("human", prompt)]
    expected = 'a text, token ids, or a conversation such as [{"from": "human", "value": "..."}]'
    try:
        said = [(ROLES[turn.get("from") or turn["role"]], turn.get("value", turn.get("content"))) for turn in prompt]
    except (TypeError, AttributeError, KeyError):
        raise UserError(f"{where} is {str(prompt)[:80]!r}, expected {expected}, whose turns are from human, gpt or system") from None
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    if [role for role, _ in said] != ["human", "gpt"] * (len(said) // 2) + ["human"]:
        raise UserError(f"{where}: its turns are from {', '.join(role for role, _ in said) or 'nobody'}; expected human and gpt in turns, human first and last")
    if bad := [text for text in (system or "", *(text for _, text in said)) if not isinstance(text, str)]:
        raise UserError(f"{where}: a turn says {str(bad[0])[:80]!r}, expected a text")
    _check_text("".join([system or "", *(text for _, text in said)]), where)
    return system, [Turn(role, text) for role, text in said]


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half of a surrogate pair at character {error.start}, expected text, which tokenizers can take") from None
