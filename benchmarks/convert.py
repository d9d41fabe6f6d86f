"""What it takes to convert a Llama-2-7B-shaped model (random bf16 weights, 13.5 GB): seconds and memory, beside `cp` and the libraries' own saves.

    python benchmarks/convert.py [--size 7b|13b|tiny] [--folder DIR] [--only hf_to_orbax,...] [--references cp,...]

Each conversion is `python convert_torch.py ... --json` as a process of its own, watched from outside: peak of RssAnon (memory that is not a mapped file) of
/proc/PID/status, 20 times a second. References write the same arrays: `cp -r` of the directory, Orbax's StandardCheckpointer from memory, torch.save of each
rank from the mapped file. Nothing waits for the disk (no fsync but the libraries' own), and files lie in the page cache as far as it is large enough.
Needs three times the model's size of free disk, four for .nemo back to Hugging Face. Results go to results/convert.json.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "convert.json"
SIZES = {  # layers, hidden, ffn, heads
    "7b": (32, 4096, 11008, 32),
    "13b": (40, 5120, 13824, 40),
    "tiny": (2, 256, 688, 4),
}
VOCAB, SHARD = 32000, 5 * 10**9


# ---- the model


def make(folder: Path, size: str) -> None:
    """A Hugging Face directory of a Llama-2's shape, in shards, with values like a trained model's: normal, so that they compress as badly."""
    layers, hidden, ffn, heads = SIZES[size]
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**25 + 4099, np.float32)).astype(ml_dtypes.bfloat16)  # each tensor begins elsewhere in it
    shards, filled = [{}], 0
    for name, shape in shapes.items():
        count = int(np.prod(shape)) * 2
        if filled + count > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += count
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            count = int(np.prod(shape)) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + count]}
            end, weight_map[name] = end + count, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                start = int(rng.integers(4099))
                for at in range(0, int(np.prod(shape)), 2**25):
                    opened.write(pool[start : start + min(2**25, int(np.prod(shape)) - at)].tobytes())
    index = {"metadata": {"total_size": sum(int(np.prod(s)) * 2 for s in shapes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- measuring


def watch(command: list[str]) -> tuple[float, float, str]:
    """-> seconds, peak of RssAnon in GiB, standard output"""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        except (OSError, TypeError):
            pass  # it has just ended
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak / 2**20, process.stdout.read()


def convert(source: Path, target: Path, to: str, *flags: str) -> dict:
    seconds, peak, out = watch([sys.executable, "convert_torch.py", f"--input={source}", f"--output={target}", f"--to={to}", "--json", *flags])
    report = json.loads(out)
    kept = {key: report[key] for key in ("seconds_comparing", "max_logit_difference", "tokens_equal") if report.get(key) is not None}
    return {"seconds": seconds, "peak_rss_anon_gib": peak, "gb_written": report["num_bytes"] / 1e9, **kept}


ORBAX = """
import sys, time, numpy as np, jax
from safetensors import safe_open
from pathlib import Path
import orbax.checkpoint as ocp
arrays = {}
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(file, framework="flax") as opened:
        arrays |= {name: opened.get_tensor(name) for name in opened.keys()}
start = time.perf_counter()
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(sys.argv[2]), arrays)
print(time.perf_counter() - start)
"""
TORCH = """
import sys, time, torch
from safetensors import safe_open
from pathlib import Path
start = time.perf_counter()
for number, file in enumerate(sorted(Path(sys.argv[1]).glob("*.safetensors"))):
    with safe_open(file, framework="pt") as opened:
        torch.save({name: opened.get_tensor(name) for name in opened.keys()}, f"{sys.argv[2]}-{number}")
print(time.perf_counter() - start)
"""


def references(source: Path, folder: Path, which: list[str]) -> dict:
    result = {}
    for name in which:
        target = folder / "reference"
        if name == "cp":
            start = time.perf_counter()
            subprocess.run(["cp", "-r", source, target], check=True)
            result[name] = time.perf_counter() - start
        else:
            result[name] = float(watch([sys.executable, "-c", TORCH if name == "torch_save" else ORBAX, str(source), str(target)])[2])
        for left in folder.glob("reference*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return result


CONVERSIONS = {  # name: (input, output, flags)
    "hf_to_orbax": ("hf", "orbax", ()),
    "orbax_to_hf": ("orbax", "hf", ()),
    "orbax_to_nemo_tp2": ("orbax", "nemo", ("--tensor_parallel=2",)),
    "hf_to_nemo_tp2": ("hf", "nemo", ("--tensor_parallel=2",)),
    "nemo_tp2_to_hf": ("nemo", "hf", ()),
}


def describe() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "command": f"python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip(), "date": datetime.date.today().isoformat(), "cpu": cpu,
        "num_cores": os.cpu_count(), "load_average_before": os.getloadavg()[0], "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "safetensors", "torch")},
    }  # fmt: skip


def main(size: str, parent: Path, only: list[str], which: list[str]) -> dict:
    results = describe()
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        hf, made = folder / "hf", {}
        make(hf, size)
        if which:
            results["references_seconds"] = references(hf, folder, which)
        made["hf"] = hf
        for conversion in only:
            source, to, flags = CONVERSIONS[conversion]
            target = folder / f"{conversion}.{to}"
            results[conversion] = convert(made[source], target, to, *flags)
            print(json.dumps({conversion: results[conversion]}), file=sys.stderr, flush=True)
            wanted = {CONVERSIONS[later][0] for later in only[only.index(conversion) + 1 :]}
            gone = [target] if to == "hf" else [made.get(to)]
            made |= {} if to == "hf" else {to: target}
            for path in filter(None, gone + [made.pop(kind) for kind in list(made) if kind not in wanted]):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    return (round(value, 2) if value < 100 else round(value)) if isinstance(value, float) else value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--only", default=",".join(CONVERSIONS), help="which conversions, in order")
    parser.add_argument("--references", default="cp,torch_save", help="of cp, torch_save and orbax_save, which needs the model's size of memory")
    arguments = parser.parse_args()
    found = rounded(main(arguments.size, arguments.folder, arguments.only.split(","), list(filter(None, arguments.references.split(",")))))
    if arguments.size != "tiny":
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {arguments.size: kept.get(arguments.size, {}) | found}, indent=2) + "\n")
    print(json.dumps(found))
