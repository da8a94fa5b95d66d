"""A configuration as text: complete, as a gin file that makes it again, and as its difference from the defaults."""

import dataclasses
import enum
import functools
import hashlib
import pathlib
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlm.configuration import typed
from jaxlm.configuration.command_line import resolve
from jaxlm.configuration.errors import ConfigError
from jaxlm.configuration.gin_files import qualified_name

_WIDTH = 100


def resolved_text(config: Any) -> str:
    """The whole configuration as a gin file, every value written out, one block an object.

    `resolve(type(config), ["--gin_file=..."])` on this text gives an equal configuration, and its text is the
    same again. Equal parts share a block, which bears the path of the first: `@decoder/blocks_0/...BlockConfig()`.

    Args:
      config: a dataclass as `resolve` makes it.

    Raises:
      ConfigError: it holds an object that is neither a literal nor a dataclass, enum, class or function.
    """
    return _Writer().write(config)


def digest(config: Any, *more: str) -> str:
    """Twelve hexadecimal digits that equal configurations share, by their `resolved_text` and further text.

    Fields that are None have no part in it: what is known by its digest is still known when a later version has a
    field more, as long as None keeps its meaning of "without".
    """
    paragraphs = []  # the imports, and a block each
    for paragraph in resolved_text(config).rstrip("\n").split("\n\n"):
        head, *lines = paragraph.split("\n")
        kept = [line for line in lines if not line.endswith(" = None")]
        if kept or not lines:
            paragraphs.append("\n".join([head, *kept]))
    return hashlib.sha256("\n".join(["\n\n".join(paragraphs), *more]).encode()).hexdigest()[:12]


def resolve_text(text: str) -> Any:
    """What `resolved_text` wrote: the configuration that a text is of, whatever its class. Imports what it names.

    Raises:
      ConfigError: the text is none, or this version cannot read it.
    """
    root = re.search(r"^([\w.]+):$", text, re.MULTILINE)  # the first block, which alone has no scope
    if root is None:
        raise ConfigError("The text of a configuration has no block that says what it configures; it is not whole.")
    with tempfile.TemporaryDirectory() as scratch:
        gin = pathlib.Path(scratch) / "config.gin"
        gin.write_text(text)
        return resolve(f"@{root[1]}()", [f"--gin_file={gin}"])


