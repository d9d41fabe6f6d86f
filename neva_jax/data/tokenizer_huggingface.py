"""Hugging Face directories, read without transformers: tokenizer.json by the `tokenizers` library, tokenizer.model as its slow Llama tokenizer reads it.

Byte-level tokenizers (GPT-2, Llama-3, Qwen) and sentencepiece BPE exported to tokenizer.json (Llama-2, Mistral, Vicuna, Yi) are read; anything else is
refused. Where both files lie in a directory the slow tokenizer counts, as in NeMo and LLaVA. Given up there: tokens that swallow the spaces around them.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

from neva_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from neva_jax.errors import UserError

BEGINS, ENDS = ("<|begin_of_text|>", "<s>"), ("<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>")  # where nothing says, the first that is there counts
EXTRA_ID = re.compile(r"<extra_id_\d+>")  # NeVA's control tokens, also where somebody added them without saying that they are special
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SLOW_LLAMA = ("", "LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer")  # "": no tokenizer_config.json


class HuggingFaceTokenizer:
    """A tokenizer.json, or GPT-2's vocab.json with its merges.txt. Attributes as SentencePieceTokenizer's.

    added: special tokens behind the vocabulary, in order (those that are there keep their ids). roles: {"eos_token": name, ...}. ordinary: those of `added`
    that are not special.
    """

    prefix_ids: list[int] = []

    def __init__(self, path: str | Path, *, merges: str | Path | None = None, added=(), roles=None, ordinary=()):
        self.path = Path(path)
        self._options = {"merges": merges and str(merges), "added": tuple(added), "roles": dict(roles or {}), "ordinary": tuple(ordinary)}
        files = [self.path, *([Path(merges)] if merges else [])]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"model.tokenizer: no file {missing[0]}; nothing is downloaded: give local files")
        self.fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(self._options).encode()).hexdigest()
        try:
            tokenizer, spec = self._plain, json.loads(self._source())
        except Exception as error:  # tokenizers raises a bare Exception
            kind = "a vocabulary of byte-level BPE with its merges" if merges else "a tokenizer.json"
            raise UserError(f"model.tokenizer.type: {self.path} is not {kind} ({' '.join(str(error).split())})") from None
        self._check_kind(spec)
        self.restarts = any(scheme == "always" for _, scheme in _prefixes(spec))
        known = tokenizer.get_added_tokens_decoder()
        self._names = {i: token.content for i, token in known.items() if token.special}
        self.special = tuple(self._names.values())
        self.vocab_size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(i + 1 for i in known)])
        self.bos_id, self.eos_id = self._first("bos_token", BEGINS), self._first("eos_token", ENDS)
        self.unk_id, self.pad_id = self._first("unk_token"), self._first("pad_token")

    def _first(self, role: str, otherwise=()) -> int | None:
        named = self._options["roles"].get(role)
        return next((i for name in ([named] if named else otherwise) if (i := self.id_of(name)) is not None), None)

    def _check_kind(self, spec: dict) -> None:
        kinds = {step["type"] for section in ("normalizer", "pre_tokenizer") for step in _steps(spec, section)}
        model = spec["model"].get("type", "BPE")
        llama = model == "BPE" and kinds <= {"Prepend", "Replace", "Metaspace"} and kinds & {"Prepend", "Metaspace"}
        if not llama and "ByteLevel" not in kinds:
            raise UserError(
                f"model.tokenizer.type: {self.path} is neither byte-level nor Llama's kind of BPE (found {', '.join([model, *sorted(kinds)])}); "
                "put the sentencepiece tokenizer.model beside it, if there is one, or take another tokenizer"
            )

    def __reduce__(self):
        return functools.partial(type(self), **self._options), (self.path,)

    # ---- the tokenizer, as it is and changed in memory

    def _source(self) -> str:
        """The text of a tokenizer.json; read anew each time, since Llama-3's is 9 MB."""
        return _gpt2(self.path, self._options["merges"]) if self._options["merges"] else self.path.read_text(encoding="utf-8")

    def _open(self, source: str, *, plain: bool):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(source)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = self._options["added"] + tuple(token for token in self._options["roles"].values() if token)
        there = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        for token in dict.fromkeys(token for token in added if token not in there):
            special = token not in self._options["ordinary"]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([tokenizers.AddedToken(token, normalized=False, special=special)])
        if plain:
            tokenizer.post_processor = None  # it trims spaces off the spans
            known = {token for token in (*BEGINS, *ENDS) if tokenizer.token_to_id(token) is not None} | set(filter(EXTRA_ID.fullmatch, there))
            tokenizer.add_special_tokens([token for token in sorted(known) if not there.get(token)])
            tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _whole(self):
        return self._open(self._source(), plain=False)

    @functools.cached_property
    def _plain(self):
        return self._open(self._source(), plain=True)

    @functools.cached_property
    def _following(self):
        """_plain without a dummy prefix; the same where there is none."""
        spec = json.loads(self._source())
        return self._open(json.dumps(_without_prefix(spec)), plain=True) if _prefixes(spec) else self._plain

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether transformers puts BOS before a string."""
        return self.bos_id is not None and self._whole.encode("a").ids[:1] == [self.bos_id]

    # ---- text to ids and back

    def encode(self, text: str, *, start: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """ids of a user's text, and for each the characters [begin, end) it stands for. start: the text opens the stream (dummy prefix and all)."""
        encoding = (self._plain if start else self._following).encode(text, add_special_tokens=False)
        spans = encoding.offsets
        follows = [begin for begin, _ in spans[1:]] + [len(text)]  # a normalizer may join characters to one, whose span is that of the first
        return encoding.ids, [(begin, max(end, after)) for (begin, end), after in zip(spans, follows, strict=False)]

    def whole(self, text: str) -> list[int]:
        """The ids that transformers gives for the whole string, without BOS; control strings in it become control tokens."""
        return self._whole.encode(text, add_special_tokens=False).ids

    def id_of(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def decode(self, ids) -> str:
        """Text of ids; control tokens show by their names."""
        text = ""
        for name, group in itertools.groupby(map(int, ids), self._names.get):
            run, decoder = list(group), self._plain if self.restarts or not text else self._following
            text += name * len(run) if name else decoder.decode(run, skip_special_tokens=False)
        return text


def _gpt2(vocab: Path, merges: str) -> str:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer.to_str()


# ---- the dummy prefix in a tokenizer.json


def _steps(spec: dict, section: str) -> list[dict]:
    """A section's steps, in order, out of their sequences."""
    step = spec.get(section)
    inner = next((step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), None) if step else []
    return [step] if inner is None else [s for one in inner for s in _steps({section: one}, section)]


def _prefixes(spec: dict) -> list[tuple[dict, str]]:
    """[(step, scheme)] of the steps that write a dummy prefix. scheme: "first", at the start of the string alone, or "always", behind control tokens too."""
    found = [(step, "always") for step in _steps(spec, "normalizer") if step["type"] == "Prepend"]
    for step in _steps(spec, "pre_tokenizer"):
        if step["type"] == "Metaspace":
            found.append((step, step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")))
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space", True):
            found.append((step, "always"))
    return [(step, scheme) for step, scheme in found if scheme != "never"]


def _without_prefix(spec: dict) -> dict:
    """spec, changed: no step writes a prefix, and none of the decoder's takes it away."""
    strips = [(step, "") for step in _steps(spec, "decoder") if step["type"] in ("Strip", "Metaspace")]
    for step, _ in _prefixes(spec) + strips:
        if step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Prepend":
            step.clear()
            step.update(type="Sequence", normalizers=[])
        else:
            step.update(start=0, stop=0)
    return spec


# ---- directories


@dataclasses.dataclass(frozen=True)
class Directory:
    """What a Hugging Face directory says beside its vocabulary. added: names by id; ids: {name: id} where a file says it; swallowing: see above."""

    kind: str
    legacy: bool
    adds_bos: bool
    roles: dict[str, str | None]
    added: tuple[str, ...]
    ids: dict[str, int]
    ordinary: tuple[str, ...]
    swallowing: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Directory":
        """As transformers 4.37 reads it: a list in tokenizer_config.json counts alone, else special_tokens_map.json and added_tokens.json do."""
        config = _object(path / "tokenizer_config.json")
        try:
            if "added_tokens_decoder" in config:
                tokens = {int(i): token for i, token in config["added_tokens_decoder"].items()}
            else:
                config = config | _object(path / "special_tokens_map.json")
                special = {_content(config.get(role)) for role in ROLES} | set(map(_content, config.get("additional_special_tokens") or []))
                tokens = {i: {"content": name, "special": name in special} for name, i in _object(path / "added_tokens.json").items()}
                tokens |= {token["id"]: token for token in _object(path / "tokenizer.json").get("added_tokens", [])}
            roles = {role: _content(config[role]) for role in ROLES if role in config}
            listed = [tokens[i]["content"] for i in sorted(tokens)]
            named = [*(token for token in roles.values() if token), *map(_content, config.get("additional_special_tokens") or [])]
            return cls(
                kind=config.get("tokenizer_class") or "",
                legacy=config.get("legacy") is not False,
                adds_bos=config.get("add_bos_token", True),
                roles=roles,
                added=tuple(dict.fromkeys([*listed, *named])),
                ids={token["content"]: i for i, token in tokens.items()},
                ordinary=tuple(token["content"] for token in tokens.values() if not token.get("special") and token["content"] not in named),
                swallowing=tuple(token["content"] for token in tokens.values() if any(token.get(key) for key in ("lstrip", "rstrip", "single_word"))),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.tokenizer.type: the tokenizer files in {path} are not as transformers writes them ({error!r})") from None


def _content(token) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _object(path: Path) -> dict:
    """A JSON file's object; empty where there is no file."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"model.tokenizer.type: {path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"model.tokenizer.type: {path} holds {type(found).__name__}, expected a JSON object")
    return found


def open_directory(path: Path, *, added=(), roles=None):
    """A Hugging Face directory as a tokenizer; added and roles come on top of its own."""
    model, fast = path / "tokenizer.model", path / "tokenizer.json"
    directory = Directory.read(path)
    options = {
        "added": tuple(dict.fromkeys([*directory.added, *added])),
        "roles": directory.roles | dict(roles or {}),
        "ordinary": tuple(token for token in directory.ordinary if token not in added),
    }
    if model.is_file() and directory.kind in SLOW_LLAMA:
        if directory.swallowing:
            found = ", ".join(directory.swallowing)
            raise UserError(f"model.tokenizer.type: {found} in {path} swallow the spaces beside them, which is not done here; remove these settings")
        tokenizer = SentencePieceTokenizer(model, style="huggingface", legacy=directory.legacy, adds_bos=directory.adds_bos, **options)
    elif fast.is_file():
        tokenizer = HuggingFaceTokenizer(fast, **options)
    elif model.is_file():
        raise UserError(f"model.tokenizer.type: {path} has a tokenizer.model for {directory.kind}, which is not read here; add its tokenizer.json")
    else:
        raise UserError(f"model.tokenizer.type: no tokenizer.json and no tokenizer.model in {path}; nothing is downloaded: give a local directory")
    for token, i in directory.ids.items():
        if tokenizer.id_of(token) != i:
            raise UserError(f"{path}: its files give {token} the id {i}, its vocabulary {tokenizer.id_of(token)}; one of the files is of another tokenizer")
    return tokenizer
