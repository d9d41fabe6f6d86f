"""Small tokenizer files as Hugging Face ships them: byte-level as Llama-3's, and a sentencepiece model exported to tokenizer.json as Llama-2's."""

import json

import tokenizers
from sentencepiece import sentencepiece_model_pb2

BYTE_LEVEL_CONTROLS = ("<|begin_of_text|>", "<|eot_id|>", "<|image|>", "<extra_id_4>", "<extra_id_5>")


def byte_level():
    """Byte-level BPE, special tokens, a post-processor that trims spaces off spans, and NeVA's tokens, added without saying that they are special."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(BYTE_LEVEL_CONTROLS[:3]), show_progress=False)
    tokenizer.train_from_iterator(["USER: what is it? ASSISTANT: yes, it is the one"] * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False) for name in BYTE_LEVEL_CONTROLS[3:]])
    return tokenizer


def llama(model: bytes, *, prefix: str = "prepend", controls=("<unk>", "<s>", "</s>")) -> dict:
    """A sentencepiece BPE model as tokenizer.json. prefix: "prepend" (a normalizer, as transformers 4 exports), or Metaspace's scheme, first, always or never
    (as transformers 5 does)."""
    pieces = {piece.piece: i for i, piece in enumerate(sentencepiece_model_pb2.ModelProto.FromString(model).pieces)}
    cuts = [[(p[:i], p[i:]) for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces] for p in pieces]  # pieces stand in the order of merging
    merges = [pair for pairs in cuts for pair in sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback="<0x00>" in pieces))
    strip = [] if prefix == "never" else [tokenizers.decoders.Strip(" ", 1, 0)]
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), *strip]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    if prefix == "prepend":
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prefix, split=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", pieces["<s>"])])
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in controls])
    return json.loads(tokenizer.to_str())
