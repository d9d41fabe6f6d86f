"""Prepare all pictures of a config's data before training, so that even the first epoch reads them from the pixel cache (model.data.pixel_cache_gib).

    python -m neva_jax.cache_pixels --config configs/finetune.py --config.model.data.pixel_cache_gib=100 [--config.model.data.num_workers=16] [--json]

Every record is read once, as training would, with model.data.num_workers processes. A command that was stopped goes on where it was when it is started again.
A bad picture ends it, or is counted where model.data.on_bad_image is skip.
"""

import json
import time

from absl import flags

from neva_jax import cli
from neva_jax.build.data import build_examples, build_tokenizer
from neva_jax.build.model import neva_config
from neva_jax.data.pixel_cache import fill
from neva_jax.errors import UserError


def prepare(config) -> dict:
    """Fills the cache -> what `--json` prints."""
    d = config.model.data
    if d.pixel_cache_gib is None:
        raise UserError("model.data.pixel_cache_gib is not set; say how large the cache may become, such as --config.model.data.pixel_cache_gib=100")
    paths = d.data_path if isinstance(d.data_path, tuple) else (d.data_path,)
    paths += (d.validation,) if isinstance(d.validation, str) else ()
    tokenizer = build_tokenizer(config)
    examples = build_examples(config, tokenizer, neva_config(config, tokenizer.vocab_size), paths)
    cache = examples.image_processor
    start = time.perf_counter()
    num_bad = fill(examples, d.num_workers)
    num_pictures, num_bytes = cache.held()
    counts = {"num_records": len(examples), "num_bad_records": num_bad, "num_pictures": num_pictures, "num_bytes": num_bytes}
    return {"path": cache.path, **counts, "seconds": time.perf_counter() - start}


def main(config, **flags) -> None:
    result = prepare(config)
    if flags["json"]:
        print(json.dumps(result))
        return
    bad = f"{result['num_bad_records']} with a bad picture, " if result["num_bad_records"] else ""
    size = f"{result['num_bytes'] / 2**30:.2f} of at most {config.model.data.pixel_cache_gib} GiB"
    print(f"{result['num_records']} records, {bad}in {result['seconds']:.0f} s; {result['path']} holds {result['num_pictures']} pictures, {size}")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "one JSON object on standard output", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags)
