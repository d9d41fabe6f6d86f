"""OmegaConf's dialect of YAML, without OmegaConf: a file read safely, and what its ${...} say.

A reference to a field stays a reference (Late), so that it follows a later change; all others become values at once. Given up: references to whole sections or
to entries of a list, ${} inside the name of a ${}, escaped dollars, and resolvers other than those of `Interpolation.call`.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import yaml

from neva_jax.errors import UserError

MAX_BYTES, MAX_VALUES = 1 << 20, 20_000  # of a file, and of what its aliases unfold into; NeMo's largest config has 12 kB and 300 values
YAML = "tag:yaml.org,2002:"
TAGS = {YAML + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


class Loader(yaml.SafeLoader):
    """As OmegaConf has it: 1e-5 is a number, which YAML 1.1 takes for a text, and a date is a text."""


Loader.add_implicit_resolver(YAML + "float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != YAML + "timestamp"] for first, rules in Loader.yaml_implicit_resolvers.items()
}


def read(path: str) -> dict:
    """The mapping that a YAML file holds. UserError for whatever else it is."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; expected NeMo's YAML file, by a path from the current directory") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes, and no config is that long; is it another file?")
    try:
        loader = Loader(content)
        node = loader.get_single_node()
        inspect(path, node)
        tree = loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not YAML that a config can be: {type(error).__name__}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, expected a mapping with the sections trainer, exp_manager and model")
    return tree


def inspect(path: str, root: yaml.Node | None) -> None:
    """Refuse, before anything is made of it: tags, a key that is given twice, and aliases that unfold into too much or contain themselves."""
    left, count = [root] if root else [], 0
    while left:
        node, count = left.pop(), count + 1
        where = f"{path}, line {node.start_mark.line + 1}"
        if count > MAX_VALUES:
            raise UserError(f"{path} unfolds into more than {MAX_VALUES} values; its aliases (* and <<) repeat or contain each other")
        if node.tag not in TAGS:
            raise UserError(f"{where}: the tag {node.tag.replace(YAML, '!!')} is not read; write plain texts, numbers, lists and mappings")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise UserError(f"{where}: {', '.join(twice)} is given twice in one mapping; keep one")
            left += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


class Late(NamedTuple):
    """A value that depends on fields: compute(values of sources) -> value."""

    sources: tuple[str, ...]
    compute: Callable


def join(function: Callable, parts: list):
    """function(*parts): its value, or Late if a part is."""
    sources = tuple(dict.fromkeys(source for part in parts if isinstance(part, Late) for source in part.sources))

    def compute(*values):
        known = dict(zip(sources, values, strict=True))
        return function(*(part.compute(*map(known.get, part.sources)) if isinstance(part, Late) else part for part in parts))

    return Late(sources, compute) if sources else compute()


def _text(*parts):
    return None if None in parts else "".join(map(str, parts))


def _product(*numbers):
    return numbers[0] * numbers[1]


def _sum(*numbers):
    return numbers[0] + numbers[1]


ARITHMETIC = {"multiply": _product, "sum": _sum}
HEAD = re.compile(r"\s*([^${}:,\s]+)\s*([:}])")  # of what stands in ${}: a name, and what ends it
SHELL = re.compile(r"\$([A-Za-z_]\w*)")


def find(tree: dict, path: tuple):
    """What the tree has at `path`; KeyError if nothing."""
    for key in path:
        if not isinstance(tree, dict):
            raise KeyError(key)
        tree = tree[key]
    return tree


