"""Records, order and batches that a config asks for."""

import dataclasses
import hashlib
import logging
import math

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from neva_jax.build.model import image_processor
from neva_jax.data.blend import CYCLE, Blend
from neva_jax.data.compat import ENCODERS
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.example import Examples
from neva_jax.data.lengths import read_lengths
from neva_jax.data.media import open_media
from neva_jax.data.pipeline import Rows, batches
from neva_jax.data.pixel_cache import PixelCache
from neva_jax.data.plan import FixedPlan, Lengths, Plan, make_buckets
from neva_jax.data.records import Records
from neva_jax.data.tokenizer import open_tokenizer
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig
from neva_jax.parallel.distributed import check_same
from neva_jax.parallel.mesh import batch_shards

log = logging.getLogger(__name__)


def build_tokenizer(config: ConfigDict):
    """The tokenizer that model.tokenizer asks for. LLaVA's templates read sentencepiece models as Hugging Face does, NeVA's as NeMo does; and where no tokens
    are asked for, those that LLaVA's train.py adds by itself are added."""
    t, template = config.model.tokenizer, config.model.data.conv_template
    tokens, llava = t.additional_special_tokens, TEMPLATES[template].llava
    if tokens is None and llava:
        tokens = ("[PAD]",) * (template == "llava:v0") + ("<im_start>", "<im_end>") * config.model.mm_cfg.use_im_start_end
    return open_tokenizer(
        t.library,
        model=t.model,
        type=t.type,
        vocab_file=t.vocab_file,
        merge_file=t.merge_file,
        legacy=t.sentencepiece_legacy,
        special_tokens=tokens.to_dict() if isinstance(tokens, ConfigDict) else tokens,
        style="huggingface" if llava else "nemo",
    )


def cached_processor(config: ConfigDict, directory: str):
    """The image processor that the config asks for, behind a pixel cache in `directory` where model.data.pixel_cache_gib is set."""
    processor, gib = image_processor(config), config.model.data.pixel_cache_gib
    return PixelCache(processor, directory, int(gib * 2**30)) if gib else processor


def build_encoder(config: ConfigDict, tokenizer, neva_config: NevaConfig):
    """What turns a record into a stream of ids, in the mode that model.data.compat asks for."""
    d = config.model.data
    return ENCODERS[d.compat](
        tokenizer=tokenizer,
        template=d.conv_template,
        media_length=neva_config.media_length,
        max_length=config.model.encoder_seq_length,
        use_im_start_end=config.model.mm_cfg.use_im_start_end,
        model_type=config.model.mm_cfg.llm.model_type,
        extra_token=not config.model.no_seqlen_plus_one_input_tokens,
        sep_image_conv_front=d.sep_image_conv_front,
        max_media=d.max_media,
        eod_mask_loss=d.eod_mask_loss,
    )


def build_examples(config: ConfigDict, tokenizer, neva_config: NevaConfig, data_path) -> Examples:
    d = config.model.data
    paths = (data_path,) if isinstance(data_path, str) else tuple(data_path or ())
    if not paths or not all(paths):
        raise UserError("model.data.data_path is not set; give a .json or .jsonl file of LLaVA records")
    vocab = neva_config.llm.vocab_size
    if tokenizer.vocab_size > vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model {vocab} (model.override_vocab_size); unset it or raise it")
    if neva_config.media_length > config.model.encoder_seq_length:
        raise UserError(f"a picture takes {neva_config.media_length} positions and model.encoder_seq_length is {config.model.encoder_seq_length}; raise it")
    sources = tuple(Records(path, d.cache_dir) for path in paths)
    return Examples(
        sources=sources,
        media=open_media(d.image_folder) if d.image_folder else None,
        image_processor=cached_processor(config, sources[0].cache_dir),
        encoder=build_encoder(config, tokenizer, neva_config),
        on_bad_image=d.on_bad_image,
    )


