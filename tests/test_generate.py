"""The command that asks a model: one question, a chat, NeVA's file of questions, NeMo's own YAML; and every way to ask it wrong."""

import functools
import io
import json
import shutil

import numpy as np
import pytest
from helpers import golden
from models_of_ours import FAMILIES, ours
from PIL import Image

import neva_jax
from neva_jax import cli, generate
from neva_jax.build import nemo_inference
from neva_jax.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ours(tmp_path_factory.mktemp("model"), **FAMILIES["grouped"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    Image.new("1", (40_000, 40_000)).save(folder / "huge.png")
    return folder


@pytest.fixture(scope="module")
def vlm(model):
    return neva_jax.from_pretrained(model)


@pytest.fixture
def ask(capsys, monkeypatch, vlm):
    """The command with flags -> (exit code, standard output, the last line of standard error). The model is opened once."""

    def opened(path, **options):
        opened.options = options
        return vlm

    monkeypatch.setattr(generate, "from_pretrained", opened)

    def run(*flags, keys=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        with pytest.raises(SystemExit) as end:
            cli.run(generate.main, generate.define_flags, generate.with_names(["generate", *map(str, flags)]), with_config=False)
        out, err = capsys.readouterr()
        run.err = err
        return end.value.code, out, (err.strip().splitlines() or [""])[-1]

    run.opened = opened
    return run


# ---- one question --------------------------------------------------------------------------------------------------------------------------------------


def test_one_question(ask, model, pictures, vlm):
    flags = ("--model", model, "--image", pictures / "0.png", "--prompt", "Which?", "--max_new_tokens", 9)
    (expected,) = vlm.answers(["Which?"], [[pictures / "0.png"]], max_new_tokens=9)
    assert ask(*flags)[:2] == (0, f"{expected.text}\n")
    code, out, _ = ask(*flags, "--json")
    found = json.loads(out)
    assert code == 0 and found["prompt"].endswith("USER: <image>\nWhich? ASSISTANT:") and len(found["answers"]) == 1
    assert found["answers"][0] == {"text": expected.text, "tokens": expected.tokens, "logprobs": expected.logprobs, "finish": expected.finish}
    assert 0 < len(expected.tokens) <= 9 and all(p <= 0 for p in expected.logprobs)


def test_several_answers_are_drawn(ask, model, vlm):
    flags = ("--model", model, "--prompt", "Which?", "--max_new_tokens", 6, "--temperature", 1.5, "--num_answers", 3, "--json")
    first = [a["tokens"] for a in json.loads(ask(*flags)[1])["answers"]]
    assert len({tuple(tokens) for tokens in first}) == 3
    assert first == [a["tokens"] for a in json.loads(ask(*flags)[1])["answers"]], "the same seed, the same answers"
    assert first != [a["tokens"] for a in json.loads(ask(*flags, "--seed", 1)[1])["answers"]]


def test_flags_reach_the_model(ask, model):
    assert ask("--model", model, "--prompt", "a", "--base", "b", "--base", "c", "--tokenizer", "t", "--conv_template", "plain", "--dtype", "float32")[0] == 0
    assert ask.opened.options == {"bases": ["b", "c"], "tokenizer": "t", "conv_template": "plain", "dtype": "float32"}


def test_an_answer_of_ids_that_no_token_has(tmp_path):
    """The model has more rows than the tokenizer has tokens, as Hugging Face's LLaVA does: they are ids of the answer, and nothing of its text."""
    vlm = neva_jax.from_pretrained(ours(tmp_path, **FAMILIES["rows of the vocabulary that no token has"]))
    answers = vlm.answers(["What?", "And this?"], max_new_tokens=16)
    assert any(token >= vlm.processor.encoder.tokenizer.vocab_size for answer in answers for token in answer.tokens)
    assert "".join(vlm.stream("What?", max_new_tokens=16)) == answers[0].text


def test_a_template_of_ones_own(model):
    plain = neva_jax.from_pretrained(model, conv_template="plain")
    assert plain.render("<image>", 1) == "<image>" and plain.speaker.stop_texts == ("\n",)
    with pytest.raises(UserError, match="prompt 1: the plain template takes one question"):
        plain.generate(["<image>", [{"from": who, "value": "a"} for who in ("human", "gpt", "human")]], [[b""], []])


# ---- a chat --------------------------------------------------------------------------------------------------------------------------------------------


def test_chat(ask, model, pictures, vlm):
    """A picture stays in the conversation, a typed tag is no picture, and what goes wrong leaves the conversation as it was."""
    keys = f"/image {pictures / '0.png'}\nOne <image>?\n/image nowhere.png\n/image {pictures / 'broken.png'}\nTwo?\n/what\n\n/clear\nThree?\n/quit\nFour?\n"
    code, out, _ = ask("--model", model, "--chat", "--max_new_tokens", 5, keys=keys)
    first = vlm.generate([[{"from": "human", "value": "<image>\nOne < image >?"}]], [[pictures / "0.png"]], max_new_tokens=5)[0]
    assert (code, out) == (0, f"{first}\n{vlm.generate(['Three?'], max_new_tokens=5)[0]}\n")
    assert "no file 'nowhere.png'" in ask.err and "picture 1" in ask.err and "/what is unknown" in ask.err
    code, out, _ = ask("--model", model, "--chat", "--max_new_tokens", 5, keys="One?\nTwo?\n")
    one = vlm.generate(["One?"], max_new_tokens=5)[0]
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": one}, {"role": "user", "content": "Two?"}]
    assert out == f"{one}\n{vlm.generate([turns], max_new_tokens=5)[0]}\n"


# ---- NeVA's files --------------------------------------------------------------------------------------------------------------------------------------


RECORDS = [
    {"image": "0.png", "prompt": "<image>What?", "id": 7}, {"text": "No picture."}, {"image": ["1.png", "2.png"], "question": "Two <image>, <image>"},
    {"image": "2.png", "prompt": "First?", "answer_id": 3, "metadata": {"a": 1}}, {"image": None, "prompt": "None"},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_file_of_questions(ask, model, pictures, vlm, tmp_path, suffix):
    questions, output = tmp_path / f"q.{suffix}", tmp_path / f"a.{suffix}"
    questions.write_text(json.dumps(RECORDS) if suffix == "json" else "\n".join(map(json.dumps, RECORDS)) + "\n\n")
    flags = ("--model", model, "--input", questions, "--output", output, "--image_folder", pictures, "--max_new_tokens", 5, "--batch_size", 2)
    assert ask(*flags)[0] == 0
    found = json.loads(output.read_text()) if suffix == "json" else [json.loads(line) for line in output.read_text().splitlines()]
    prompts = ["<image>\nWhat?", "No picture.", "Two <image>\n, <image>\n", "First?", "None"]
    images = [[pictures / "0.png"], [], [pictures / "1.png", pictures / "2.png"], [pictures / "2.png"], []]
    answers = vlm.generate(prompts, images, max_new_tokens=5)
    for record, given, prompt, answer, shown in zip(found, RECORDS, prompts, answers, images, strict=True):
        assert record == {
            **given, "prompt": prompt, "full_text": f"{vlm.render(prompt, len(shown))} {answer}", "pred_answer": answer, "model_id": str(model),
            "answer_id": given.get("answer_id", 0), "metadata": given.get("metadata", {}),
        }  # fmt: skip
    assert "exists; name another file" in ask(*flags)[2]
    assert ask(*flags, "--overwrite")[0] == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("content", "name", "message"), [
    ('{"prompt": "a"}\n{"prompt": 3}', "q.jsonl", "q.jsonl, line 2: has no question"), ('{"prompt": "a"}\n{', "q.jsonl", "line 2: is not JSON"),
    ('{"prompt": "a"}', "q.json", "expected a list of records"), ("[1]", "q.json", "record 0: found 1"), ("[]", "q.json", "holds no question"),
    ("a", "q.txt", "unknown extension"), ('[{"image": 3, "prompt": "a"}]', "q.json", "record 0: image holds 3"),
    ('[{"video": "a.mp4", "prompt": "a"}]', "q.json", "record 0: asks about a video"), ('[{"image": "9.png", "prompt": "a"}]', "q.json", "'9.png' is missing"),
    ('[{"prompt": "a"}, {"image": "broken.png", "prompt": "a"}]', "q.json", "q.json, record 1: picture 0"),
    ('[{"prompt": "a"}, {"image": "0.png", "prompt": "<image><image>"}]', "q.json", "record 1 has 2 <image> and 1 pictures"),
    (json.dumps([{"prompt": "a"}, {"prompt": "\ud800"}]), "q.json", "record 1 has half of a surrogate pair"),
    ('[{"image": "../0.png", "prompt": "a"}]', "q.json", "points outside"), ('[{"image": "huge.png", "prompt": "a"}]', "q.json", "record 0: picture 0"),
    (json.dumps([{"prompt": "word " * 3000}]), "q.json", "record 0 takes .* and the model was made for 256"),
])  # fmt: skip
def test_bad_files_of_questions(ask, model, pictures, tmp_path, content, name, message):
    import re

    (tmp_path / name).write_text(content)
    code, out, error = ask("--model", model, "--input", tmp_path / name, "--output", tmp_path / "a.jsonl", "--image_folder", pictures)
    assert (code, out) == (2, "") and error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "a.jsonl").exists()


def test_an_output_that_is_a_folder(ask, model, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "a.jsonl").mkdir()
    code, _, error = ask("--model", model, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--overwrite")
    assert code == 2 and "a.jsonl is a folder" in error


def test_a_line_ends_at_a_line_feed_alone(ask, model, tmp_path):
    """Not at the other separators that str.splitlines knows, which JSON may hold as they are; one object with --json."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    code, out, _ = ask("--model", model, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--max_new_tokens", 2, "--json")
    assert code == 0 and json.loads(out) == {"num_questions": 1, "output": str(tmp_path / "a.jsonl")}
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "a\u2028b\x85c"


# ---- NeMo's YAML ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2.0.0", "v1.23.0"])
def test_nemos_own_file(ask, model, pictures, vlm, tmp_path, version):
    """As it is but for its paths and the eight GPUs; flags, and fields by NeMo's names, count more."""
    text = golden(f"yaml/neva_inference_{version}.yaml").read_text()
    paths = {"/pwd/images": pictures, "/pwd/nemo_experiments/nemo_llava.nemo": model, "/pwd/nemo_experiments/input_prompts.jsonl": tmp_path / "q.jsonl",
             "/pwd/nemo_experiments/results.jsonl": tmp_path / "a.jsonl"}  # fmt: skip
    for old, new in paths.items():
        assert old in text
        text = text.replace(old, str(new))
    (tmp_path / "inference.yaml").write_text(text)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "What?"}) + "\n")
    flags = ("--inference", tmp_path / "inference.yaml", "--tensor_parallel", 1, "--inference.tokens_to_generate=5")
    code, _, error = ask(*flags)
    assert code == 0, error
    expected = dict(max_new_tokens=5, top_p=0.9, temperature=0.2, repetition_penalty=1.2, end_strings=("<extra_id_1>", "<extra_id_7>"))
    (found,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert found["pred_answer"] == vlm.generate(["What?"], [[pictures / "0.png"]], **expected)[0]
    assert ask.opened.options["tensor_parallel"] == 1 and "quality" in ask.err and "NeMo does not read it either" in ask.err
    assert "_token: null" in text
    (tmp_path / "inference.yaml").write_text(text.replace("_token: null", "_token: right"))
    assert ask(*flags, "--overwrite", "--inference.greedy=true", "--max_new_tokens", 4)[0] == 0
    (found,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert found["prompt"] == "What?<image>\n"
    assert found["pred_answer"] == vlm.generate(["What?<image>\n"], [[pictures / "0.png"]], max_new_tokens=4, repetition_penalty=1.2)[0]


@pytest.mark.parametrize(("fields", "options"), [
    ({"greedy": True, "temperature": 0.2, "top_p": 0.0}, {"temperature": 0.0}),
    ({"tokens_to_generate": 3, "min_tokens_to_generate": 2}, {"max_new_tokens": 3, "min_tokens": 2}),
    ({"greedy": False, "temperature": 0.3, "top_k": 4, "top_p": 1.0}, {"temperature": 0.3, "top_k": 4}), ({"all_probs": False, "compute_logprob": True}, {}),
])  # fmt: skip
def test_nemos_fields(fields, options):
    assert nemo_inference.sampling_options(fields) == options


@pytest.mark.parametrize(("change", "message"), [
    (("all_probs: False", "all_probs: True"), "inference.all_probs is True"), (("media_type: image", "media_type: video"), "media_type is 'video'"),
    (("top_k: 0", "topk: 0"), "inference.topk is not a field .* did you mean top_k"), (("cluster_type", "clustertype"), "clustertype is not a field"),
    (("checkpoint_dir: null", "checkpoint_dir: /a"), "checkpoint_dir names a checkpoint of PyTorch Lightning"),
    (("enable: False", "enable: True"), "quantization.enable"), (("insert_media_token: null", "insert_media_token: up"), "'up'"),
    (("temperature: 0.2", "temperature: 0.0"), "inference.temperature is 0, and inference.greedy is False"),
    (("top_p: 0.9", "top_p: hot"), "top_p is 'hot', expected a number"), (("top_k: 0", "3: 0"), "inference.3 is not a field"),
    (("port:", "5:"), "5 is not a field"),
    (("model_parallel_size: 8", "model_parallel_size: eight"), "tensor_model_parallel_size is 'eight', expected a whole number"),
    (("prompt_file: /pwd/nemo_experiments/input_prompts.jsonl", "prompt_file: 5"), "prompt_file is 5, expected a path"),
    (("media_base_path: /pwd/images", "media_base_path: [a]"), "media_base_path is .'a'., expected a text"),
    (("media_type: image", "batch_size: 0"), "inference.batch_size is 0"), (('["<extra_id_1>","<extra_id_7>",]', "5"), "end_strings is 5, expected a list"),
    (("inference:", "inferring:"), "no section `inference`"), (("temperature: 0.2", "temperature: hot"), "temperature is 'hot', expected a number"),
])  # fmt: skip
def test_what_nemos_file_may_not_say(ask, tmp_path, change, message):
    import re

    text = golden("yaml/neva_inference_v2.0.0.yaml").read_text()
    assert change[0] in text
    (tmp_path / "inference.yaml").write_text(text.replace(*change, 1))
    code, _, error = ask("--inference", tmp_path / "inference.yaml", "--prompt", "a")
    assert code == 2 and re.search(message, error), error


@pytest.mark.parametrize("name", ["trainer", "quantization"])
def test_a_section_that_is_none(tmp_path, name):
    (tmp_path / "inference.yaml").write_text(f"inference: {{}}\n{name}: [5]")
    with pytest.raises(UserError, match=f"{name} is .5., expected a section"):
        nemo_inference.read(str(tmp_path / "inference.yaml"))


def test_every_field_by_nemos_name_counts(ask, model, pictures, vlm, tmp_path):
    """Those that are no option of sampling too; one that turns a field of the file off does so, and greedy stays greedy."""
    (tmp_path / "inference.yaml").write_text("inference: {greedy: True, temperature: 0.2, top_p: 0.5}")
    assert nemo_inference.read(str(tmp_path / "inference.yaml"), {"top_p": 0.0, "temperature": 3.0}) == {"temperature": 0.0, "separator": ""}
    assert nemo_inference.by_name("--inference.temperature=1e-5") == ("temperature", 1e-5)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "0.png", "prompt": "What?"}))
    named = (f"--inference.media_base_path={pictures}", "--inference.insert_media_token=right", "--inference.tokens_to_generate=2")
    assert ask("--model", model, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", *named)[0] == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["prompt"] == "What?<image>\n"


# ---- wrong questions -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    (("--prompt", "a", "--chat"), "nothing, or more than one thing"), ((), "nothing, or more than one thing"),
    (("--prompt", "a", "--top_p", "2"), "top_p is 2.0"), (("--prompt", "<image>"), "prompt 0 has 1 <image> and 0 pictures"),
    (("--prompt", "a", "--image", "nowhere.png"), "nowhere.png cannot be read"),
    (("--prompt", "<image> <image>", "--image", "{0.png}"), "has 2 <image> and 1 pictures"), (("--prompt", "a", "--image", "{broken.png}"), "picture 0"),
    (("--prompt", "a", "--image", "{huge.png}"), "prompt 0: picture 0"), (("--prompt", "a " * 2000), "was made for 256"),
    (("--prompt", "a", "--num_answers", "2"), "always gives the same answer"), (("--input", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
    (("--prompt", "a", "--max_new_tokens", "0"), "max_new_tokens"), (("--prompt", "a", "--inference.colour=red"), "inference.colour is not a field"),
    (("--prompt", "a", "--inference.end_strings=["), "is not YAML"), (("--prompt", "a", "--inference.top_p=hot"), "top_p is 'hot'"),
    (("--prompt", "a", "--inference.end_strings=5"), "end_strings is 5"), (("--prompt", "\udcff"), "half of a surrogate pair"),
    (("--prompt", "a", "--output", "b.json"), "--output does nothing with --prompt"), (("--chat", "--json"), "--json does nothing with --chat"),
    (("--input", "a.json", "--image", "b.png"), "--image does nothing with --input"), (("--prompt", "a", "--image", "/dev/zero"), "/dev/zero has more than"),
    (("--prompt", "a", "--image", "{.}"), "cannot be read"), (("--prompt", "a", "--max_new_tokens", "10", "--min_tokens", "11"), "at most as many"),
])  # fmt: skip
def test_wrong_flags(ask, model, pictures, flags, message):
    flags = [str(pictures / flag[1:-1]) if flag.startswith("{") else flag for flag in flags]
    code, out, error = ask("--model", model, *flags)
    assert (code, out) == (2, "") and error.startswith("error: ") and message in error, error


def test_an_end_string_that_never_comes(ask, model):
    code, out, _ = ask("--model", model, "--prompt", "a", "--end_strings", "never said", "--max_new_tokens", 7, "--json", "--min_tokens", 7)
    (answer,) = json.loads(out)["answers"]
    assert code == 0 and len(answer["tokens"]) == 7 and answer["finish"] == "length"


def test_room_ends_with_the_models_positions(vlm, caplog):
    (answer,) = vlm.answers(["word " * 50], max_new_tokens=1000, min_tokens=1000)
    used = len(vlm.processor.read("word " * 50).ids)
    assert len(answer.tokens) == vlm.max_length - used and answer.finish == "length"
    assert "of 1000 new tokens" in caplog.text


# ---- token ids, pictures of all kinds ------------------------------------------------------------------------------------------------------------------


def test_token_ids_are_read_as_they_are(vlm, pictures):
    prompt, image = "What <image>?", pictures / "0.png"
    read = vlm.processor.read(prompt, [image])
    compact = [int(i) for i in read.ids[read.media_index < 0]]
    compact.insert(int(np.argmax(read.media_index >= 0)), -200)
    assert vlm.answers([compact], [[image]], max_new_tokens=6) == vlm.answers([prompt], [[image]], max_new_tokens=6)
    with pytest.raises(UserError, match="has 1 pictures and 0 ids that stand for one"):
        vlm.answers([[1, 2, 3]], [[image]])
    with pytest.raises(UserError, match="has the id 99999, and the model's vocabulary"):
        vlm.answers([[1, 99999]])


def test_golden_llava_without_a_tokenizer():
    """Ids and pixel values as transformers has them, expanded or one a picture, alone and together: its tokens."""
    answers = np.load(golden("checkpoints/llava_golden.npz"))
    vlm = neva_jax.from_pretrained(golden("checkpoints/llava"))
    cases = sorted({name.split("/")[0] for name in answers if name.endswith("/generated")})
    for kind in ("input_ids", "input_ids_compact"):
        ids, pixels = [answers[f"{case}/{kind}"][0] for case in cases], [list(answers[f"{case}/pixel_values"]) for case in cases]
        for found in (vlm.answers(ids, pixels, max_new_tokens=12), [vlm.answers([i], [p], max_new_tokens=12)[0] for i, p in zip(ids, pixels, strict=True)]):
            assert [answer.tokens for answer in found] == [answers[f"{case}/generated"].tolist() for case in cases]
    with pytest.raises(UserError, match=r"no tokenizer is in it, so that only token ids can be asked; give tokenizer="):
        vlm.generate(["What?"])


def test_golden_llava_and_its_nemo_answer_alike():
    """A square picture: the .nemo's config pads others, and a Hugging Face directory without a preprocessor crops them."""
    options = {"tokenizer": golden("tokenizer/tiny160.model")}
    hf = neva_jax.from_pretrained(golden("checkpoints/llava"), conv_template="v1", **options)
    nemo = neva_jax.from_pretrained(golden("nemo_ckpt/neva_llava_mcore_tp1.nemo"), bases=[golden("checkpoints/llava")], conv_template="v1")
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    expected = hf.answers(["What is it?"], [[picture]], max_new_tokens=8)
    (found,) = nemo.answers(["What is it?"], [[picture]], max_new_tokens=8)
    assert [found.tokens] == [answer.tokens for answer in expected] and len(found.tokens) == 8
    np.testing.assert_allclose(found.logprobs, expected[0].logprobs, atol=1e-4)


def test_pictures_of_all_kinds(vlm, pictures):
    path = pictures / "0.png"
    with Image.open(path) as picture:
        kinds = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
        answers = vlm.generate(["What?"] * 5, [[kind] for kind in kinds], max_new_tokens=6)
        assert len(set(answers)) == 1
        assert len(vlm.generate(["What?"], [[picture.convert("CMYK")]], max_new_tokens=2)) == 1
    for wrong, message in ((3, "prompt 0: picture 0 is a int"), (np.zeros((3, 3)), "array of floats of shape"), (np.zeros((3, 3), np.uint8), "expected uint8")):
        with pytest.raises(UserError, match=message):
            vlm.generate(["What?"], [[wrong]])
    with pytest.raises(UserError, match="expected a list of pictures"):
        vlm.generate(["What?"], [str(path)])


@pytest.mark.parametrize(("prompt", "message"), [
    ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "human first and last"), ([{"from": "gpt", "value": "b"}], "human first and last"),
    ([{"from": "moon", "value": "b"}], "turns are from human, gpt or system"), ([{"value": "b"}], "expected a text, token ids"), (3.5, "expected a text"),
    ([[1], [2, 3]], "expected a text"), ([{"from": "human", "value": "a"}, [1, 2]], "turns are from human"),
    ([{"from": "human", "value": "\ud800"}], "surrogate"),
    (functools.reduce(lambda inner, _: [inner], range(100), 1), "expected a text"), (b"a", "expected a text"), (None, "expected a text"),
    ([{"from": "human", "value": None}], "a turn says 'None'"), ([], "its turns are from nobody"),
])  # fmt: skip
def test_conversations_that_are_none(vlm, prompt, message):
    with pytest.raises(UserError, match=message):
        vlm.generate([prompt])


