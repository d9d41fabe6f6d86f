"""Tokenizers that have every template's control tokens, made in memory of the digits' small model or of Llama-2's."""

import functools
from pathlib import Path

from helpers import ROOT, golden
from sentencepiece import sentencepiece_model_pb2

from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.extend_tokenizer import extend

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"
EXTRA = tuple(f"<extra_id_{i}>" for i in range(8))
CHAT = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
IM = ("<im_start>", "<im_end>")
CONTROLS = ("<s>", "</s>", *EXTRA, *CHAT, *IM)


def extended(directory: Path, name: str, *, with_bytes: bool = False) -> Path:
    """The path of a sentencepiece model with the tokens of CHAT; name: "digits" or "llama2". with_bytes: no text is unknown to it, as in Llama-2's."""
    model = (DIGITS if name == "digits" else golden("tokenizer/llama2_neva.model")).read_bytes()
    if with_bytes:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        proto.trainer_spec.byte_fallback = True
        for byte in range(256):
            proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=proto.SentencePiece.BYTE)
        model = proto.SerializeToString()
    path = directory / f"{name}.model"
    path.write_bytes(extend(model, CHAT))
    return path


def open_for(path: Path, template: str, *, legacy: bool = False) -> SentencePieceTokenizer:
    """As a run with that template opens the model. legacy: of LLaVA's, whether text behind a control token begins with a space piece again."""
    return _opened(path, TEMPLATES[template].llava, legacy)


@functools.cache
def _opened(path, llava, legacy):
    return SentencePieceTokenizer(path, style="huggingface", legacy=legacy, added=(*CHAT[-2:], *IM)) if llava else SentencePieceTokenizer(path)


def spelt(sp, ids) -> str:
    """The text of ids, control pieces by name, spaces as they are."""
    pieces = [(sp.is_byte(i), sp.id_to_piece(i)) for i in map(int, ids)]
    return b"".join(bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode() for is_byte, piece in pieces).decode(errors="replace")
