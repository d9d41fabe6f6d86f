"""NeMo's `tokenizer.*` fields as an object: pieces of text to ids with character spans, control tokens by name.

A control token never comes out of a user's text: `encode` takes control strings for plain text, and only `whole` reads a string as the original program would.
Objects pickle as a path and options, and open themselves again in a worker. Nothing is ever downloaded. Given up: NeMo's yttm, byte-level, regex,
tiktoken and tabular libraries, and WordPiece.
"""

from pathlib import Path

import yaml

from neva_jax.data.tokenizer_huggingface import ROLES, HuggingFaceTokenizer, open_directory
from neva_jax.data.tokenizer_sentencepiece import LLAMA, SentencePieceTokenizer
from neva_jax.errors import UserError

__all__ = ["HuggingFaceTokenizer", "SentencePieceTokenizer", "open_tokenizer"]

LIBRARIES = ("sentencepiece", "huggingface", "megatron")
GPT2 = ("GPT2BPETokenizer", "megatron-gpt-345m", "gpt2")  # NeMo's names for one tokenizer


def open_tokenizer(
    library: str,
    *,
    model: str | None = None,
    type: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    legacy: bool = False,
    special_tokens=None,
    style: str = "nemo",
):
    """NeMo's `tokenizer.{library, model, type, vocab_file, merge_file, sentencepiece_legacy, additional_special_tokens}` as a tokenizer.

    style: whose way with a sentencepiece model, "nemo" or "huggingface" (LLaVA). Errors: UserError, which names the field.
    """
    added, roles = read_special_tokens(special_tokens)
    if library not in LIBRARIES:
        raise UserError(f"model.tokenizer.library is {library!r}, which is not read here; expected one of {', '.join(LIBRARIES)}")
    if library != "megatron" and (vocab_file or merge_file):
        raise UserError(f"model.tokenizer.vocab_file and merge_file belong to library megatron, and the library is {library}; set them to null")
    if library == "sentencepiece" or (library == "megatron" and type == "GPTSentencePieceTokenizer"):
        if not model:
            raise UserError("model.tokenizer.model is not set; give the path of the sentencepiece model (for Llama-2: tokenizer.model)")
        if style == "huggingface":
            added = tuple(dict.fromkeys([*LLAMA.values(), *added]))
        return SentencePieceTokenizer(model, style=style, legacy=legacy, added=added, roles=roles)
    if not type:
        raise UserError("model.tokenizer.type is not set; with library huggingface it is the path of a directory with tokenizer.json")
    if library == "megatron" and not Path(type).is_dir():
        return _megatron(type, vocab_file, merge_file, added, roles)
    if vocab_file or merge_file:
        raise UserError(f"model.tokenizer.vocab_file and merge_file do not go with type {type}, a directory with a tokenizer of its own; set them to null")
    return open_directory(Path(type), added=added, roles=roles)


def _megatron(name: str, vocab_file: str | None, merge_file: str | None, added, roles) -> HuggingFaceTokenizer:
    if name not in GPT2:
        raise UserError(f"model.tokenizer.type is {name!r}, which is neither a local directory nor one of {', '.join(GPT2)}; nothing is downloaded")
    if not (vocab_file and merge_file):
        raise UserError(
            f"model.tokenizer.type is {name} of library megatron, which NeMo downloads and this program does not: set model.tokenizer.vocab_file and "
            "model.tokenizer.merge_file to GPT-2's vocab.json and merges.txt; for another tokenizer set model.tokenizer.library to sentencepiece or huggingface"
        )
    end = "<|endoftext|>"
    return HuggingFaceTokenizer(vocab_file, merges=merge_file, added=added, roles={"bos_token": end, "eos_token": end, "unk_token": end} | roles)


def read_special_tokens(value) -> tuple[tuple[str, ...], dict[str, str]]:
    """additional_special_tokens -> (tokens in order, {"pad_token": name, ...}).

    value: None, a sequence of tokens, a mapping as transformers takes it ({additional_special_tokens: [...], pad_token: ...}), or a text that spells one.
    """
    field = "model.tokenizer.additional_special_tokens"
    if isinstance(value, str):
        try:
            parts = yaml.safe_load(f"[{value}]")  # as on NeMo's command line: a,b or [a, b] or {additional_special_tokens: [a, b]}
        except yaml.YAMLError:
            raise UserError(f"{field} is {value!r}, expected a list such as [<extra_id_0>, <extra_id_1>]") from None
        value = parts[0] if len(parts) == 1 and not isinstance(parts[0], str) else parts
    mapping = value if isinstance(value, dict) else {"additional_special_tokens": value or ()}
    if unknown := sorted(map(str, mapping.keys() - {*ROLES, "additional_special_tokens"})):
        raise UserError(f"{field} has the key {unknown[0]!r}, expected additional_special_tokens or one of {', '.join(ROLES)}")
    tokens = [token for part in mapping.values() for token in (part if isinstance(part, list | tuple) else [part])]
    if bad := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
        raise UserError(f"{field} holds {bad[0]!r}, expected texts such as '<extra_id_0>'")
    return tuple(dict.fromkeys(tokens)), {role: token for role, token in mapping.items() if role in ROLES}
