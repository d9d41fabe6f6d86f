"""Chat templates and tokenizer.json of an export: transformers gives the ids of our exact stream for every template, tokenizer and conversation."""

import json
import random

import numpy as np
import pytest
from data.template_tokenizers import CHAT, DIGITS, EXTRA, IM, extended, open_for
from data.tokenizer_files import byte_level, llama
from helpers import golden

from neva_jax.convert.hf_chat import CHATS, GAP
from neva_jax.convert.hf_processor import backend_tokenizer, processor_files
from neva_jax.data.conversation import TEMPLATES, render
from neva_jax.data.encoder import Encoder
from neva_jax.data.image import ImageProcessor
from neva_jax.data.tokenize import encode
from neva_jax.data.tokenizer import HuggingFaceTokenizer
from neva_jax.errors import UserError
from neva_jax.extend_tokenizer import extend
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig

CONFIG = NevaConfig(None, ClipVisionConfig(16, 20, 3, 2, 28, 14), "mlp2x_gelu")
IMAGES = ImageProcessor(crop_size=(28, 28), shortest_edge=28)
QUESTIONS = (
    "<image>\nWhat is it?", "What <image> is\n\n it?", "Hi", "  two spaces <image>", "<image>", "<image>\n<image>\nCompare", "text then\n<image>",
    "</s> <s> <extra_id_1> <|im_end|><unk> [INST] <<SYS>>", "É 日本 🙂▁x", "\n", "USER: <|eot_id|>ASSISTANT:",
)  # fmt: skip
ANSWERS = ("Yes.", " lead", "7", "</s>ASSISTANT: x", "no\n", "<image> is no picture here", "<<s></s>")
SYSTEMS = (None, "", "Be brief.", "</s> <image>")
CONTROLS = ("<unk>", "<s>", "</s>", *CHAT, *EXTRA)


def conversations(count: int):
    """(turns, system, whether the model is to speak), the same ones each time."""
    choose = random.Random(0)
    for _ in range(count):
        turns = [choose.choice(ANSWERS if i % 2 else QUESTIONS) for i in range(choose.choice([1, 1, 2, 3, 4, 5]))]
        prompt = choose.random() < 0.7
        turns = turns[: len(turns) - (prompt and len(turns) % 2 == 0)]
        yield [("gpt" if i % 2 else "human", turn) for i, turn in enumerate(turns)], choose.choice(SYSTEMS), prompt


def processor_of(directory, encoder, files=None):
    transformers = pytest.importorskip("transformers")
    for name, content in (files or processor_files(encoder, CONFIG, IMAGES)).files.items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text('{"model_type": "llava"}')
    return transformers.AutoProcessor.from_pretrained(directory)


def check(encoder, processor, count: int) -> int:
    """Our ids and theirs for `count` conversations -> how many of them the template takes."""
    from PIL import Image

    compared = 0
    for turns, system, prompt in conversations(count):
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system is not None else []
        messages += [{"role": {"human": "user", "gpt": "assistant"}[role], "content": value} for role, value in turns]
        options = {"chat_template": processor.chat_template, "tokenize": False, "add_generation_prompt": prompt}
        try:
            stream = encode(render(encoder.template, turns, system, prompt=prompt), encoder.tokenizer, encoder.special, 4)
        except UserError:
            with pytest.raises(Exception, match="this template (takes one|needs a picture)"):
                processor.tokenizer.apply_chat_template(messages, **options)
            continue
        pictures = [Image.new("RGB", (28, 28))] * stream.num_media
        theirs = processor(text=processor.tokenizer.apply_chat_template(messages, **options), images=pictures or None)["input_ids"][0]
        assert list(theirs) == np.where(stream.media_index >= 0, processor.image_token_id, stream.ids).tolist(), (turns, system, prompt)
        compared += 1
    return compared


MODES = [(name, legacy, marks) for name in CHATS for legacy in ([False, True] if name.startswith("llava") else [False]) for marks in (False, True)]


@pytest.mark.parametrize("template, legacy, marks", MODES)
def test_sentencepiece(tmp_path, template, legacy, marks):
    """marks: use_im_start_end."""
    tokenizer = open_for(extended(tmp_path, "digits", with_bytes=True), template, legacy=legacy)
    encoder = Encoder(tokenizer, template, 4, 2048, use_im_start_end=marks)
    assert check(encoder, processor_of(tmp_path, encoder), 40) >= 8


@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "nv_dpo", "llava:v1", "llava:mpt"])
def test_llama_2s_own_pieces(tmp_path, template):
    encoder = Encoder(open_for(extended(tmp_path, "llama2"), template), template, 4, 2048)
    assert check(encoder, processor_of(tmp_path, encoder), 30) == 30


