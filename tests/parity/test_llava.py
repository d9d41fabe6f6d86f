"""The whole of LLaVA against transformers and against what the original LLaVA answered: features, logits, loss, gradients within 1e-4, greedy answers equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Array, golden, neva_config, randomise, read_weights

from neva_jax.convert import hf
from neva_jax.inference.generate import generate as generate_ids
from neva_jax.inference.generate import set_apart
from neva_jax.inference.sampling import Sampling
from neva_jax.models.fusion import fuse
from neva_jax.models.multimodal import neva
from neva_jax.training.loss import row_weights, supervised_cross_entropy
from neva_jax.transforms.select import nest

IMAGE = 159
TEXT = dict(
    vocab_size=163, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    rope_theta=10000.0, max_position_embeddings=128,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)


def our_llava(directory, dtype="float32", padded=None, **vision):
    """-> config, graphdef, {path: array}"""
    config = neva_config(directory, padded=padded, llm={"dtype": dtype}, vision={"dtype": dtype} | vision)
    tensors = hf.open_tensors(directory)
    key_map = hf.key_map(config, tensors)
    key_map.check(tensors, list(key_map.rules), "test")
    return config, *read_weights(lambda: neva(config, rngs=nnx.Rngs(0)), tensors, key_map)


def make_batch(rows, pixel_values, media_length, *, length=None, max_media=None):
    """rows: [(ids with IMAGE once for every vector, their labels or None)]; pixel_values: [images of all rows, 3, H, W] -> a batch as the data makes it.

    Labels are shifted here: they say the next token. Rows are padded on the right, and with black pictures.
    """
    length = length or max(len(ids) for ids, _ in rows)
    counts = [int((ids == IMAGE).sum()) // media_length for ids, _ in rows]
    assert sum(counts) == len(pixel_values)
    shape = len(rows), length
    media = np.zeros((len(rows), max(counts) if max_media is None else max_media, *pixel_values.transpose(0, 2, 3, 1).shape[1:]), np.float32)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids")}
    batch |= {"media": media, "media_index": np.full(shape, -1, np.int32), "labels": np.full(shape, -100, np.int32)}
    batch["position_ids"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    first = 0
    for i, ((ids, labels), count) in enumerate(zip(rows, counts, strict=True)):
        n = len(ids)
        batch["tokens"][i, :n], batch["segment_ids"][i, :n] = np.where(ids == IMAGE, 0, ids), 1
        batch["media_index"][i, :n] = np.where(ids == IMAGE, np.cumsum(ids == IMAGE) - 1, -1)
        media[i, :count] = pixel_values[first : first + count].transpose(0, 2, 3, 1)
        first += count
        if labels is not None:
            batch["labels"][i, : n - 1] = labels[1:]
    batch["supervised_positions"] = np.where(batch["labels"] >= 0, batch["position_ids"], -1)
    return batch


def outputs(graphdef, batch):
    """params -> loss, (image features, fused embeddings, logits)"""

    def function(params):
        model = nnx.merge(graphdef, nest(params))
        features = model.encode(batch["media"])
        embeddings = fuse(model.llm.embed(batch["tokens"]), features, batch["media_index"])
        hidden = model(batch)
        weights = row_weights(jnp.asarray(batch["labels"])[None], "global_token_mean", 1)[0]
        loss = supervised_cross_entropy(model.llm.logits, hidden, batch["labels"], batch["supervised_positions"], weights)
        return loss, (features, embeddings, model.llm.logits(hidden))

    return function


# ---- against transformers ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """transformers' tiny LLaVA with random weights, and the directory where it is saved."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_seq_length=4, attn_implementation="eager",
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("llava")
    model = randomise(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(directory)
    return model, directory


def text(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 150, count).tolist()


PICTURE = [IMAGE] * 4
ROWS = {
    "start": [[1, *PICTURE, *text(9, 0)]],
    "middle": [[1, *text(5, 1), *PICTURE, *text(6, 2)]],
    "two": [[1, *PICTURE, *text(3, 3), *PICTURE, *text(5, 4)]],
    "a batch of one, none and two": [
        [1, *text(5, 1), *PICTURE, *text(2, 2)], [1, *text(9, 5)], [1, *PICTURE, *PICTURE, *text(8, 6)],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_features_logits_loss_and_gradients(live, name):
    import torch

    theirs, directory = live
    config, graphdef, params = our_llava(directory, padded=192)
    assert config.media_length == 4 and config.llm.head_dim == 12
    ids = [np.array(row) for row in ROWS[name]]
    labels = [np.where((row == IMAGE) | (np.arange(len(row)) < 3), -100, row) for row in ids]
    count = sum(int((row == IMAGE).sum()) // 4 for row in ids)
    pixels = np.random.default_rng(7).normal(size=(count, 3, 28, 28)).astype(np.float32)
    batch = make_batch(list(zip(ids, labels, strict=True)), pixels, config.media_length)

    theirs.zero_grad()
    padded_ids, padded_labels = (
        torch.tensor(np.stack([np.pad(row, (0, batch["tokens"].shape[1] - len(row)), constant_values=fill) for row in rows]))
        for rows, fill in ((ids, 0), (labels, -100))
    )
    attention = torch.tensor(batch["segment_ids"])
    out = theirs(input_ids=padded_ids, pixel_values=torch.tensor(pixels), attention_mask=attention, labels=padded_labels)
    out.loss.backward()

    (loss, (features, _, logits)), grads = jax.jit(jax.value_and_grad(outputs(graphdef, batch), has_aux=True))(params)
    present = np.concatenate([np.arange(features.shape[1]) < (row == IMAGE).sum() // 4 for row in ids])
    np.testing.assert_allclose(np.concatenate(features)[present], out.image_hidden_states.detach().reshape(count, 4, -1), atol=1e-4)
    valid = batch["segment_ids"] > 0
    np.testing.assert_allclose(logits[..., :163][valid], out.logits.detach().numpy()[valid], atol=1e-4)
    np.testing.assert_allclose(loss, out.loss.item(), atol=1e-4)

    named = {hf.canonical(n): p for n, p in theirs.named_parameters()}
    expected = {n: Array((torch.zeros_like(p) if p.grad is None else p.grad).numpy()) for n, p in named.items()}
    key_map = hf.key_map(config, expected)
    for path, grad in grads.items():
        want = key_map.read(expected, path, grad.shape, "gradients")
        np.testing.assert_allclose(grad, want, atol=1e-4, err_msg=path)
        assert np.abs(want).max() > 1e-3 or "post_layernorm" in path or path.endswith("k_proj/bias"), f"{path}: nothing was compared"


# ---- against stored answers of the originals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return our_llava(golden("checkpoints/llava"))


@pytest.fixture(scope="module")
def answers():
    return np.load(golden("checkpoints/llava_golden.npz"))


CASES = ("one_start", "one_mid", "two_imgs")


@pytest.mark.parametrize("case", CASES)
def test_golden(llava, answers, case):
    config, graphdef, params = llava
    batch = make_batch([(answers[f"{case}/input_ids"][0], answers[f"{case}/labels"][0])], answers[f"{case}/pixel_values"], config.media_length)
    loss, (features, _, logits) = jax.jit(outputs(graphdef, batch))(params)
    np.testing.assert_allclose(logits, answers[f"{case}/logits"], atol=1e-4)
    np.testing.assert_allclose(loss, answers[f"{case}/loss"], atol=1e-4)
    if case == "two_imgs":
        np.testing.assert_allclose(features[0], answers["two_imgs/image_features"], atol=1e-5)


@pytest.mark.parametrize("case", ["single", "batch", "two_images"])
def test_what_the_original_llava_computed(llava, case):
    """-200 stands for a picture in its input; a row without one still takes a picture from the batch, which it does not look at."""
    config, graphdef, params = llava
    z = {name.split("/")[1]: value for name, value in np.load(golden("llava_forward.npz")).items() if name.startswith(f"{case}/")}
    rows, pixels, images = [], [], iter(z["images"])
    for ids, mask, labels in zip(z["input_ids"], z["attention_mask"], z["labels"], strict=True):
        repeats = np.where(ids[mask] == -200, config.media_length, 1)
        rows.append((np.repeat(np.where(ids[mask] == -200, IMAGE, ids[mask]), repeats), np.repeat(labels[mask], repeats)))
        taken = [next(images) for _ in range(max(1, int((ids == -200).sum())))]
        pixels += taken if -200 in ids else []
    batch = make_batch(rows, np.stack(pixels), config.media_length)
    loss, (_, embeddings, logits) = jax.jit(outputs(graphdef, batch))(params)
    valid = z["out_attention_mask"]
    np.testing.assert_array_equal(batch["segment_ids"] > 0, valid)
    np.testing.assert_allclose(embeddings[valid], z["out_embeds"][valid], atol=1e-5)
    np.testing.assert_allclose(logits[valid], z["logits"][valid], atol=1e-4)
    np.testing.assert_allclose(loss, z["loss"], atol=1e-4)


# ---- generation --------------------------------------------------------------------------------------------------------------------------------------


def generate(llava, batch, max_new_tokens=12, stop_id=2):
    _, graphdef, params = llava
    weights = set_apart(graphdef, jax.tree.map(jnp.asarray, params))
    return generate_ids(weights, batch, Sampling(max_new_tokens), (stop_id,))


def prompts(answers, cases):
    return [(answers[f"{case}/input_ids"][0], None) for case in cases], np.concatenate([answers[f"{case}/pixel_values"] for case in cases])


def test_greedy_answers_alone(llava, answers):
    for case in CASES:
        assert answers[f"{case}/gen_margins"].min() > 1e-3, "no tie that rounding could turn"
        batch = make_batch(*prompts(answers, [case]), 16)
        np.testing.assert_array_equal(generate(llava, batch)[0], answers[f"{case}/generated"], err_msg=case)


def test_greedy_answers_in_one_batch_with_a_text_only_row(llava, answers):
    rows, pixels = prompts(answers, CASES)
    alone = make_batch([(np.array([1, 30, 31, 32]), None)], pixels[:0], 16, max_media=0)
    batch = make_batch([*rows[:2], (np.array([1, 30, 31, 32]), None), rows[2]], pixels, 16, length=60)
    together = generate(llava, batch)
    for row, case in ((0, "one_start"), (1, "one_mid"), (3, "two_imgs")):
        np.testing.assert_array_equal(together[row], answers[f"{case}/generated"], err_msg=case)
    np.testing.assert_array_equal(together[2], generate(llava, alone)[0])


def test_greedy_stops_at_the_stop_token(llava, answers):
    """Another token plays the part of the end: nothing comes after it, and other rows go on."""
    generated = answers["one_mid/generated"]
    stop = int(generated[4])
    batch = make_batch(*prompts(answers, CASES[:2]), 16, length=45)
    assert stop not in answers["one_start/generated"] and stop not in generated[:4]
    out = generate(llava, batch, stop_id=stop)
    np.testing.assert_array_equal(out, [answers["one_start/generated"], [*generated[:5], *[-1] * 7]])


# ---- fusion ------------------------------------------------------------------------------------------------------------------------------------------


def test_fuse_places_features_and_learned_vectors():
    rng = np.random.default_rng(0)
    embeddings, media, learned = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(2, 3))
    media_index = np.array([[-1, 0, 1, 4, 3, -1], [5, -1, -1, 2, 2, 4]])  # N * S = 4: indices 4 and 5 are the learned ones
    fused = fuse(jnp.asarray(embeddings), jnp.asarray(media), jnp.asarray(media_index), jnp.asarray(learned))
    for b, row in enumerate(media_index):
        vectors = [*media[b].reshape(4, 3), *learned]
        np.testing.assert_allclose(fused[b], [embeddings[b, t] if i < 0 else vectors[i] for t, i in enumerate(row)], rtol=1e-6)


def test_fuse_of_nothing_is_the_text_itself():
    embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
    for count in (0, 2):
        np.testing.assert_array_equal(fuse(embeddings, jnp.ones((2, count, 2, 3)), jnp.full((2, 6), -1)), embeddings)


def test_fuse_keeps_the_dtype_of_the_text():
    fused = fuse(jnp.zeros((1, 3, 4), jnp.float32), jnp.ones((1, 1, 2, 4), jnp.bfloat16), jnp.array([[0, -1, 1]]))
    assert fused.dtype == jnp.float32 and fused[0, :, 0].tolist() == [1, 0, 1]


def test_a_picture_of_another_row_is_never_seen(llava, answers):
    """Row 0's embeddings depend on row 0's media alone, and a text row on none."""
    config, graphdef, params = llava
    rows, pixels = prompts(answers, CASES[:2])
    batch = make_batch([*rows, (np.array([1, 30, 31, 32]), None)], pixels, 16)
    other = batch | {"media": batch["media"].copy()}
    other["media"][1:] += 1.0
    hidden = jax.jit(lambda params, batch: nnx.merge(graphdef, nest(params))(batch))
    a, b = hidden(params, batch), hidden(params, other)
    np.testing.assert_array_equal(a[jnp.array([0, 2])], b[jnp.array([0, 2])])
    assert not np.allclose(a[1], b[1])


@pytest.mark.parametrize(
    "name, value", [("position_ids", np.zeros((1, 3), np.int32)), ("media_index", np.zeros((1, 27))), ("media", np.zeros((2, 1, 16, 16, 3)))]
)
def test_a_batch_of_wrong_shapes_says_which(llava, answers, name, value):
    _, graphdef, params = llava
    batch = make_batch(*prompts(answers, CASES[:1]), 16) | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be"):
        nnx.merge(graphdef, nest(params))(batch)


# ---- bf16 --------------------------------------------------------------------------------------------------------------------------------------------


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from all_equations(inner)


def test_bf16_is_near_fp32_and_what_must_be_precise_runs_in_fp32(answers):
    """bf16 rounds every activation by up to 2**-9 of itself; after five blocks, logits with a spread of 1 are off by at most 0.1 and by 0.02 on average."""
    directory = golden("checkpoints/llava")
    config, graphdef, params = our_llava(directory, dtype="bfloat16")
    batch = make_batch([(answers["two_imgs/input_ids"][0], answers["two_imgs/labels"][0])], answers["two_imgs/pixel_values"], 16)
    function = outputs(graphdef, batch)
    loss, (features, embeddings, logits) = jax.jit(function)(params)
    assert (features.dtype, embeddings.dtype, logits.dtype, loss.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32)
    difference = np.abs(np.asarray(logits) - answers["two_imgs/logits"])
    assert 1e-4 < difference.max() < 0.1 and difference.mean() < 0.02
    np.testing.assert_allclose(loss, answers["two_imgs/loss"], atol=0.02)

    found = {name: set() for name in ("dot_general", "exp", "log", "rsqrt", "reduce_sum", "reduce_max")}
    of_logits = set()
    for equation in all_equations(jax.make_jaxpr(function)(params).jaxpr):
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape[-1] == 160:
            of_logits.add(str(equation.outvars[0].aval.dtype))
        if equation.primitive.name in found:
            found[equation.primitive.name] |= {str(v.aval.dtype) for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
    assert "bfloat16" in found.pop("dot_general"), "GEMMs run in bf16"
    assert found == {name: {"float32"} for name in found}, "norms, softmax and loss run in fp32"
    assert of_logits == {"float32"}, "logits leave their GEMM in fp32"
