"""The files beside the weights that turn text and pictures into a model's input: tokenizer, image processor, chat template, for transformers 4.4x and 5.

Everything is written so that their processor gives our ids and pixels; what it cannot do is an error, or a note that the export's report shows. Given up:
sentencepiece models that are not BPE, GPT-2's vocab.json, pictures of another aspect than square and pad.
"""

import json
from dataclasses import dataclass

from neva_jax.convert.hf_chat import GAP, Style, chat_template
from neva_jax.convert.hf_write import TokenIds, image_tokens
from neva_jax.data.conversation import BOS, EOS, PLACEHOLDER, TEMPLATES, render
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig

BPE, NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 2, 1, 2, 3, 4  # sentencepiece's kind of model, and of pieces
PAD = "<pad>"
LEADS = {  # how a text may begin, as Jinja: as it is, behind a space, behind one if it has none
    '""': lambda text: text,
    '" "': lambda text: " " + text,
    '("" if value[0] == " " else " ")': lambda text: text if text[0] == " " else " " + text,
}
PROBES = ("x", " x", "  x", "\n", "\nx", "USER: what is it?", "Ä", "日本 <s>", "a  b\n\n c", "[INST] <<SYS>>\n", "0.5, 12345!", "🙂 ok", "</s> <|x|>")


@dataclass(frozen=True)
class ProcessorFiles:
    """files: {name: content}; ids: what config.json and generation_config.json say of tokens; notes: what another program will not do as we do."""

    files: dict[str, bytes]
    ids: TokenIds
    notes: tuple[str, ...]


def processor_files(encoder: Encoder, config: NevaConfig, images: ImageProcessor | None = None) -> ProcessorFiles:
    """encoder: of the run, with its tokenizer, template and longest text; images: the run's pictures, None for a language model alone."""
    tokenizer = encoder.tokenizer
    backend = backend_tokenizer(tokenizer, with_image=images is not None)
    ids, notes = _token_ids(encoder, backend, with_image=images is not None)
    style = chat_style(encoder, backend)
    chat = chat_template(encoder.template, style)
    notes += _notes(encoder, images, chat)
    config_files = {"tokenizer_config.json": _tokenizer_config(backend, ids, encoder.max_length, images is not None)}
    if isinstance(tokenizer, SentencePieceTokenizer):  # for who opens tokenizer.model instead
        config_files["tokenizer_config.json"] |= {"legacy": tokenizer.legacy, "additional_special_tokens": list(tokenizer.behind)}
    config_files["special_tokens_map.json"] = {role: backend.id_to_token(i) for role, i in _roles(ids).items()}
    if images is not None:
        config_files["preprocessor_config.json"] = image_config(images)
        config_files["processor_config.json"] = {
            "processor_class": "LlavaProcessor", "patch_size": config.vision.patch_size, "image_token": PLACEHOLDER, **image_tokens(config.vision),
        }  # fmt: skip
    if chat is not None:  # where transformers before chat_template.jinja looks for it: a processor here, a tokenizer there
        config_files.setdefault("chat_template.json" if images is not None else "tokenizer_config.json", {})["chat_template"] = chat
    files = {name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in config_files.items()}
    files |= {"tokenizer.json": backend.to_str(pretty=True).encode()} | ({"chat_template.jinja": chat.encode()} if chat is not None else {})
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.path.read_bytes()
    return ProcessorFiles(files, ids, tuple(notes))


# ---- the tokenizer -----------------------------------------------------------------------------------------------------------------------------------


