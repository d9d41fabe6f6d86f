"""Tokenizers behind one small face: pieces of text to ids with character spans, control tokens by name.

A control token never comes out of text: sentencepiece models are copied in memory with their user-defined pieces switched off, Hugging Face ones encode
special tokens as plain text. Where a text starts behind a control token it gets no dummy prefix, so on text free of control strings the ids are those of the
whole string encoded at once; but spaces stay as they are written, also where a sentencepiece model would squeeze them. Objects pickle as a path and open
themselves again in a worker.
"""

import functools
import hashlib
import itertools
from pathlib import Path

from neva_jax.data.conversation import BOS, END, EOS, PATCH, START
from neva_jax.errors import UserError

USER_DEFINED, CONTROL = 4, 3  # sentencepiece's piece types
BEGINS, ENDS = ("<|begin_of_text|>", "<s>"), ("<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>")  # Hugging Face's names, the first that is there counts


class SentencePieceTokenizer:
    """A sentencepiece `.model` file. Attributes: vocab_size, bos_id, eos_id, unk_id, fingerprint."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"model.tokenizer.model: no file {self.path}; give the sentencepiece model (for Llama-2: tokenizer.model)")
        self.fingerprint = hashlib.sha256(self.path.read_bytes()).hexdigest()
        try:
            whole = self._processors[0]
        except Exception as error:  # protobuf and sentencepiece raise several kinds
            raise UserError(f"model.tokenizer.model: {self.path} is not a sentencepiece model ({' '.join(str(error).split())})") from None
        self.vocab_size, self.bos_id, self.eos_id, self.unk_id = whole.vocab_size(), whole.bos_id(), whole.eos_id(), whole.unk_id()

    @functools.cached_property
    def _model(self):
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(self.path.read_bytes())
        return model

    @functools.cached_property
    def _processors(self):
        """The model as it is; without user-defined pieces; and without a dummy prefix too."""
        from sentencepiece import SentencePieceProcessor

        model = type(self._model).FromString(self._model.SerializeToString())
        processors = [SentencePieceProcessor(model_proto=model.SerializeToString())]
        model.normalizer_spec.remove_extra_whitespaces = False  # a space behind a control token counts, and the pieces' surfaces tile the text
        for piece in model.pieces:
            piece.type = CONTROL if piece.type == USER_DEFINED else piece.type
        processors.append(SentencePieceProcessor(model_proto=model.SerializeToString()))
        model.normalizer_spec.add_dummy_prefix = False
        return [*processors, SentencePieceProcessor(model_proto=model.SerializeToString())]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_model", "_processors", "prefix_ids")}

    def encode(self, text: str, *, start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """ids, and for each the characters [begin, end) of `text` it stands for. start: the text opens the stream (dummy prefix and all)."""
        pieces = self._processors[1 if start else 2].encode(text, return_type="proto").pieces
        ends = list(itertools.accumulate(len(piece.surface) for piece in pieces))  # surfaces, since begin and end count bytes
        return [piece.id for piece in pieces], list(zip([0, *ends], ends, strict=False))

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What stands before a control token that opens the stream: sentencepiece puts its dummy prefix there."""
        return [self._processors[0].piece_to_id("▁")] if self._model.normalizer_spec.add_dummy_prefix else []

    def id_of(self, token: str) -> int | None:
        """The id of a control token or user-defined piece, or None."""
        whole = self._processors[0]
        found = whole.piece_to_id(token)
        return found if whole.id_to_piece(found) == token else None

    def decode(self, ids) -> str:
        return self._processors[0].decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A Hugging Face directory with a byte-level tokenizer.json (Llama-3, Qwen, GPT-2). A directory with a sentencepiece tokenizer.model opens as that."""

    def __init__(self, path: Path):
        self.path = path
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"model.tokenizer.type: {path} is not a tokenizer.json ({' '.join(str(error).split())})") from None
        self.bos_id, self.eos_id, self.unk_id = self._first(BEGINS), self._first(ENDS), None

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        tokenizer.post_processor = None  # it trims spaces off the spans
        tokenizer.add_special_tokens([name for name in (*BEGINS, *ENDS, BOS, EOS, PATCH, START, END) if tokenizer.token_to_id(name) is not None])
        tokenizer.encode_special_tokens = True
        return tokenizer

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def _first(self, tokens):
        return next((i for token in tokens if (i := self.id_of(token)) is not None), None)

    def encode(self, text: str, *, start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    prefix_ids: list[int] = []

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def open_tokenizer(library: str, *, model: str | None, type: str | None):
    """NeMo's `tokenizer.{library,model,type}` as an object of this file."""
    if library == "sentencepiece":
        if not model:
            raise UserError("model.tokenizer.model is not set; give the path of the sentencepiece model (for Llama-2: tokenizer.model)")
        return SentencePieceTokenizer(model)
    if not type:
        raise UserError("model.tokenizer.type is not set; with library huggingface it is the path of a directory with tokenizer.json")
    directory = Path(type)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model")
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"model.tokenizer.type: no tokenizer.json and no tokenizer.model in {directory}; nothing is downloaded: give a local directory")
    if b'"ByteLevel"' not in path.read_bytes():
        raise UserError(f"model.tokenizer.type: {path} is not byte-level; put the sentencepiece tokenizer.model beside it, this version reads that")
    return HuggingFaceTokenizer(path)
