"""Answers of a batch of prompts, as token ids: media encoded and prompts read once (`_start`), then `CHUNK` tokens at a time (`_go_on`), until every row has
stopped. Both are compiled once a shape: rows, text positions, room. Between two chunks the caller sees what there is, and may say that rows are done.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from neva_jax.inference import cache, recompute
from neva_jax.inference.sampling import Kind, Sampling, choose
from neva_jax.models.multimodal import MultimodalModel
from neva_jax.parallel.sharding import constrain
from neva_jax.transforms.select import nest

CHUNK = 16
GRAIN = 64  # lengths of prompts and of answers are padded to a multiple, so that few programs are compiled
STOPS = 16  # ids that may end an answer
LAYERS = "llm/layers/"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model to ask. params: {path: array}, stacked; apart: None, or for each layer of the language model its own {path: array}, which `params` then lacks:
    a loop over tokens reads a layer's weights where they lie, and would copy them out of a stack first. mesh: None for the one in use. has_cache: see
    recompute.py."""

    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]
    apart: list[dict[str, jax.Array]] | None = None
    mesh: Mesh | None = None
    has_cache: bool = True

    @property
    def traced(self):
        return self.params, self.apart


def set_apart(graphdef: nnx.GraphDef, params: dict[str, jax.Array], mesh: Mesh | None = None) -> Weights:
    """Takes the language model's stack apart, one weight after the other; the stacked arrays are given up. They live where they lived."""
    depth = next(jax.tree.leaves(array)[0].shape[0] for path, array in params.items() if path.startswith(LAYERS))
    split = jax.jit(lambda array: [jax.tree.map(operator.itemgetter(layer), array) for layer in range(depth)])
    apart: list[dict] = [{} for _ in range(depth)]
    for path in [path for path in params if path.startswith(LAYERS)]:
        stacked = params.pop(path)
        for layer, part in zip(apart, split(stacked), strict=True):
            layer[path.removeprefix(LAYERS)] = part
        jax.tree.map(lambda a: a.delete(), stacked)
    return Weights(graphdef, params, apart, mesh)


def stack(weights: Weights) -> dict[str, jax.Array]:
    """{path: array} with the layers stacked again: a copy."""
    if weights.apart is None:
        return weights.params
    stacked = {LAYERS + path: jax.tree.map(lambda *parts: jnp.stack(parts), *(layer[path] for layer in weights.apart)) for path in weights.apart[0]}
    return weights.params | stacked


