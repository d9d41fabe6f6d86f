"""LoRA as a transform: which Linears it finds, what it is born as, that it changes nothing by itself, what it drops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import quickstart
from neva_jax.build.lora import check_targets, targets_of
from neva_jax.errors import UserError
from neva_jax.fields import INITS, LORA_TARGETS
from neva_jax.layers.linear import Linear
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.parallel.layer_runner import make_runner
from neva_jax.transforms.lora import INITIALIZERS, Lora, Target, adapters_of, apply_lora, describe_keys, draw_keys, is_adapter
from neva_jax.transforms.select import describe, flatten, nest

LLM = LlamaConfig(
    vocab_size=60, padded_vocab_size=64, num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8, rope=Rope(8)
)
VISION = ClipVisionConfig(hidden_size=16, ffn_hidden_size=24, num_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
CONFIG = NevaConfig(LLM, VISION, "mlp2x_gelu")
ALL = Lora(4, 8.0, targets_of(("all",), "nemo"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 9)), jnp.int32)


def base(**how):
    return neva(CONFIG, rngs=nnx.Rngs(0), **how)


def make(lora: Lora, **how):
    return apply_lora(base(**how), lora, nnx.Rngs(5))


def values(module) -> dict[str, jax.Array]:
    return flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def away_from_zero(weights: dict) -> dict:
    """With adapters that do something."""
    rng = np.random.default_rng(1)
    return {path: 0.3 * jnp.asarray(rng.normal(size=a.shape), jnp.float32) if path.endswith("lora_B") else a for path, a in weights.items()}


def logits(graphdef, weights: dict) -> np.ndarray:
    return np.asarray(nnx.merge(graphdef, nest(weights)).llm(TOKENS))


def test_the_base_is_what_and_where_it_was():
    before, after = values(base()), values(make(ALL))
    assert {path for path in after if not is_adapter(path)} == before.keys()
    for path in before:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    adapters = {path for path in after if is_adapter(path)}
    assert adapters == {f"llm/layers/{path}" for path in (
        "self_attn/k_proj/lora_A", "self_attn/q_proj/lora_B", "self_attn/k_proj/lora_B", "self_attn/v_proj/lora_B", "self_attn/o_proj/lora_A",
        "self_attn/o_proj/lora_B", "mlp/gate_proj/lora_A", "mlp/gate_proj/lora_B", "mlp/up_proj/lora_B", "mlp/down_proj/lora_A", "mlp/down_proj/lora_B",
    )}  # fmt: skip
    axes = {path.removeprefix("llm/layers/self_attn/"): weight.axes for path, weight in describe(lambda: make(ALL))[1].items()}
    assert axes["o_proj/lora_A"] == ("layers", "heads", "rank") and axes["o_proj/lora_B"] == ("layers", None, "embed")
    assert axes["k_proj/lora_A"] == ("layers", "embed", "rank") and axes["k_proj/lora_B"] == ("layers", None, "kv_heads")


def test_born_as_the_identity():
    graphdef, _ = describe(lambda: make(ALL))
    np.testing.assert_array_equal(logits(graphdef, values(make(ALL))), logits(describe(base)[0], values(base())))


def test_what_it_computes():
    """Every adapted projection, shared A or not, is kernel + A B alpha / rank."""
    weights = away_from_zero(values(make(ALL)))
    merged = {path: a for path, a in weights.items() if not is_adapter(path)}
    pairs = adapters_of(merged, ALL)
    assert len(pairs) == 7 and len({lora_A for lora_A, _ in pairs.values()}) == 4
    for kernel, (lora_A, lora_B) in pairs.items():
        merged[kernel] += jnp.matmul(weights[lora_A], weights[lora_B], precision="highest") * 2.0
    found, expected = logits(describe(lambda: make(ALL))[0], weights), logits(describe(base)[0], merged)
    np.testing.assert_allclose(found[..., :60], expected[..., :60], rtol=0, atol=1e-5)
    assert np.max(np.abs(found[..., :60] - logits(describe(base)[0], values(base()))[..., :60])) > 0.05


def test_a_shared_input_gathers_the_gradients_of_all():
    """An A that q, k and v share has the sum of what three of its copies would have."""
    shared, apart = (Lora(4, 8.0, targets_of(("attention_qkv",), variant)) for variant in ("nemo", "canonical"))
    weights = away_from_zero(values(make(shared)))
    one = weights["llm/layers/self_attn/k_proj/lora_A"]
    copies = weights | {f"llm/layers/self_attn/{name}_proj/lora_A": one for name in "qkv"}

    def gradients(lora, weights):
        graphdef, _ = describe(lambda: make(lora))
        return jax.grad(lambda w: jnp.sum(jnp.square(nnx.merge(graphdef, nest(w)).llm(TOKENS)[..., :60])))(weights)

    found, expected = gradients(shared, weights), gradients(apart, copies)
    total = sum(expected[f"llm/layers/self_attn/{name}_proj/lora_A"] for name in "qkv")
    np.testing.assert_allclose(found["llm/layers/self_attn/k_proj/lora_A"], total, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(total))))


SPREADS = [("xavier", (2 / (1024 + 512)) ** 0.5, None), ("normal", 0.2, None), ("kaiming", (3 * 1024) ** -0.5, 1024**-0.5), ("zero", 0, 0)]


@pytest.mark.parametrize(("init", "std", "bound"), SPREADS)
def test_initial_values(init, std, bound):
    """The spread that torch gives a matrix of [512, 1024] (out, in)."""
    found = np.asarray(INITIALIZERS[init](jax.random.key(0), (2, 1024, 512)))
    assert np.std(found) == pytest.approx(std, rel=0.01, abs=1e-9) and abs(np.mean(found)) < 1e-3
    assert bound is None or np.max(np.abs(found)) <= bound
    assert tuple(INITIALIZERS) == INITS


def test_a_fused_matrix_is_counted_whole():
    """NeMo's linear_out for q, k and v is one matrix: xavier counts the columns of all three."""
    wide = dataclasses.replace(ALL, init_B="xavier", rank=8)
    found = values(make(wide))
    together = np.concatenate([np.ravel(found[f"llm/layers/self_attn/{name}_proj/lora_B"]) for name in "qkv"])
    assert np.std(together) == pytest.approx((2 / (8 + 64)) ** 0.5, rel=0.1)


