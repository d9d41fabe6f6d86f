"""How fast answers come, against transformers' generate on the same CPU, the same random weights, the same prompts with a picture each, greedy, float32.

    python benchmarks/generate.py [--rounds 3] [--sizes quickstart,small,medium]

For each size of model, 8 prompts at once and one alone, 128 new tokens: tokens a second of the whole call (picture, prompt, all tokens), round by round side by
side, medians. Both must say the same tokens. Then ours alone: milliseconds a token near the beginning and near the end of 512 tokens in one program, which a
cache keeps flat. What is compiled is compiled before. Prints one JSON object and keeps it in `results/generate.json`. Needs the `test` extra.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import neva_jax  # noqa: E402
from neva_jax.inference.generate import Generation, row_keys  # noqa: E402
from neva_jax.inference.sampling import Sampling  # noqa: E402

SIZES = {  # hidden_size, layers, heads, ffn, vocabulary of the language model; side, patch, hidden_size, layers, heads of the tower
    "quickstart": ((128, 2, 4, 256, 400), (32, 16, 128, 2, 4)),
    "small": ((512, 8, 8, 1376, 32000), (112, 14, 256, 4, 4)),
    "medium": ((768, 12, 12, 2048, 32000), (112, 14, 256, 4, 4)),
}
NEW, TEXT = 128, 40


def make(folder: Path, llm: tuple, tower: tuple):
    """-> transformers' model, saved in `folder` too, and ids and pixel values of 8 prompts."""
    hidden, layers, heads, ffn, vocab = llm
    side, patch, width, depth, tower_heads = tower
    text = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=1024
    )
    vision = transformers.CLIPVisionConfig(
        image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=depth, num_attention_heads=tower_heads, intermediate_size=4 * width
    )
    patches = (side // patch) ** 2
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab - 1, image_seq_length=patches)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # as spread as trained ones are, so that tokens differ and no two logits are equal
            if weight.ndim > 1:
                weight.normal_(0, 2 * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.ones((8, 1), int), np.full((8, patches), vocab - 1), rng.integers(3, vocab - 1, (8, TEXT))], 1)
    return model, ids, rng.normal(size=(8, 3, side, side)).astype(np.float32)


def measure(name: str, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        theirs, ids, pixels = make(Path(folder), *SIZES[name])
        ours = neva_jax.from_pretrained(folder, dtype="float32")
        found = {"weights": sum(weight.numel() for weight in theirs.parameters()), "prompt_positions": ids.shape[1]}
        for rows in (8, 1):
            ask = {
                "transformers": lambda rows=rows: theirs.generate(
                    torch.tensor(ids[:rows]), pixel_values=torch.tensor(pixels[:rows]), attention_mask=torch.ones(ids[:rows].shape, dtype=torch.long),
                    max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
                ).numpy()[:, ids.shape[1] :],
                "neva_jax": lambda rows=rows: np.array(
                    [a.tokens for a in ours.answers(list(ids[:rows]), [[picture] for picture in pixels[:rows]], max_new_tokens=NEW, min_tokens=NEW)]
                ),
            }  # fmt: skip
            with torch.no_grad():
                tokens = {who: call() for who, call in ask.items()}
                seconds = {who: [] for who in ask}
                for _ in range(rounds):
                    for who, call in ask.items():
                        start = time.perf_counter()
                        call()
                        seconds[who].append(time.perf_counter() - start)
            rates = {who: round(rows * NEW / statistics.median(times), 1) for who, times in seconds.items()}
            agree = float((tokens["transformers"] == tokens["neva_jax"]).mean())
            found[f"batch_{rows}"] = {
                "tokens_per_second": rates, "ratio": round(rates["neva_jax"] / rates["transformers"], 2), "tokens_equal": agree,
                "seconds": {who: [round(t, 3) for t in times] for who, times in seconds.items()},
            }  # fmt: skip
        return found | {"ms_per_token_at": flatness(ours, ids, pixels)}


def flatness(vlm, ids, pixels) -> dict[str, float]:
    """Milliseconds of a token (8 rows) by its number in answers of 512."""
    prompts = [vlm.processor.read(row, [picture], "prompt") for row, picture in zip(ids, pixels, strict=True)]
    batch, sampling, seen = vlm.processor.batch(prompts, 8, 128), Sampling(512, 512), []
    for _ in range(2):
        seen.clear()
        start = time.perf_counter()
        for tokens, _ in Generation(vlm.speaker.weights, batch, sampling, vlm.speaker.stop_ids, row_keys(0, np.arange(8))):
            seen.append((time.perf_counter() - start, tokens.shape[1]))
            start = time.perf_counter()
    rates = [1e3 * seconds / count for seconds, count in seen[1:]]
    parts = {"first_128": rates[:8], "129_to_384": rates[8:24], "last_128": rates[24:]}
    return {part: round(statistics.median(values), 3) for part, values in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(SIZES))
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    result = {"command": " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]]), "date": datetime.date.today().isoformat()}
    result |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "load_before": round(os.getloadavg()[0], 2), "new_tokens": NEW}
    result |= {"versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers")}}
    result |= {"sizes": {name: measure(name, given.rounds) for name in given.sizes.split(",")}}
    (Path(__file__).parent / "results" / "generate.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
