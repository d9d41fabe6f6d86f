"""The trunk: encoder -> projector -> fusion -> language model. It knows neither pictures nor sound: an encoder turns media into features, that is all.

NeVA: ClipVision or SiglipVision, Projector, Llama. SALM will bring another encoder and projector to the same trunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.attention import attend
from neva_jax.models.clip import ClipVision, ClipVisionConfig
from neva_jax.models.fusion import fuse
from neva_jax.models.llama import Llama, LlamaConfig
from neva_jax.models.projector import Projector
from neva_jax.models.siglip import SiglipVision, SiglipVisionConfig
from neva_jax.parallel.layer_runner import scan_layers
from neva_jax.parallel.sharding import WHOLE, axis_rules, constrain, spread_rows

TOWERS = {ClipVisionConfig: ClipVision, SiglipVisionConfig: SiglipVision}


class MultimodalModel(nnx.Module):
    """vision_encoder: media[M, ...] -> [M, S, E]; projector: [M, S, E] -> [M, S', D]; llm: see models/llama.py."""

    def __init__(self, *, vision_encoder, projector, llm):
        self.vision_encoder, self.projector, self.llm = vision_encoder, projector, llm

    def encode(self, media: jax.Array) -> jax.Array:
        """media: [B, N, ...] -> media embeddings [B, N, S', D]. Each device of the mesh, of the tensor and pipeline axes too, does its share of the media."""
        batch, num_media = media.shape[:2]
        with axis_rules(WHOLE):
            flat, gather = spread_rows(media.reshape(batch * num_media, *media.shape[2:]))
            embeddings = gather(self.projector(self.vision_encoder(flat)))
        return constrain(embeddings.reshape(batch, num_media, *embeddings.shape[1:]), "batch", None, None, None)

    def embed(self, batch: dict[str, jax.Array]) -> jax.Array:
        """batch: tokens, position_ids, segment_ids, media_index int32[B, T]; media [B, N, ...] -> embeddings [B, T, D] of texts and media."""
        _check(batch)
        embeddings = self.llm.embed(batch["tokens"])
        return fuse(embeddings, self.encode(batch["media"]), batch["media_index"]) if batch["media"].shape[1] else embeddings

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """batch: see `embed` -> hidden [B, T, D], for `llm.logits`."""
        return self.llm.decode(self.embed(batch), batch["position_ids"], batch["segment_ids"])


@dataclasses.dataclass(frozen=True)
class NevaConfig:
    llm: LlamaConfig
    vision: ClipVisionConfig | SiglipVisionConfig
    projector: str  # a kind of models/projector.py

    @property
    def media_length(self) -> int:
        """S': text positions an image takes."""
        half = (self.vision.grid + 1) // 2
        return half**2 if self.projector.startswith("mlp_downsample") else self.vision.num_tokens


def neva(config: NevaConfig, *, rngs: nnx.Rngs, llm_attend=attend, vision_attend=attend, runner=scan_layers, vision_runner=scan_layers) -> MultimodalModel:
    """NeVA: the tower of the type of `config.vision`, projector, Llama. The attention kernels and the way layers are run are handed in."""
    return MultimodalModel(
        vision_encoder=TOWERS[type(config.vision)](config.vision, attend=vision_attend, runner=vision_runner, rngs=rngs),
        projector=Projector(config.projector, config.vision.hidden_size, config.llm.hidden_size, rngs=rngs),
        llm=Llama(config.llm, attend=llm_attend, runner=runner, rngs=rngs),
    )


def _check(batch) -> None:
    """Ranks and counts, in words, once a trace."""
    rows, length = batch["tokens"].shape
    for name in ("position_ids", "segment_ids", "media_index"):
        if batch[name].shape != (rows, length) or not jnp.issubdtype(batch[name].dtype, jnp.integer):
            raise ValueError(f"{name} must be int[B, T] = int[{rows}, {length}] like tokens; found {batch[name].dtype}{list(batch[name].shape)}")
    if batch["media"].ndim < 3 or batch["media"].shape[0] != rows:
        raise ValueError(f"media must be [B, N, ...] with B = {rows}, the rows of tokens; found {list(batch['media'].shape)}")
