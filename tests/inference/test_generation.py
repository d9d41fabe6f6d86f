"""Whole answers: the same with a cache and without, alone and in a batch, on one device and on a mesh, and those of transformers; stops, limits, streams."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise

from neva_jax.data.pipeline import pad_examples
from neva_jax.errors import UserError
from neva_jax.inference import generate as engine
from neva_jax.inference.answers import Speaker
from neva_jax.inference.generate import Weights, generate, row_keys, set_apart
from neva_jax.inference.sampling import Sampling
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.parallel.mesh import make_mesh
from neva_jax.parallel.sharding import weight_sharding
from neva_jax.transforms.select import describe

LLM = LlamaConfig(61, 64, 3, 32, 48, 4, 2, 8, Rope(8))
CONFIG = NevaConfig(LLM, ClipVisionConfig(16, 24, 2, 2, 8, 4), "mlp2x_gelu")  # four vectors a picture
GRAPHDEF, SHAPES = describe(lambda: neva(CONFIG, rngs=nnx.Rngs(0)))


def params():
    rng = np.random.default_rng(3)
    return {path: jnp.asarray(rng.normal(size=w.shape) * 0.4 + path.endswith("scale"), jnp.float32) for path, w in SHAPES.items()}


def prompts(*rows, length=24, seed=0):
    """rows: (tokens, pictures) counts -> a batch; pictures stand behind the first token."""
    rng, count = np.random.default_rng(seed), max(pictures for _, pictures in rows)
    shape = len(rows), length
    batch = {"tokens": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32), "media_index": np.full(shape, -1, np.int32)}
    batch |= {"position_ids": np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)), "media": np.zeros((len(rows), count, 8, 8, 3), np.uint8)}
    for i, (size, pictures) in enumerate(rows):
        batch["tokens"][i, :size], batch["segment_ids"][i, :size] = rng.integers(3, 60, size), 1
        batch["media_index"][i, 1 : 1 + 4 * pictures] = np.arange(4 * pictures)
        batch["media"][i, :pictures] = rng.integers(0, 255, (pictures, 8, 8, 3))
    return batch


ROWS = (20, 1), (7, 0), (24, 2), (5, 1)
BATCH = prompts(*ROWS)


def row(i, batch=BATCH, rows=ROWS):
    return {name: field[i : i + 1] for name, field in batch.items()} | {"media": batch["media"][i : i + 1, : rows[i][1]]}


WAYS = {
    "stacked": lambda: Weights(GRAPHDEF, params()),
    "apart": lambda: set_apart(GRAPHDEF, params()),
    "without a cache": lambda: Weights(GRAPHDEF, params(), has_cache=False),
}
SETTINGS = {
    "greedy": Sampling(max_new_tokens=21),
    "drawn": Sampling(max_new_tokens=21, temperature=0.8, top_p=0.95, top_k=40, repetition_penalty=1.4, min_tokens=18),
}


@pytest.fixture(scope="module")
def expected():
    """The long way: logits of the whole row so far, for each token anew, through the model's own call."""
    model = nnx.merge(GRAPHDEF, engine.nest(params()))
    batch = {name: np.concatenate([f, np.full((4, 21, *f.shape[2:]), -1 if name == "media_index" else 0, f.dtype)], 1)
             for name, f in BATCH.items() if name != "media"}  # fmt: skip
    batch |= {"media": BATCH["media"], "position_ids": np.tile(np.arange(45, dtype=np.int32), (4, 1))}
    lengths, run = np.array([n for n, _ in ROWS]), jax.jit(lambda batch: model.llm.logits(model(batch)))
    tokens, logprobs = np.zeros((4, 21), int), np.zeros((4, 21))
    for step in range(21):
        logits = np.asarray(run(batch))[np.arange(4), lengths + step - 1]
        tokens[:, step] = logits.argmax(-1)
        logprobs[:, step] = np.asarray(jax.nn.log_softmax(logits))[np.arange(4), tokens[:, step]]
        batch["tokens"][np.arange(4), lengths + step], batch["segment_ids"][np.arange(4), lengths + step] = tokens[:, step], 1
    return tokens, logprobs


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_and_their_log_probabilities(way, expected):
    generation = engine.Generation(WAYS[way](), BATCH, Sampling(max_new_tokens=21), (), row_keys(0, np.arange(4)))
    tokens, logprobs = (np.concatenate(parts, 1) for parts in zip(*generation, strict=True))
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(logprobs, expected[1], atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_alone_and_in_a_batch(setting):
    together = {way: generate(WAYS[way](), BATCH, SETTINGS[setting], (2, 40), seed=5) for way in WAYS}
    for tokens in together.values():
        np.testing.assert_array_equal(tokens, together["stacked"])
    apart = WAYS["apart"]()
    for i in (0, 1):  # each is another shape
        generation = engine.Generation(apart, row(i), SETTINGS[setting], (2, 40), row_keys(5, np.array([i])))
        alone = np.concatenate([tokens for tokens, _ in generation], 1)[0]
        np.testing.assert_array_equal(alone, together["stacked"][i][: len(alone)])
        assert (together["stacked"][i][len(alone) :] == -1).all()


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 8}], ids=str)
def test_a_mesh_answers_alike(axes, expected):
    """Key/value heads fewer than devices, too: two heads on four devices."""
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(**{name: size for name, size in axes.items() if name != "data"}, devices=jax.devices()[:count])
    heads = {"kv_heads": None} if LLM.num_query_groups % mesh.shape["tensor"] else {}
    placed = {path: jax.device_put(a, weight_sharding(path, a.shape, SHAPES[path].axes, mesh, heads)) for path, a in params().items()}
    weights = set_apart(GRAPHDEF, placed, mesh)
    kernel = weights.apart[0]["mlp/up_proj/kernel"]
    assert len(kernel.sharding.device_set) == count
    assert kernel.addressable_shards[0].data.size == kernel.size // (mesh.shape["fsdp"] * mesh.shape["tensor"]), "a layer set apart is as sharded as the stack"
    generation = engine.Generation(weights, BATCH, Sampling(max_new_tokens=21), (), row_keys(0, np.arange(4)))
    if mesh.shape["tensor"] == 2:
        keys = generation.state["memory"]["layers"][0][0]
        assert keys.addressable_shards[0].data.shape[1] == 1, "each device has its heads of the cache"
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in generation], 1), expected[0])


