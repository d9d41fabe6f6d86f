"""Add control tokens to a sentencepiece model: python -m neva_jax.extend_tokenizer --input tokenizer.model --output tokenizer_neva.model [--json]

NeVA needs <extra_id_0>..<extra_id_7>, which is what is added if --tokens does not say otherwise; with Llama-2's model they get the ids 32000..32007. Other
tokens are given by --tokens '<a>,<b>'. The pieces that are there stay as they are, so a model trained with the input reads the same text from the output.
"""

import json
import os
import re
from pathlib import Path

from absl import flags

from neva_jax import cli
from neva_jax.data.tokenizer_sentencepiece import CONTROL, USER_DEFINED, SentencePieceTokenizer
from neva_jax.errors import UserError

EXTRA_IDS = tuple(f"<extra_id_{i}>" for i in range(8))


def extend(model: bytes, tokens: tuple[str, ...], *, user_defined: bool = True) -> bytes:
    """A serialised sentencepiece model with `tokens` behind its pieces, in order. user_defined False: control pieces, which text never becomes, not even by
    NeMo's own way of tokenising."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    there = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    for token in tokens:
        if token in there:
            raise UserError(f"--tokens: {token} is in the model already, with id {there[token]}; leave it out")
        there[token] = len(proto.pieces)
        proto.pieces.add(piece=token, score=0.0, type=USER_DEFINED if user_defined else CONTROL)
    return proto.SerializeToString()


def main(input: str, output: str, tokens: list[str], is_userdefined: bool, overwrite: bool, json: bool) -> None:
    if os.path.isdir(output) or (os.path.exists(output) and not overwrite):
        raise UserError(f"--output {output} exists; name another file, or add --overwrite")
    names = tuple(token for part in tokens for token in re.split(r"[,\s]+", part) if token)
    if not names:
        raise UserError("--tokens names no token; expected a list such as '<a>,<b>'")
    try:
        SentencePieceTokenizer(input)
    except UserError as error:
        raise UserError(str(error).replace("model.tokenizer.model", "--input")) from None
    partial = Path(f"{output}.partial")
    try:
        partial.write_bytes(extend(Path(input).read_bytes(), names, user_defined=is_userdefined))
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    extended = SentencePieceTokenizer(output)
    _report(output, {name: extended.id_of(name) for name in names}, extended.vocab_size, json)


def _report(output: str, ids: dict[str, int], vocab_size: int, as_json: bool) -> None:
    if as_json:
        return print(json.dumps({"output": output, "ids": ids, "vocab_size": vocab_size}))
    print("\n".join(f"{i}  {name}" for name, i in ids.items()))
    print(f"{output} has {vocab_size} pieces; set model.tokenizer.model to it")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("input", None, "the sentencepiece model to add to (for Llama-2: tokenizer.model)", flag_values=values, required=True)
    flags.DEFINE_string("output", None, "the model to write", flag_values=values, required=True)
    flags.DEFINE_multi_string("tokens", [",".join(EXTRA_IDS)], "tokens to add, with commas or spaces between; may be repeated", flag_values=values)
    flags.DEFINE_bool("is_userdefined", True, "as user-defined pieces; false: as control pieces", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an output that exists", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)


if __name__ == "__main__":
    cli.run(main, define_flags, with_config=False)
