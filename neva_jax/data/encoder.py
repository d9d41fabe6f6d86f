"""A record (dict) -> its pictures' names and its stream of ids: what the template means, exactly. The originals' own ways are in compat/."""

import dataclasses
import functools
import logging
from typing import ClassVar, NamedTuple

from neva_jax.data.conversation import PLACEHOLDER, TEMPLATES, Turn, render
from neva_jax.data.record import Record, parse_record
from neva_jax.data.tokenize import SpecialIds, Stream, encode
from neva_jax.errors import DataError, UserError

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """images: the names of the stream's media, in order. note: what exact mode would refuse, "" for nothing."""

    images: tuple[str, ...]
    stream: Stream
    note: str = ""


@dataclasses.dataclass
class Encoder:
    """media_length: S, text positions that a picture takes; max_length: T at most; model_type: whose media tokens (mm_cfg.llm.model_type);
    extra_token: the last id is a target only (see `shift`; never in LLaVA); sep_image_conv_front: NeMo's, the picture and "USER: " open the first turn;
    max_media: pictures a record may have, None for any number; eod_mask_loss: NeMo's, nothing is learnt at a position that reads </s>.
    """

    tokenizer: object
    template: str
    media_length: int
    max_length: int
    use_im_start_end: bool = False
    model_type: str = "llama_2"
    extra_token: bool = True
    sep_image_conv_front: bool = False
    max_media: int | None = None
    eod_mask_loss: bool = False

    compat: ClassVar[str] = "exact"

    def __post_init__(self):
        self.extra_token = self.extra_token and not TEMPLATES[self.template].llava
        _ = self.special  # a tokenizer that cannot be the template's is an error before the first record

    @functools.cached_property
    def special(self) -> SpecialIds:
        """The ids of the template's control tokens, for what is encoded exactly: all of exact mode, and every mode's prompts."""
        return SpecialIds.of(self.tokenizer, self.template, use_im_start_end=self.use_im_start_end, model_type=self.model_type)

    @property
    def stops(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The ids and the texts that end an answer: the template's own stop, and in any case the tokenizer's end of sequence."""
        stop = TEMPLATES[self.template].stop
        number, eos = self.special.control(stop), self.tokenizer.eos_id
        ids = {number: None} if number is not None else {}
        ids |= {eos: None} if eos is not None and eos >= 0 else {}
        return tuple(ids), () if number is not None else (stop,)

    @property
    def limit(self) -> int:
        """ids at most."""
        return self.max_length + self.extra_token

    def fingerprint(self) -> str:
        """Of all that decides a record's ids but the record."""
        options = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tokenizer"]
        return repr((self.compat, self.tokenizer.fingerprint, options))

    def parse(self, record: dict, where: str) -> Record:
        """Strict in every mode: what `--validate` judges."""
        return parse_record(record, where=where, max_media=self.max_media, interleaved=self.template == "interleaved")

    def __call__(self, record: dict, where: str) -> Encoded:
        """Raises DataError that opens with `where`: for a defect of the record, or if nothing supervised is left of it."""
        return self.encode(self.parse(record, where), where)

    def encode(self, record: Record, where: str) -> Encoded:
        try:
            pieces = render(self.template, self._turns(record), self._system(record), prompt=False)
        except UserError as error:
            raise DataError(f"{where}: conversations: {error}") from None
        whole = self.masked(encode(pieces, self.tokenizer, self.special, self.media_length))
        stream = whole.truncate(self.limit)
        if not stream.supervised[1:].any():
            cause = "empty answers?"
            if stream is not whole:
                cause = f"of its {len(whole.ids)} tokens the first {self.max_length} hold no answer; raise model.encoder_seq_length"
            raise DataError(f"{where}: conversations: no supervised token; {cause}")
        return Encoded(record.images[: stream.num_media], stream)

    def masked(self, stream: Stream) -> Stream:
        if self.eod_mask_loss:
            stream.supervised[1:] &= stream.ids[:-1] != self.tokenizer.eos_id
        return stream

    def _turns(self, record: Record) -> tuple[Turn, ...]:
        if not (self.sep_image_conv_front and record.images):
            return record.turns
        if self.template == "interleaved":
            raise UserError("model.data.sep_image_conv_front needs turns, and an interleaved record has none; turn it off")
        first, *rest = record.turns
        count = first.text.count(PLACEHOLDER)
        if not count:
            raise UserError("model.data.sep_image_conv_front needs <image> in the first turn, and it has none; turn it off or move the tag")
        words = first.text.replace(PLACEHOLDER, "").strip()
        return (first._replace(text=f"{PLACEHOLDER * count} USER: {words}"), *rest)

    def _system(self, record: Record) -> str | None:
        """A leading system turn counts in every template; the key `system` where NeMo reads it."""
        if record.system is not None or record.system_key is None:
            return record.system
        if TEMPLATES[self.template].takes_system:
            return record.system_key
        _warn_of_system(self.template)
        return None


@functools.cache
def _warn_of_system(template: str) -> None:
    log.warning(f"records have a key system, which the template {template} does not read (nor does NeMo); write it as a first turn from system to use it")
