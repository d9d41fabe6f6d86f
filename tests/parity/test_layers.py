"""Layers against plain torch or transformers, within 1e-5: norms, activations, rope, attention, and one block of a model like NVGPT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.fields import ACTIVATIONS as DOCUMENTED_ACTIVATIONS
from neva_jax.layers.attention import Attention, attend, make_attend
from neva_jax.layers.mlp import ACTIVATIONS, MLP
from neva_jax.layers.norm import LayerNorm, LayerNorm1P, RMSNorm
from neva_jax.layers.rope import Rope, rotate
from neva_jax.models.llama import Llama, LlamaConfig
from neva_jax.parallel.layer_runner import scan_layers
from neva_jax.transforms.select import describe, nest

torch = pytest.importorskip("torch")
F = torch.nn.functional


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def random_weights(make, seed=0):
    """-> graphdef, {path: random array}: kernels like 1/sqrt(in), biases 0.3, gains about 1 (a layernorm1p's about 0)."""
    graphdef, weights = describe(make)
    params = {}
    for i, (path, w) in enumerate(weights.items()):
        kernel = path.endswith(("kernel", "embedding"))
        params[path] = normal(*w.shape, seed=seed + i, scale=w.shape[-2] ** -0.5 if kernel else 0.3) + (1.0 if path.endswith("scale") else 0.0)
    return graphdef, params


# ---- norms -------------------------------------------------------------------------------------------------------------------------------------------


def plain_norm(kind, x, scale, bias, epsilon):
    x, scale = torch.tensor(x), torch.tensor(scale)
    if kind is RMSNorm:
        return F.rms_norm(x, x.shape[-1:], scale, epsilon).numpy()
    return F.layer_norm(x, x.shape[-1:], scale + 1 if kind is LayerNorm1P else scale, torch.tensor(bias), epsilon).numpy()


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm, LayerNorm1P])
def test_norm(kind, epsilon):
    x, scale, bias = 3 + 2 * normal(2, 5, 12), 1 + normal(12, seed=1), normal(12, seed=2)
    module = kind(12, epsilon, rngs=nnx.Rngs(0))
    born = module(jnp.asarray(x))
    np.testing.assert_allclose(born, plain_norm(kind, x, np.full(12, kind is not LayerNorm1P, np.float32), 0 * bias, epsilon), atol=1e-5)
    module.scale[...] = scale
    if kind is not RMSNorm:
        module.bias[...] = bias
    np.testing.assert_allclose(module(jnp.asarray(x)), plain_norm(kind, x, scale, bias, epsilon), atol=1e-5)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm, LayerNorm1P])
def test_norm_has_its_statistics_in_fp32(kind):
    module = kind(64, 1e-5, rngs=nnx.Rngs(0))
    x = jnp.asarray(100 + normal(4, 64)).astype(jnp.bfloat16)
    y = module(x)
    assert y.dtype == jnp.bfloat16
    scale = np.full(64, kind is not LayerNorm1P, np.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), plain_norm(kind, np.asarray(x, np.float32), scale, 0 * scale, 1e-5), rtol=2**-8, atol=2**-8)
    assert module(jnp.asarray(normal(4, 64)), jnp.bfloat16).dtype == jnp.bfloat16, "an fp32 residual stream feeds bf16 GEMMs"


# ---- activations -------------------------------------------------------------------------------------------------------------------------------------

FORMULAS = {
    "gelu": F.gelu, "approx-gelu": lambda x: x * torch.sigmoid(1.702 * x), "squared-relu": lambda x: F.relu(x) ** 2,
    "geglu": F.gelu, "swiglu": F.silu, "reglu": F.relu, "fast-geglu": F.gelu, "fast-swiglu": F.silu, "fast-reglu": F.relu,
}  # fmt: skip


def test_every_documented_activation_is_here():
    assert set(FORMULAS) == set(ACTIVATIONS) == set(DOCUMENTED_ACTIVATIONS.split())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_mlp(name, bias):
    activation, gated = ACTIVATIONS[name]
    assert gated == name.endswith("glu")
    graphdef, p = random_weights(lambda: MLP(12, 20, activation=activation, gated=gated, bias=bias, rngs=nnx.Rngs(0)))
    x, t = normal(2, 3, 12), {path: torch.tensor(w) for path, w in p.items()}

    def linear(x, name):
        return F.linear(x, t[f"{name}/kernel"].T, t.get(f"{name}/bias"))

    up = linear(torch.tensor(x), "up_proj")
    hidden = FORMULAS[name](linear(torch.tensor(x), "gate_proj")) * up if gated else FORMULAS[name](up)
    np.testing.assert_allclose(nnx.merge(graphdef, nest(p))(jnp.asarray(x)), linear(hidden, "down_proj"), atol=1e-5)


# ---- rope --------------------------------------------------------------------------------------------------------------------------------------------

