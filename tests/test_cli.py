"""The entry of every command: what a command line gives, and that every wrong one ends with exit code 2 and one line on standard error."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from absl import flags

from configs import base
from neva_jax import cli
from neva_jax.config import assign, changed, to_json
from neva_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = "configs/pretrain.py"
PROGRAM = '''"""A program for the test."""
import json
import logging
import sys

from absl import flags

from neva_jax import cli


def define_flags(values):
    flags.DEFINE_integer("show", None, "records to show", flag_values=values)


def main(config, show):
    logging.getLogger(__name__).info("about to print")
    if show == 3:
        raise KeyboardInterrupt
    if show == 2:
        raise ValueError("a defect")
    print(json.dumps({"show": show, "light": "jax" not in sys.modules}))
    return show


if __name__ == "__main__":
    cli.run(main, define_flags)
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function: arguments -> CompletedProcess of a small program, run in the repository."""
    path = tmp_path_factory.mktemp("cli") / "program.py"
    path.write_text(PROGRAM)
    start = f"import sys, runpy; sys.path[0] = {str(ROOT)!r}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return lambda *arguments: subprocess.run([sys.executable, "-c", start, str(path), *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*arguments, **options):
    return cli.parse(["program", *arguments], **options)


def one_line(capsys, *arguments, main=lambda config: None, **options) -> str:
    """The only line that a wrong command line leaves."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, argv=["program", *arguments], **options)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- whole programs ----------------------------------------------------------------------------------------------------------------------------------


def test_a_reader_who_is_gone_is_no_error(tmp_path):
    """Also where what is printed fits a buffer, and meets the closed pipe only when that is emptied; nor is a standard output that was closed before."""
    (tmp_path / "program.py").write_text("from neva_jax import cli\ncli.run(lambda: print('x'), with_config=False)\n")
    command = f"env -u PYTHONUNBUFFERED PYTHONPATH={ROOT} {sys.executable} {tmp_path / 'program.py'}"
    for shell in (f"(sleep 1; exec {command}) | true; exit ${{PIPESTATUS[0]}}", f"{command} >&-"):
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), shell


def test_wrong_command_lines_end_with_one_line(program, tmp_path):
    broken, strict, empty = tmp_path / "broken.py", tmp_path / "strict.py", tmp_path / "empty.py"
    broken.write_text("def get_config():\n    return 1 +\n")
    strict.write_text("from neva_jax.errors import UserError\ndef get_config(size='x'):\n    raise UserError(f'size {size}\\nis wrong')\n")
    empty.write_text("def get_config():\n    return {}['a']\n")
    wrong = {
        (): "--config is required",
        ("--config", "configs/pretrian.py"): "no such file; did you mean configs/pretrain.py?",
        ("--config", f"{PRETRAIN}:llama9"): "known are llama2_7b",
        ("--config", str(broken)): "line 2: SyntaxError",
        ("--config", f"{strict}:big"): "size big is wrong",
        ("--config", str(empty)): "line 2: KeyError: 'a'",
        ("--config", PRETRAIN, "--show=many"): "flag --show=many: invalid literal for int()",
        ("--config", PRETRAIN, "--shew=1"): "Unknown command line flag 'shew'. Did you mean: show?",
        ("--config", PRETRAIN, "extra"): "unexpected argument 'extra'",
        ("--config", PRETRAIN, "--config.model.micro_batchsize=8"): "did you mean model.micro_batch_size",
        ("--config", PRETRAIN, "--config.model.micro_batch_size=many"): "model.micro_batch_size is 'many', expected a whole number",
        ("--config", PRETRAIN, "--config.trainer.accumulate_grad_batches=2"): "set it to 1",
        ("--config", PRETRAIN, "--config.trainer.devices=3", "--config.model.onnx_safe"): "data parallel size 3",
    }
    with ThreadPoolExecutor(4) as pool:
        for (arguments, words), done in zip(wrong.items(), pool.map(lambda a: program(*a), wrong), strict=True):
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (arguments, done.stderr)
            assert done.stderr.startswith("error: ") and words in done.stderr, done.stderr


def test_right_command_lines(program):
    done = program("--config", PRETRAIN, "--show", "1", "--config.model.onnx_safe")
    assert done.returncode == 1 and json.loads(done.stdout) == {"show": 1, "light": True}
    assert done.stderr.splitlines() == ["warning: model.onnx_safe is True, which does nothing here: belongs to PyTorch", "about to print"]


def test_other_ends(program):
    done = program("--help")
    assert done.returncode == 0 and "A program for the test." in done.stdout and "--show: records to show" in done.stdout and not done.stderr
    done = program("--config", PRETRAIN, "--show=2")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: a defect" in done.stderr
    done = program("--config", PRETRAIN, "--show=3")
    assert (done.returncode, done.stderr) == (130, "about to print\n")


# ---- within this process -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "path", "result"),
    [
        (["--config.model.micro_batch_size=8"], "model.micro_batch_size", 8),
        (["--config.model.micro_batch_size", "8"], "model.micro_batch_size", 8),
        (["-config.model.micro_batch_size=8"], "model.data.micro_batch_size", 8),
        (["--config.model.seed=1", "--config.model.seed=2"], "model.seed", 2),
        (["--config.model.num_query_groups=8"], "model.num_query_groups", 8),  # null by default
        (["--config.model.num_query_groups=8", "--config.model.num_query_groups=None"], "model.num_query_groups", None),
        (["--config.model.restore_from_path=runs/a=b"], "model.restore_from_path", "runs/a=b"),
        (["--config.trainer.devices", "2"], "trainer.devices", 2),  # of several types
        (["--config.trainer.max_epochs", "-1"], "trainer.max_epochs", -1),
        (["--config.model.data.data_path", "a.json"], "model.data.data_path", "a.json"),
        (["--config.trainer.deterministic"], "trainer.deterministic", True),
        (["--config.trainer.deterministic=true"], "trainer.deterministic", True),
        (["--noconfig.model.use_flash_attention"], "model.use_flash_attention", False),
        (["--config.model.optim.betas=(0.9, 0.99)"], "model.optim.betas", (0.9, 0.99)),
        (["--config.model.optim.betas=0.9,0.99"], "model.optim.betas", (0.9, 0.99)),
        (['--config.model.optim={"lr": 1e-4}'], "model.optim.lr", 1e-4),
        (['--config.model.optim={"lr": 1e-4}'], "model.optim.eps", 1e-8),
        (['--config.model.optim={"sched": {"warmup_steps": 7}}', "--config.model.optim.sched.warmup_steps=9"], "model.optim.sched.warmup_steps", 9),
        (["--config.trainer.precision=32"], "model.precision", 32),
    ],
)
def test_overrides(arguments, path, result):
    config = parse(*arguments, "--config", PRETRAIN)["config"]  # before or after --config
    assert config[path] == result and config.is_locked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.model.fast=1"], "there is no such field"),
        (["--config.model.optim.betas[0]=1"], "did you mean model.optim.betas"),
        (["--config.model.optim=1e-4"], "expected a dictionary"),
        (['--config.model.optim={"lrr": 1}'], "did you mean model.optim.lr"),
        (["--config.model.seed"], "has no value"),
        (["--config.model.seed", "--config.model.bias"], "--config.model.seed has no value"),
        (["--noconfig.model.seed"], "true or false"),
        (["--noconfig.model.bias=true"], "takes no value"),
        (["--config.model.optim.lr=fast"], "model.optim.lr is 'fast', expected a number"),
        (["--config.model.bias=maybe"], "expected true or false"),
    ],
)
def test_wrong_overrides(capsys, arguments, words):
    assert words in one_line(capsys, "--config", PRETRAIN, *arguments)


def test_config_files_that_are_wrong(capsys, tmp_path):
    path = tmp_path / "config.py"
    for text, words in (("", "has no attribute 'get_config'"), ("def get_config(): pass", "returned NoneType"), ("get_config = dict", "returned dict")):
        path.write_text(text)
        assert words in one_line(capsys, "--config", str(path))
    path.write_text("from configs import base\ndef get_config():\n    config = base.get_config()\n    config.model.seed = 'x'\n")
    assert "line 4: TypeError" in one_line(capsys, "--config", str(path))
    assert "name one such as" in one_line(capsys, "--config", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "JSONDecodeError" in one_line(capsys, "--config", str(tmp_path / "config.json"))


def test_a_saved_config_is_read_back(tmp_path):
    config = parse("--config", PRETRAIN, "--config.model.num_query_groups=8")["config"]
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    again = parse("--config", str(tmp_path / "config.json"), "--config.trainer.devices=2")["config"]
    assert (again.model.num_query_groups, again.trainer.devices, again.model.optim.betas) == (8, 2, (0.9, 0.95))


def test_commands_without_config(capsys):
    def define_flags(values):
        flags.DEFINE_string("model", None, "what to ask", flag_values=values, required=True)
        flags.DEFINE_float("temperature", 0.0, "0: greedy", flag_values=values)

    options = {"define_flags": define_flags, "with_config": False}
    assert parse("--model=a", "--temperature", "0.5", **options) == {"model": "a", "temperature": 0.5}
    assert "--model is required" in one_line(capsys, main=lambda model, temperature: None, **options)
    assert "Unknown command line flag 'config'" in one_line(capsys, "--model=a", "--config=x", main=lambda model, temperature: None, **options)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda model, temperature: 143, argv=["program", "--model=a"], **options)
    assert stop.value.code == 143


def test_errors_of_main_are_one_line(capsys):
    def main(config):
        raise UserError("the file\n  is not there")

    assert one_line(capsys, "--config", PRETRAIN, main=main) == "error: the file is not there\n"


# ---- setting one field, from a command line, a YAML file or a JSON file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "result"),
    [
        ("model.num_query_groups", "8", 8),
        ("model.num_query_groups", "null", None),
        ("model.restore_from_path", "", None),
        ("model.restore_from_path", "None", None),
        ("model.data.cache_dir", "/a b", "/a b"),
        ("exp_manager.version", 3, "3"),
        ("model.optim.lr", "1e-4", 1e-4),
        ("model.optim.lr", 1, 1.0),
        ("model.bias", "True", True),
        ("model.bias", "false", False),
        ("model.optim.betas", "(0.9, 0.99)", (0.9, 0.99)),
        ("model.optim.betas", [0.9, 0.99], (0.9, 0.99)),
        ("model.peft.lora_tuning.target_modules", "attention_qkv,mlp_fc1", ("attention_qkv", "mlp_fc1")),
        ("model.peft.lora_tuning.target_modules", "all", ("all",)),
        ("model.peft.lora_tuning.layer_selection", "12", (12,)),
        ("trainer.precision", "32", 32),
        ("trainer.precision", "bf16", "bf16"),
        ("trainer.val_check_interval", "0.25", 0.25),
        ("model.data.data_path", "data/chat.json", "data/chat.json"),
        ("model.data.data_path", ["a.json", "b.json"], ("a.json", "b.json")),
    ],
)
def test_text_becomes_the_type_of_the_field(path, value, result):
    config = base.get_config()
    assign(config, path, value)
    assert config[path] == result and type(config[path]) is type(result)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.num_layers", "1.5", "expected a whole number"),
        ("model.num_layers", 2.0, "expected a whole number"),
        ("model.num_layers", True, "expected a whole number"),
        ("model.num_layers", None, "expected a whole number"),
        ("model.num_query_groups", "many", "expected a whole number or null"),
        ("model.optim.lr", "fast", "expected a number"),
        ("model.optim.lr", "nan", "expected a number"),
        ("model.bias", "maybe", "expected true or false"),
        ("trainer.devices", "null", "expected a value; its default is 1"),
        ("model.optim.name", None, "expected a text"),
        ("model.optim", "fused_adam", "expected a dictionary of its fields"),
        ("model.optim", {"lrr": 1}, "model.optim.lrr is not a field of the config; did you mean model.optim.lr"),
        ("model.lr", 1, "did you mean model.optim.lr?"),
        ("colour", 1, "configs/base.py"),
    ],
)
def test_wrong_types_are_refused(path, value, words):
    with pytest.raises(UserError) as error:
        assign(base.get_config(), path, value)
    assert words in str(error.value)


def test_a_dictionary_changes_only_the_fields_it_names():
    config = base.get_config()
    assign(config, "model.optim", {"lr": "1e-4", "sched": {"warmup_steps": 7}})
    assert changed(config) == {"model.optim.lr": 1e-4, "model.optim.sched.warmup_steps": 7}
