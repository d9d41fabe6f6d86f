"""Look at the data as the model will see it: python -m neva_jax.inspect_data --config CONFIG {--show N | --validate | --lengths} [--json] [--output FILE]

--show N prints the first records: what is learnt in green, what media vectors replace in grey, then ids and labels. It reads no picture and never stops at a
defective record: the record says what is wrong with it.
--validate looks at every record and picture and reports every defect; exit code 1 if there is any. With --output the report is kept as JSON.
--lengths measures the records and compares what padding each way of bucketing costs; it writes histograms to --output, by default lengths.png.

Work is spread over model.data.num_workers processes, as far as there are processor cores.
"""

import json
import logging
import os
import time
from pathlib import Path

from absl import flags
from PIL import Image

from neva_jax import cli
from neva_jax.build.data import build_blend, build_examples, build_tokenizer, sampling_shares
from neva_jax.build.model import neva_config
from neva_jax.data.survey import bucketings, histogram, summary, survey
from neva_jax.data.tokenize import shift
from neva_jax.data.validate import validate
from neva_jax.errors import UserError
from neva_jax.evaluation.histogram import picture
from neva_jax.evaluation.report import print_lengths, print_records, print_report
from neva_jax.evaluation.show import token_runs

log = logging.getLogger(__name__)


def open_examples(config):
    tokenizer = build_tokenizer(config)
    return build_examples(config, tokenizer, neva_config(config, tokenizer.vocab_size), config.model.data.data_path)


def num_workers(config) -> int:
    return min(config.model.data.num_workers, len(os.sched_getaffinity(0)))


# ---- --show


def records(config, count: int) -> list[dict]:
    """The first `count` records, in file order, unpadded: what `--json` prints under `records`."""
    examples = open_examples(config)
    return [_record(examples, index) for index in range(min(count, len(examples)))]


def _record(examples, index: int) -> dict:
    lists = {name: [] for name in ("tokens", "labels", "loss_mask", "media_index", "runs")}
    empty = {"index": index, "error": None, "warning": None, "text": "", "num_media": 0} | lists
    try:
        _, stream, note = examples.encoded(index)
    except UserError as error:
        return {**empty, "error": str(error)}
    tokens, labels, media_index = shift(stream, examples.encoder.extra_token)
    runs = token_runs(stream.ids, stream.supervised, stream.media_index, examples.encoder.tokenizer)
    return {
        **empty,
        "warning": note or None,
        "text": "".join(text for text, _ in runs),
        "tokens": tokens.tolist(),
        "labels": labels.tolist(),
        "loss_mask": (labels >= 0).astype(int).tolist(),
        "media_index": media_index.tolist(),
        "num_media": stream.num_media,
        "runs": [{"text": text, "kind": kind} for text, kind in runs],
    }


# ---- --validate


def report(config, headers_only: bool = False) -> dict:
    """Every defect of the whole set: what `--json` prints."""
    examples = open_examples(config)
    start = time.perf_counter()
    defects = validate(examples, num_workers(config), headers_only)
    seconds = time.perf_counter() - start
    speed = {"seconds": round(seconds, 3), "records_per_second": round(len(examples) / seconds, 1)}
    return {"num_records": len(examples), "num_defects": len(defects), "defects": [defect._asdict() for defect in defects], **speed}


# ---- --lengths


def measure(config) -> dict:
    """Lengths of all sound records, and the padding of an epoch by way of bucketing: what `--json` prints."""
    d, examples = config.model.data, open_examples(config)
    lengths, ids = survey(examples, examples.sources[0].cache_dir, num_workers(config))
    shares = sampling_shares(config)
    blend = shares and build_blend(config, shares, examples, ids)
    seed = None if d.dataloader_type == "single" else config.model.seed
    columns = lengths._asdict()
    histograms = {name: histogram(values) for name, values in columns.items()}
    return {
        "num_records": len(examples),
        "num_defects": len(examples) - len(ids),
        **{name: summary(values) for name, values in columns.items()},
        "histogram": histograms["tokens"],
        "histograms": histograms,
        "padding": bucketings(lengths, config.model.global_batch_size, seed=seed, token_lengths=d.buckets, grouping=d.length_grouping, blend=blend),
    }


def draw(measured: dict, path: Path) -> None:
    in_use = next(row["token_lengths"] for row in measured["padding"] if row["in_use"])
    names = {"tokens": "tokens (dashed: the token lengths of buckets)", "supervised": "supervised tokens", "media": "media"}
    panels = [(f"records by {text}", measured["histograms"][name], in_use if name == "tokens" else ()) for name, text in names.items()]
    Image.fromarray(picture(panels)).save(path, "PNG")
    log.info(f"wrote {path}")


# ---- the command


def main(config, **options) -> int:
    acts = ("show", "validate", "lengths")
    chosen = [act for act in acts if options[act]]
    if len(chosen) != 1:
        found = " and ".join(f"--{act}" for act in chosen) or "none of them"
        raise UserError(f"found {found}, expected one of --show=N, --validate and --lengths; see --help")
    (act,) = chosen
    if options["headers_only"] and act != "validate":
        raise UserError(f"--headers_only belongs to --validate, found --{act}; leave it out")
    path = output(options["output"], act)
    if act == "show":
        found, print_it = {"records": records(config, options["show"])}, print_records
    elif act == "validate":
        found, print_it = report(config, options["headers_only"]), print_report
        if path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    else:
        found, print_it = measure(config), print_lengths
        draw(found, path)
    print(json.dumps(found)) if options["json"] else print_it(found)
    return int(act == "validate" and found["num_defects"] > 0)


def output(given: str | None, act: str) -> Path | None:
    """The file to write, tried before the work begins."""
    if act == "show":
        if given:
            raise UserError("--output belongs to --validate and --lengths, found --show; leave it out, and keep what --json prints")
        return None
    if act == "lengths" and given and not given.lower().endswith(".png"):
        raise UserError(f"--output {given}: --lengths draws a PNG, expected a name that ends in .png")
    path = Path(given or "lengths.png") if given or act == "lengths" else None
    try:
        if path:
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name a file in a folder that is there and writable") from None
    return path


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("show", None, "print the first N records", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("validate", False, "report every defect of the whole set", flag_values=values)
    flags.DEFINE_bool("lengths", False, "measure the records, and what padding costs", flag_values=values)
    flags.DEFINE_bool("headers_only", False, "with --validate: open pictures without decoding them; quick, but misses those cut off", flag_values=values)
    flags.DEFINE_string("output", None, "a file for the report (--validate, JSON) or the histograms (--lengths, PNG, default lengths.png)", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object on standard output", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags)