POSITIONS = np.array([[0, 1, 2, 3, 50, 1000, 4095], [7, 6, 5, 4, 3, 2, 1]])


def hugging_face_rope(x, head_dim, **parameters):
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = TheirConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=8192, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(POSITIONS))
    return apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)[0].numpy()


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)


@pytest.mark.parametrize(
    "rope, parameters",
    [
        (Rope(16), dict(rope_type="default", rope_theta=10000.0)),
        (Rope(128), dict(rope_type="default", rope_theta=10000.0)),
        (Rope(12, base=500000.0), dict(rope_type="default", rope_theta=500000.0)),
        (Rope(16, interpolation=4.0), dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        (Rope(32, base=5e5, llama3=tuple(LLAMA3.values())), dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)),
    ],
    ids=["base 10000", "head dim 128", "base 500000", "interpolation", "llama3"],
)
def test_rope(rope, parameters):
    x = normal(2, 7, 3, rope.head_dim)
    np.testing.assert_allclose(rotate(jnp.asarray(x), *rope.angles(POSITIONS)), hugging_face_rope(x, rope.head_dim, **parameters), atol=1e-5)


def test_rope_of_half_a_head_is_rope_of_a_smaller_head_and_the_rest_passes():
    x = normal(2, 7, 3, 24)
    ours = np.asarray(rotate(jnp.asarray(x), *Rope(24, percentage=0.5).angles(POSITIONS)))
    np.testing.assert_array_equal(ours[..., 12:], x[..., 12:])
    np.testing.assert_allclose(ours[..., :12], hugging_face_rope(x[..., :12], 12, rope_type="default", rope_theta=10000.0), atol=1e-5)


# ---- attention ---------------------------------------------------------------------------------------------------------------------------------------


