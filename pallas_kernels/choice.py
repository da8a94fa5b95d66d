"""Who computes attention: the backends by name, and which of them `backend="auto"` takes on which machine."""

import dataclasses
import importlib
import logging
import math

from pallas_kernels import platforms
from pallas_kernels.requests import Backend, Request, UnsupportedAttention

BACKENDS: dict[str, Backend | str] = {
    "xla": "pallas_kernels.backends.xla:XlaBackend",
    "xla_chunked": "pallas_kernels.backends.xla_chunked:XlaChunkedBackend",
    "xla_blocks": "pallas_kernels.backends.xla_blocks:XlaBlocksBackend",
    "pallas_tpu": "pallas_kernels.backends.pallas_tpu:PallasTpuBackend",
    "splash": "pallas_kernels.backends.splash:SplashBackend",
    "cudnn": "pallas_kernels.backends.cudnn:CudnnBackend",
    "tokamax": "pallas_kernels.backends.tokamax:TokamaxBackend",
    "pallas_gpu": "pallas_kernels.backends.pallas_gpu:PallasGpuBackend",
}
"""By name: a backend, or "module:class" of one, imported when first asked for (some need 0.3 s)."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place in the order of `PREFERENCE`.

    Attributes:
      name: of the backend.
      reason: why it stands here, and where that was measured.
      most_score_bytes: it is passed over if the float32 scores [B, H, Tq, Tk] take more; None sets no limit.
    """

    name: str
    reason: str
    most_score_bytes: int | None = None

    def passes(self, request: Request) -> list[str]:
        """Why the request is not for this backend; empty if it is."""
        reasons = backend(self.name).refuses(request)
        size = score_bytes(request)
        if self.most_score_bytes is not None and size > self.most_score_bytes:
            reasons = [*reasons, f"the scores take {size / 2**20:.0f} MiB, {self.most_score_bytes / 2**20:.0f} at most"]
        return reasons


SMALL_SCORES = 8 * 2**20
"""Bytes of float32 scores up to which the reference needs no blocks."""

_SMALL = Candidate(
    "xla",
    "As fast as in blocks up to here; beyond, blocks stay in the processor's caches and take 0.6 to 0.9 of the time, "
    "and the memory of one block (benchmarks/results/attention_memory.json).",
    most_score_bytes=SMALL_SCORES,
)
_ANYTHING = Candidate("xla_chunked", "Refuses nothing; memory O(S * block).")

PREFERENCE: dict[str, tuple[Candidate, ...]] = {
    "cpu": (_SMALL, _ANYTHING),
    "tpu": (
        Candidate("splash", "Masks that are the same for every example, without bias; jax's own."),
        _SMALL,
        _ANYTHING,
    ),
    "gpu": (
        Candidate("cudnn", "The fastest there is for what it takes: 530-690 TFLOP/s forward at D = 128 on an H100."),
        Candidate("tokamax", "Where it is installed: intervals with block skipping, 490-690 TFLOP/s on an H100."),
        _SMALL,
        _ANYTHING,
    ),
}
"""For "auto", by kind of platform: the first that takes the request. The last one refuses nothing."""

_log = logging.getLogger(__name__)
_announced: set[str] = set()


def backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
      UnsupportedAttention: there is none.
    """
    if name not in BACKENDS:
        raise UnsupportedAttention(f"There is no attention backend {name!r}; there are {sorted(BACKENDS)} and 'auto'.")
    entry = BACKENDS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = BACKENDS[name] = getattr(importlib.import_module(module), attribute)()
    return entry


def choose(name: str, request: Request) -> Backend:
    """The backend that serves a request: the named one, or for "auto" the platform's first that takes it.

    Raises:
      UnsupportedAttention: the named backend does not exist or refuses.
    """
    if name == "auto":
        return _automatic(request)
    named = backend(name)
    reasons = named.refuses(request)
    if reasons:
        able = [other for other in BACKENDS if not backend(other).refuses(request)]
        raise UnsupportedAttention(f"{name} cannot: {'; '.join(reasons)}. Backends that can: {', '.join(able)}.")
    return named


def score_bytes(request: Request) -> int:
    """What the whole score matrix would take, in float32."""
    batch, tq, heads, _ = request.q_shape
    return 4 * math.prod((batch, heads, tq, request.k_shape[1]))


def _automatic(request: Request) -> Backend:
    platform = platforms.current()
    passed_over = []
    for candidate in PREFERENCE[platform.kind]:
        reasons = candidate.passes(request)
        if not reasons:
            _announce(platform, candidate.name, passed_over)
            return backend(candidate.name)
        passed_over.append(f"not {candidate.name}: {', '.join(reasons)}")
    raise UnsupportedAttention(f"No attention backend for {platform.chip} takes this call: {'; '.join(passed_over)}.")


def _announce(platform: platforms.Platform, chosen: str, passed_over: list[str]) -> None:
    """Logs each choice once, with what kept faster backends from it."""
    line = f"attention on {platform.chip} runs on {chosen}" + (f" ({'; '.join(passed_over)})" if passed_over else "")
    if line not in _announced:
        _announced.add(line)
        _log.info(line)