@dataclasses.dataclass
class Split:
    """Records, the plan over some of them (ids: which), and this process' rows."""

    examples: Examples
    lengths: Lengths
    ids: np.ndarray
    plan: object
    rows: Rows
    global_batch_size: int
    num_workers: int

    def batches(self, start: int, stop: int):
        """Global batches start .. stop-1, as Grain makes them (see data/pipeline.py)."""
        return batches(
            self.examples, self.plan, self.rows, ids=self.ids, start=start, stop=stop, global_batch_size=self.global_batch_size, num_workers=self.num_workers
        )

    def fingerprint(self) -> str:
        """Of what decides which records the batches of a run hold, in which order."""
        parts = (self.examples.fingerprint(), len(self.ids), int(self.ids.sum()), self.plan.seed, self.plan.args[1:])  # args[0]: the lengths
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def describe(self, batch: int, count: int = 8) -> str:
        """The records of a global batch, in words."""
        ids = self.ids[self.plan[batch][1]]
        return ", ".join(self.examples.where(int(i)) for i in ids[:count]) + (f" and {len(ids) - count} more" if len(ids) > count else "")


def build_data(config: ConfigDict, tokenizer, neva_config: NevaConfig, mesh: Mesh) -> tuple[Split, Split | None]:
    """-> (training, validation or None). Validation has its own file, or a share of the training records that training never sees."""
    m, d = config.model, config.model.data
    shares = sampling_shares(config)
    examples = build_examples(config, tokenizer, neva_config, d.data_path)
    lengths = read_lengths(examples, examples.sources[0].cache_dir, d.num_workers)
    ids = np.arange(len(examples))
    held_out = None
    if isinstance(d.validation, float):
        order = np.random.default_rng([m.seed, 0, 2]).permutation(ids)
        count = max(1, round(d.validation * len(ids)))
        held_out, ids = (examples, lengths, np.sort(order[:count])), np.sort(order[count:])
    elif d.validation:
        other = build_examples(config, tokenizer, neva_config, d.validation)
        held_out = other, read_lengths(other, other.sources[0].cache_dir, d.num_workers), np.arange(len(other))
    if len(ids) == 0:
        raise UserError("model.data.data_path: no record is left to train on")
    rows = Rows(m.micro_batch_size, batch_shards(mesh), local_shards(mesh))
    blend = shares and build_blend(config, shares, examples, ids)
    size, single = m.global_batch_size, d.dataloader_type == "single"
    once = single and not blend  # NeMo's blend is as long as the run
    if once and len(ids) < size:
        raise UserError(f"model.data.dataloader_type single passes once over the data, and {len(ids)} records do not fill a global batch of {size}")
    mine = lengths.select(ids)
    check_same("the training records", b"".join(np.ascontiguousarray(column).tobytes() for column in (mine.tokens, mine.supervised, mine.media)))
    plan = Plan(None if single else m.seed, mine, size, make_buckets(mine, d.buckets, blend=blend), d.length_grouping, once, blend)
    train = Split(examples, mine, ids, plan, rows, size, d.num_workers)
    if held_out is None or config.trainer.limit_val_batches == 0:
        return train, None
    other, lengths, ids = held_out
    mine = lengths.select(ids)
    return train, Split(other, mine, ids, FixedPlan(mine, size, make_buckets(mine, d.buckets)), rows, size, 0)


def sampling_shares(config: ConfigDict) -> tuple[float, ...] | None:
    """Each file's share of what is drawn, of sum 1: model.data.concat_sampling_probabilities, whose null means equal shares, as in NeMo. None: one file."""
    paths, given = config.model.data.data_path, config.model.data.concat_sampling_probabilities
    count = len(paths) if isinstance(paths, tuple) else 1
    if given is not None and len(given) != count:
        found = f"has {len(given)} number{'s' * (len(given) != 1)}, and model.data.data_path names {count} file{'s' * (count != 1)}"
        raise UserError(f"model.data.concat_sampling_probabilities {found}; give one number a file, or null for equal shares")
    if count < 2:
        return None
    total = math.fsum(given or ())
    if given and abs(total - 1) > 1e-6:
        log.info("model.data.concat_sampling_probabilities sum to %g, not 1, and are divided by it", total)
    return tuple(p / total for p in given) if given else (1 / count,) * count


