"""The next token: transformers' processors and warpers give the same scores, draws follow their distribution, and a row's draws are its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.errors import UserError
from neva_jax.inference.generate import row_keys
from neva_jax.inference.sampling import Sampling, choose, keep_likely

V = 50
LOGITS = np.random.default_rng(0).normal(size=(4, V)).astype(np.float32) * 2


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (5, 0.6), (1, 1.0), (0, 1e-6), (100, 0.99), (0, 0.5)])
def test_what_stays_is_what_transformers_keeps(top_k, top_p):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = torch.tensor(LOGITS)
    if top_k:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    np.testing.assert_array_equal(keep_likely(jnp.asarray(LOGITS), jnp.int32(top_k), jnp.float32(top_p)), theirs.numpy())


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_is_transformers(penalty):
    """Greedy under it: the argmax of their processed scores; logits of both signs."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    said = np.array([[1, 2, 3], [7, 7, 8], [int(LOGITS[2].argmax()), 0, 4], [int(LOGITS[3].argmin()), 9, 10]])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(said), torch.tensor(LOGITS)).numpy()
    used = np.zeros((4, V), bool)
    used[np.arange(4)[:, None], said] = True
    tokens, _ = pick(Sampling(repetition_penalty=penalty), used=used)
    np.testing.assert_array_equal(tokens, theirs.argmax(-1))
    assert (tokens != LOGITS.argmax(-1)).any() or penalty < 1


def pick(sampling, logits=LOGITS, used=None, step=0, stops=(-1,), seed=0):
    keys = row_keys(seed, np.arange(len(logits)))
    used = None if used is None else jnp.asarray(used)
    tokens, logprobs = choose(jnp.asarray(logits), used, jnp.int32(step), keys, sampling.numbers, jnp.array(stops), kind=sampling.kind)
    return np.asarray(tokens), np.asarray(logprobs)


def test_logprobs_are_of_the_models_own_logits():
    tokens, logprobs = pick(Sampling(temperature=3.0, top_k=2, top_p=0.5))
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(LOGITS))[np.arange(4), tokens], rtol=1e-5)


def test_no_end_before_the_least_length():
    best = int(LOGITS[0].argmax())
    for step, forbidden in ((0, True), (2, True), (3, False)):
        token = pick(Sampling(min_tokens=3), LOGITS[:1], step=step, stops=(best, -1))[0][0]
        assert (token != best) == forbidden
    second = int(np.argsort(LOGITS[0])[-2])
    assert pick(Sampling(min_tokens=3), LOGITS[:1], stops=(best, -1))[0][0] == second


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=1.0), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=4), Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.3, top_k=6, top_p=0.8, repetition_penalty=1.5),
])  # fmt: skip
def test_draws_follow_the_distribution(sampling):
    """20,000 rows of the same logits: each token's count lies within five standard deviations of what is expected, and what is filtered never comes."""
    count, few = 20_000, LOGITS[0, :12]
    used = np.tile(np.arange(12) < 3, (count, 1)) if sampling.kind.penalised else None
    scores = few.astype(np.float64).copy()
    if used is not None:
        scores[:3] = np.where(scores[:3] > 0, scores[:3] / sampling.repetition_penalty, scores[:3] * sampling.repetition_penalty)
    scores /= sampling.temperature
    scores[np.argsort(-scores)[sampling.top_k or len(scores) :]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    order = np.argsort(-p)
    p[order[1:][np.cumsum(p[order])[:-1] >= sampling.top_p]] = 0
    p /= p.sum()
    tokens, _ = pick(sampling, np.tile(few, (count, 1)), used)
    found = np.bincount(tokens, minlength=12)
    assert (found[p == 0] == 0).all() and (p > 0).sum() > 1
    assert (np.abs(found - count * p) <= 5 * np.sqrt(count * p * (1 - p)) + 1).all(), (found, count * p)


def test_a_row_draws_by_its_own_number():
    """The same tokens alone and in a batch; others with another seed, step or number."""
    sampling, logits = Sampling(temperature=1.0), np.tile(LOGITS[:1] / 10, (64, 1))
    together = pick(sampling, logits)[0]
    np.testing.assert_array_equal(pick(sampling, logits[:5])[0], together[:5])
    others = pick(sampling, logits, seed=1)[0], pick(sampling, logits, step=1)[0], together[::-1]
    assert all((other != together).sum() > 48 for other in others)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("temperature", -1, "temperature is -1, expected a number from 0"), ("temperature", float("nan"), "temperature is nan"), ("top_p", 0, "top_p is 0"),
    ("top_p", 1.5, "top_p is 1.5"), ("top_k", -1, "top_k is -1"), ("top_k", 2.5, "top_k is 2.5, expected a whole number"), ("top_k", True, "top_k is True"),
    ("repetition_penalty", 0, "repetition_penalty is 0"), ("max_new_tokens", 0, "max_new_tokens is 0"), ("min_tokens", 100, "give at most as many"),
    ("end_strings", "</s>", "expected a list of texts"), ("end_strings", [""], "at least one character"), ("end_strings", [3], "expected a text"),
    ("end_strings", None, "expected a list of texts"), ("end_strings", 5, "expected a list of texts"), ("end_strings", ["\udcff"], "at least one character"),
])  # fmt: skip
def test_values_out_of_range(field, value, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Sampling(), **{field: value})


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_near_zero_is_greedy(temperature, top_p):
    """1e-42 is 0 in float32."""
    np.testing.assert_array_equal(pick(Sampling(temperature=temperature, top_p=top_p))[0], LOGITS.argmax(-1))


def test_numbers_of_numpy():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), max_new_tokens=np.int32(4))
    np.testing.assert_array_equal(pick(sampling)[0], pick(Sampling(4, temperature=0.5, top_k=3))[0])
