"""Ids that the original programs gave: NeMo v2.0.0's sentencepiece tokenizer, and the slow LlamaTokenizer of transformers 4.37.2 with which LLaVA trains."""

import gzip
import json

import pytest
from helpers import golden

from neva_jax.data.conversation import SYSTEM_V1
from neva_jax.data.tokenizer import SentencePieceTokenizer

ADDED = ("[PAD]", "<im_start>", "<im_end>")  # in LLaVA's order for template v0 with mm_use_im_start_end: ids 32000, 32001, 32002

SLOW = [  # (text, ids with legacy True, with legacy False), printed by transformers 4.37.2 on the Llama-2 model with ADDED
    ("Hello world", [15043, 3186], [15043, 3186]),
    ("<im_start>\nWhat?", [32001, 29871, 13, 5618, 29973], [32001, 13, 5618, 29973]),
    ("</s>USER: hi", [2, 3148, 1001, 29901, 7251], [2, 11889, 29901, 7251]),
    ("</s> USER: hi", [2, 29871, 3148, 1001, 29901, 7251], [2, 3148, 1001, 29901, 7251]),
    ("a <im_start> b<im_end>c", [263, 29871, 32001, 29871, 289, 32002, 274], [263, 29871, 32001, 289, 32002, 29883]),
    ("<s> <s>x", [1, 259, 1, 921], [1, 29871, 1, 29916]),
    ("▁x▁", [29871, 921, 29871], [29871, 921, 29871]),
    ("<unk>é😀", [0, 904, 243, 162, 155, 131], [0, 29948, 243, 162, 155, 131]),
    ("<im_start><im_end>", [32001, 32002], [32001, 32002]),
    (" <im_start>", [259, 32001], [259, 32001]),
    ("[PAD][PAD]\t", [32000, 32000, 29871, 12], [32000, 32000, 12]),
    ("<s", [529, 29879], [529, 29879]),
    ("一</s>二", [29871, 30287, 2, 29871, 30685], [29871, 30287, 2, 30685]),
    ("", [], []),
]


def load():
    return json.loads(golden("tokenizer/tokenizer_golden.json").read_text())


def test_whole_strings():
    answers, cases = load()["meta"], load()["cases"]
    llama2, neva = golden("tokenizer/llama2.model"), golden("tokenizer/llama2_neva.model")
    openers = {"llama2_ids": (llama2, {}), "neva_ids": (neva, {}), "hf_legacy_slow_ids": (llama2, {"style": "huggingface", "legacy": True})}
    for name, (path, options) in openers.items():
        tokenizer = SentencePieceTokenizer(path, **options)
        start = [tokenizer.bos_id] if name.startswith("hf_") else []
        assert [start + tokenizer.whole(case["text"]) for case in cases] == [case[name] for case in cases]
        plain = [case for case in cases if not any(token in case["text"] for token in tokenizer.special)]
        assert len(plain) > 15 and [start + tokenizer.encode(case["text"], start=True)[0] for case in plain] == [case[name] for case in plain]
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id)
        assert ids == (answers["bos"], answers["eos"], answers["unk"], None)
        assert tokenizer.vocab_size == answers["neva_vocab" if path == neva else "llama2_vocab"]
    neva = SentencePieceTokenizer(neva)
    for name, i in answers["extra_ids"].items():
        assert neva.id_of(name) == (i or None)  # the original gives unk's id for what is not there
    assert [neva.decode(case["neva_ids"]) for case in cases] == [case["neva_decoded"] for case in cases]


@pytest.mark.parametrize("legacy", [True, False])
def test_slow_llama_tokenizer(legacy):
    tokenizer = SentencePieceTokenizer(golden("tokenizer/llama2.model"), style="huggingface", legacy=legacy, added=ADDED, roles={"pad_token": "[PAD]"})
    assert [tokenizer.whole(text) for text, *_ in SLOW] == [ids[0 if legacy else 1] for _, *ids in SLOW]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.restarts, tokenizer.prefix_ids) == (32003, 32000, legacy, [])
    odd = SentencePieceTokenizer(tokenizer.path, style="huggingface", legacy=legacy, added=["<a▁b>"])
    assert odd.whole("x<a▁b>") == ([921, 32000] if legacy else [921, 29966, 29874, 289, 29958])  # legacy False never finds it: it replaces "▁" first


@pytest.mark.parametrize("legacy", [True, False])
def test_llava_conversations_without_picture(legacy):
    """LLaVA encodes these as one string, </s> and all."""
    with gzip.open(golden("llava_conversations.json.gz")) as file:
        stored = json.load(file)
    tokenizer = SentencePieceTokenizer(golden("tokenizer/llama2.model"), style="huggingface", legacy=legacy)
    records = [r for r in stored["records"] if (r["template"], r["legacy"], r["has_image"], r["error"]) == ("v1", legacy, False, None)]
    assert len(records) > 5
    for record in records:
        turns = [turn["value"] for turn in stored["conversations"][record["name"]]["conversations"]]
        rounds = [f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in zip(turns[::2], turns[1::2], strict=True)]
        ids = [tokenizer.bos_id, *tokenizer.whole(f"{SYSTEM_V1} {''.join(rounds)}")]
        assert ids[: record["model_max_length"]] == record["input_ids"], record["name"]


def test_nemo_legacy():
    """NeMo's sentencepiece_legacy cuts the text at added tokens and encodes each part by itself, prefix and all; without added tokens it changes nothing."""
    model = golden("tokenizer/llama2.model")
    extra_ids = tuple(f"<extra_id_{i}>" for i in range(8))
    tokenizer = SentencePieceTokenizer(model, legacy=True, added=extra_ids)
    assert [tokenizer.id_of(name) for name in extra_ids] == list(range(32000, 32008)) and tokenizer.vocab_size == 32008
    assert tokenizer.whole("<extra_id_4> hi<extra_id_7>hi</s>") == [32004, 29871, 7251, 32007, 7251, 829, 29879, 29958]
    assert tokenizer.restarts and tokenizer.prefix_ids == []
    overlapping = ("<im", "<im_start>")  # NeMo cuts at the first of the list, transformers at the longest
    assert SentencePieceTokenizer(model, legacy=True, added=overlapping).whole("<im_start>")[0] == 32000
    assert SentencePieceTokenizer(model, style="huggingface", added=overlapping).whole("<im_start>") == [32001]
    inside = SentencePieceTokenizer(golden("tokenizer/llama2_neva.model"), legacy=True, added=extra_ids)
    assert inside.whole("<extra_id_4> hi<extra_id_7>hi") == [29871, 32004, 7251, 32007, 2918] and inside.vocab_size == 32008
    assert not inside.restarts and inside.prefix_ids == [29871]