def test_options_that_are_none(vlm):
    with pytest.raises(UserError, match=r"max_tokens is no option of an answer; did you mean max_new_tokens"):
        vlm.generate(["a"], max_tokens=3)
    with pytest.raises(UserError, match="colour is no option of an answer; known are max_new_tokens"):
        list(vlm.stream("a", colour=3))


def test_a_template_of_one_text(model):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    with pytest.raises(UserError, match="has 3 turns, and the template interleaved is of one text"):
        neva_jax.from_pretrained(model, conv_template="interleaved").generate([turns])


def test_a_system_turn(vlm):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]
    assert vlm.render(turns).startswith("Be brief. USER: Hi")
    with pytest.raises(UserError, match=r"prompts is one str, expected a list; write \['Hi'\]"):
        vlm.generate("Hi")


def test_the_model_stays_where_it_is(model, tmp_path):
    """A copied run answers alike: nothing of the first place is needed."""
    shutil.copytree(model, tmp_path / "copy")
    assert neva_jax.from_pretrained(tmp_path / "copy").generate(["a"], max_new_tokens=4) == neva_jax.from_pretrained(model).generate(["a"], max_new_tokens=4)


# ---- called wrongly, or oddly --------------------------------------------------------------------------------------------------------------------------


def test_lists_of_any_kind(vlm, pictures):
    import jax.numpy as jnp

    expected, image = vlm.generate(["One?", "Two?"], max_new_tokens=3), pictures / "0.png"
    for prompts in (("One?", "Two?"), (text for text in ("One?", "Two?")), np.array(["One?", "Two?"])):
        assert vlm.generate(prompts, max_new_tokens=3) == expected
    assert vlm.generate(["One?", "Two?"], (() for _ in range(2)), max_new_tokens=3) == expected and vlm.generate([]) == []
    assert vlm.generate(["One?"], [(image for _ in range(1))], max_new_tokens=3) == vlm.generate(["One?"], [[image]], max_new_tokens=3)
    assert vlm.generate([jnp.array([1, 5, 6])], max_new_tokens=3) == vlm.generate([[1, 5, 6]], max_new_tokens=3) == vlm.generate([(1, 5, 6)], max_new_tokens=3)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": -1}, "batch_size is -1"), ({"batch_size": 2.5}, "batch_size is 2.5"),
    ({"seed": None}, "seed is None"), ({"seed": 2**70}, "at most 64 bits"), ({"seed": 1.5}, "seed is 1.5"),
    ({"images": [None]}, "prompt 0: its pictures are one NoneType"), ({"images": [Image.new("RGB", (9, 9))]}, "prompt 0: its pictures are one Image"),
    ({"images": [np.zeros((9, 9, 3), np.uint8)]}, "prompt 0: its pictures are one ndarray"), ({"images": Image.new("RGB", (9, 9))}, "images is one Image"),
    ({"images": [[Image.new("RGB", (0, 0))]]}, "prompt 0: picture 0: a PIL picture"), ({"images": [[np.zeros((0, 5, 3), np.uint8)]]}, "prompt 0: picture 0"),
    ({"images": [[Image.new("La", (9, 9))]]}, "prompt 0: picture 0: a PIL picture"),
])  # fmt: skip
def test_wrong_arguments(vlm, options, message):
    with pytest.raises(UserError, match=message):
        vlm.generate(["a"], **options)


