"""How fast pictures and whole samples are made, on synthetic data of LLaVA-Instruct's shape: 640 x 480 JPEGs and conversations of some hundred words.

    python benchmarks/data.py [--num_records 2000] [--tokenizer tokenizer.model]

Part one, pinned to one core, round by round side by side: file -> pixels, by transformers' CLIP processor used as LLaVA uses it, by ours, and from the pixel
cache. Part two, on two cores: samples a second through the whole path (record -> ids -> cached pixels -> padded batch), and what each part of a sample takes.
What one process does is counted in its CPU seconds, which other programs disturb little; samples a second are by the clock, the best of three runs
(one where the cache is filled).
Everything is in the page cache: disks are not measured. Prints one JSON object and keeps it in `results/data.json`. Needs the `test` extra.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import datetime
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from transformers import CLIPImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import finetune  # noqa: E402
from neva_jax import config as library  # noqa: E402
from neva_jax.build.data import build_data, build_tokenizer  # noqa: E402
from neva_jax.build.model import neva_config  # noqa: E402
from neva_jax.data.image import ImageProcessor  # noqa: E402
from neva_jax.data.pipeline import collate  # noqa: E402
from neva_jax.data.pixel_cache import PixelCache, fill  # noqa: E402
from neva_jax.parallel.mesh import make_mesh  # noqa: E402

SIZES = (224, 336)
WORDS = """the a of in on and is are with to at that this its which there man woman child people dog cat bus street table window tree building water kitchen
standing sitting holding wearing looking walking appears suggests visible background foreground several various different colorful large small wooden
possibly indicating creating atmosphere scene image overall additionally furthermore while near behind beside enjoying likely because"""
# LLaVA-Instruct-150K: (share in thousands of records, rounds, words of a question, words of an answer)
KINDS = ((58, 4, 9, 22), (23, 1, 12, 90), (77, 1, 16, 115))
MICRO, GLOBAL = 16, 128  # 8 GPUs of 16 rows


# ---- the data


def write_data(folder: Path, num_records: int) -> int:
    """records.json and one picture a record -> the pictures' mean size in bytes."""
    source, canvas = random.Random(0), _canvas(2048)
    (folder / "images").mkdir()
    records, sizes = [], []
    for i in range(num_records):
        path = folder / "images" / f"{i:06d}.jpg"
        top, left = source.randrange(2048 - 480), source.randrange(2048 - 640)
        Image.fromarray(canvas[top : top + 480, left : left + 640]).save(path, quality=90)
        sizes.append(path.stat().st_size)
        records.append({"id": str(i), "image": path.name, "conversations": _conversation(source)})
    (folder / "records.json").write_text(json.dumps(records))
    return round(statistics.mean(sizes))


def _canvas(side: int) -> np.ndarray:
    """uint8[side, side, 3] whose power falls with frequency as a photograph's does."""
    source, frequency = np.random.default_rng(0), np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf

    def field():
        values = np.fft.irfft2(np.fft.rfft2(source.standard_normal((side, side))) / frequency**1.2)
        return values / values.std()

    colours = np.stack([field() for _ in range(3)], axis=-1)
    return np.clip(120 + 45 * field()[..., None] + 12 * colours, 0, 255).astype(np.uint8)


