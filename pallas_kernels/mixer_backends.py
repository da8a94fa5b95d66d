"""The choice of a backend for the linear mixers: by name, or the platform's best; never another than the one named."""

import functools
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from pallas_kernels import platforms

_LOG = logging.getLogger(__name__)

# For "auto", best first; the last of a row refuses nothing. A CPU interprets TPU kernels, for tests: never by choice.
_PREFERENCE = {"tpu": ("pallas_tpu", "xla"), "gpu": ("xla",), "cpu": ("xla",)}


class UnsupportedMixer(ValueError):
    """The named backend cannot do what was asked for, or does not exist."""


class Backend(Protocol):
    """One implementation of a mixer; `refuses` takes what the mixer's own protocol says."""

    name: str

    def refuses(self, *request: Any) -> list[str]:
        """Reasons why this backend cannot serve the call; empty if it can. Looks at shapes and types only."""


def choose[T: Backend](mixer: str, name: str, backends: Mapping[str, T], *request: Any) -> T:
    """The backend called `name`, or with "auto" the first of the platform's that does not refuse.

    Args:
      mixer: what is asked for, to be named in messages and in the log.
      name: a key of `backends`, or "auto".
      backends: all there are.
      *request: what `refuses` is asked.

    Raises:
      UnsupportedMixer: there is no such backend, or it refuses.
    """
    kind = platforms.current().kind
    if name == "auto":
        chosen = next(n for n in _PREFERENCE.get(kind, ("xla",)) if not backends[n].refuses(*request))
        _log_once(mixer, chosen, kind)
        return backends[chosen]
    if name not in backends:
        raise UnsupportedMixer(f"There is no {mixer} backend {name!r}; there are {sorted(backends)} and 'auto'.")
    if reasons := backends[name].refuses(*request):
        able = [n for n, backend in backends.items() if not backend.refuses(*request)]
        raise UnsupportedMixer(f"{mixer}: {name} cannot: {'; '.join(reasons)}. Backends that can: {', '.join(able)}.")
    return backends[name]


@functools.cache
def _log_once(mixer: str, chosen: str, kind: str) -> None:
    _LOG.info("%s on %s runs on the backend %s", mixer, kind, chosen)
