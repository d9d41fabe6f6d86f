"""Media into text, by index. The data says for each text position which media vector stands there; on the device it is one gather and one `where`."""

import jax
import jax.numpy as jnp


def fuse(embeddings: jax.Array, media: jax.Array, media_index: jax.Array, learned: jax.Array | None = None) -> jax.Array:
    """embeddings: [B, T, D], media: [B, N, S, D], learned: [J, D] -> [B, T, D].

    media_index: int32[B, T]; -1: the text's own embedding, 0 .. N*S-1: the row's features, N*S ..: learned vectors (LLaVA-NeXT's image_newline).
    """
    batch, num_media, length, dim = media.shape
    vectors = media.reshape(batch, num_media * length, dim)
    if learned is not None:
        vectors = jnp.concatenate([vectors, jnp.broadcast_to(learned.astype(media.dtype), (batch, *learned.shape))], 1)
    if vectors.shape[1] == 0:
        return embeddings
    chosen = jnp.take_along_axis(vectors, jnp.maximum(media_index, 0)[..., None], axis=1)
    return jnp.where(media_index[..., None] >= 0, chosen.astype(embeddings.dtype), embeddings)
