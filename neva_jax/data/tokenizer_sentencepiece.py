"""Sentencepiece models as NeMo and as Hugging Face's Llama tokenizers (slow, of transformers 4.37) read them.

For pieces of text the model is copied in memory with its user-defined pieces switched off, so that no control token ever comes out of text; spaces stay as
they are written, also where a model would squeeze them. `whole` is the original program's way, control strings included. Given up: added tokens that
swallow the spaces around them.
"""

import functools
import hashlib
import itertools
import re
from pathlib import Path

from neva_jax.errors import UserError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # sentencepiece's piece types
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # what transformers' LlamaTokenizer takes where nothing else is said


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    style "nemo": the model alone, control tokens are its user-defined pieces. With `legacy`, NeMo's sentencepiece_legacy, tokens of `added` that are no pieces
    get the ids behind the vocabulary, in order, and the text is cut at them; without it they must be pieces. style "huggingface": the text is cut at <s>, </s>,
    <unk> and all of `added`; what `legacy` means there is said at `whole`.
    roles: {"bos_token": name, ...} where they are not the model's own. ordinary: those of `added` that transformers does not count as special.
    adds_bos: whether transformers puts BOS before a string (NeMo never does).
    Attributes: path, fingerprint, vocab_size; bos_id, eos_id, unk_id, pad_id (None where absent); adds_bos; special, the names that `whole` takes for control
    tokens; behind, those of them behind the model's own pieces; restarts, whether text behind a control token begins with a dummy prefix again.
    """

    def __init__(self, path: str | Path, *, style: str = "nemo", legacy: bool = False, added=(), roles=None, ordinary=(), adds_bos: bool = True):
        self.path, self.style, self.legacy = Path(path), style, legacy
        self._options = {"style": style, "legacy": legacy, "added": tuple(added), "roles": dict(roles or {}), "ordinary": tuple(ordinary), "adds_bos": adds_bos}
        if not self.path.is_file():
            raise UserError(f"model.tokenizer.model: no file {self.path}; give the sentencepiece model (for Llama-2: tokenizer.model)")
        self._bytes = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(self._bytes + repr(self._options).encode()).hexdigest()
        try:
            model = self._original
        except Exception as error:  # protobuf and sentencepiece raise several kinds
            raise UserError(f"model.tokenizer.model: {self.path} is not a sentencepiece model ({' '.join(str(error).split())})") from None
        own = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id(), "pad_token": model.pad_id()}
        if style == "huggingface":
            roles, own = LLAMA | self._options["roles"], dict.fromkeys(own, -1)
        else:
            roles = self._options["roles"]
        self._added: dict[str, int] = {}  # the tokens at which text is cut before sentencepiece sees it
        self._added = self._ids_of_added([*(token for token in roles.values() if token and token not in added), *added])
        self.vocab_size = max([model.vocab_size(), *(i + 1 for i in self._added.values())])
        ids = {role: self.id_of(roles[role]) if roles.get(role) else i if i >= 0 else None for role, i in own.items()}
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = ids.values()
        self.adds_bos = style == "huggingface" and adds_bos and self.bos_id is not None
        pieces = [piece.piece for piece in self._proto().pieces if piece.type == USER_DEFINED]
        self.special = tuple(dict.fromkeys((*self._added, *pieces)))
        self.behind = tuple(sorted((name for name, i in self._added.items() if i >= model.vocab_size()), key=self._added.get))
        self.restarts = legacy and (style == "huggingface" or bool(self._added and not pieces))

    def _ids_of_added(self, tokens: list[str]) -> dict[str, int]:
        if self.style == "nemo" and not self.legacy:
            if missing := [token for token in tokens if self._piece(token) is None]:
                command = f"python -m neva_jax.extend_tokenizer --input {self.path} --output NEW.model --tokens '{','.join(missing)}'"
                raise UserError(
                    f"model.tokenizer.additional_special_tokens: {self.path} has no piece {', '.join(missing)}; add them by {command}, "
                    "or set model.tokenizer.sentencepiece_legacy to get ids behind the vocabulary"
                )
            return {}
        ids, behind = {}, itertools.count(self._original.vocab_size())
        for token in dict.fromkeys(tokens):
            found = self._piece(token)
            if self.style == "huggingface" or found is None:
                ids[token] = next(behind) if found is None else found
        return ids

    def __reduce__(self):
        return functools.partial(type(self), **self._options), (self.path,)

    # ---- the model, as it is and changed in memory

    def _proto(self):
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._bytes)

    def _processor(self, *, plain: bool, prefix: bool | None = None):
        """plain: user-defined pieces off, spaces as written. prefix: whether there is a dummy prefix; None: as the model has it."""
        from sentencepiece import SentencePieceProcessor

        model = self._proto()
        if not model.pieces:
            raise ValueError("it has no pieces")
        if prefix is not None:
            model.normalizer_spec.add_dummy_prefix = prefix
        if plain:
            model.normalizer_spec.remove_extra_whitespaces = False  # a space behind a control token counts, and the pieces' surfaces tile the text
            for piece in model.pieces:
                piece.type = CONTROL if piece.type == USER_DEFINED else piece.type
        return SentencePieceProcessor(model_proto=model.SerializeToString())

    @functools.cached_property
    def _original(self):
        return self._processor(plain=False)

    @functools.cached_property
    def _bare(self):
        return self._processor(plain=False, prefix=False)

    @functools.cached_property
    def _opening(self):
        return self._processor(plain=True, prefix=True if self.style == "huggingface" and not self.legacy else None)

    @functools.cached_property
    def _following(self):
        return self._processor(plain=True, prefix=False)

    @functools.cached_property
    def _cuts(self) -> re.Pattern:
        """NeMo takes the first of the added tokens that fit at a place, transformers the longest."""
        tokens = sorted(self._added, key=len, reverse=True) if self.style == "huggingface" else self._added
        return re.compile(f"({'|'.join(map(re.escape, tokens))})")

    # ---- text to ids and back

    def encode(self, text: str, *, start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """ids of a user's text, and for each the characters [begin, end) it stands for. start: the text opens the stream (dummy prefix and all)."""
        pieces = (self._opening if start else self._following).encode(text, return_type="proto").pieces
        ends = list(itertools.accumulate(len(piece.surface) for piece in pieces))  # surfaces, since begin and end count bytes
        return [piece.id for piece in pieces], list(zip([0, *ends], ends, strict=False))

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What stands before a control token that opens the stream: sentencepiece alone puts its dummy prefix there, a program that cuts the text does not."""
        alone = self.style == "nemo" and not self.restarts
        return [self._original.piece_to_id("▁")] if alone and self._proto().normalizer_spec.add_dummy_prefix else []

    def whole(self, text: str) -> list[int]:
        """The ids that the original program gives for the whole string, without BOS; control strings in it become control tokens.

        transformers with legacy False: the string alone gets a prefix, and loses it where a special token opens it; a part that begins with a space is
        encoded behind <unk>, so that sentencepiece keeps the space. Otherwise each part is encoded by itself, prefix and all.
        """
        if not self._added:
            return self._original.encode(text)
        modern = self.style == "huggingface" and not self.legacy
        parts = [part for part in self._cuts.split("▁" + text.replace("▁", " ") if modern and text else text) if part]
        if modern and len(parts) > 1 and parts[0] == "▁" and parts[1] in self._added and parts[1] not in self._options["ordinary"]:
            del parts[0]
        part_ids = self._part_ids if modern else self._original.encode
        return [i for part in parts for i in ([self._added[part]] if part in self._added else part_ids(part))]

    def _part_ids(self, part: str) -> list[int]:
        if not part.startswith(("▁", " ")):
            return self._bare.encode(part)
        unk = (LLAMA | self._options["roles"])["unk_token"]
        return self._bare.encode(unk + part)[len(self._bare.encode(unk)) :]

    def _piece(self, token: str) -> int | None:
        found = self._original.piece_to_id(token)
        return found if self._original.id_to_piece(found) == token else None

    def id_of(self, token: str) -> int | None:
        """The id of a control token or piece, or None."""
        return self._added.get(token, self._piece(token))

    def decode(self, ids) -> str:
        """Text of ids. Tokens at which text is cut show by their names; the model's own control pieces (<s>, </s>) do not, nor ids that no piece has."""
        names, text = {i: token for token, i in self._added.items()}, ""
        for name, group in itertools.groupby(map(int, ids), names.get):
            run, decoder = list(group), self._original if self.restarts or not text else self._following
            text += name * len(run) if name else decoder.decode([i for i in run if i < decoder.get_piece_size()])
        return text