class Interpolation:
    """The values of a tree of mappings whose texts may hold ${...}.

    fields: paths (tuples of keys) that stay references. wrappers: sections that this tree was cut out of, which its absolute references may begin with.
    After `value` was called for all that is wanted, `missing` is {variable of the environment that is not set: where it is asked for}, and `used` are the
    paths that something refers to.
    """

    def __init__(self, tree: dict, fields: set[tuple], wrappers: tuple[str, ...] = ()):
        self.tree, self.fields, self.wrappers = tree, fields, wrappers
        self.missing, self.used, self.open, self.done = {}, set(), [], {}

    def value(self, path: tuple):
        """What stands at `path`: a plain value or Late. UserError for references that go round in a circle or lead nowhere."""
        if path in self.open:
            circle = [*self.open[self.open.index(path) :], path]
            raise UserError(f"{_dotted(path)} refers to itself: {' -> '.join(map(_dotted, circle))}")
        if path not in self.done:
            self.open.append(path)
            self.done[path] = self.evaluate(find(self.tree, path), path)
            self.open.pop()
        return self.done[path]

    def evaluate(self, node, at: tuple):
        if isinstance(node, list):
            return join(lambda *values: list(values), [self.evaluate(child, (*at, i)) for i, child in enumerate(node)])
        if isinstance(node, dict):
            return join(lambda *values: dict(zip(node, values, strict=True)), [self.evaluate(child, (*at, key)) for key, child in node.items()])
        return self.scan(node, 0, "", at)[0] if isinstance(node, str) and "$" in node else node

    def scan(self, text: str, i: int, stop: str, at: tuple):
        """The value of text[i:] up to a character of `stop`, and where that stands. One ${...} alone keeps its type; among other text it is text, or null."""
        parts, plain = [], ""
        while i < len(text) and text[i] not in stop:
            shell = SHELL.match(text, i)
            if not shell and not text.startswith("${", i):
                plain, i = plain + text[i], i + 1
                continue
            value, i = (self.environment(shell[1], at), shell.end()) if shell else self.braces(text, i + 2, at)
            parts, plain = [*parts, *[plain] * bool(plain), value], ""
        parts += [plain] * bool(plain)
        return (parts[0] if len(parts) == 1 else join(_text, parts)), i

    def braces(self, text: str, i: int, at: tuple):
        """The value of a ${...} whose inside begins at i, and where its text ends."""
        head, arguments = HEAD.match(text, i), []
        if head and head[2] == "}":
            return self.reference(head[1], at), head.end()
        i = head.end() - 1 if head else len(text)
        while i < len(text) and text[i] != "}":
            value, i = self.scan(text, i + 1, ",}", at)
            arguments.append(value.strip().strip("'\"") if isinstance(value, str) else value)
        if i == len(text):
            raise UserError(f"{_dotted(at)} is {text!r}, which holds a ${{...}} that cannot be read; expected ${{section.field}} or ${{resolver:argument}}")
        return self.call(head[1], arguments, at), i + 1

    def call(self, name: str, arguments: list, at: tuple):
        if name in ARITHMETIC and len(arguments) == 2:
            return join(lambda *values: ARITHMETIC[name](*(_number(v, name, at) for v in values)), arguments)
        if name in ("oc.env", "env") and 1 <= len(arguments) <= 2 and isinstance(arguments[0], str):
            return self.environment(arguments[0], at, *arguments[1:])
        raise UserError(f"{_dotted(at)}: ${{{name}:...}} cannot be read; known are multiply and sum of two numbers, and oc.env")

    def environment(self, name: str, at: tuple, *default):
        if name not in os.environ and not default:
            self.missing.setdefault(name, _dotted(at))
        return os.environ.get(name, *default)

    def reference(self, name: str, at: tuple):
        """${a.b}: from the root; ${.a}: beside this; ${..a}: a section further out. A plain name that the file lacks is the environment's."""
        keys = name.lstrip(".")
        up, path = len(name) - len(keys), tuple(keys.split("."))
        if up:
            path = (*at[:-up], *path)
        elif path[0] in self.wrappers and path[0] not in self.tree:
            path = path[1:]
        try:
            node = find(self.tree, path)
        except KeyError:
            if not up and len(path) == 1:
                return self.environment(name, at)
            raise UserError(f"{_dotted(at)} refers to ${{{name}}}, and the file has no {_dotted(path)}; write it there, or a value here") from None
        if isinstance(node, dict):
            raise UserError(f"{_dotted(at)} refers to ${{{name}}}, which is a section; name one of its fields: {', '.join(map(str, node))}")
        value = self.value(path)
        self.used.add(path)
        return Late((_dotted(path),), lambda value: value) if path in self.fields else value


def _number(value, name: str, at: tuple):
    try:
        return int(value) if str(value).strip().lstrip("+-").isdigit() else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{_dotted(at)}: ${{{name}:...}} takes numbers, found {value!r}") from None


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
