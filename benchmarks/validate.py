"""How fast `inspect_data --validate` judges a data set: the command itself, with two processes, on synthetic data of LLaVA-Instruct's shape.

    python benchmarks/validate.py [--num_records 100000] [--num_pictures 2000] [--num_distinct 5000] [--tokenizer tokenizer.model]

Two sets: `num_records` records that share `num_pictures` pictures of 640 x 480, each decoded once a process; and `num_distinct` records with a picture each,
where decoding counts; this one also with --headers_only. In each set ten records are defective, and exactly those must be found. Records a second are those
that the command reports, by the clock, the start of its workers included; of the second set the best of three runs. On a machine that
others use too they are a lower bound, so `load_average_before` is kept with them, and `cpu_seconds` of all processes, the start of Python and JAX included,
which others disturb little: half of them is what two cores of one's own would take. Everything is in the page cache: disks are not measured. Prints one JSON
object and keeps it in `results/validate.json`. Needs the `test` extra.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from data import ROOT, default_tokenizer, describe, rounded, write_data

NUM_DEFECTS, NUM_WORKERS = 10, 2


def add_records(folder: Path, name: str, count: int) -> set[int]:
    """Writes `count` records that repeat those of records.json -> which of them have an empty answer."""
    records = json.loads((folder / "records.json").read_text())
    step = count // NUM_DEFECTS
    defective = set(range(step // 2, count, step))
    with (folder / name).open("w") as file:
        for i in range(count):
            record = records[i % len(records)] | {"id": f"{i:09d}"}
            if i in defective:
                record = record | {"conversations": [*record["conversations"][:-1], {"from": "gpt", "value": " "}]}
            file.write(json.dumps(record) + "\n")
    return defective


def measure(folder: Path, name: str, defective: set[int], tokenizer: str, *arguments: str) -> dict:
    changes = {
        "data.data_path": folder / name, "data.image_folder": folder / "images", "data.cache_dir": folder / "cache", "data.num_workers": NUM_WORKERS,
        "tokenizer.model": tokenizer, "mm_cfg.llm.model_type": "v1", "encoder_seq_length": 2048,
    }  # fmt: skip
    command = [sys.executable, "-m", "neva_jax.inspect_data", "--config=configs/finetune.py", "--validate", "--json", *arguments]
    command += [f"--config.model.{field}={value}" for field, value in changes.items()]
    before, spent = os.getloadavg()[0], cpu_seconds()
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    found = json.loads(ended.stdout)
    assert ended.returncode == 1 and {defect["index"] for defect in found["defects"]} == defective and found["num_defects"] == len(defective)
    keys = ("num_records", "seconds", "records_per_second")
    return {key: found[key] for key in keys} | {"load_average_before": before, "cpu_seconds": cpu_seconds() - spent}


def cpu_seconds() -> float:
    """Of all processes that have ended by now."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(num_records: int, num_pictures: int, num_distinct: int, tokenizer: str) -> dict:
    kept = ("date", "cpu", "num_cores", "python", "numpy", "pillow", "sentencepiece", "libjpeg_turbo")
    command = " ".join(["python", "benchmarks/validate.py", *sys.argv[1:]])
    results = {"command": command} | {name: value for name, value in describe().items() if name in kept}
    results |= {"num_workers": NUM_WORKERS, "tokenizer": Path(tokenizer).name, "num_pictures": num_pictures}
    with tempfile.TemporaryDirectory() as name:
        shared, distinct = Path(name, "shared"), Path(name, "distinct")
        for folder, count in ((shared, num_pictures), (distinct, num_distinct)):
            folder.mkdir()
            results["mean_jpeg_bytes"] = write_data(folder, count)
        bad = add_records(shared, "many.jsonl", num_records)
        results["shared_pictures"] = measure(shared, "many.jsonl", bad, tokenizer)
        bad = add_records(distinct, "each.jsonl", num_distinct)
        for name, arguments in (("distinct_pictures", ()), ("distinct_pictures_headers_only", ("--headers_only",))):
            runs = [measure(distinct, "each.jsonl", bad, tokenizer, *arguments) for _ in range(3)]
            results[name] = min(runs, key=lambda run: run["seconds"])
    results["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest process
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, default=100_000)
    parser.add_argument("--num_pictures", type=int, default=2000)
    parser.add_argument("--num_distinct", type=int, default=5000)
    parser.add_argument("--tokenizer", default=str(default_tokenizer()), help="a sentencepiece model; by default Llama-2's among the golden answers")
    results = rounded(main(**vars(parser.parse_args())))
    (ROOT / "benchmarks" / "results" / "validate.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