def _conversation(source: random.Random) -> list[dict]:
    _, rounds, question, answer = source.choices(KINDS, [kind[0] for kind in KINDS])[0]

    def text(mean: int) -> str:
        return " ".join(source.choices(WORDS.split(), k=source.randint(mean // 2, mean * 3 // 2))).capitalize()

    turns = [{"from": role, "value": text(words) + end} for _ in range(rounds) for role, words, end in (("human", question, "?"), ("gpt", answer, "."))]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


# ---- file -> pixels


def measure_pictures(folder: Path, size: int, rounds: int = 9) -> dict:
    """Medians over rounds, each of which runs every side over the same 64 files. Pictures a second of one core."""
    paths = sorted((folder / "images").iterdir())[:64]
    config = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}  # openai/clip-vit-large-patch14(-336); the rest is its default
    theirs, ours = CLIPImageProcessorPil(**config), ImageProcessor((size, size), size)
    cache = PixelCache(ours, folder / "pictures", 2**40)
    sides = {
        "huggingface": lambda path: theirs.preprocess(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0],
        "ours": lambda path: ours(path.read_bytes(), path.name),
        "cached": lambda path: cache(path.read_bytes(), path.name),
    }
    whole = CLIPImageProcessorPil(**config, do_rescale=False, do_normalize=False)
    for path in paths:  # the same pixels; this also fills the cache
        answer = whole.preprocess(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert all(np.array_equal(answer, sides[side](path)) for side in ("ours", "cached", "cached")), path
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, make in sides.items():
            start = time.process_time()
            for path in paths:
                make(path)
            seconds[side].append((time.process_time() - start) / len(paths))
    ratios = {f"{side}_to_huggingface": statistics.median(map(np.divide, seconds["huggingface"], seconds[side])) for side in ("ours", "cached")}
    return {f"{side}_per_second": 1 / statistics.median(values) for side, values in seconds.items()} | ratios


# ---- the whole path


def open_data(folder: Path, size: int, tokenizer_path: str):
    """The training Split of a finetuning at this picture size, with a filled pixel cache; the same without; how fast the cache was filled."""
    config = finetune.get_config()
    changes = {
        "data.data_path": str(folder / "records.json"), "data.image_folder": str(folder / "images"), "data.cache_dir": str(folder / "cache"),
        "data.pixel_cache_gib": 1024, "data.num_workers": 0, "micro_batch_size": MICRO, "global_batch_size": GLOBAL, "tokenizer.model": tokenizer_path,
        "mm_cfg.vision_encoder.crop_size": (size, size), "mm_cfg.llm.model_type": "v1", "encoder_seq_length": 2048,
    }  # fmt: skip
    for name, value in changes.items():
        library.assign(config, f"model.{name}", value)
    tokenizer = build_tokenizer(config)
    split, _ = build_data(config, tokenizer, neva_config(config, tokenizer.vocab_size), make_mesh())
    plain = dataclasses.replace(split, examples=dataclasses.replace(split.examples, image_processor=split.examples.image_processor.processor))
    start = time.perf_counter()
    fill(split.examples, 2)
    return split, plain, len(split.examples) / (time.perf_counter() - start)


def assert_equal_batches(cached, plain) -> None:
    for ours, theirs in zip(cached.batches(0, 2), plain.batches(0, 2), strict=True):
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def samples_per_second(split, num_workers: int, warm: int = 8, timed: int = 40) -> float:
    """Global batches as training gets them, from when the workers are at work: they fill no buffer while the clock stands."""
    batches = dataclasses.replace(split, num_workers=num_workers).batches(0, warm + timed)
    for _ in range(warm):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    assert count == timed
    return timed * GLOBAL / (time.perf_counter() - start)


def microseconds_by_part(split, rounds: int = 5) -> dict:
    """Medians of the mean over 256 samples, one after the other in one process. example is all of the parts before it, batch comes on top."""
    examples, indices = split.examples, range(256)
    bucket, ids = split.plan[0]
    rows = [(examples[int(i)], bucket) for i in ids]
    names = [examples.raw(i)["image"] for i in indices]
    files = [examples.media.read(name) for name in names]
    parts = {
        "read_record": lambda: [examples.raw(i) for i in indices],
        "read_record_and_encode": lambda: [examples.encoded(i) for i in indices],
        "read_picture": lambda: [examples.media.read(name) for name in names],
        "cached_pixels": lambda: [examples.image_processor(data, "").shape for data in files],
        "example": lambda: [examples[i].bad_image for i in indices],
        "batch": lambda: [collate(MICRO, examples.no_media, rows) for _ in range(2)],
    }
    seconds = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            start = time.process_time()
            run()
            seconds[name].append((time.process_time() - start) / 256)
    return {name: statistics.median(values) * 1e6 for name, values in seconds.items()}


def measure_path(folder: Path, size: int, tokenizer_path: str) -> dict:
    cached, plain, filled = open_data(folder, size, tokenizer_path)
    assert_equal_batches(cached, plain)
    speeds = {f"samples_per_second_{n}_workers": max(samples_per_second(cached, n) for _ in range(3)) for n in (0, 1, 2)}
    speeds["uncached_samples_per_second_2_workers"] = max(samples_per_second(plain, 2, warm=4, timed=8) for _ in range(3))
    return {
        "mean_tokens": float(np.mean(cached.lengths.tokens)), **speeds, "fill_samples_per_second_2_workers": filled,
        "microseconds": microseconds_by_part(cached),
    }  # fmt: skip


# ---- all of it


def describe() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    libraries = {name: version(name) for name in ("numpy", "pillow", "transformers", "torch", "grain", "sentencepiece")}
    return {
        "command": f"python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip(), "date": datetime.date.today().isoformat(), "cpu": cpu,
        "num_cores": os.cpu_count(), "cores_used": "part one: 1, part two: 2", "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(), **libraries, "libjpeg_turbo": features.version("libjpeg_turbo"),
        "huggingface_class": CLIPImageProcessorPil.__name__,
    }  # fmt: skip


def main(num_records: int, tokenizer_path: str) -> dict:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))[:2]
    results = describe() | {"tokenizer": Path(tokenizer_path).name, "num_records": num_records, "global_batch_size": GLOBAL}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["mean_jpeg_bytes"] = write_data(folder, num_records)
        os.sched_setaffinity(0, cores[-1:])
        results["pictures"] = {size: measure_pictures(folder, size) for size in SIZES}
        os.sched_setaffinity(0, cores)
        results["path"] = {size: measure_path(folder, size, tokenizer_path) for size in SIZES}
    return results


def default_tokenizer() -> Path:
    llama = Path(os.environ.get("NEVA_GOLDEN_DIR", ROOT.parent / "shared" / "golden"), "tokenizer", "llama2.model")
    return llama if llama.exists() else ROOT / "examples" / "digits" / "tokenizer.model"


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    return (round(value, 2) if value < 100 else round(value)) if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, default=2000)
    parser.add_argument("--tokenizer", default=str(default_tokenizer()), help="a sentencepiece model; by default Llama-2's among the golden answers")
    arguments = parser.parse_args()
    results = rounded(main(arguments.num_records, arguments.tokenizer))
    (ROOT / "benchmarks" / "results" / "data.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
