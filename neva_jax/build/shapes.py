"""The shapes that a config's batches will have, as far as this machine can say: from the data's index of lengths if it is here, else from the config alone."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from neva_jax.build.data import build_blend, build_examples, build_tokenizer, sampling_shares
from neva_jax.build.model import flops_by_kind, neva_config
from neva_jax.build.planned import Step
from neva_jax.config import assign, leaves
from neva_jax.data.lengths import index_path, read_lengths
from neva_jax.data.plan import SUPERVISED_GRAIN, Bucket, make_buckets, padding_share, plan
from neva_jax.errors import UserError

VOCABULARIES = {"sentencepiece": 32008, "huggingface": 128264}  # Llama 2's and Llama 3's with NeVA's eight tokens, where no tokenizer is here to ask
WEIGHTS = ("restore_from_path", "model.restore_from_path", "model.mm_cfg.pretrain_mm_mlp_adapter") + tuple(
    f"model.mm_cfg.{part}.from_pretrained" for part in ("llm", "vision_encoder")
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """bucket: the largest shape, which memory is planned for. notes: what was assumed. batches: of an epoch, how many have which shape; this and what follows
    where the lengths are known."""

    vocab_size: int
    bucket: Bucket
    notes: tuple[str, ...]
    batches: dict[Bucket, int] | None = None
    num_records: int | None = None
    padding_share: float | None = None

    def mean_share(self, step: Step) -> float:
        """FLOPs of the data's mean row / FLOPs of a row of the largest shape."""
        if not self.batches:
            return 1.0
        flops = lambda b: sum(flops_by_kind(step.model, tokens=b.tokens, supervised=b.supervised, media=b.media).values())  # noqa: E731
        return sum(count * flops(bucket) for bucket, count in self.batches.items()) / (sum(self.batches.values()) * flops(self.bucket))


def gather(config: ConfigDict) -> Facts:
    """Takes weights that are not here out of the config, so that a run can be planned elsewhere than where it will run."""
    notes, given = [], leaves(config)
    for field in WEIGHTS:
        if given[field] and not Path(given[field]).exists():
            assign(config, field, None)
            notes.append(f"{field} {given[field]} is not here: the config alone says the architecture")
    try:
        tokenizer = build_tokenizer(config) if config.model.tokenizer.model or config.model.tokenizer.vocab_file else None
    except UserError as error:
        tokenizer = None
        notes.append(f"the tokenizer cannot be opened here ({error})")
    vocab_size = tokenizer.vocab_size if tokenizer else VOCABULARIES.get(config.model.tokenizer.library, VOCABULARIES["sentencepiece"])
    if tokenizer is None and not config.model.override_vocab_size:
        notes.append(f"a vocabulary of {vocab_size:,} is assumed; model.tokenizer.model or model.override_vocab_size says another")
    if config.model.data.data_path and tokenizer:
        try:
            if measured := _measured(config, tokenizer, vocab_size, notes):
                return measured
        except UserError as error:
            notes.append(f"the data cannot be read here ({error})")
    d, length = config.model.data, config.model.encoder_seq_length
    tokens = max(d.buckets) if d.buckets else length
    notes.append(f"T {tokens} is {'the largest of model.data.buckets' if d.buckets else 'model.encoder_seq_length; model.data.buckets sets the real lengths'}")
    supervised = -(-tokens // SUPERVISED_GRAIN) * SUPERVISED_GRAIN  # every position, as if all text were learnt
    return Facts(vocab_size, Bucket(tokens, supervised, d.max_media or 1), tuple(notes))


def _measured(config: ConfigDict, tokenizer, vocab_size: int, notes: list[str]) -> Facts | None:
    """From the index of lengths of the data, None where there is none: making it reads every record."""
    examples = build_examples(config, tokenizer, neva_config(config, vocab_size), config.model.data.data_path)
    cache, d = examples.sources[0].cache_dir, config.model.data
    if not index_path(examples, cache).exists():
        notes.append("the data's lengths are not indexed; python -m neva_jax.inspect_data --lengths does that, then they are planned with")
        return None
    lengths = read_lengths(examples, cache)
    shares = sampling_shares(config)
    blend = shares and build_blend(config, shares, examples, np.arange(len(examples)))
    buckets = make_buckets(lengths, d.buckets, blend=blend)
    seed = None if d.dataloader_type == "single" else config.model.seed
    batches = plan(seed, 0, lengths, min(config.model.global_batch_size, len(examples)), buckets, d.length_grouping, blend)
    largest = Bucket(*(max(bucket[i] for bucket in buckets) for i in range(3)))
    count, padding = Counter(bucket for bucket, _ in batches), padding_share(lengths, batches)
    return Facts(vocab_size, largest, tuple(notes), dict(count), len(examples), float(padding))
