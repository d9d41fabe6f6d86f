"""Llama against transformers (torch, CPU, fp32): layer by layer within 1e-5, logits, loss and gradients within 1e-4, several shapes of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fill, golden, neva_config, randomise

from neva_jax.convert import hf
from neva_jax.layers.attention import attend
from neva_jax.models.llama import Llama
from neva_jax.parallel.layer_runner import make_runner, scan_layers
from neva_jax.training.loss import row_weights, supervised_cross_entropy

BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
VARIANTS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2, rope_theta=500000.0),
    "mqa": dict(num_key_value_heads=1, rms_norm_eps=1e-3),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=20, num_key_value_heads=2),
    "linear rope": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3 rope": dict(
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    ),
}


def torch_llama(tmp_path, **changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**(BASE | changes), attn_implementation="eager")
    model = randomise(transformers.LlamaForCausalLM(config))
    model.save_pretrained(tmp_path)
    return model


def our_llama(directory, runner=scan_layers, **llm):
    config = neva_config(directory, llm=llm)
    tensors = hf.open_tensors(directory)
    return fill(Llama(config.llm, attend=attend, runner=runner, rngs=nnx.Rngs(0)), tensors, hf.key_map(config, tensors), "llm")


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_logits_loss_and_gradients(tmp_path, name):
    import torch

    theirs = torch_llama(tmp_path, **VARIANTS[name])
    ours = our_llama(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    labels = np.where(np.arange(24) > 4, np.roll(tokens, -1, 1), -100)
    labels[:, -1] = -100

    out = theirs(torch.tensor(tokens), output_hidden_states=True)
    x = ours.embed(jnp.asarray(tokens))
    np.testing.assert_allclose(x, out.hidden_states[0].detach(), atol=1e-5)
    side = (ours.config.rope.angles(jnp.broadcast_to(jnp.arange(24), (2, 24))), None)
    graphdef, stacked = nnx.split(ours.layers)
    for i in range(2):  # hidden_states[3] of transformers is behind the last norm
        layer = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked))
        x = layer(jnp.asarray(out.hidden_states[i].detach().numpy()), side)
        np.testing.assert_allclose(x, out.hidden_states[i + 1].detach(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), out.logits.detach(), atol=1e-4)

    loss = torch.nn.functional.cross_entropy(out.logits.reshape(-1, 97), torch.tensor(labels).reshape(-1), ignore_index=-100)
    loss.backward()
    graphdef, state = nnx.split(ours)
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))

    def our_loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model.decode(model.embed(jnp.asarray(tokens)), positions)
        weights = row_weights(jnp.asarray(labels)[None], "global_token_mean", 1)[0]
        return supervised_cross_entropy(model.logits, hidden, jnp.asarray(labels), jnp.where(labels >= 0, positions, -1), weights)

    value, grads = jax.value_and_grad(our_loss)(state)
    np.testing.assert_allclose(value, loss.item(), atol=1e-4)
    expected = {hf.canonical(n): _Array(p.grad.numpy()) for n, p in theirs.named_parameters() if p.grad is not None}
    key_map = hf.key_map(neva_config(tmp_path))
    for path, grad in nnx.to_flat_state(grads):
        want = key_map.read(expected, "llm/" + "/".join(map(str, path)), grad.shape, "gradients")
        np.testing.assert_allclose(grad[...], want, atol=1e-4, err_msg=str(path))


class _Array:
    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def read(self):
        return self.array


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa"])
def test_golden(name):
    answers = np.load(golden(f"checkpoints/{name}_golden.npz"))
    ours = our_llama(golden(f"checkpoints/{name}"), vocab_size=160, padded_vocab_size=256)
    logits = ours(jnp.asarray(answers["input_ids"]))
    assert (np.asarray(logits[..., 160:]) < -1e30).all(), "padded rows never win"
    valid = answers["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(logits[..., :160])[valid], answers["logits"][valid], atol=1e-4)


@pytest.mark.parametrize("plan", [("full", "uniform", 1), ("full", "uniform", 2), ("full", "block", 2), (None, None, None)])
def test_every_way_to_run_layers_gives_the_same_numbers(tmp_path, plan):
    torch_llama(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 10)))

    def loss_and_gradients(runner):
        graphdef, state = nnx.split(our_llama(tmp_path, runner))
        return jax.value_and_grad(lambda s: jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, s)(tokens))[..., 3]))(state)

    (a, ga), (b, gb) = loss_and_gradients(scan_layers), loss_and_gradients(make_runner(*plan))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ga, gb)


def test_padding_on_the_right_changes_nothing(tmp_path):
    torch_llama(tmp_path)
    ours = our_llama(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (1, 9)))
    padded = jnp.pad(tokens, [(0, 0), (0, 7)])
    segments = (jnp.arange(16) < 9).astype(jnp.int32)[None]
    np.testing.assert_allclose(ours(padded, segment_ids=segments)[:, :9], ours(tokens), atol=1e-5)