def backend_tokenizer(tokenizer, *, with_image: bool):
    """A tokenizer of ours as the `tokenizers` library's: same ids for text, special tokens cut out of it, no <s> added, GAP deleted.

    with_image: <image> and a pad token stand behind the vocabulary where they are missing.
    """
    import tokenizers

    sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    backend, names = _from_sentencepiece(tokenizer) if sentencepiece else (_from_file(tokenizer.path), ())
    special = sorted({*names, *tokenizer.special}, key=tokenizer.id_of)
    extra = [PLACEHOLDER, *([PAD] if tokenizer.pad_id is None else [])] if with_image else []
    for name in (*special, *extra):  # those that are there too: a token that is looked for in normalized text is found when GAP is gone
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        if backend.token_to_id(name) != tokenizer.id_of(name) is not None:
            raise UserError(f"{tokenizer.path}: {name} has the id {tokenizer.id_of(name)}, in a tokenizer.json it gets {backend.token_to_id(name)}")
    spec = json.loads(backend.to_str())
    delete = {"type": "Replace", "pattern": {"String": GAP}, "content": ""}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [delete, *([spec["normalizer"]] if spec["normalizer"] else [])]}
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _from_file(path):
    import tokenizers

    if path.suffix != ".json" or "vocab" in path.name:
        raise UserError(f"{path}: only a tokenizer.json or a sentencepiece model can be exported")
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    spec = json.loads(backend.to_str())
    spec["post_processor"] = None  # it adds <s>, which the chat template writes where the stream has one
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _from_sentencepiece(tokenizer):
    """-> the backend, and the names of the model's control tokens. Every pair of pieces that make a piece is a merge, in the order of the scores."""
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    if model.trainer_spec.model_type != BPE or model.normalizer_spec.precompiled_charsmap or model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{tokenizer.path}: only sentencepiece models of kind BPE that change no character can be exported")
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    normal = {piece.piece: -piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (piece[:i], piece[i:])
        for piece in sorted(normal, key=lambda piece: (normal[piece], vocabulary[piece]))
        for i in sorted(range(1, len(piece)), key=lambda i: (vocabulary.get(piece[:i], 0), vocabulary.get(piece[i:], 0)))
        if piece[:i] in normal and piece[i:] in normal
    ]
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    fallback = model.trainer_spec.byte_fallback
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    prefix = "first" if model.normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prefix, split=False)
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    return backend, [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)]


def _token_ids(encoder: Encoder, backend, *, with_image: bool) -> tuple[TokenIds, list[str]]:
    """Ids that end an answer: the tokenizer's own end, and the template's. A stop of several tokens is a note."""
    tokenizer, stop = encoder.tokenizer, TEMPLATES[encoder.template].stop
    stop_id, notes = encoder.special.control(stop), []
    if stop_id is None:
        stop_ids = tokenizer.encode(stop, start=False)[0]
        stop_id = stop_ids[0] if len(stop_ids) == 1 else None
        if stop_id is None:
            notes = [f"answers end with the text {stop!r}, of {len(stop_ids)} tokens: generate with stop_strings=[{stop!r}] and the tokenizer"]
    ends = tuple(dict.fromkeys(i for i in (tokenizer.eos_id, stop_id) if i is not None))
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else backend.token_to_id(PAD) if with_image else None
    return TokenIds(backend.token_to_id(PLACEHOLDER) if with_image else None, pad, tokenizer.bos_id, ends, tokenizer.unk_id), notes


def _roles(ids: TokenIds) -> dict[str, int]:
    roles = {"bos_token": ids.bos, "eos_token": ids.ends[0] if ids.ends else None, "unk_token": ids.unknown, "pad_token": ids.pad}
    return {role: i for role, i in roles.items() if i is not None}


def _tokenizer_config(backend, ids: TokenIds, max_length: int, with_image: bool) -> dict:
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(i): {name: getattr(token, name) for name in fields} for i, token in sorted(backend.get_added_tokens_decoder().items())}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it is; LlamaTokenizer would build its own
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, "padding_side": "left", "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": added, **{role: backend.id_to_token(i) for role, i in _roles(ids).items()},
    }  # fmt: skip
    return config | ({"processor_class": "LlavaProcessor"} if with_image else {})


# ---- the chat template -------------------------------------------------------------------------------------------------------------------------------


