"""Who computes attention: the backends by name, and which of them `backend="auto"` takes on which machine."""

import math

from pallas_kernels.choice import Candidate, Choice
from pallas_kernels.requests import Backend, Request, UnsupportedAttention

SMALL_SCORES = 8 * 2**20
"""Bytes of float32 scores up to which the reference needs no blocks."""


def _large_scores(request: Request) -> str | None:
    batch, tq, heads, _ = request.q_shape
    size = 4 * math.prod((batch, heads, tq, request.k_shape[1]))
    if size > SMALL_SCORES:
        return f"the scores take {size / 2**20:.0f} MiB, {SMALL_SCORES / 2**20:.0f} at most"
    return None


_SMALL = Candidate(
    "xla",
    "As fast as in blocks up to here; beyond, blocks stay in the processor's caches and take 0.7 to 1.0 of the "
    "time, and the memory of one block (benchmarks/results/attention_memory.json).",
    better_not=_large_scores,
)
_VISIBLE_BLOCKS = Candidate(
    "xla_blocks",
    "Computes the visible blocks alone; even with all visible it takes a fraction of the dense time once the scores "
    "have left the caches (benchmarks/results/sparse_patterns.json).",
)
_ANYTHING = Candidate("xla_chunked", "Refuses nothing; memory O(S * block).")

ATTENTION: Choice[Backend] = Choice(
    "attention",
    backends={
        "xla": "pallas_kernels.backends.xla:XlaBackend",
        "xla_chunked": "pallas_kernels.backends.xla_chunked:XlaChunkedBackend",
        "xla_blocks": "pallas_kernels.backends.xla_blocks:XlaBlocksBackend",
        "pallas_tpu": "pallas_kernels.backends.pallas_tpu:PallasTpuBackend",
        "splash": "pallas_kernels.backends.splash:SplashBackend",
        "pallas_gpu": "pallas_kernels.backends.pallas_gpu:PallasGpuBackend",
        "cudnn": "pallas_kernels.backends.cudnn:CudnnBackend",
        "tokamax": "pallas_kernels.backends.tokamax:TokamaxBackend",
    },
    order={
        "cpu": (_SMALL, _VISIBLE_BLOCKS, _ANYTHING),
        "tpu": (
            Candidate(
                "pallas_tpu",
                "One kernel for all masks, which skips blocks by example; splash computes the blocks of other examples "
                "in packed rows. benchmarks/attention_tpu.py ranks the two by the compiler's cycles.",
            ),
            Candidate("splash", "Masks that are the same for every example, without bias; jax's own."),
            _SMALL,
            _ANYTHING,
        ),
        "gpu": (
            Candidate("cudnn", "Fastest of four implementations on an H100, by the times that tokamax 0.0.17 ships."),
            Candidate(
                "tokamax", "By the same times next to cuDNN, and it skips by example; only where it is installed."
            ),
            Candidate("pallas_gpu", "Intervals, block lists and biases; not yet timed beside tokamax on an H200."),
            _SMALL,
            _ANYTHING,
        ),
    },
    error=UnsupportedAttention,
)
