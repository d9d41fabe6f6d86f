"""Llama against transformers (torch, CPU, fp32): layer by layer within 1e-5, logits, loss and gradients within 1e-4, several shapes of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Array, golden, neva_config, randomise, read_weights

from neva_jax.convert import hf
from neva_jax.layers.attention import attend
from neva_jax.models.llama import Llama
from neva_jax.parallel.layer_runner import make_runner, scan_layers
from neva_jax.training.loss import row_weights, supervised_cross_entropy
from neva_jax.transforms.select import nest

LENGTH = 24
BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
VARIANTS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2, rope_theta=500000.0),
    "mqa": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=20, num_key_value_heads=2),
    "gelu": dict(hidden_act="gelu"),
    "linear rope": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3 rope": dict(
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    ),
}


def torch_llama(directory, **changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**(BASE | changes), attn_implementation="eager")
    model = randomise(transformers.LlamaForCausalLM(config))
    model.save_pretrained(directory)
    return model


def our_llama(directory, runner=scan_layers, **llm):
    """-> config, graphdef, {path: array}"""
    config = neva_config(directory, llm=llm)
    tensors = hf.open_tensors(directory)
    return config, *read_weights(lambda: Llama(config.llm, attend=attend, runner=runner, rngs=nnx.Rngs(0)), tensors, hf.key_map(config, tensors), "llm/")


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_logits_loss_and_gradients(tmp_path, name):
    import torch

    theirs = torch_llama(tmp_path, **VARIANTS[name])
    config, graphdef, params = our_llama(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (2, LENGTH))
    labels = np.where(np.arange(LENGTH) > 4, np.roll(tokens, -1, 1), -100)
    labels[:, -1] = -100
    positions = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))

    out = theirs(torch.tensor(tokens), output_hidden_states=True)
    states = np.stack([h.detach().numpy() for h in out.hidden_states])  # the last is behind the last norm
    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, 97), torch.tensor(labels).reshape(-1), ignore_index=-100)
    loss.backward()

    def our_loss(params):
        model = nnx.merge(graphdef, nest(params))
        embeddings = model.embed(tokens)
        hidden = model.decode(embeddings, positions)
        weights = row_weights(jnp.asarray(labels)[None], "global_token_mean", 1)[0]
        value = supervised_cross_entropy(model.logits, hidden, jnp.asarray(labels), jnp.where(labels >= 0, positions, -1), weights)
        side, (block, stacked) = (config.llm.rope.angles(positions), None), nnx.split(model.layers)
        layers = jax.lax.map(lambda layer: nnx.merge(block, layer[0])(layer[1], side), (stacked, states[:-1]))  # each fed what theirs was fed
        return value, (embeddings, layers.at[-1].set(model.norm(layers[-1])), model.logits(hidden))

    (value, (embeddings, layers, logits)), grads = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(params)
    np.testing.assert_allclose(embeddings, states[0], atol=1e-5)
    np.testing.assert_allclose(layers, states[1:], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits, out.logits.detach(), atol=1e-4)
    np.testing.assert_allclose(value, loss.item(), atol=1e-4)

    expected = {hf.canonical(n): Array(p.grad.numpy()) for n, p in theirs.named_parameters()}
    key_map = hf.key_map(config)
    for path, grad in grads.items():
        want = key_map.read(expected, f"llm/{path}", grad.shape, "gradients")
        np.testing.assert_allclose(grad, want, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa"])
def test_golden(name):
    answers = np.load(golden(f"checkpoints/{name}_golden.npz"))
    _, graphdef, params = our_llama(golden(f"checkpoints/{name}"), vocab_size=160, padded_vocab_size=256)
    logits = np.asarray(jax.jit(lambda params, tokens: nnx.merge(graphdef, nest(params))(tokens))(params, answers["input_ids"]))
    assert (logits[..., 160:] < -1e30).all(), "padded rows never win"
    valid = answers["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[..., :160][valid], answers["logits"][valid], atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama's directory, and its loss and gradients under the plain runner."""
    directory = tmp_path_factory.mktemp("llama")
    torch_llama(directory)
    return directory, *loss_and_gradients(directory, scan_layers)


def loss_and_gradients(directory, runner):
    _, graphdef, params = our_llama(directory, runner)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 10))
    function = jax.value_and_grad(lambda params: jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, nest(params))(tokens))[..., 3]))
    return *jax.jit(function)(params), str(jax.make_jaxpr(function)(params))


@pytest.mark.parametrize("plan", [("full", "uniform", 1), ("full", "uniform", 2), ("full", "block", 2)])
def test_every_way_to_run_layers_gives_the_same_numbers(plain, plan):
    directory, value, grads, jaxpr = plain
    other_value, other_grads, other_jaxpr = loss_and_gradients(directory, make_runner(*plan))
    assert "remat" in other_jaxpr and "remat" not in jaxpr, "the runner recomputes"
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    for path in grads:
        np.testing.assert_allclose(grads[path], other_grads[path], atol=1e-6, err_msg=path)


def test_padding_on_the_right_changes_nothing(plain):
    _, graphdef, params = our_llama(plain[0])
    tokens = np.random.default_rng(0).integers(0, 97, (1, 9))
    padded, segments = np.pad(tokens, [(0, 0), (0, 7)]), (np.arange(16) < 9).astype(np.int32)[None]

    def both(params):
        model = nnx.merge(graphdef, nest(params))
        return model(padded, segment_ids=segments)[:, :9], model(tokens)

    np.testing.assert_allclose(*jax.jit(both)(params), atol=1e-5)


def test_every_weight_has_a_gradient(plain):
    """Parity of gradients would hold for weights that nothing reads."""
    assert all(np.abs(grad).max() > 0 for grad in plain[2].values())
