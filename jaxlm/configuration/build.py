"""Builds the tree of configurations that statements describe, checking types and what remained unused."""

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

from jaxlm.configuration import typed
from jaxlm.configuration.errors import ConfigError, nearest
from jaxlm.configuration.gin_files import Binding, Macro, Origin, Reference, Statements

log = logging.getLogger(__name__)


def build(root: Any, statements: Statements, *, warn: bool = True) -> Any:
    """Builds `root` with everything bound to it.

    Args:
      root: a dataclass or function, or a value of the gin language (`Statements.read_value`).
      statements: what the files and the command line bind.
      warn: of unused bindings in included files.

    Returns:
      What `root` makes, checked as a whole.

    Raises:
      ConfigError: something is missing, of a wrong type, refused by a dataclass, or bound and used by nothing
        (in a file given by name or on the command line; in an included file that is a warning).
    """
    if not isinstance(root, Reference | Macro):
        root = Reference(root, (), evaluate=True)
    builder = _Builder(statements)
    config = builder.evaluate(root, (), f"the root {_name(root)}")
    typed.check(config)
    builder.report_unused(_name(root), warn)
    return config


class _Builder:
    def __init__(self, statements: Statements):
        self.statements = statements
        self.used: set[Binding] = set()
        self.calls: dict[Any, set[str]] = {}  # target -> scopes in which it was called
        self.open: list[Any] = []  # macros and (target, scope) pairs that are being built now

    def evaluate(self, value: Any, scope: tuple[str, ...], place: str) -> Any:
        """A value with its macros and references replaced by what they stand for."""
        if isinstance(value, Macro):
            return self._macro(value, place)
        if isinstance(value, Reference):
            return self._call(value, value.scope or scope, place)
        if isinstance(value, list | tuple):
            return type(value)(self.evaluate(v, scope, place) for v in value)
        if isinstance(value, dict):
            return {k: self.evaluate(v, scope, place) for k, v in value.items()}
        return value

    def _macro(self, macro: Macro, place: str) -> Any:
        if macro.is_required:
            macros = self.statements.macros.values()
            names = [b.key for b in macros if isinstance(b.value, Macro) and b.value.is_required]
            flags = " ".join(f"--gin.{name}=..." for name in names)
            raise ConfigError(f"{place}: a value is required here; give it with {flags or 'a later binding'}.")
        binding = self.statements.macros.get(macro.name)
        if binding is None:
            raise ConfigError(f"{place}: no macro {macro.name} is defined{nearest(macro.name, self.statements.macros)}")
        self.used.add(binding)
        # As in gin, what a macro refers to is built in the scope of the macro's name, not of the place of use.
        with self._entered(macro, place):
            return self.evaluate(binding.value, tuple(macro.name.split("/")), binding.place)

    def _call(self, reference: Reference, scope: tuple[str, ...], place: str) -> Any:
        target = reference.target
        self.calls.setdefault(target, set()).add("/".join(scope))
        bindings: dict[str, Binding] = {}
        for depth in range(len(scope) + 1):  # from outer to inner scope, the innermost wins
            bindings |= self.statements.parameters.get((target, "/".join(scope[:depth])), {})
        self.used.update(bindings.values())
        annotations = typed.parameters(target)
        arguments = {}
        with self._entered((target, scope), place):
            for name, binding in bindings.items():
                value = self.evaluate(binding.value, scope, binding.place)
                try:
                    arguments[name] = typed.fit(value, annotations[name])
                except typed.Misfit as misfit:
                    raise ConfigError(f"{self._place_of_value(binding)}: {binding.key} {misfit}.") from None
        if not reference.evaluate:
            return functools.partial(target, **arguments) if arguments else target
        missing = [
            name
            for name, parameter in inspect.signature(target).parameters.items()
            if name in annotations and name not in arguments and parameter.default is parameter.empty
        ]
        if missing:
            example = "/".join([*scope, f"{target.__qualname__}.{missing[0]}"])
            raise ConfigError(f"{place}: {target.__qualname__} needs {' and '.join(missing)}; bind {example} = ...")
        try:
            return target(**arguments)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:  # what it refuses; a TypeError would be a mistake of its own
            message, name = " ".join(str(error).split()), target.__qualname__
            who = "" if place.endswith(name) or message.startswith(name) else f"{name}: "
            raise ConfigError(f"{place}: {who}{message}") from error

    def _place_of_value(self, binding: Binding) -> str:
        """Where the value of a binding was written: `A.x = %X` got its value where X did."""
        while isinstance(binding.value, Macro):
            binding = self.statements.macros[binding.value.name]
        return binding.place

    @contextlib.contextmanager
    def _entered(self, thing: Any, place: str) -> Iterator[None]:
        """Marks `thing` as being built while the context is open: it must not be reached again."""
        if thing in self.open:
            raise ConfigError(f"{place}: {_name(thing)} refers to itself; break the circle.")
        self.open.append(thing)
        yield
        self.open.pop()

    def report_unused(self, root: str, warn: bool) -> None:
        """Refuses or warns of bindings that nothing used: gin ignores them, so that mistakes stay unseen."""
        for name, binding in self.statements.macros.items():
            if binding not in self.used:
                _refuse(binding, f"macro {name} is bound and used by nothing in {root}", warn)
        for (target, scope), bindings in self.statements.parameters.items():
            for binding in bindings.values():
                if binding not in self.used:
                    _refuse(binding, self._why_unused(target, scope, binding, root), warn)

    def _why_unused(self, target: Any, scope: str, binding: Binding, root: str) -> str:
        scopes = self.calls.get(target)
        if scopes is None:
            return f"{binding.key} is bound, but no @{target.__qualname__}() is part of {root}"
        where = " and ".join(repr(s) if s else "no scope" for s in sorted(scopes))
        if any(s == scope or s.startswith(f"{scope}/") or not scope for s in scopes):
            return f"{binding.key} is bound, but every use has its own value, by scope ({where})"
        return f"{binding.key} is bound, but {target.__qualname__} is used in {where} only"


def _refuse(binding: Binding, why: str, warn: bool) -> None:
    if binding.origin is Origin.INCLUDE:
        if warn:
            log.warning("%s: %s.", binding.place, why)
    else:
        raise ConfigError(f"{binding.place}: {why}; remove it or refer to it.")


def _name(thing: Any) -> str:
    if isinstance(thing, Macro):
        return f"%{thing.name}"
    target = thing.target if isinstance(thing, Reference) else thing[0]
    return target.__qualname__