def plain_attention(query, key, value, is_causal, scale, lengths=None):
    """[B, T, H, C] with as many key heads, head by head of torch."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    positions = torch.arange(query.shape[1])
    if is_causal:
        scores = scores.masked_fill(positions[None] > positions[:, None], -torch.inf)
    if lengths is not None:
        scores = scores.masked_fill(positions >= torch.tensor(lengths)[:, None, None, None], -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).numpy()


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_attend(kv_heads, is_causal, scale):
    query, key, value = normal(2, 9, 6, 10), normal(2, 9, kv_heads, 10, seed=1), normal(2, 9, kv_heads, 10, seed=2)
    lengths = [9, 4]
    segments = (np.arange(9) < np.array(lengths)[:, None]).astype(np.int32)
    run = jax.jit(lambda q, k, v, s: attend(q, k, v, s, is_causal=is_causal, scale=scale))
    want = plain_attention(query, key, value, is_causal, scale or 10**-0.5, lengths)
    valid = segments.astype(bool)
    np.testing.assert_allclose(run(query, key, value, segments)[valid], want[valid], atol=1e-5)
    np.testing.assert_allclose(run(query, key, value, None), plain_attention(query, key, value, is_causal, scale or 10**-0.5), atol=1e-5)


def test_padded_rows_of_attention_are_finite():
    """Rows without a single valid position come with incomplete batches; a NaN there would reach the gradients of all."""
    x, segments = normal(2, 5, 2, 8), np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    value, grads = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.square(attend(x, x, x, jnp.asarray(segments), is_causal=True)))))(x)
    assert np.isfinite(value) and np.isfinite(grads).all()


@pytest.mark.parametrize(
    "platform, dtype, head_dim, flash, kernel",
    [
        ("gpu", jnp.bfloat16, 64, True, "cudnn"),
        ("gpu", jnp.bfloat16, 128, True, "cudnn"),
        ("cuda", jnp.float16, 128, True, "cudnn"),
        ("gpu", jnp.float32, 128, True, "xla"),
        ("gpu", jnp.bfloat16, 12, True, "xla"),
        ("gpu", jnp.bfloat16, 256, True, "xla"),
        ("gpu", jnp.bfloat16, 128, False, "xla"),
        ("cpu", jnp.bfloat16, 128, True, "xla"),
    ],
)
def test_the_choice_of_a_kernel(platform, dtype, head_dim, flash, kernel):
    chosen, name = make_attend(platform=platform, dtype=dtype, head_dim=head_dim, use_flash_attention=flash)
    assert name == kernel and chosen.keywords == {"implementation": kernel}


@pytest.mark.parametrize("biases", [dict(), dict(bias=True), dict(qkv_bias=True)], ids=["no bias", "bias", "qkv bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_module(kv_heads, biases):
    rope, x = Rope(10), normal(2, 7, 24)
    module = lambda: Attention(24, num_heads=4, num_kv_heads=kv_heads, head_dim=10, attend=attend, is_causal=True, rngs=nnx.Rngs(0), **biases)  # noqa: E731
    graphdef, p = random_weights(module)
    has_bias = {name: f"{name}/bias" in p for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert list(has_bias.values()) == [bool(biases)] * 3 + ["bias" in biases]

    def linear(x, name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0)

    def heads(name, count):
        return linear(x, name).reshape(2, 7, count, 10)

    def turned(x):
        return hugging_face_rope(x, 10, rope_type="default", rope_theta=10000.0)

    mixed = plain_attention(turned(heads("q_proj", 4)), turned(heads("k_proj", kv_heads)), heads("v_proj", kv_heads), True, 10**-0.5)
    run = jax.jit(lambda p, x: nnx.merge(graphdef, nest(p))(x, angles=rope.angles(POSITIONS)))
    np.testing.assert_allclose(run(p, x), linear(mixed.reshape(2, 7, 40), "o_proj"), atol=1e-5)


# ---- a model like NVGPT ------------------------------------------------------------------------------------------------------------------------------

NVGPT = LlamaConfig(
    vocab_size=50, padded_vocab_size=64, num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=4, head_dim=8,
    rope=Rope(8, percentage=0.5), normalization="layernorm1p", activation="squared-relu", bias=True, tied=True,
)  # fmt: skip


def plain_nvgpt(p, tokens, config):
    """The whole model in torch, written out: layernorm1p, rotary 0.5, squared-relu, biases, tied head."""
    t = {path: torch.tensor(w) for path, w in p.items()}
    batch, length = tokens.shape
    rotary = int(config.head_dim * config.rope.percentage)
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    cos, sin = (f(torch.cat([angle, angle], -1))[None, :, None] for f in (torch.cos, torch.sin))

    def norm(x, path, i):
        return F.layer_norm(x, x.shape[-1:], 1 + t[f"{path}/scale"][i], t[f"{path}/bias"][i], config.layernorm_epsilon)

    def linear(x, path, i):
        return F.linear(x, t[f"layers/{path}/kernel"][i].T, t[f"layers/{path}/bias"][i])

    def turned(x):
        x, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat([-x[..., rotary // 2 :], x[..., : rotary // 2]], -1)
        return torch.cat([x * cos + half * sin, rest], -1)

    x = t["embed_tokens/embedding"][torch.tensor(tokens)]
    states = [x]
    for i in range(config.num_layers):
        y = norm(x, "layers/input_layernorm", i)
        q, k, v = (linear(y, f"self_attn/{name}", i).reshape(batch, length, -1, config.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
        y = torch.tensor(plain_attention(turned(q).numpy(), turned(k).numpy(), v.numpy(), True, config.head_dim**-0.5))
        x = x + linear(y.reshape(batch, length, -1), "self_attn/o_proj", i)
        y = norm(x, "layers/post_attention_layernorm", i)
        x = x + linear(F.relu(linear(y, "mlp/up_proj", i)) ** 2, "mlp/down_proj", i)
        states.append(x)
    return states, norm(x, "norm", ...) @ t["embed_tokens/embedding"].T


def llama(config):
    return random_weights(lambda: Llama(config, attend=attend, runner=scan_layers, rngs=nnx.Rngs(0)))


def test_a_model_like_nvgpt():
    graphdef, p = llama(NVGPT)
    p = {path: w - 1 if path.endswith("scale") else w for path, w in p.items()}  # gains are stored minus one
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    states, logits = plain_nvgpt(p, tokens, NVGPT)

    def run(p):
        model = nnx.merge(graphdef, nest(p))
        block, stacked = nnx.split(model.layers)
        first = nnx.merge(block, jax.tree.map(lambda w: w[0], stacked))
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
        return first(model.embed(tokens), (NVGPT.rope.angles(positions), None)), model(tokens)

    block, ours = jax.jit(run)(p)
    np.testing.assert_allclose(block, states[1], atol=1e-5)
    np.testing.assert_allclose(ours[..., :50], logits[..., :50], atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_rows_never_win(tied):
    """Even where the padding of the table is enormous: not the largest, no share of the softmax, no gradient."""
    config = dataclasses.replace(NVGPT, tied=tied)
    graphdef, p = llama(config)
    head = "embed_tokens/embedding" if tied else "lm_head/kernel"
    assert ("lm_head/kernel" in p) == (not tied)
    padding = np.s_[50:] if tied else np.s_[:, 50:]
    p[head][padding] = 1e6
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))

    def loss(p):
        logits = nnx.merge(graphdef, nest(p))(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 7]), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(p)
    assert logits.shape == (2, 9, 64) and int(jnp.argmax(logits, -1).max()) < 50
    np.testing.assert_allclose(jax.nn.softmax(logits)[..., :50].sum(-1), 1.0, atol=1e-6)
    assert (grads[head][padding] == 0).all() and np.abs(grads[head]).max() > 0
