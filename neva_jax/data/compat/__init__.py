"""model.data.compat: what turns a record into tokens and labels. "exact" is what the template means; the others repeat an original, defects included."""

from neva_jax.data.compat.llava import LlavaEncoder
from neva_jax.data.compat.nemo import Nemo123Encoder, NemoEncoder
from neva_jax.data.encoder import Encoder

ENCODERS = {encoder.compat: encoder for encoder in (Encoder, NemoEncoder, Nemo123Encoder, LlavaEncoder)}
