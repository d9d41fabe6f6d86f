"""What validation is made of: the judgement of a picture, strings that originals would not take as text, and keys of ids."""

import random
from collections import Counter

import numpy as np
import pytest
from pictures import PICTURES, encoded
from PIL import Image
from template_tokenizers import extended, open_for

from neva_jax.data import validate as validate_module
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.validate import marks_of, picture_defect
from neva_jax.errors import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return extended(tmp_path_factory.mktemp("model"), "digits", with_bytes=True)


# ---- pictures


def damaged():
    """Pictures of every kind, cut and changed in the middle."""
    source = random.Random(0)
    colours = {"no RGB": lambda: encoded(Image.new("LAB", (20, 20)), "TIFF")}  # Pillow reads it, and cannot convert it
    for kind, make in (PICTURES | colours).items():
        data = make()
        yield kind, data
        for _ in range(12):
            yield kind, data[: source.randrange(1, len(data))]
            place = source.randrange(len(data))
            yield kind, data[:place] + source.randbytes(source.choice((1, 4, 40))) + data[place + 4 :]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged pictures
def test_it_refuses_what_training_refuses_and_no_other():
    """In the processor's words, which an eighth of a JPEG's size does not change."""
    processor = ImageProcessor((8, 8), 8)
    refused = Counter()
    for kind, data in damaged():
        found = picture_defect(processor, data, "here")
        try:
            processor(data, "here")
            expected = None
        except DataError as error:
            expected = str(error)
        assert (found and found[1]) == expected, (kind, data[:40])
        refused[found and found[0]] += 1
    assert refused[None] > 100 and refused["broken"] > 100 and refused["no_picture"] > 10


# ---- strings that originals misread


def found_in(model, template, text, **options):
    return marks_of(Encoder(open_for(model, template), template, 4, 400, **options)).findall(text)


@pytest.mark.parametrize(("template", "text", "found"), [
    ("v1", "a<s>b</s> ASSISTANT: [/INST] ### <|im_end|>", ["<s>", "</s>", " ASSISTANT: ", "<|im_end|>"]),  # <|im_end|>: the tokenizer has it
    ("llama_2", "a [INST] b [/INST] c ASSISTANT: ###", ["[/INST]"]),
    ("mistral", "a [/INST]", ["[/INST]"]),
    ("llava:mistral_instruct", "a [/INST]", ["[/INST]"]),
    ("llava:llava_llama_2", "a [/INST]", ["[/INST]"]),
    ("llava:v1_mmtag", "a ASSISTANT: b ###", [" ASSISTANT: "]),
    ("llava:llava_v1", "a ASSISTANT: b", [" ASSISTANT: "]),
    ("llava:v0", "### Human", ["###"]),
    ("llava:v0_mmtag", "### <image> <Image>", ["###"]),
    ("plain", "<image> a\nb ASSISTANT: ### [/INST] <b>bold</b>", []),
    ("nvgpt", "a <extra_id_1> <extra_id_11>", ["<extra_id_1>"]),
    ("yi_34b", "<|im_start|>user", ["<|im_start|>"]),
])  # fmt: skip
def test_strings_that_originals_take_for_their_own(model, template, text, found):
    assert found_in(model, template, text) == found


def test_words_and_spaces_that_a_vocabulary_keeps_whole_are_no_control_tokens(model):
    encoder = Encoder(open_for(model, "v1"), "v1", 4, 400)
    encoder.tokenizer.special += ("\n\n", "▁▁", "7", "word", "<image>", "<h1>")
    assert marks_of(encoder).findall("a\n\n▁▁7 word <image> <h1>") == ["<h1>"]


# ---- ids


def test_keys_are_spread_and_never_that_of_no_id():
    keys = {validate_module.key_of({"id": i}) for i in range(1000)}
    assert len(keys) == 1000 and 0 not in keys and max(keys) > 2**60 and validate_module.key_of({}) == validate_module.key_of({"id": None}) == 0
    assert validate_module.key_of({"id": 1}) != validate_module.key_of({"id": "1"})
    assert np.array(sorted(keys), np.uint64).tolist() == sorted(keys)