def test_layers_without_adapters_stay_without():
    """Zeros in both factors: no gradient leads away, and weight decay keeps zeros."""
    chosen = dataclasses.replace(ALL, layers=(0, 2))
    graphdef, weights = describe(lambda: make(chosen))[0], values(make(chosen))
    grads = jax.grad(lambda w: jnp.sum(jnp.square(nnx.merge(graphdef, nest(w)).llm(TOKENS)[..., :60])))(weights)
    for path in filter(is_adapter, weights):
        assert not np.any(weights[path][1]) and not np.any(grads[path][1]), path
        assert np.any(grads[path][0]) and np.any(grads[path][2]) or path.endswith("lora_A")  # whose gradient waits for B
        assert bool(np.any(weights[path][0])) is path.endswith("lora_A")


def test_targets_touch_nothing_but_the_language_model():
    kernels = describe(base)[1]
    for name in LORA_TARGETS:
        for variant in ("nemo", "canonical"):
            found = adapters_of(kernels, Lora(4, 8.0, targets_of((name,), variant)))
            assert found and all(path.startswith("llm/layers/") for path in found), name
    assert len(adapters_of(kernels, Lora(4, 8.0, (Target("q_proj"),)))) == 2, "a bare pattern would find the tower's"


def test_what_is_refused():
    with pytest.raises(UserError, match=r"the pattern 'self_attn/qkv_proj' finds no Linear of the model; near misses: .*llm/layers/self_attn/"):
        make(Lora(4, 8.0, (Target("self_attn/qkv_proj"),)))
    with pytest.raises(UserError, match=r"k_proj is a matrix of 32 x 16.*would have rank 17; set .*adapter_dim to at most 16, or leave k_proj"):
        check_targets(quickstart.get_config("peft"), dataclasses.replace(ALL, rank=17), describe(base)[1])


# ---- dropout -----------------------------------------------------------------------------------------------------------------------------------------


def dropped(position: str, rate: float = 0.25, **how):
    lora = dataclasses.replace(ALL, dropout=rate, dropout_position=position)
    graphdef, shapes = describe_keys(lambda: make(lora, **how))
    return graphdef, shapes, away_from_zero(values(make(ALL)))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_is_right_on_average(position):
    """One projection alone, so that its output is linear in what is dropped."""
    lora = Lora(4, 8.0, (Target("q_proj$"),), dropout=0.25, dropout_position=position)

    def block(lora):
        return apply_lora(nnx.Dict(q_proj=Linear(24, 16, axes=(None, None), bias=False, rngs=nnx.Rngs(0))), lora, nnx.Rngs(1))

    graphdef, shapes = describe_keys(lambda: block(lora))
    weights = away_from_zero(values(block(lora)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 24)), jnp.float32)
    run = jax.jit(jax.vmap(lambda key: nnx.merge(graphdef, nest(weights | draw_keys(key, shapes)))["q_proj"](x)))
    found = np.asarray(run(jax.random.split(jax.random.key(0), 4000)))
    expected = np.asarray(nnx.merge(describe(lambda: block(dataclasses.replace(lora, dropout=0.0)))[0], nest(weights))["q_proj"](x))
    np.testing.assert_allclose(found.mean(0), expected, atol=5 * np.max(found.std(0)) / 4000**0.5)
    if position == "post":
        plain = np.asarray(x @ weights["q_proj/kernel"])
        assert np.mean(np.abs(found - plain) < 1e-6) == pytest.approx(0.25, abs=0.01), "a quarter of what comes out is dropped"


def test_keys_decide_and_nothing_else():
    graphdef, shapes, weights = dropped("post")
    run = jax.jit(lambda key: nnx.merge(graphdef, nest(weights | draw_keys(key, shapes))).llm(TOKENS))
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)[..., :60]) > 1e-3
    keys = draw_keys(jax.random.key(0), shapes)
    bits = np.concatenate([jax.random.key_data(key) for key in keys.values()])
    assert len(np.unique(bits, axis=0)) == len(bits) == 3 * 7, "every projection of every layer has its own"
    assert describe_keys(lambda: make(ALL))[1] == {}


def test_projections_that_share_an_input_drop_the_same_of_it():
    shapes = dropped("pre")[1]
    assert sorted(path.split("/")[-2] for path in shapes) == ["down_proj", "gate_proj", "k_proj", "o_proj"]


def test_layers_that_are_computed_again_drop_the_same():
    def gradients(runner):
        graphdef, shapes, weights = dropped("post", runner=runner)
        keys = draw_keys(jax.random.key(3), shapes)
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(nnx.merge(graphdef, nest(w | keys)).llm(TOKENS)[..., :60]))))(weights)

    kept, again = gradients(make_runner()), gradients(make_runner("full", "uniform", 1))
    for path in filter(is_adapter, kept):
        np.testing.assert_allclose(kept[path], again[path], rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(kept[path]))), err_msg=path)