class Generation:
    """One batch on its way. batch: tokens, segment_ids, position_ids, media_index int32[B, T], media [B, N, ...]; rows are right-padded, one of length 0 is
    no prompt. stops: at most STOPS ids that end an answer. keys: a key a row, for draws. chunk: tokens between two looks at them, at most CHUNK."""

    def __init__(self, weights: Weights, batch: dict, sampling: Sampling, stops, keys: jax.Array, chunk: int = CHUNK):
        self.weights, self.count, self.room, self.chunk = weights, 0, sampling.max_new_tokens, chunk
        stops = list(dict.fromkeys(stops))
        if len(stops) > STOPS:
            raise ValueError(f"{len(stops)} ids end an answer, at most {STOPS} may")
        self.fixed = keys, sampling.numbers, jnp.array([*stops, *[-1] * (STOPS - len(stops))], jnp.int32)
        self.how = {"graphdef": weights.graphdef, "kind": sampling.kind, "has_cache": weights.has_cache}
        room = -(-self.room // GRAIN) * GRAIN
        (device, *_) = jax.tree.leaves(weights.params)[0].sharding.device_set
        begin, self.go_on = programs(device.platform)
        with self._mesh():
            self.state, *self.first = begin(weights.traced, batch, *self.fixed, room=room, **self.how)

    def _mesh(self):
        return jax.set_mesh(self.weights.mesh) if self.weights.mesh else contextlib.nullcontext()

    def finish(self, rows: list[int]) -> None:
        """These rows have said enough."""
        self.state["done"] = self.state["done"] | np.isin(np.arange(self.state["done"].shape[0]), rows)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """-> tokens int32[B, n] and their log-probabilities float32[B, n], n from 1 to CHUNK; -1 behind the token that ended a row."""
        first, logprobs = jax.device_get(self.first)
        self.count = 1
        yield first[:, None], logprobs[:, None]
        while self.count < self.room and not np.asarray(self.state["done"]).all():
            n = min(self.chunk, self.room - self.count)
            with self._mesh():
                self.state, *found = self.go_on(self.weights.traced, self.state, *self.fixed, np.int32(n), **self.how)
            tokens, logprobs = jax.device_get(found)
            self.count += n
            yield tokens[:, :n], logprobs[:, :n]


def generate(weights: Weights, batch: dict, sampling: Sampling, stops=(), seed: int = 0) -> np.ndarray:
    """-> int32[B, at most max_new_tokens]: whole answers, -1 behind the id that ended one."""
    keys = row_keys(seed, np.arange(batch["tokens"].shape[0]))
    return np.concatenate([tokens for tokens, _ in Generation(weights, batch, sampling, stops, keys)], 1)


def row_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """A key a row, that depends on the seed and the row's number alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers, jnp.uint32))


def _merge(graphdef, traced):
    """-> the model, and its layers as cache.py wants them."""
    params, apart = traced
    if apart is None:
        model = nnx.merge(graphdef, nest(params))
        return model, nnx.split(model.llm.layers)
    model = nnx.merge(graphdef, nest(params | {LAYERS + path: array for path, array in apart[0].items()}))
    return model, (nnx.graphdef(model.llm.layers), [nest(layer) for layer in apart])


def _choose(model: MultimodalModel, hidden, state: dict, keys, numbers, stops, kind: Kind):
    """The token after `hidden` [B, D] -> the state with it, and what to tell of it."""
    tokens, logprobs = choose(model.llm.logits(hidden), state.get("used"), state["count"], keys, numbers, stops, kind=kind)
    told = jnp.where(state["done"], -1, tokens)
    state = state | {"token": tokens, "count": state["count"] + 1, "done": state["done"] | jnp.any(tokens[:, None] == stops, -1)}
    if kind.penalised:
        state["used"] = state["used"].at[jnp.arange(tokens.shape[0]), tokens].set(True)
    whole = lambda x: constrain(x, *(None,) * x.ndim)  # noqa: E731  (on every device, so that every process can read it)
    return state | {name: whole(state[name]) for name in ("token", "done")}, whole(told), whole(logprobs)


def _start(traced, batch, keys, numbers, stops, *, graphdef, kind, has_cache, room):
    model, blocks = _merge(graphdef, traced)
    hidden, memory = (cache if has_cache else recompute).start(model, blocks, model.embed(batch), batch, room)
    rows, is_text = jnp.arange(hidden.shape[0])[:, None], (batch["segment_ids"] != 0) & (batch["media_index"] < 0)
    state = {"memory": memory, "count": jnp.int32(0), "done": ~jnp.any(batch["segment_ids"] != 0, -1)}
    if kind.penalised:
        state["used"] = jnp.zeros((hidden.shape[0], model.llm.config.padded_vocab_size), bool).at[rows, batch["tokens"]].max(is_text)
    return _choose(model, hidden, state, keys, numbers, stops, kind)


def _go_on(traced, state, keys, numbers, stops, n, *, graphdef, kind, has_cache):
    model, blocks = _merge(graphdef, traced)
    remember = (cache if has_cache else recompute).step
    rows = state["token"].shape[0]

    def turn(carry):
        i, state, tokens, logprobs = carry
        embeddings = model.llm.embed(state["token"][:, None])[:, 0]
        hidden, memory = remember(model, blocks, state["memory"], embeddings, state["count"] - 1)
        state, token, logprob = _choose(model, hidden, state | {"memory": memory}, keys, numbers, stops, kind)
        return i + 1, state, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

    start = jnp.int32(0), state, jnp.full((rows, CHUNK), -1, jnp.int32), jnp.zeros((rows, CHUNK))
    return jax.lax.while_loop(lambda carry: (carry[0] < n) & ~jnp.all(carry[1]["done"]), turn, start)[1:]


@functools.cache
def programs(platform: str):
    """-> `_start` and `_go_on`, compiled for a platform ("gpu", "cpu"). On a GPU, XLA would make one GEMM of q, k and v, and copy their weights for it."""
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if platform in ("gpu", "cuda") else None
    fixed = ("graphdef", "kind", "has_cache")
    start = jax.jit(_start, static_argnames=(*fixed, "room"), compiler_options=options)
    return start, jax.jit(_go_on, static_argnames=fixed, donate_argnames=("state",), compiler_options=options)