def chat_style(encoder: Encoder, backend) -> Style:
    """What our stream has beside the template's words, as text that `backend` reads into the same ids."""
    tokenizer, special, llava = encoder.tokenizer, encoder.special, TEMPLATES[encoder.template].llava
    used = [piece.value for piece in render(encoder.template, [("human", PLACEHOLDER), ("gpt", "", "label")]) if piece.kind == "control"]
    spelt = tuple(sorted(name for name in set(used) - {BOS, EOS} if special.control(name) is None))
    ends = (special.start, special.end) if special.use_im_start_end else ()
    around = [backend.id_to_token(i) for i in ends] or ["", ""]
    bos, eos = ("" if i is None else backend.id_to_token(i) for i in (special.bos, special.eos))
    return Style(
        lead=_lead(tokenizer, backend), opens=" " if tokenizer.prefix_ids and not llava else "", restarts=tokenizer.restarts,
        behind_image=tokenizer.restarts or (llava and not ends), start=bos if llava and tokenizer.adds_bos else "", bos=bos,
        eos=eos, image=around[0] + PLACEHOLDER + around[1],
        controls=tuple(token.content for token in backend.get_added_tokens_decoder().values() if token.special), spelt=spelt,
    )  # fmt: skip


def _lead(tokenizer, backend) -> str:
    """The first of LEADS with which `backend` gives our ids for PROBES, at the start of a stream and behind a special token."""
    controls = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]

    def theirs(text: str, before: str = "") -> list[int]:
        for control in controls:
            text = text.replace(control, control[0] + GAP + control[1:])
        return backend.encode(before + text, add_special_tokens=False).ids[bool(before) :]

    def ours(text: str, start: bool) -> list[int]:
        return tokenizer.encode(text, start=start)[0]

    if not tokenizer.restarts and (bad := [text for text in PROBES if theirs(text, controls[0]) != ours(text, False)]):
        found = theirs(bad[0], controls[0])
        raise UserError(f"{tokenizer.path}: a tokenizer.json of it would give {found} for {bad[0]!r}, expected {ours(bad[0], False)}; it cannot be exported")
    for lead, written in LEADS.items():
        if all(theirs(written(text), before) == ours(text, True) for text in PROBES for before in ("", controls[0])):
            return lead
    raise UserError(f"{tokenizer.path}: no tokenizer.json begins texts as this tokenizer does; it cannot be exported")


def _notes(encoder: Encoder, images: ImageProcessor | None, chat: str | None) -> list[str]:
    notes = [] if chat is not None else [f"no chat template: {encoder.template} is not a conversation; write prompts by hand"]
    if encoder.sep_image_conv_front:
        notes.append("the chat template leaves pictures where they are: model.data.sep_image_conv_front is not done by it")
    if images is not None and images.exif:
        notes.append("pictures are not turned as their EXIF says; turn them before the processor")
    return notes


# ---- pictures ----------------------------------------------------------------------------------------------------------------------------------------


def image_config(images: ImageProcessor) -> dict:
    """preprocessor_config.json: CLIP's processor, LLaVA's where pictures are padded to squares, SigLIP's where they are stretched."""
    if images.aspect not in ("square", "pad"):
        raise UserError(f"model.data.image_aspect_ratio {images.aspect!r} cannot be exported: transformers' LLaVA knows square and pad")
    height, width = images.crop_size
    edge = images.shortest_edge
    if images.aspect == "pad" and edge is None:  # what is padded is square, and stretching a square to a square is resizing its shorter side
        if height != width:
            raise UserError(f"a processor that stretches pictures to {width} x {height} cannot be exported with model.data.image_aspect_ratio pad")
        edge = height
    crop = {"height": height, "width": width}
    common = {
        "processor_class": "LlavaProcessor", "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(images.mean), "image_std": list(images.std), "do_convert_rgb": True,
    }  # fmt: skip
    if edge is None:
        return common | {"image_processor_type": "SiglipImageProcessor", "size": crop}
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if images.aspect == "pad" else {"image_processor_type": "CLIPImageProcessor"}
    return common | kind | {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": crop}
