"""Token ids -> answers: text, where it ends, and what of it may be shown before it is whole."""

import dataclasses
import os
from collections.abc import Iterator

import jax

from neva_jax.errors import UserError
from neva_jax.inference.generate import CHUNK, STOPS, Generation, Weights
from neva_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Answer:
    """text: without what ended it. tokens: with it, as transformers has them; logprobs: of each token under the model's own logits, before temperature and all
    else. finish: "stop", or "length" where max_new_tokens or the model's own length ended it."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: str


@dataclasses.dataclass(frozen=True)
class Speaker:
    """tokenizer: None for ids alone. stop_ids, stop_texts: what ends an answer under the model's template."""

    weights: Weights
    tokenizer: object
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    def answers(self, batch: dict, sampling: Sampling, keys: jax.Array, limits: list[int] | None = None) -> list[Answer]:
        """One a row. batch: see Generation. limits: the most tokens of each row, where that is less than sampling's."""
        *_, rows = self._grow(batch, sampling, keys, limits)
        return [row.answer() for row in rows]

    def stream(self, batch: dict, sampling: Sampling, keys: jax.Array, limits: list[int] | None = None) -> Iterator[str]:
        """The text of a batch of one, piece by piece."""
        shown = ""
        for (row,) in self._grow(batch, sampling, keys, limits, chunk=2):
            text = row.answer().text if row.finish else row.settled()
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text

    def _grow(self, batch, sampling, keys, limits, chunk: int = CHUNK) -> Iterator[list["_Row"]]:
        ids, texts = self._ends(sampling.end_strings)
        limits = limits or [sampling.max_new_tokens] * len(batch["segment_ids"])
        rows = [_Row(self.tokenizer, ids, texts, limit) for limit in limits]
        generation = Generation(self.weights, batch, sampling, ids, keys, chunk)
        for tokens, logprobs in generation:
            for row, more, their in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                row.take(more, their)
            if early := [i for i, row in enumerate(rows) if row.finish]:
                generation.finish(early)
            yield rows
        for row in rows:
            row.finish = row.finish or "length"
        yield rows

    def _ends(self, end_strings: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """An end string that is a token of its own ends by its id, as in NeMo; any, by its text."""
        if end_strings and self.tokenizer is None:
            raise UserError(f"end_strings {list(end_strings)} cannot be looked for in token ids; the model has no tokenizer, give one")
        own = [number for text in end_strings if (number := self.tokenizer.id_of(text)) is not None]
        ids = tuple(dict.fromkeys([*self.stop_ids, *own]))
        if len(ids) > STOPS:
            raise UserError(f"{len(ids)} tokens would end an answer; give fewer end_strings, at most {STOPS} tokens are looked for")
        return ids, (*self.stop_texts, *end_strings)


class _Row:
    """An answer on its way."""

    def __init__(self, tokenizer, stop_ids: tuple[int, ...], stop_texts: tuple[str, ...], limit: int):
        self.tokenizer, self.stop_ids, self.stop_texts, self.limit = tokenizer, stop_ids, stop_texts, limit
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: str | None = None

    def take(self, tokens: list[int], logprobs: list[float]) -> None:
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finish or token < 0:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.stop_ids:
                self.finish = "stop"
            elif len(self.tokens) >= self.limit:
                self.finish = "length"
        if self.stop_texts and (end := self._end()) is not None:
            del self.tokens[end:], self.logprobs[end:]
            self.finish = "stop"

    def _end(self) -> int | None:
        """How many tokens it takes to hold a stop text."""
        if not _holds(self._text(), self.stop_texts):
            return None
        low, high = 1, len(self.tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _holds(self._text(middle), self.stop_texts) else (middle + 1, high)
        return low

    def _text(self, count: int | None = None, more: tuple[int, ...] = ()) -> str:
        tokens = self.tokens[:count]
        if self.tokenizer is None:
            return ""
        silent = {self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id, self.tokenizer.unk_id}
        if tokens and tokens[-1] in self.stop_ids:
            tokens = tokens[:-1]
        return self.tokenizer.decode([*(token for token in tokens if token not in silent), *more])

    def answer(self) -> Answer:
        text = self._text()
        ends = [text.index(stop) for stop in self.stop_texts if stop in text]
        return Answer(text[: min(ends, default=None)].strip(), self.tokens, self.logprobs, self.finish or "length")

    def settled(self) -> str:
        """As much of the text as no later token can change: not the bytes of half a character, nor what may be the beginning of a stop text."""
        text = self._text()
        if self.tokenizer and (byte := self.tokenizer.id_of("<0xFF>")) is not None:  # with a wrong byte behind them, some decoders spoil a whole run of bytes
            text = os.path.commonprefix([text, self._text(more=(byte,))])
        text = text.rstrip("\ufffd")
        held = max((n for stop in self.stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - held].strip()


def _holds(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop in text for stop in stops)
