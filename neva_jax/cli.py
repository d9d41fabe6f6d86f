"""The one entry of every command: flags, the config and its overrides, and user errors as one line on standard error and exit code 2.

`--config FILE.py[:ARGUMENT]` runs get_config(ARGUMENT) of that file, `--config FILE.json` reads back what a run saved. Then each `--config.PATH=VALUE` sets a
field, and the config is locked and checked. ml_collections' own config_flags is not used for that: it cannot set an int back to None, replaces a whole section
by a dictionary that was meant to change one field of it, and takes the value after an untyped field for a positional argument. Given up: a flag per override.
"""

import difflib
import json
import logging
import os
import re
import sys
import traceback
import types
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict

from neva_jax.config import assign, check, from_json, schema, sections, suggest
from neva_jax.errors import UserError
from neva_jax.parallel.xla_flags import filter_environment

OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<path>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)


def run(main: Callable, define_flags: Callable | None = None, argv: list[str] | None = None, *, with_config: bool = True) -> None:
    """Parse the command line, call main with every flag as a keyword argument (config=..., show=..., ...), and exit.

    main: returns None or an exit code. define_flags: called with the absl FlagValues to define flags on, as in
    `flags.DEFINE_integer("show", None, "records to show", flag_values=values, required=True)`. with_config: the command has a --config, which is required.
    Exit codes: main's own, 2 after a UserError, 130 after control-C; any other exception is a defect of ours and keeps its traceback.
    """
    log_to_stderr()
    filter_environment()
    try:
        code = main(**parse(sys.argv if argv is None else argv, define_flags, with_config=with_config, about=getattr(main, "__globals__", {}).get("__doc__")))
        if sys.stdout:  # None where it was closed from the first
            sys.stdout.flush()  # now, where a reader who is gone is no error
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Our own messages from `level` up and other libraries' warnings, on standard error, as plain lines."""
    root = logging.getLogger()
    root.handlers = [_PlainHandler()]  # absl and others put theirs there, and every line would come twice
    root.setLevel(logging.WARNING)
    for name in ("neva_jax", "train", "__main__"):
        logging.getLogger(name).setLevel(level)


class _PlainHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(prefix + self.format(record), file=sys.stderr, flush=True)  # sys.stderr of now: tests and notebooks replace it


def parse(argv: list[str], define_flags: Callable | None = None, *, with_config: bool = True, about: str | None = None) -> dict[str, object]:
    """{flag: value} of a command line (argv[0] is the program); `config`, if the command has one, is a locked, checked ConfigDict. Exits after --help."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    if with_config:
        flags.DEFINE_string(
            "config", None, "FILE.py[:ARGUMENT], or a run's config.json; a field is set by --config.PATH=VALUE", flag_values=values, required=True
        )
    if define_flags:
        define_flags(values)
    rest, overrides = split(argv[1:]) if with_config else (argv[1:], [])
    if {"--help", "-help", "-h"} & set(rest):
        print(usage(values, argv[0], about))
        sys.exit(0)
    try:
        _, *positional = values([argv[0], *rest])
    except (flags.Error, ValueError) as error:
        raise UserError(_reword(str(error))) from None
    if positional:
        raise UserError(f"unexpected argument {positional[0]!r}; every argument is a flag, --NAME=VALUE (see --help)")
    parsed = {name: values[name].value for name in values if name == values[name].name}
    if with_config:
        parsed["config"] = config = load(parsed["config"])
        for path, value in overrides:
            assign(config, path, value)
        config.lock()
        check(config)
    return parsed


def split(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Command line -> what is left of it, and the overrides [(path, text)] in their order."""
    rest, overrides, stream = [], [], iter(arguments)
    for argument in stream:
        if not (match := OVERRIDE.fullmatch(argument)):
            rest.append(argument)
            continue
        path, value = match["path"], match["value"]
        leaf = schema().get(path)
        if leaf is None and path not in sections():
            raise UserError(f"--config.{path}: there is no such field{suggest(path)}")
        if match["no"] and (value is not None or leaf is None or leaf.kind is not bool):
            raise UserError(f"{argument}: --noconfig.PATH sets a field that is true or false, and takes no value; write --config.{path}=VALUE")
        if value is None and leaf and leaf.kind is bool:
            value = "false" if match["no"] else "true"
        elif value is None and ((value := next(stream, None)) is None or value.startswith("--")):
            raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
        overrides.append((path, value))
    return rest, overrides


def load(spec: str) -> ConfigDict:
    """FILE.py[:ARGUMENT] or FILE.json -> its config. An error in the file is a UserError that says where."""
    path, *argument = spec.split(":", 1)
    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        files = [entry for entry in os.listdir(folder or ".") if entry.endswith((".py", ".json"))] if os.path.isdir(folder or ".") else []
        near = [os.path.join(folder, entry) for entry in difflib.get_close_matches(name, files, 1)]
        raise UserError(f"--config {path}: no such file; {f'did you mean {near[0]}?' if near else 'name one such as configs/pretrain.py'}")
    try:
        config = _load_json(path) if path.endswith(".json") else _load_python(path, argument)
    except UserError:
        raise
    except Exception as error:  # whatever a config file does wrong, its author is the person to tell
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = frames[-1] if frames else getattr(error, "lineno", None)
        raise UserError(f"--config {path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config() returned {type(config).__name__}, expected a ConfigDict; end it with `return config`")
    return config


def _load_json(path: str) -> ConfigDict:
    with open(path) as file:
        return from_json(json.load(file))


def _load_python(path: str, argument: list[str]) -> ConfigDict:
    module = types.ModuleType("config_file")
    module.__file__ = path
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)  # not imported: no bytecode is kept beside it
    return module.get_config(*argument)


def usage(values: flags.FlagValues, program: str, about: str | None) -> str:
    """What --help prints: the command's docstring and its flags."""
    names = sorted(name for name in values if name == values[name].name)
    lines = [f"  --{name}: {values[name].help}" + ("" if values[name].default is None else f" (default: {values[name].default!r})") for name in names]
    return "\n".join([(about or os.path.basename(program)).strip(), "", "Flags:", *lines])


def _reword(message: str) -> str:
    """absl's messages, less repetitive."""
    message = re.sub(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.", r"--\1 is required;", message)
    return f"{message.replace(' ?', '?').strip().rstrip('.;')}; see --help"
