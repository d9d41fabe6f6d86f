"""A record -> an Example: everything of it that the model will see, unpadded. `Examples` is the dataset before any order: `examples[i]`."""

import dataclasses
import hashlib

import numpy as np

from neva_jax.data.conversation import render
from neva_jax.data.image import ImageProcessor
from neva_jax.data.records import Record, Records, parse_record
from neva_jax.data.tokenize import IGNORE, SpecialIds, Stream, encode, shift
from neva_jax.errors import DataError, UserError

FORMAT = 2  # of a record's ids; part of the fingerprint: raise it when a template, the way of encoding or the cut changes


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
    """sources: record files, one behind the other; media: see `open_media`, or None where there are only texts; media_length: S, text positions that a
    picture takes; max_length: T at most; on_bad_image: "raise" or "skip". Pickles small: a worker opens its own files.
    """

    sources: tuple[Records, ...]
    media: object
    image_processor: ImageProcessor
    tokenizer: object
    special: SpecialIds
    template: str
    media_length: int
    max_length: int
    max_media: int | None = None
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

    def record(self, index: int) -> Record:
        source, i = self._locate(index)
        record = parse_record(source[i], where=source.where(i), max_media=self.max_media)
        if record.images and self.media is None:
            raise DataError(f"{source.where(i)}: image: names a picture, but model.data.image_folder is not set; set it to the folder or tar of the pictures")
        return record

    def stream(self, index: int) -> Stream:
        """The record's ids, cut to max_length + 1 (the last one is a target only). An error if nothing supervised is left."""
        return self._encode(index, self.record(index))

    def _encode(self, index: int, record: Record) -> Stream:
        try:
            pieces = render(self.template, record.turns, record.system)
        except UserError as error:
            raise DataError(f"{self.where(index)}: conversations: {error}") from None
        whole = encode(pieces, self.tokenizer, self.special, self.media_length)
        stream = whole.truncate(self.max_length + 1)
        if not stream.supervised[1:].any():
            cause = "empty answers?"
            if stream is not whole:
                cause = f"of its {len(whole.ids)} tokens the first {self.max_length} hold no answer; raise model.encoder_seq_length"
            raise DataError(f"{self.where(index)}: conversations: no supervised token; {cause}")
        return stream

    def __getitem__(self, index: int) -> Example:
        record = self.record(index)
        stream = self._encode(index, record)
        tokens, labels, media_index = shift(stream)
        names = record.images[: stream.num_media]
        try:
            media = [self._picture(index, name) for name in names]
        except DataError:
            if self.on_bad_image != "skip":
                raise
            height, width = self.image_processor.crop_size
            return Example(tokens, np.full_like(labels, IGNORE), media_index, np.zeros((len(names), height, width, 3), np.uint8), bad_image=True)
        return Example(tokens, labels, media_index, np.stack(media) if media else self.no_media)

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
        files, special = [source.fingerprint for source in self.sources], dataclasses.astuple(self.special)
        parts = [FORMAT, files, self.tokenizer.fingerprint, self.template, self.media_length, self.max_length, self.max_media, special]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