def test_transformers_generates_the_same():
    """A language model alone, with a repetition penalty and a least length: their ids, in a batch of unequal prompts (theirs padded on the left)."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager", rms_norm_eps=1e-5,
    )), seed=1)  # fmt: skip
    found = params()
    for path in [path for path in found if path.startswith("llm/")]:
        found[path] = jnp.asarray(_theirs(theirs.state_dict(), path, found[path].shape))
    lengths = [9, 4, 12]
    ids = [np.random.default_rng(i).integers(3, 61, n) for i, n in enumerate(lengths)]
    batch = prompts(*((n, 0) for n in lengths), length=12)
    for i, one in enumerate(ids):
        batch["tokens"][i, : len(one)] = one
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, one in enumerate(ids):
        padded[i, 12 - len(one) :], mask[i, 12 - len(one) :] = torch.tensor(one), 1
    weights = Weights(GRAPHDEF, found)
    for options, sampling in (({}, Sampling(20)), ({"repetition_penalty": 1.3, "min_new_tokens": 15}, Sampling(20, 15, repetition_penalty=1.3))):
        ours = generate(weights, batch, sampling, (2,))
        with torch.no_grad():
            for i, one in enumerate(ids):  # alone: in a batch their penalty counts the padding as said
                answer = theirs.generate(torch.tensor(one)[None], max_new_tokens=20, do_sample=False, **options)[0, len(one) :].numpy()
                np.testing.assert_array_equal(ours[i][ours[i] >= 0], answer)
    with torch.no_grad():
        together = theirs.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 12:].numpy()
    ours = generate(weights, batch, Sampling(20), (2,))
    np.testing.assert_array_equal(np.where(ours < 0, 0, ours), together[:, : ours.shape[1]])


def _theirs(state: dict, path: str, shape) -> np.ndarray:
    """A weight of ours from transformers' names, which are ours but for the dots."""
    inner = path.removeprefix("llm/").replace("/", ".")
    if inner.startswith("layers."):
        names = [f"model.layers.{i}.{inner.removeprefix('layers.')}" for i in range(shape[0])]
        return np.stack([_theirs_one(state, name) for name in names])
    found = _theirs_one(state, inner if inner.startswith("lm_head") else f"model.{inner}")
    more = [(0, wanted - have) for wanted, have in zip(shape, found.shape, strict=True)]
    return np.pad(found, more)