def test_a_picture_that_breaks_when_it_is_used(vlm, pictures):
    with Image.open(pictures / "broken.png") as picture, pytest.raises(UserError, match="prompt 0: picture 0: a PIL picture"):
        vlm.generate(["a"], [[picture]])
    with pytest.raises(UserError, match="prompts is one int"):
        vlm.generate(3)
    with pytest.raises(UserError, match="pictures are one Image"):
        next(vlm.stream("a", Image.new("RGB", (9, 9))))


@pytest.mark.parametrize(("options", "message"), [
    ({"tensor_parallel": 0}, "tensor_parallel is 0"), ({"tensor_parallel": -1}, "tensor_parallel is -1"), ({"tensor_parallel": "2"}, "tensor_parallel is '2'"),
    ({"dtype": "fp32"}, "dtype is 'fp32'"), ({"dtype": "int8"}, "dtype is 'int8'"), ({"bases": "/nowhere"}, "there is no /nowhere"),
])  # fmt: skip
def test_a_model_opened_wrongly(model, options, message):
    with pytest.raises(UserError, match=message):
        neva_jax.from_pretrained(model, **options)


@pytest.mark.parametrize(("content", "message"), [
    ("{", "generation_config.json: not valid JSON"), ("[1]", "generation_config.json: holds list"), ('{"eos_token_id": ["a"]}', "eos_token_id is"),
])  # fmt: skip
def test_what_says_the_end_is_broken(tmp_path, content, message):
    shutil.copytree(golden("checkpoints/llava"), tmp_path / "hf", copy_function=shutil.copyfile)
    (tmp_path / "hf" / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        neva_jax.from_pretrained(tmp_path / "hf")


def test_no_more_room_than_the_model_has_positions(vlm, monkeypatch):
    """A cache for a million tokens would be gigabytes."""
    from neva_jax.inference import answers

    rooms, generation = [], answers.Generation
    monkeypatch.setattr(answers, "Generation", lambda weights, batch, sampling, *rest: rooms.append(sampling.max_new_tokens) or generation(
        weights, batch, sampling, *rest))  # fmt: skip
    (answer,) = vlm.answers(["word " * 40], max_new_tokens=10**6)
    "".join(vlm.stream("word " * 40, max_new_tokens=10**6))
    assert rooms == [vlm.max_length] * 2 and len(answer.tokens) <= vlm.max_length - len(vlm.processor.read("word " * 40).ids)


def test_an_answer_that_says_image(ask, model, monkeypatch, vlm):
    """Its tag is no picture of the next question's."""
    asked = []

    def stream(self, prompt, images=(), **options):
        asked.append(prompt)
        yield "an <image>"

    monkeypatch.setattr(type(vlm), "stream", stream)
    assert ask("--model", model, "--chat", keys=f"One?\n/image {'x' * 5000}\nTwo?\n")[0] == 0
    assert [turn["value"] for turn in asked[1]] == ["One?", "an < image >", "Two?"]
