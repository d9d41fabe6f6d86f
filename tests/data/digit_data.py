"""Examples of the digits and batches of them, for tests of the pipeline. Workers import this file, and are to stay small."""

import json
from pathlib import Path

import numpy as np

from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.lengths import read_lengths
from neva_jax.data.media import open_media
from neva_jax.data.pipeline import Rows, batches
from neva_jax.data.plan import Plan, make_buckets
from neva_jax.data.records import Records
from neva_jax.data.tokenizer import SentencePieceTokenizer

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
S = 16  # text positions of a picture
SIZE, MBS = 8, 2


def digits(directory, records=None, images=DIGITS / "images.tar", processor=ImageProcessor, **changes):
    """Examples of the digits, or of other records about their pictures."""
    path = DIGITS / "test.json"
    if records is not None:
        path = directory / "data.json"
        path.write_text(json.dumps(records))
    encoder = Encoder(SentencePieceTokenizer(DIGITS / "tokenizer.model"), "v1", S, 256)
    source = Records(path, directory / "cache")
    return Examples((source,), open_media(images), processor(crop_size=(32, 32), shortest_edge=32), encoder, **changes)


def planned(examples, seed=0):
    lengths = read_lengths(examples, examples.sources[0].cache_dir)
    return Plan(seed, lengths, SIZE, make_buckets(lengths))


def read(examples, plan, start, stop, *, rows=Rows(MBS), num_workers=0):  # noqa: B008 (frozen)
    return list(batches(examples, plan, rows, ids=np.arange(len(examples)), start=start, stop=stop, global_batch_size=SIZE, num_workers=num_workers))


def record(image, question="Which digit?", answer="seven"):
    images = [image] if isinstance(image, str) else image
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if images else {})}