def _theirs_one(state: dict, name: str) -> np.ndarray:
    stem, _, kind = name.rpartition(".")
    array = state[f"{stem}.weight"].numpy()
    return array.T if kind == "kernel" else array


# ---- shapes and programs -------------------------------------------------------------------------------------------------------------------------------


def test_one_program_a_shape():
    """Other prompts, lengths within a bucket, numbers of one kind of sampling, longer answers: nothing is compiled anew."""
    start, go_on = engine.programs("cpu")
    start.clear_cache()
    go_on.clear_cache()
    weights = WAYS["apart"]()
    for sampling in (Sampling(30, temperature=0.5), Sampling(10, temperature=0.7), Sampling(64, temperature=1.0, min_tokens=9)):
        for seed in range(2):
            generate(weights, prompts((20 + seed, 1), (7, 0), seed=seed), sampling, (2, 3 + seed), seed=seed)
    assert (start._cache_size(), go_on._cache_size()) == (1, 1)
    generate(weights, prompts((20, 1), (7, 0)), Sampling(65, temperature=0.5), (2,))
    assert (start._cache_size(), go_on._cache_size()) == (2, 2), "another room is another shape"


def test_a_token_costs_the_same_wherever_it_stands():
    """Of the compiled loop over tokens: the FLOPs do not depend on how many came before, and are a position's, not a row's."""
    weights = WAYS["apart"]()
    generation = engine.Generation(weights, BATCH, Sampling(64), (), row_keys(0, np.arange(4)))
    lowered = generation.go_on.lower(weights.traced, generation.state, *generation.fixed, np.int32(16), **generation.how)
    flops = lowered.compile().cost_analysis()["flops"]
    a_token = 4 * 2 * sum(np.prod(w.shape) for path, w in SHAPES.items() if path.endswith("kernel") and path.startswith("llm/"))
    attention = 4 * 4 * LLM.num_layers * LLM.num_attention_heads * LLM.head_dim * (24 + 64)
    assert 0.9 * (a_token + attention) < flops < 1.5 * (a_token + attention)


def test_a_state_is_used_in_place():
    """The cache is as large as it must be, and is not copied from chunk to chunk."""
    weights = WAYS["apart"]()
    generation = engine.Generation(weights, BATCH, Sampling(64), (), row_keys(0, np.arange(4)))
    cache = generation.state["memory"]["layers"]
    assert {part.shape for layer in cache for part in layer} == {(4, 2, 24 + 64, 8)}
    stale = cache[0][0]
    next(rest := iter(generation))
    next(rest)
    assert stale.is_deleted()


# ---- text ----------------------------------------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: 3.. are characters; 50 and 51 are the two bytes of one."""

    bos_id, eos_id, pad_id, unk_id, path = 1, 2, 0, None, "letters"
    text = "abcdefghijklmnopqrstuvwxyz .,#\n"

    def decode(self, ids):
        said = "".join("\ufffd" if i == 50 else "\u00e9" if i == 51 else self.text[(i - 3) % len(self.text)] for i in ids)
        return said.replace("\ufffd\u00e9", "\u00e9")

    def id_of(self, token):
        return {"</s>": 2, "b": 4}.get(token)


class Said(Speaker):
    """A speaker whose model says what it is told to."""

    def with_tokens(self, monkeypatch, rows, chunk=3):
        class Fake:
            def __init__(self, weights, batch, sampling, stops, keys, how_many):
                self.finished = set()

            def finish(self, chosen):
                self.finished |= set(chosen)

            def __iter__(self):
                for start in range(0, max(map(len, rows)), chunk):
                    part = [[*r[start : start + chunk], *[-1] * chunk][:chunk] for r in rows]
                    if len(self.finished) < len(rows):
                        yield np.array(part), np.zeros((len(rows), chunk))

        monkeypatch.setattr("neva_jax.inference.answers.Generation", Fake)
        return {"segment_ids": np.ones((len(rows), 1))}


