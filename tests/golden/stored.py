"""The stored conversations of NeMo and LLaVA, brought to our terms: tokenizer, encoder options, record, and the expected (tokens, labels)."""

import functools
import gzip
import json

from helpers import golden

from neva_jax.data.tokenize import IGNORE
from neva_jax.data.tokenizer import SentencePieceTokenizer

NEMO = {"v2.0.0": "neva_conversations.json.gz", "v1.23.0": "neva_conversations_v1.23.0.json.gz"}


@functools.cache
def load(name):
    with gzip.open(golden(name)) as file:
        return json.load(file)


@functools.cache
def open_model(name, **options):
    return SentencePieceTokenizer(golden(f"tokenizer/{name}.model"), **options)


def nemo_case(case):
    if "conversations_str" in case:
        record = {"conversations": case["conversations_str"]}
    else:
        stored = load(NEMO["v2.0.0"])["conversations"][case["name"]]
        record = {key: stored[key] for key in ("conversations", "system") if key in stored}
    record |= {"image": "x.png"} if case["has_image"] else {}
    options = {
        "template": case["conv_template"],
        "media_length": case["image_token_len"] // (4 if case["mm_mlp_adapter_type"] == "mlp_downsample" else 1),  # stored before the projector joins them
        "max_length": case["context_length"],
        "use_im_start_end": case["use_im_start_end"],
        "model_type": case["model_type"],
        "extra_token": bool(case["add_extra_token"]),
        "sep_image_conv_front": case["sep_image_conv_front"],
    }
    expected = None if case["error"] else (case["tokens"], [IGNORE if label == -1 else label for label in case["labels"]])
    return open_model("llama2_neva"), options, record, expected


def llava_case(case):
    """A picture is one vector here, so that a stored -200 is one id. The stored ids are those before the collator's cut; labels are shifted to next tokens."""
    stored = load("llava_conversations.json.gz")
    added = stored["meta"]["added_tokens"][f"{case['template']}|im_start_end={case['mm_use_im_start_end']}"]
    names = tuple(name for name, number in sorted(added.items(), key=lambda item: item[1]) if number >= 32000 and name not in ("len", "pad_token_id"))
    limit = case["model_max_length"]
    record = {"conversations": stored["conversations"][case["name"]]["conversations"]} | ({"image": "x.png"} if case["has_image"] else {})
    options = {"template": f"llava:{case['template']}", "media_length": 1, "max_length": limit, "use_im_start_end": case["mm_use_im_start_end"]}
    expected = None
    if not case["error"]:
        labels = [IGNORE if label == -200 else label for label in case["labels"][1:limit]]  # the model learns no picture
        expected = [max(number, 0) for number in case["input_ids"][:limit]], [*labels, IGNORE]
    return open_model("llama2", style="huggingface", legacy=case["legacy"], added=names), options, record, expected
