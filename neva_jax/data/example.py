"""A record -> an Example: everything of it that the model will see, unpadded. `Examples` is the dataset before any order: `examples[i]`."""

import dataclasses
import hashlib

import numpy as np

from neva_jax.data.encoder import Encoded, Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.record import Record, adopt_img_tags
from neva_jax.data.records import Records
from neva_jax.data.tokenize import IGNORE, Stream, shift
from neva_jax.errors import DataError

FORMAT = 4  # of a record's ids; part of the fingerprint: raise it when a template, the way of encoding or the cut changes


@dataclasses.dataclass(frozen=True)
class Example:
    """tokens, labels, media_index: int32[n]; media: uint8[N, H, W, 3]; bad_image: its pictures could not be read, its labels are all -100."""

    tokens: np.ndarray
    labels: np.ndarray
    media_index: np.ndarray
    media: np.ndarray
    bad_image: bool = False


@dataclasses.dataclass
class Examples:
    """sources: record files, one behind the other; media: see `open_media`, or None where there are only texts; encoder: what makes ids of a record;
    image_processor: called with a picture's bytes; on_bad_image: "raise" or "skip". Pickles small: a worker opens its own files.
    """

    sources: tuple[Records, ...]
    media: object
    image_processor: ImageProcessor
    encoder: Encoder
    on_bad_image: str = "raise"

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def _locate(self, index: int) -> tuple[Records, int]:
        for source in self.sources:
            if index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(index)

    def where(self, index: int) -> str:
        """The words that name a record in an error: file and index."""
        source, i = self._locate(index)
        return source.where(i)

    def raw(self, index: int) -> dict:
        """The record as its file has it; of JSONL, with NeVA's <img> tags taken in."""
        source, i = self._locate(index)
        return adopt_img_tags(source[i]) if source.path.endswith(".jsonl") else source[i]

    def record(self, index: int) -> Record:
        """Checked strictly, in every mode."""
        return self.encoder.parse(self.raw(index), self.where(index))

    def encoded(self, index: int) -> Encoded:
        """The record's ids, cut. An error if nothing supervised is left, in exact mode."""
        return self.encoder(self.raw(index), self.where(index))

    def stream(self, index: int) -> Stream:
        return self.encoded(index).stream

    def __getitem__(self, index: int) -> Example:
        names, stream, _ = self.encoded(index)
        if names and self.media is None:
            raise DataError(f"{self.where(index)}: image: names a picture, but model.data.image_folder is not set; set it to the folder or tar of the pictures")
        tokens, labels, media_index = shift(stream, self.encoder.extra_token)
        try:
            media = [self._picture(index, name) for name in names]
        except DataError:
            if self.on_bad_image != "skip":
                raise
            height, width = self.image_processor.crop_size
            return Example(tokens, np.full_like(labels, IGNORE), media_index, np.zeros((len(names), height, width, 3), np.uint8), bad_image=True)
        return Example(tokens, labels, media_index, media[0][None] if len(media) == 1 else np.stack(media) if media else self.no_media)

    @property
    def no_media(self) -> np.ndarray:
        return np.zeros((0, *self.image_processor.crop_size, 3), np.uint8)

    def _picture(self, index: int, name: str) -> np.ndarray:
        where = f"{self.where(index)}: image {name!r}"
        try:
            return self.image_processor(self.media.read(name), where)
        except DataError as error:
            message = str(error)
            raise DataError(message if message.startswith(where) else f"{self.where(index)}: {message}") from None

    def fingerprint(self) -> str:
        """Of all that decides lengths: files, tokenizer, template, media length, limits. Not of pixels."""
        return hashlib.sha256(repr((FORMAT, [source.fingerprint for source in self.sources], self.encoder.fingerprint())).encode()).hexdigest()