def ids(text):
    return [3 + Letters.text.index(c) for c in text]


def test_an_answer_ends_before_the_first_end_string(monkeypatch):
    speaker = Said(None, Letters(), (2,), ("##",))
    rows = [ids("one. two"), [*ids("three"), 2], ids(" x ##yes"), ids("say stop now")]
    batch = speaker.with_tokens(monkeypatch, rows)
    answers = speaker.answers(batch, Sampling(end_strings=("stop", ". ")), None)
    assert [a.text for a in answers] == ["one", "three", "x", "say"]
    assert [a.finish for a in answers] == ["stop"] * 4
    assert answers[0].tokens == ids("one. ") and answers[1].tokens == [*ids("three"), 2] and answers[3].tokens == ids("say stop")
    assert all(len(a.tokens) == len(a.logprobs) for a in answers)


def test_an_end_that_never_comes_is_bounded(monkeypatch):
    speaker = Said(None, Letters(), (2,))
    batch = speaker.with_tokens(monkeypatch, [ids("on and on and on"), ids("on and on and on")])
    answers = speaker.answers(batch, Sampling(end_strings=("never",)), None, [16, 4])
    assert [(a.text, a.finish) for a in answers] == [("on and on and on", "length"), ("on a", "length")]


@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
def test_a_stream_is_the_answer(monkeypatch, chunk):
    """Neither half a character nor the beginning of an end string, nor space that may be the last, is shown early."""
    speaker = Said(None, Letters(), (2,), ("###",))
    batch = speaker.with_tokens(monkeypatch, [[*ids(" a #b## c"), 50, 51, *ids(" x \n###no")]], chunk)
    pieces = list(speaker.stream(batch, Sampling(), None))
    assert "".join(pieces) == "a #b## c\u00e9 x" == speaker.answers(batch, Sampling(), None)[0].text
    assert len(pieces) > 1 or chunk == 16
    assert "\ufffd" not in "".join(pieces) and all(pieces)


class Runs(Letters):
    """As tokenizers' ByteFallback: a run of bytes is spoilt whole by a wrong one."""

    def decode(self, ids):
        runs = "".join("<" if i == 50 else ">" if i == 51 else "!" if i == 52 else self.text[(i - 3) % len(self.text)] for i in ids)
        whole = lambda run: run.replace("<>", "\u00e9") if re.fullmatch("(<>)*", run) else "\ufffd" * len(run)  # noqa: E731
        return re.sub("[<>!]+", lambda run: whole(run[0]), runs)

    def id_of(self, token):
        return 52 if token == "<0xFF>" else None


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_stream_goes_on_behind_a_wrong_byte(monkeypatch, chunk):
    speaker = Said(None, Runs(), (2,))
    for said, text in (([50, 51, 52], "\ufffd" * 3), ([50, 51, 50, 51], "\u00e9\u00e9"), ([50, 51, 50], "\ufffd" * 3)):
        for tail in ([], ids(" and on")):
            batch = speaker.with_tokens(monkeypatch, [[*ids("a"), *said, *tail]], chunk)
            assert "".join(speaker.stream(batch, Sampling(), None)) == "a" + text + (" and on" if tail else "")


def test_too_many_ends():
    class Many(Letters):
        def id_of(self, token):
            return int(token)

    with pytest.raises(UserError, match="17 tokens would end an answer"):
        Speaker(None, Many(), (0,))._ends(tuple(str(i) for i in range(1, 17)))
    with pytest.raises(UserError, match="has no tokenizer"):
        Speaker(None, None, (0,))._ends(("a",))


def test_rows_without_a_prompt_take_no_part():
    batch = pad_examples([None, None], engine_bucket(), np.zeros((0, 8, 8, 3), np.uint8))
    batch = {name: batch[name] for name in BATCH}
    answers = Speaker(WAYS["stacked"](), None, (2,)).answers(batch, Sampling(5), row_keys(0, np.arange(2)), [1, 1])
    assert [len(answer.tokens) for answer in answers] == [1, 1]


def engine_bucket():
    from neva_jax.data.plan import Bucket

    return Bucket(24, 1, 0)