def build_blend(config: ConfigDict, shares: tuple[float, ...], examples: Examples, ids: np.ndarray) -> Blend:
    """The blend of what `ids` leaves of the files. An error if a file that has a share is never drawn from."""
    paths = [source.path for source in examples.sources]
    sizes = np.diff(np.searchsorted(ids, np.cumsum([0, *map(len, examples.sources)]))).tolist()
    for path, size, share in zip(paths, sizes, shares, strict=True):
        if share and (size == 0 or share * max(len(ids), CYCLE) < 1):
            why = "it has no record to train on" if size == 0 else "that is too little to be ever drawn"
            raise UserError(f"model.data.concat_sampling_probabilities gives {path} a share of {share:.2g}, but {why}; set it to 0, or leave the file out")
    blend = Blend(tuple(sizes), shares)
    if config.model.data.concat_sampling_probabilities is None and len(set(sizes)) > 1:
        often = ", ".join(f"{path} ({size}) {draws:.2f}" for path, size, draws in zip(paths, sizes, blend.draws_per_record(), strict=True))
        log.warning(
            f"model.data.concat_sampling_probabilities is null, so that the {len(paths)} files have equal shares, as in NeMo; how often an epoch "
            f"a record comes, of each file (its number of records): {often}; set it to {tuple(sizes)} for every record once"
        )
    return blend


def local_shards(mesh: Mesh) -> range:
    """The data shards (of data x fsdp) whose rows this process reads."""
    mine = [place for place, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()]
    shards = sorted({data * mesh.shape["fsdp"] + fsdp for _, data, fsdp, _ in mine})
    if shards != list(range(shards[0], shards[-1] + 1)):
        raise UserError(f"this process holds the data shards {shards}, which are not neighbours; choose a tensor parallel size that divides its devices")
    return range(shards[0], shards[-1] + 1)


def num_steps(config: ConfigDict, train: Split) -> int:
    """Optimizer steps of the whole run: max_steps, max_epochs or one pass, whichever ends first."""
    limits = [config.trainer.max_steps] if config.trainer.max_steps > 0 else []
    if config.trainer.max_epochs > 0:
        limits.append(config.trainer.max_epochs * len(train.ids) // train.global_batch_size)
    if train.plan.num_batches is not None:
        limits.append(train.plan.num_batches)
    return min(limits)


def num_validation_batches(config: ConfigDict, validation: Split) -> int:
    """`limit_val_batches`: a count of global batches, or a share (float) of them."""
    limit, there = config.trainer.limit_val_batches, validation.plan.num_batches
    return max(1, int(limit * there)) if isinstance(limit, float) else there if limit is None else min(limit, there)


def describe_data(train: Split, validation: Split | None, max_steps: int) -> str:
    shapes = ", ".join(f"T {b.tokens} K {b.supervised} N {b.media}" for b in train.plan.buckets)
    held = f"{len(validation.ids)} records for validation" if validation else "no validation records (model.data.validation)"
    epochs = max_steps * train.global_batch_size / len(train.ids)
    steps = f"{max_steps} steps of {train.global_batch_size} are {epochs:.2f} epochs"
    blend = train.plan.blend
    files = ", ".join(f"{source.path} {share:.1%}" for source, share in zip(train.examples.sources, blend.shares, strict=True)) if blend else ""
    return f"{len(train.ids)} training records{f' ({files} of the draws)' * bool(blend)}, {held}; {steps}; buckets: {shapes}"
