"""The choice of a backend, for every operation that has several: the one named, or the platform's best that can."""

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pallas_kernels import platforms

_LOG = logging.getLogger(__name__)


class Backend(Protocol):
    """One implementation of an operation; what `refuses` is asked is the operation's own."""

    def refuses(self, *request: Any) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can.

        Looks at static facts (shapes, types, options) and at `platforms.current()` only, so that it also answers while
        a program is compiled ahead of time.
        """


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place in the order in which "auto" asks backends.

    Attributes:
      name: of the backend.
      reason: why it stands here, and where that was measured.
      better_not: why the call had better go to the next one, though this one could serve it; None or "" if not.
    """

    name: str
    reason: str
    better_not: Callable[..., str | None] = lambda *request: None


class Choice[B: Backend]:
    """The backends of one operation.

    Attributes:
      operation: its name, in messages and in the log.
      backends: by name a backend, or "module:class" of one that is imported when first asked for.
      order: for "auto", by kind of platform; the last candidate of each refuses nothing.
      error: raised where a named backend does not exist or refuses.
    """

    def __init__(
        self,
        operation: str,
        backends: Mapping[str, B | str],
        order: Mapping[str, tuple[Candidate, ...]],
        error: type[ValueError],
    ):
        self.operation = operation
        self.backends: dict[str, B | str] = dict(backends)
        self.order = dict(order)
        self.error = error
        self._announced: set[str] = set()

    def backend(self, name: str) -> B:
        """The backend of this name; an `error` if there is none."""
        if name not in self.backends:
            known = ", ".join(sorted(self.backends))
            raise self.error(f"There is no {self.operation} backend {name!r}; there are {known} and 'auto'.")
        entry = self.backends[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self.backends[name] = getattr(importlib.import_module(module), attribute)()
        return entry

    def check_name(self, name: str, field: str) -> None:
        """Raises a ValueError that names a configuration's `field` unless there is a backend of this name."""
        if name not in ("auto", *self.backends):
            raise ValueError(f"{field}={name!r} does not exist; there are {sorted(self.backends)} and 'auto'.")

    def choose(self, name: str, *request: Any) -> B:
        """The backend that serves a request: the named one, or for "auto" the platform's first that takes it.

        Raises:
          `error`: the named backend does not exist or refuses.
        """
        if name == "auto":
            return self._automatic(request)
        chosen = self.backend(name)
        if reasons := chosen.refuses(*request):
            able = ", ".join(other for other in self.backends if not self.backend(other).refuses(*request))
            raise self.error(f"{name} cannot: {'; '.join(reasons)}. Backends that can: {able}.")
        return chosen

    def _automatic(self, request: tuple[Any, ...]) -> B:
        platform = platforms.current()
        passed_over = []
        for candidate in self.order[platform.kind]:
            backend = self.backend(candidate.name)
            reasons = backend.refuses(*request)
            if not reasons and (better_not := candidate.better_not(*request)):
                reasons = [better_not]
            if not reasons:
                self._announce(platform, candidate.name, passed_over)
                return backend
            passed_over.append(f"not {candidate.name}: {', '.join(reasons)}")
        raise self.error(f"No {self.operation} backend for {platform.chip} takes this call: {'; '.join(passed_over)}.")

    def _announce(self, platform: platforms.Platform, chosen: str, passed_over: list[str]) -> None:
        """Logs each choice once, with what kept faster backends from it."""
        because = f" ({'; '.join(passed_over)})" if passed_over else ""
        line = f"{self.operation} on {platform.chip} runs on {chosen}{because}"
        if line not in self._announced:
            self._announced.add(line)
            _LOG.info(line)
