"""Digests that name caches: equal definitions give equal digests, in any process, on any machine."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping

import numpy as np


def fingerprint(*parts: object) -> str:
    """Digest of plain values, dataclasses, functions and containers of them, 32 hex digits.

    An object with a `fingerprint()` method (a vocabulary: its contents, not its path) answers for itself. A function
    is known by its name and source, its defaults and what it closes over, so that editing a preprocessor, or making it
    with other settings, makes a new cache.

    Raises:
      TypeError: a part has no stable description (say, an open file).
    """
    digest = hashlib.sha256()
    for piece in _describe(parts, ()):
        digest.update(piece)
    return digest.hexdigest()[:32]


def source_of(function: types.FunctionType) -> tuple:
    """A function's module, name and source; in place of source that no file has, its bytecode."""
    try:
        source = inspect.getsource(function.__code__)
    except OSError:  # typed into an interpreter
        source = _bytecode(function.__code__)
    return function.__module__, function.__qualname__, source


def _bytecode(code: types.CodeType) -> tuple:
    inner = tuple(_bytecode(part) if inspect.iscode(part) else repr(part) for part in code.co_consts)
    return code.co_code, code.co_names, inner


def _closed_over(function: types.FunctionType) -> dict[str, object]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # nothing was assigned yet
            found[name] = cell.cell_contents
    return found


def _describe(value: object, inside: tuple[object, ...]) -> Iterator[bytes]:
    """Describes a part; `inside` are the functions in whose closures it was found."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        body = repr(value).encode()
        yield b"%s:%d:%s;" % (kind.__name__.encode(), len(body), body)
    elif isinstance(value, enum.Enum):
        yield f"{kind.__qualname__}.{value.name};".encode()
    elif callable(getattr(value, "fingerprint", None)) and not isinstance(value, type):
        yield f"{kind.__qualname__}={value.fingerprint()};".encode()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{kind.__module__}.{kind.__qualname__}(".encode()
        for field in dataclasses.fields(value):
            yield field.name.encode() + b"="
            yield from _describe(getattr(value, field.name), inside)
        yield b")"
    elif isinstance(value, Mapping):
        yield b"{"
        for key in sorted(value, key=repr):
            yield from _describe(key, inside)
            yield from _describe(value[key], inside)
        yield b"}"
    elif isinstance(value, (tuple, list)):
        yield b"["
        for item in value:
            yield from _describe(item, inside)
        yield b"]"
    elif isinstance(value, (set, frozenset)):
        yield b"<" + b"".join(sorted(b"".join(_describe(item, inside)) for item in value)) + b">"
    elif isinstance(value, (np.ndarray, np.generic)):
        yield f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    elif isinstance(value, functools.partial):
        yield from _describe((value.func, value.args, value.keywords), inside)
    elif inspect.isfunction(value):
        if value in inside:  # it calls itself
            yield f"function {inside.index(value)};".encode()
            return
        settings = (value.__defaults__, value.__kwdefaults__, _closed_over(value))
        yield from _describe((source_of(value), *settings), (*inside, value))
    elif inspect.ismethod(value):
        yield from _describe((value.__func__, value.__self__), inside)
    elif isinstance(value, np.ufunc):
        yield f"numpy {value.__name__};".encode()
    elif isinstance(value, re.Pattern):
        yield from _describe((value.pattern, value.flags), inside)
    elif isinstance(value, type) or inspect.isbuiltin(value):
        yield f"{value.__module__}.{value.__qualname__};".encode()
    elif inspect.ismethoddescriptor(value):  # such as str.lower
        yield f"{value.__objclass__.__module__}.{value.__qualname__};".encode()
    elif inspect.ismodule(value):
        yield f"module {value.__name__};".encode()
    else:
        raise TypeError(
            f"{value!r} ({kind.__qualname__}) has no stable description to name a cache by; use plain functions, "
            f"frozen dataclasses and plain values in tasks, or give it a fingerprint() method."
        )