class _Writer:
    def __init__(self):
        self.blocks: dict[str, list[str]] = {}  # scoped selector -> lines, in order of first mention
        self.scope_of: dict[Any, str] = {}  # (selector, lines) -> scoped selector: equal parts are written once
        self.modules: set[str] = set()

    def write(self, config: Any) -> str:
        self.block(config, (), self.selector(type(config)))
        imports = [f"import {module}" for module in sorted(self.modules)]
        blocks = [
            f"{head}:\n" + "".join(f"    {line}\n" for line in lines) for head, lines in self.blocks.items() if lines
        ]
        return "\n".join(["from __gin__ import dynamic_registration", *imports, "", "\n".join(blocks)])

    def block(self, thing: Any, path: tuple[str, ...], selector: str) -> str:
        """Writes the block of a dataclass or partial function; returns its scoped selector."""
        scope, n = "/".join(path), 2
        while f"{scope}/{selector}" in self.blocks:  # two dictionary keys that read the same as identifiers
            scope, n = f"{'/'.join(path)}_{n}", n + 1
        head = f"{scope}/{selector}" if scope else selector
        self.blocks[head] = []  # keeps its place before its parts
        lines = tuple(f"{name} = {self.value(v, (*path, name), a)}" for name, v, a in _parameters(thing))
        known = self.scope_of.setdefault((selector, lines), head) if scope else head
        if known == head:
            self.blocks[head] = list(lines)
        else:
            del self.blocks[head]
        return known

    def value(self, value: Any, path: tuple[str, ...], annotation: Any = Any) -> str:
        value = typed.fit(value, annotation)
        if isinstance(value, enum.Enum):
            return repr(value.value if isinstance(value.value, str) else value.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return f"@{self.block(value, path, self.selector(type(value)))}()"
        if isinstance(value, functools.partial):
            return f"@{self.block(value, path, self.selector(value.func))}"
        if isinstance(value, list | tuple):
            items = [self.value(v, (*path[:-1], f"{path[-1]}_{i}")) for i, v in enumerate(value)]
            return _enclosed(items, *("()" if isinstance(value, tuple) else "[]"))
        if isinstance(value, Mapping):
            named = {k: (*path[:-1], re.sub(r"\W", "_", f"{path[-1]}_{k}")) for k in value}
            return _enclosed([f"{k!r}: {self.value(v, named[k])}" for k, v in value.items()], "{", "}")
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return repr(value).replace("inf", "1e999")  # the literal that reads as infinity
        if value is None or (isinstance(value, bool | int | float | str) and value == value):
            return repr(value)
        if callable(value) and getattr(value, "__qualname__", "<").isidentifier():
            return f"@{self.selector(value)}"
        raise ConfigError(
            f"{'.'.join(path)} is {typed.show(value)}, which cannot be written as a configuration; "
            f"use literals, enums, frozen dataclasses, or functions of a module."
        )

    def selector(self, target: Any) -> str:
        name = qualified_name(target)
        self.modules.add(name.rpartition(".")[0])
        return name


def _parameters(thing: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, annotation) of each parameter that makes a dataclass or a partial function."""
    if isinstance(thing, functools.partial):
        yield from ((name, value, Any) for name, value in thing.keywords.items())
        return
    annotations = typing.get_type_hints(type(thing))
    for field in dataclasses.fields(thing):
        if field.init:
            yield field.name, getattr(thing, field.name), annotations[field.name]


def _enclosed(items: list[str], opening: str, closing: str) -> str:
    """A container: on one line if it fits, else one item a line."""
    if len(items) == 1 and opening == "(":
        return f"({items[0]},)"
    line = opening + ", ".join(items) + closing
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    return opening + "".join("\n        " + item.replace("\n", "\n    ") + "," for item in items) + "\n    " + closing


def diff_from_defaults(config: Any) -> str:
    """What `config` sets to other values than its dataclasses' defaults, one line a value.

    A line is `path = value  # default`, where a field without a default has no comment. Equal neighbours in a
    tuple share a line (`blocks[0..11].norm`).
    """
    return "".join(f"{path} = {value}" + (f"  # {d}" if d else "") + "\n" for path, value, d in _differences(config))


def _differences(config: Any, reference: Any = None, path: str = "") -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}.{field.name}".lstrip(".")
        if reference is not None:
            default = getattr(reference, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        yield from _difference(value, default, where)


def _difference(value: Any, default: Any, where: str) -> Iterator[tuple[str, str, str]]:
    if type(value) is type(default) and value == default:
        return
    comment = "" if default is dataclasses.MISSING else _short(default)
    if _is_config(value):
        same_class = type(default) is type(value)
        if not same_class:
            yield where, type(value).__name__, comment
        yield from _differences(value, default if same_class else None, where)
    elif isinstance(value, tuple) and any(map(_is_config, value)):
        start = 0
        for i in range(1, len(value) + 1):
            if i == len(value) or value[i] != value[start]:
                index = f"[{start}]" if i == start + 1 else f"[{start}..{i - 1}]"
                yield from _difference(value[start], dataclasses.MISSING, where + index)
                start = i
    elif isinstance(value, Mapping) and any(map(_is_config, value.values())):
        for key, item in value.items():
            yield from _difference(item, dataclasses.MISSING, f"{where}[{key!r}]")
    elif not (isinstance(value, float) and isinstance(default, int) and value == default):
        yield where, _short(value), comment


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _short(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return repr(value.value if isinstance(value.value, str) else value.name)
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return type(value).__name__ if _is_config(value) else repr(value)
