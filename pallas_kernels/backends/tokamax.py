"""tokamax's Mosaic GPU kernel, an optional package: masks of one key interval a query, with block skipping.

Nothing of tokamax is imported before a call runs on it.
"""

import functools
import importlib.metadata
from typing import Any, override

import jax
import jax.numpy as jnp

from pallas_kernels import masks, platforms
from pallas_kernels.biases import DenseBias
from pallas_kernels.requests import Backend, Request
from pallas_kernels.residuals import named

# Its public function has no place for intervals; the class behind it has moved from release to release.
_KNOWN_VERSION = "0.0.17"
_CHIPS = ("h100", "h200", "b200")


class TokamaxBackend(Backend):
    """Masks of one key interval a query, dense biases with their gradient, a soft cap; Hopper and Blackwell GPUs."""

    name = "tokamax"

    @override
    def refuses(self, request: Request) -> list[str]:
        reasons = []
        installed = _version()
        if installed is None:
            reasons.append(f"tokamax is not installed (pip install tokamax=={_KNOWN_VERSION})")
        elif installed != _KNOWN_VERSION:
            reasons.append(f"tokamax {installed} is installed, and what is known is {_KNOWN_VERSION}")
        chip = platforms.current().chip
        if not any(known in chip for known in _CHIPS):
            reasons.append(f"its backward kernel runs on Hopper and Blackwell GPUs, not on {chip}")
        if request.dtype not in (jnp.float16, jnp.bfloat16):
            reasons.append(f"{request.dtype.name}; it takes float16 and bfloat16")
        if request.mask.intervals != 1 or request.mask.block_sparse is not None:
            reasons.append(f"the mask {request.mask}; it takes masks of one key interval a query")
        if request.bias is not None and not isinstance(request.bias, DenseBias):
            reasons.append(f"{type(request.bias).__name__}; it takes DenseBias")
        if request.bias is not None and request.soft_cap is not None:
            reasons.append("a soft cap with a bias, which it would cap too")
        if request.dropout_seed is not None:
            reasons.append("dropout")
        if request.needs_lse:
            reasons.append("the log-sum-exp (for return_lse or sinks), whose gradient it lacks")
        return reasons

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, None]:
        mask, sees = _mask(request)
        out = _kernel()(
            q,
            k,
            v,
            mask=mask,
            bias=None if request.bias is None else jnp.asarray(request.bias.values),
            logits_scale=request.scale,
            logits_soft_cap=request.soft_cap,
        )
        return named(out if sees is None else jnp.where(sees[..., None, None], out, 0), None)


@functools.cache
def _version() -> str | None:
    try:
        return importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel() -> Any:
    from tokamax._src.ops.attention import pallas_mosaic_gpu  # exported beside modules that need jax_triton

    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()


def _mask(request: Request) -> tuple[Any, jax.Array | None]:
    """The mask in tokamax's terms, and which queries [B or 1, Tq] see anything; None if all do."""
    from tokamax._src.ops.attention import base

    if isinstance(request.mask, masks.Full):
        return None, None
    if isinstance(request.mask, masks.Causal) and isinstance(request.mask.offset, int) and request.mask.offset == 0:
        return base.Mask(is_causal=True), None
    rows = request.mask.rows(request.q_shape[1], request.k_shape[1])
    # A softmax over no keys is undefined there: such a query gets one, and its results are discarded.
    sees = rows.lo < rows.hi
    return base.Mask(k_start=jnp.where(sees, rows.lo, 0), k_end=jnp.where(sees, rows.hi, 1)), sees[:, 0]
