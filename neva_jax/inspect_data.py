"""Look at the data as the model will see it: python -m neva_jax.inspect_data --config configs/quickstart.py --show 3 [--json]

Prints the first records: their text with what is learnt in green, what media vectors replace in grey, then ids and labels. It reads no picture and
never stops at a defective record: the record says what is wrong with it.
"""

import json
import sys

from absl import flags

from neva_jax import cli
from neva_jax.build.data import build_examples, build_tokenizer
from neva_jax.build.model import neva_config
from neva_jax.data.tokenize import shift
from neva_jax.errors import UserError
from neva_jax.evaluation.show import token_runs

COLOURS = {"text": "", "supervised": "\033[32;1m", "media": "\033[90m"}


def records(config, count: int) -> list[dict]:
    """The first `count` records, in file order, unpadded: what `--json` prints under `records`."""
    tokenizer = build_tokenizer(config)
    examples = build_examples(config, tokenizer, neva_config(config, tokenizer.vocab_size), config.model.data.data_path)
    return [_record(examples, index) for index in range(min(count, len(examples)))]


def _record(examples, index: int) -> dict:
    empty = {"index": index, "error": None, "warning": None, "text": "", "tokens": [], "labels": [], "loss_mask": [], "media_index": [], "num_media": 0, "runs": []}
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


def _print(record: dict, colour: bool) -> None:
    print(f"--- record {record['index']}: {len(record['tokens'])} tokens, {sum(record['loss_mask'])} supervised, {record['num_media']} media")
    if record["error"]:
        print(f"error: {record['error']}")
        return
    marks = {"text": ("", ""), "supervised": ("«", "»"), "media": ("", "")}
    for run in record["runs"]:
        before, after = (COLOURS[run["kind"]], "\033[0m") if colour else marks[run["kind"]]
        print(before + run["text"] + after, end="")
    print(f"\n\ntokens: {record['tokens']}\nlabels: {record['labels']}\n")


def main(config, show: int, **flags) -> None:
    shown = records(config, show)
    if flags["json"]:
        print(json.dumps({"records": shown}))
        return
    colour = sys.stdout.isatty()
    print("learnt text is " + ("green" if colour else "in «»"))
    for record in shown:
        _print(record, colour)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("show", None, "how many records to show", lower_bound=1, flag_values=values, required=True)
    flags.DEFINE_bool("json", False, "one JSON object on standard output", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags)
