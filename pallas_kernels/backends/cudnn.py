"""NVIDIA's kernels, through `jax.nn.dot_product_attention`."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from pallas_kernels import masks, platforms
from pallas_kernels.biases import DenseBias
from pallas_kernels.requests import Backend, Request
from pallas_kernels.residuals import named

_LARGE_HEADS = ("h100", "h200", "b100", "b200", "b300")  # Hopper and later


@dataclasses.dataclass(frozen=True)
class _Mask:
    """A mask in cuDNN's terms: causal or not, keys to the left (None sees all), and how many keys an example has."""

    causal: bool = False
    left: int | None = None
    length: jax.Array | int | None = None


class CudnnBackend(Backend):
    """Full, Causal, causal windows and padded keys; a dense bias in the queries' type. NVIDIA GPUs that are there.

    Other masks would have to be dense arrays to it, of which it skips nothing.
    """

    name = "cudnn"

    @override
    def refuses(self, request: Request) -> list[str]:
        return [*_of_the_machine(request), *_of_the_call(request)]

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, None]:
        mask = _mask(request.mask)
        lengths = None
        if mask.length is not None:
            lengths = jnp.broadcast_to(jnp.asarray(mask.length, jnp.int32).reshape(-1), (q.shape[0],))
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=None if request.bias is None else jnp.asarray(request.bias.values),
            scale=request.scale,
            is_causal=mask.causal,
            # A softmax over no keys is undefined there: such an example gets one, and its results are discarded.
            key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
            local_window_size=None if mask.left is None else (mask.left, 0),
            implementation="cudnn",
        )
        if lengths is not None:
            out = jnp.where((lengths > 0)[:, None, None, None], out, 0)
        return named(out, None)


def _of_the_machine(request: Request) -> list[str]:
    platform = platforms.current()
    if platform.kind != "gpu" or not (platform.chip.startswith("nvidia") or platform.chip in _LARGE_HEADS):
        return [f"it runs on NVIDIA GPUs, not on {platform.chip}"]
    reasons = []
    if not _has_gpu():
        reasons.append("there is no GPU here, and jax asks one what cuDNN can do; it does not compile ahead of time")
    size, most = request.q_shape[3], 256 if any(chip in platform.chip for chip in _LARGE_HEADS) else 128
    if size > most or size % 8:
        reasons.append(f"heads of size {size}; they must be multiples of 8, {most} at most on {platform.chip}")
    return reasons


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _of_the_call(request: Request) -> list[str]:
    reasons = []
    if request.dtype not in (jnp.float16, jnp.bfloat16):
        reasons.append(f"{request.dtype.name}; it takes float16 and bfloat16")
    if request.v_shape[3] != request.k_shape[3]:
        reasons.append(f"heads of size {request.k_shape[3]} for keys and {request.v_shape[3]} for values")
    if request.soft_cap is not None:
        reasons.append("the soft cap")
    if request.dropout_seed is not None:
        reasons.append("dropout, for which it has random numbers of its own")
    if request.needs_lse:
        reasons.append("the log-sum-exp (for return_lse or sinks), whose gradient it lacks")
    return [*reasons, *_of_the_mask(request), *_of_the_bias(request)]


def _of_the_mask(request: Request) -> list[str]:
    mask, tq, tk = _mask(request.mask), request.q_shape[1], request.k_shape[1]
    if mask is None:
        return [f"the mask {request.mask}; it takes Full, Causal(0), KVLength and windows that end at the query"]
    reasons = []
    if mask.causal and tq != tk:
        reasons.append(f"{tq} queries and {tk} keys under a causal mask")
    if mask.left is not None and mask.length is not None:
        reasons.append("a window and lengths together, under which some query may see no key")
    return reasons


def _of_the_bias(request: Request) -> list[str]:
    bias, tq, tk = request.bias, request.q_shape[1], request.k_shape[1]
    if bias is None:
        return []
    if not isinstance(bias, DenseBias):
        return [f"{type(bias).__name__}; it takes DenseBias"]
    reasons = []
    if bias.values.shape[-2:] != (tq, tk) or bias.values.ndim != 4:
        reasons.append(f"a bias of shape {list(bias.values.shape)}; it must be [B or 1, H or 1, {tq}, {tk}]")
    if bias.values.dtype != request.dtype:
        reasons.append(f"a bias in {bias.values.dtype}; it must be {request.dtype.name}, as the queries are")
    if tq % 2 or tk % 2:
        reasons.append(f"a bias over {tq} queries and {tk} keys; both must be even")
    return reasons


def _mask(mask: masks.Mask) -> _Mask | None:
    """The mask in cuDNN's terms; None if it has none there."""
    found = _Mask()
    for part in mask.masks if isinstance(mask, masks.And) else (mask,):
        match part:
            case masks.Full():
                pass
            case masks.Causal(offset=int(offset)) if offset == 0:
                found = dataclasses.replace(found, causal=True)
            case masks.Window(left, right) if found.left is None and (left is None or left >= 0):
                found = dataclasses.replace(found, left=left, causal=found.causal or right == 0)
                if right is not None and right != 0:
                    return None
            case masks.KVLength(length) if found.length is None:
                found = dataclasses.replace(found, length=length)
            case _:
                return None
    # Its window ends at the query, so that it needs a causal mask beside it.
    return found if found.causal or found.left is None else None
