"""extend_tokenizer: the model that NeMo's script writes, to the byte; what cannot be done is refused and leaves no file."""

import json

import pytest
from helpers import ROOT, golden
from sentencepiece import SentencePieceTrainer

from neva_jax import cli, extend_tokenizer
from neva_jax.data.tokenizer import SentencePieceTokenizer

DIGITS = ROOT / "examples" / "digits" / "tokenizer.model"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model without control tokens."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "texts").write_text("one two three USER: ASSISTANT: yes no\n" * 20)
    SentencePieceTrainer.train(input=str(folder / "texts"), model_prefix=str(folder / "bare"), vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    return folder / "bare.model"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(extend_tokenizer.main, extend_tokenizer.define_flags, ["extend_tokenizer", *map(str, arguments)], with_config=False)
    return end.value.code, *capsys.readouterr()


def test_byte_for_byte(tmp_path, capsys):
    output = tmp_path / "llama2_neva.model"
    code, printed, _ = run(capsys, "--input", golden("tokenizer/llama2.model"), "--output", output, "--json")
    ids = {f"<extra_id_{i}>": 32000 + i for i in range(8)}
    assert (code, json.loads(printed)) == (0, {"output": str(output), "ids": ids, "vocab_size": 32008})
    assert output.read_bytes() == golden("tokenizer/llama2_neva.model").read_bytes()


def test_tokens_by_name(bare, tmp_path, capsys):
    output, size = tmp_path / "new.model", SentencePieceTokenizer(bare).vocab_size
    code, printed, _ = run(capsys, "--input", bare, "--output", output, "--tokens", "<a>,<b>", "--tokens", "<c> <d>")
    assert code == 0 and [line.split() for line in printed.splitlines()[:4]] == [[str(size + i), name] for i, name in enumerate(("<a>", "<b>", "<c>", "<d>"))]
    before, after = SentencePieceTokenizer(bare), SentencePieceTokenizer(output)
    assert after.whole("one<b>two") == [*before.whole("one"), size + 1, *before.encode("two", start=False)[0]]
    assert after.special == ("<a>", "<b>", "<c>", "<d>") and after.whole("one two") == before.whole("one two")
    assert run(capsys, "--input", bare, "--output", output, "--tokens", "<a>", "--nois_userdefined", "--overwrite")[0] == 0
    control = SentencePieceTokenizer(output)
    assert control.id_of("<a>") == size and control.special == () and size not in control.whole("one<a>two")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", DIGITS], "<extra_id_0> is in the model already, with id"),
        (["--input", "BARE", "--tokens", "<a>,<a>"], "<a> is in the model already"),
        (["--input", "BARE", "--tokens", " , "], "names no token"),
        (["--input", ROOT / "README.md"], "--input: "),
        (["--input", ROOT / "no.model"], "--input: no file"),
    ],
)
def test_refused(bare, tmp_path, capsys, arguments, expected):
    output = tmp_path / "new.model"
    code, printed, message = run(capsys, *(bare if a == "BARE" else a for a in arguments), "--output", output)
    assert code == 2 and printed == "" and expected in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_stays(bare, tmp_path, capsys):
    output = tmp_path / "new.model"
    output.write_text("mine")
    code, _, message = run(capsys, "--input", bare, "--output", output)
    assert code == 2 and "--overwrite" in message and output.read_text() == "mine"
    code, _, message = run(capsys, "--input", bare, "--output", tmp_path / "none" / "new.model")
    assert code == 2 and "cannot be written" in message
