"""How fast a million records open. Writes a LLaVA-like JSON list to a temporary folder, indexes it, then opens it and reads 1,000 random records in a
fresh process. Prints one JSON object and keeps it in `results/records.json`. The file is in the page cache: disks are not measured.

    python benchmarks/records.py [--num_records 1000000]
"""

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = ["the", "a", "man", "dog", "street", '"sign"', "red,", "left;", "of", "[on]", "with", "{two}", "people", "walking", "near", "bright\n", "café"]


def write_records(path, num_records):
    source = random.Random(0)
    with open(path, "w") as file:
        for i in range(num_records):
            question, answer = (" ".join(source.choices(WORDS, k=k)) for k in (9, 24))
            turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
            record = {"id": f"{i:09d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": turns}
            file.write(("[" if i == 0 else ", ") + json.dumps(record))
        file.write("]")


def read_in_a_fresh_process(path, cache_dir, num_reads=1000):
    import resource

    from neva_jax.data.records import Records

    start = time.perf_counter()
    records = Records(path, cache_dir)
    num_records = len(records)
    opened = time.perf_counter()
    for index in random.Random(1).choices(range(num_records), k=num_reads):
        assert int(records[index]["id"]) == index
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"open_seconds": opened - start, "peak_rss_mib": peak, "records_per_second": num_reads / (done - opened), "num_records": num_records}


def main(num_records):
    from neva_jax.data.records import Records

    with tempfile.TemporaryDirectory() as folder:
        path, cache_dir = os.path.join(folder, "records.json"), os.path.join(folder, "cache")
        write_records(path, num_records)
        start = time.perf_counter()
        Records(path, cache_dir)
        index_seconds = time.perf_counter() - start
        size = os.path.getsize(path) / 1e6
        reader = subprocess.run([sys.executable, __file__, "--read", path, cache_dir], check=True, capture_output=True, text=True)
    return {
        "file_mb": size, "index_seconds": index_seconds, "index_mb_per_second": size / index_seconds, **json.loads(reader.stdout),
        "python": platform.python_version(), "numpy": np.__version__, "num_cpus": os.cpu_count(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, default=1_000_000)
    parser.add_argument("--read", nargs=2, metavar=("FILE", "CACHE_DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_in_a_fresh_process(*arguments.read)))
    else:
        results = {k: round(v, 4) if isinstance(v, float) else v for k, v in main(arguments.num_records).items()}
        (ROOT / "benchmarks" / "results" / "records.json").write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results))