@pytest.mark.parametrize("template", ["plain", "v1", "llama_2", "llama_3", "mistral", "llava:v1", "llava:llama_2", "llava:mpt"])
@pytest.mark.parametrize("kind", ["byte level", "prepend", "first", "always", "never"])
def test_a_tokenizer_json(tmp_path, kind, template):
    path = tmp_path / "source.json"
    if kind == "byte level":
        byte_level().save(str(path))
    else:
        spec = llama(extended(tmp_path, "digits", with_bytes=True).read_bytes(), prefix=kind, controls=CONTROLS)
        for token in spec["added_tokens"]:
            token["normalized"] = kind == "first"  # as some files on the hub have it
        path.write_text(json.dumps(spec))
    encoder = Encoder(HuggingFaceTokenizer(path, added=IM), template, 4, 2048)
    assert check(encoder, processor_of(tmp_path, encoder), 30) >= 6


def test_labels_of_answers(tmp_path):
    """A turn's SteerLM label is where the record's is; without one the template's own stands there, and in nv_dpo none."""
    for template in ("nv_steerlm", "nv_dpo"):
        encoder = Encoder(open_for(extended(tmp_path, "digits", with_bytes=True), template), template, 4, 2048)
        processor = processor_of(tmp_path, encoder)
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "label": "quality:1"}, {"role": "user", "content": "c"}]
        prompt = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True)
        turns = [("human", "a"), ("gpt", "b", "quality:1"), ("human", "c")]
        assert processor.tokenizer(prompt)["input_ids"] == encode(render(template, turns), encoder.tokenizer, encoder.special, 4).ids.tolist()


def test_turns_out_of_order_are_refused(tmp_path):
    encoder = Encoder(open_for(extended(tmp_path, "digits", with_bytes=True), "v1"), "v1", 4, 2048)
    processor = processor_of(tmp_path, encoder)
    for roles in (["assistant"], ["user", "user"], ["user", "assistant", "system"]):
        with pytest.raises(Exception, match="one after the other"):
            messages = [{"role": role, "content": "x"} for role in roles]
            processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)


def test_every_template_but_the_interleaved_is_a_chat():
    assert TEMPLATES.keys() - CHATS.keys() == {"interleaved"} and not CHATS.keys() - TEMPLATES.keys()


# ---- the tokenizer alone -----------------------------------------------------------------------------------------------------------------------------


def texts():
    cases = json.loads(golden("tokenizer/tokenizer_golden.json").read_text())["cases"]
    return [case["text"] for case in cases] + [*QUESTIONS, *ANSWERS, " ", "   ", "a" * 300, "\t\n\r x", "x\u200by\u0301", "\U0001f469\u200d\U0001f52c 1234567"]


@pytest.mark.parametrize("name", ["llama2.model", "llama2_neva.model", "tiny160.model"])
def test_ids_of_texts(name, tmp_path):
    """Sentencepiece's ids, from tokenizer.json: text alone, and behind a control token, where no prefix stands."""
    tokenizer = open_for(golden(f"tokenizer/{name}"), "v1")
    backend = backend_tokenizer(tokenizer, with_image=True)
    for text in texts():
        guarded = text
        for control in ("<s>", "</s>", "<unk>", *EXTRA, "<image>"):
            guarded = guarded.replace(control, control[0] + GAP + control[1:])
        assert backend.encode("</s>" + guarded).ids == [2, *tokenizer.encode(text, start=False)[0]], text
        assert backend.encode(" " + guarded).ids == tokenizer.encode(text, start=True)[0] or not text, text


def test_ids_of_transformers_own_conversion(tmp_path):
    """transformers makes a tokenizer.json of the same model by itself, in which 5.23 merges by id and not by score: of Llama-2's pieces, two spaces differ."""
    transformers = pytest.importorskip("transformers")
    path = golden("tokenizer/llama2.model")
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    theirs = transformers.LlamaTokenizerFast.from_pretrained(tmp_path, legacy=False)
    backend = backend_tokenizer(open_for(path, "v1"), with_image=False)
    for text in texts():
        if text.strip() and "  " not in text:
            assert backend.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_model_of_another_kind_is_refused(tmp_path):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(extend(DIGITS.read_bytes(), CHAT))
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    (tmp_path / "unigram.model").write_bytes(proto.SerializeToString())
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unigram.model"))
    with pytest.raises(UserError, match="only sentencepiece models of kind BPE"):
        backend_tokenizer(open_for(tmp_path / "unigram.model", "v1"), with_image=False)
