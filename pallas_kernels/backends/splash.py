"""jax's own TPU kernel (`jax.experimental.pallas.ops.tpu.splash_attention`), for masks that are known beforehand."""

import functools
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks, platforms
from pallas_kernels.requests import Backend, Request
from pallas_kernels.residuals import ATTENTION_OUT

_LANES = 128


class _Band(NamedTuple):
    """A mask that is the same for every example: keys q - left ... q + right of the query's chunk; None is no limit."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None

    def visible(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """bool, for positions that broadcast against each other."""
        shown = np.broadcast_to(np.True_, np.broadcast_shapes(queries.shape, keys.shape))
        if self.left is not None:
            shown = shown & (keys >= queries - self.left)
        if self.right is not None:
            shown = shown & (keys <= queries + self.right)
        if self.chunk is not None:
            shown = shown & (keys // self.chunk == queries // self.chunk)
        return shown

    def hides_a_row(self, tq: int, tk: int) -> bool:
        """Whether some query sees no key."""
        queries = np.arange(tq)
        lo, hi = np.zeros(tq, int), np.full(tq, tk)
        if self.left is not None:
            lo = np.maximum(lo, queries - self.left)
        if self.right is not None:
            hi = np.minimum(hi, queries + self.right + 1)
        if self.chunk is not None:
            first = queries // self.chunk * self.chunk
            lo, hi = np.maximum(lo, first), np.minimum(hi, first + self.chunk)
        return bool((lo >= hi).any())


class SplashBackend(Backend):
    """Full, Causal, Window, Chunked and what `&` makes of them, in packed rows too; no bias, no log-sum-exp.

    Blocks are as large as divide the rows, up to 1024 queries and 2048 keys; its own default, 128, is several times
    slower. On a CPU it is interpreted.
    """

    name = "splash"

    @override
    def refuses(self, request: Request) -> list[str]:
        reasons = []
        if platforms.current().kind == "gpu":
            reasons.append("it is a TPU kernel")
        if request.bias is not None:
            reasons.append("bias")
        if request.dropout_seed is not None:
            reasons.append("dropout")
        if request.needs_lse:
            reasons.append("the log-sum-exp (for return_lse or sinks), whose gradient it lacks")
        if request.dtype not in (jnp.float32, jnp.bfloat16):
            reasons.append(f"{request.dtype.name}; it takes float32 and bfloat16")
        tq, tk = request.q_shape[1], request.k_shape[1]
        if tq % _LANES or tk % _LANES:
            reasons.append(f"{tq} queries and {tk} keys; both must be multiples of {_LANES}")
        parts = _parts(request.mask)
        if parts is None:
            reasons.append(f"the mask {request.mask}; it takes Full, Causal(int), Window, Chunked and Segments(ids)")
        elif parts[0].hides_a_row(tq, tk):
            reasons.append(f"the mask {request.mask}, under which some query sees no key")
        return reasons

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, None]:
        band, ids = _parts(request.mask)
        kernel = _kernel(band, q.shape[2], q.shape[1], k.shape[1], request.soft_cap, platforms.tpu_interpret())
        q = q * jnp.asarray(request.scale, q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, D]
        if ids is None:
            return jax.vmap(kernel)(q, k, v).swapaxes(1, 2), None
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, _segment_ids(ids))
        # Padding is a segment like any other to the kernel; here its queries see nothing.
        return jnp.where((ids > 0)[:, :, None, None], out.swapaxes(1, 2), 0), None


def _parts(mask: masks.Mask) -> tuple[_Band, jax.Array | None] | None:
    """The static part of a mask and the ids of its segments; None if it has other parts."""
    band, ids = _Band(), None
    for part in mask.masks if isinstance(mask, masks.And) else (mask,):
        match part:
            case masks.Full():
                pass
            case masks.Causal(offset=int(offset)):
                band = band._replace(right=_least(band.right, offset))
            case masks.Window(left, right):
                band = band._replace(left=_least(band.left, left), right=_least(band.right, right))
            case masks.Chunked(size) if band.chunk in (None, size):
                band = band._replace(chunk=size)
            case masks.Segments(kv_ids=None) if ids is None:
                ids = jnp.asarray(part.q_ids, jnp.int32)
            case _:
                return None
    return band, ids


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)


def _segment_ids(ids: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(q=ids, kv=ids)


def _kernel(band: _Band, heads: int, tq: int, tk: int, soft_cap: float | None, interpret: bool) -> Any:
    """The kernel [H, Tq, D], [Hkv, Tk, D], [Hkv, Tk, Dv] -> [H, Tq, Dv] of this mask."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries, keys = _block(tq, 1024), _block(tk, 2048)
    blocks = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=_block(keys, 512),
        block_q_dkv=queries,
        block_kv_dkv=_block(tk, 1024),
        block_kv_dkv_compute=_block(tk, 512),
        # Not the fused backward kernel: it writes a gradient of the queries for each block of keys.
        block_q_dq=queries,
        block_kv_dq=_block(tk, 1024),
    )
    mask = splash.MultiHeadMask([_splash_mask(band, (tq, tk))] * heads)
    return splash.make_splash_mha(
        mask=mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION_OUT,  # its log-sum-exp too
    )


def _block(length: int, most: int) -> int:
    """The largest multiple of 128 that divides `length`, up to `most`."""
    return max(size for size in range(_LANES, min(length, most) + 1, _LANES) if length % size == 0)


@functools.cache
def _splash_mask(band: _Band, shape: tuple[int, int]) -> Any:
    """The band as splash's mask; one it computes in the kernel where it has that."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if band == _Band():
        return splash.FullMask(shape)
    if band.chunk is None and band.left is None:
        return splash.CausalMask(shape, offset=band.right)
    if band.chunk is None:
        return splash.LocalMask(shape, window_size=(band.left, band.right), offset=0)

    class Chunks(splash.Mask):
        """Looked at block by block, by numpy, while the program is traced."""

        @property
        def shape(self) -> tuple[int, int]:
            return shape

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            queries, keys = (np.arange(length)[part] for length, part in zip(shape, index))
            return band.visible(queries[:, None], keys[None, :])

    return Chunks()
