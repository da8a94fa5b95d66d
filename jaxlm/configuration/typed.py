"""Fits values to type annotations, which gin does not do: checks, and converts where the meaning is plain.

Conversions: int to float, list to tuple, an enum's value or member name to the member.
"""

import collections.abc
import dataclasses
import enum
import inspect
import types
import typing
from typing import Any

from jaxlm.configuration.errors import ConfigError


class Misfit(Exception):
    """A value does not fit its annotation; the message says what was expected and what came."""


def fit(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it.

    Args:
      value: what was bound: a literal, an enum member, a configuration, a function, or containers of them.
      annotation: a resolved type annotation (`typing.get_type_hints`).

    Raises:
      Misfit: it does not fit.
    """
    if isinstance(annotation, typing.TypeAliasType):
        annotation = annotation.__value__
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return fit(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, annotation, arguments)
    if annotation in (None, types.NoneType):
        ok = value is None
    elif origin is typing.Literal:
        ok = any(value == a and type(value) is type(a) for a in arguments)
    elif origin is type or annotation is type:
        ok = isinstance(value, type) and (not arguments or arguments[0] is Any or issubclass(value, arguments[0]))
    elif origin is collections.abc.Callable or annotation is collections.abc.Callable:
        ok = callable(value)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _fit_enum(value, annotation)
    elif annotation is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif annotation is float:
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        ok = isinstance(value, float)
    elif (origin or annotation) is tuple:
        return _fit_tuple(value, annotation, arguments)
    elif issubclass(origin or annotation, collections.abc.Mapping):
        if not isinstance(value, collections.abc.Mapping):
            raise _misfit(value, annotation)
        key_type, value_type = arguments or (Any, Any)
        return {_fit_item(k, key_type, "key"): _fit_item(v, value_type, repr(k)) for k, v in value.items()}
    elif origin in (list, collections.abc.Sequence):
        fitted = _fit_tuple(value, annotation, (arguments[0], ...))
        return list(fitted) if origin is list else fitted
    else:
        try:
            ok = isinstance(value, origin or annotation)
        except TypeError:  # a protocol that is for type checkers only
            ok = True
    if not ok:
        raise _misfit(value, annotation)
    return value


def _fit_union(value: Any, annotation: Any, members: tuple) -> Any:
    """The first member that takes the value as it is, else the first that takes it converted."""
    fitted, misfits = [], []
    for member in members:
        try:
            fitted.append(fit(value, member))
        except Misfit as misfit:
            if member is not types.NoneType:
                misfits.append(misfit)
    if not fitted:  # `X | None` has one reason, which may lie deep inside X
        enums = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
        if isinstance(value, str) and len(enums) == 1:  # a name that does not exist: say which do
            others = [describe(m) for m in members if m is not enums[0] and m is not types.NoneType]
            try:
                _fit_enum(value, enums[0])
            except Misfit as misfit:
                raise Misfit(f"{misfit}{'; or a ' if others else ''}{' or '.join(others)}") from None
        raise misfits[0] if len(misfits) == 1 else _misfit(value, annotation)
    return next((f for f in fitted if type(f) is type(value) and f == value), fitted[0])


def _fit_enum(value: Any, annotation: type[enum.Enum]) -> enum.Enum:
    for member in annotation:
        if value is member or (isinstance(value, str) and value in (member.value, member.name)):
            return member
    names = ", ".join(repr(m.value if isinstance(m.value, str) else m.name) for m in annotation)
    raise Misfit(f"expects one of {names} ({annotation.__name__}), got {show(value)}")


def _fit_tuple(value: Any, annotation: Any, arguments: tuple) -> tuple:
    if not isinstance(value, list | tuple):
        raise _misfit(value, annotation, "; write (x,) for a tuple of one")
    if not arguments:
        return tuple(value)
    if len(arguments) == 2 and arguments[1] is ...:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise _misfit(value, annotation)
    return tuple(_fit_item(v, a, str(i)) for i, (v, a) in enumerate(zip(value, arguments)))


def _fit_item(value: Any, annotation: Any, where: str) -> Any:
    try:
        return fit(value, annotation)
    except Misfit as misfit:
        raise Misfit(f"item {where} {misfit}") from None


def _misfit(value: Any, annotation: Any, remedy: str = "") -> Misfit:
    if isinstance(value, float) and value.is_integer() and annotation is int:
        remedy = f"; write {int(value)}"
    elif value in ("true", "false") and annotation is bool:
        remedy = f"; write {value.capitalize()}"
    elif annotation is str:
        remedy = "; a string needs quotes"
    elif inspect.isroutine(value) or isinstance(value, type):
        remedy = f"; write @{value.__name__}() with parentheses for what it returns"
    return Misfit(f"expects {describe(annotation)}, got {show(value)}{remedy}")


def show(value: Any) -> str:
    """A value in an error message: short, with its type unless that is plain."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"a {type(value).__name__}"
    if value is None or isinstance(value, bool | int | float | str | enum.Enum):
        return repr(value)
    return f"{str(value)[:60]!s} ({type(value).__name__})"


def describe(annotation: Any) -> str:
    """An annotation as people write it."""
    if annotation in (None, types.NoneType):
        return "None"
    if annotation is ...:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(describe, arguments))
    name = getattr(origin or annotation, "__name__", str(annotation))
    if not arguments or origin is collections.abc.Callable:
        return name
    return f"{name}[{', '.join(repr(a) if origin is typing.Literal else describe(a) for a in arguments)}]"


def parameters(target: Any) -> dict[str, Any]:
    """{parameter: annotation} of a dataclass, class or function. `Any` where there is none.

    Raises:
      ConfigError: an annotation names what is imported for type checkers only.
    """
    is_plain_class = isinstance(target, type) and not dataclasses.is_dataclass(target)
    try:
        hints = typing.get_type_hints(target.__init__ if is_plain_class else target)
    except NameError as error:
        raise ConfigError(f"{target.__qualname__} cannot be configured: an annotation's {error}.") from error
    signature = inspect.signature(target).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check(config: Any, path: str = "") -> None:
    """Checks every field of every dataclass in `config`, also defaults and what functions built.

    Raises:
      ConfigError: a field holds what its annotation does not allow; the message gives its path.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        path = path or type(config).__name__
        annotations = typing.get_type_hints(type(config))
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            try:
                fit(value, annotations[field.name])
            except Misfit as misfit:
                raise ConfigError(f"{path}.{field.name} {misfit}.") from None
            check(value, f"{path}.{field.name}")
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check(value, f"{path}[{i}]")
    elif isinstance(config, collections.abc.Mapping):
        for key, value in config.items():
            check(value, f"{path}[{key!r}]")
