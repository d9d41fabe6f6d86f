"""How the next token is chosen: the greatest logit, or a draw after temperature, top-k and top-p; a repetition penalty and a least length come before either.

The order is transformers': penalty, least length, temperature, top-k, top-p. The penalty works (Keskar et al. 2019, CTRL: logits of used tokens are divided by
it where positive and multiplied where negative); NeMo's has no effect unless compute_logprob is on, and then raises negative logits. A row draws from its own
key, so that its answer does not depend on the rows beside it. Given up: beams, typical sampling.
"""

import dataclasses
from collections.abc import Iterable
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp

from neva_jax.errors import UserError

RANGES = {
    "max_new_tokens": (int, 1, 10**6),
    "min_tokens": (int, 0, 10**6),
    "temperature": (float, 0, 1e3),
    "top_k": (int, 0, 10**9),
    "top_p": (float, 1e-6, 1),
    "repetition_penalty": (float, 1e-3, 1e3),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """max_new_tokens: at most; min_tokens: no end before as many; temperature 0: greedy; top_k 0 and top_p 1: all tokens; repetition_penalty 1: none;
    end_strings: an answer ends before the first of them. Raises UserError for a value out of its range."""

    max_new_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    end_strings: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.end_strings, str) or not isinstance(self.end_strings, Iterable):
            raise UserError(f"end_strings is {self.end_strings!r}, expected a list of texts, such as ['</s>']")
        object.__setattr__(self, "end_strings", tuple(self.end_strings))
        for name, (kind, least, most) in RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise UserError(f"{name} is {value!r}, expected {'a whole number' if kind is int else 'a number'} from {least:g} to {most:g}")
        if self.min_tokens > self.max_new_tokens:
            raise UserError(f"min_tokens is {self.min_tokens} and max_new_tokens {self.max_new_tokens}; give at most as many")
        if bad := [text for text in self.end_strings if not isinstance(text, str) or not text.encode(errors="ignore")]:
            raise UserError(f"end_strings has {bad[0]!r}, expected a text of at least one character")

    @property
    def kind(self) -> "Kind":
        filtered = bool(self.top_k) or self.top_p < 1
        return Kind(self.temperature > 0, self.temperature > 0 and filtered, self.repetition_penalty != 1)

    @property
    def numbers(self) -> dict[str, jax.Array]:
        """What a compiled program takes in, so that other numbers of one kind compile nothing."""
        floats = {name: jnp.float32(getattr(self, name)) for name in ("top_p", "repetition_penalty")}
        floats["temperature"] = jnp.float32(max(self.temperature, 1e-30))  # less is 0 in float32, and logits over it are not numbers
        return floats | {name: jnp.int32(getattr(self, name)) for name in ("top_k", "min_tokens")}


class Kind(NamedTuple):
    """What of sampling a program computes."""

    drawn: bool
    filtered: bool
    penalised: bool


def choose(logits, used, step, keys, numbers: dict, stops, *, kind: Kind):
    """logits: float32[B, V], used: bool[B, V] (tokens of prompt and answer so far; None unless penalised), step: int32, tokens chosen before; keys: one a row;
    stops: int32[n], ids that end an answer (-1: none) -> tokens int32[B], their log-probabilities float32[B] under the model's own logits.
    """
    scores = logits
    if kind.penalised:
        penalty = numbers["repetition_penalty"]
        scores = jnp.where(used, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    is_stop = jnp.any(jnp.arange(logits.shape[-1]) == stops[:, None], 0)
    scores = jnp.where(is_stop & (step < numbers["min_tokens"]), -jnp.inf, scores)
    if kind.drawn:
        scores = scores / numbers["temperature"]
        scores = keep_likely(scores, numbers["top_k"], numbers["top_p"]) if kind.filtered else scores
        tokens = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, scores)
    else:
        tokens = jnp.argmax(scores, -1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, -1)


def keep_likely(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """scores: float32[B, V]; those outside of the top_k largest (0: all) become -inf, then those outside of the smallest set of likeliest tokens whose
    probabilities reach top_p (Holtzman et al. 2020); the likeliest always stays, and so do equals of the last that stays."""
    ranked = -jnp.sort(-scores, -1)
    size = scores.shape[-1]
    kth = jnp.take(ranked, jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1, axis=-1)[:, None]
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    least = jnp.min(jnp.where((before < top_p) & (ranked >= kth), ranked, jnp.inf), -1, keepdims=True)
    return jnp.where(scores < jnp.maximum(least, kth), -jnp.inf, scores)
