"""The reference over blocks of queries: plain jax in O(S * block) memory, for whatever no kernel takes."""

import functools
from typing import override

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.backends.xla import attend
from pallas_kernels.requests import Backend, Request
from pallas_kernels.residuals import named

_CPU_BUDGET, _BUDGET = 2**22, 2**26
_LEAST = 64  # queries: the scores of a head then take about what its keys take, so that fewer would save little


class XlaChunkedBackend(Backend):
    """Any mask, any bias, any platform; the scores of one block of queries exist at a time, forward and backward.

    The backward pass computes each block's scores again.

    Attributes:
      budget: bytes that the float32 scores [B, H, block, Tk] of a block may take; None is 4 MiB on a CPU, whose caches
        they should stay in (benchmarks/results/attention_memory.json), and 64 MiB elsewhere.
    """

    name = "xla_chunked"

    def __init__(self, budget: int | None = None):
        self.budget = budget

    @override
    def refuses(self, request: Request) -> list[str]:
        return []

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        tq = q.shape[1]
        block = self._block(request)
        if block >= tq:
            return named(*attend(q, k, v, request))
        # The gradients of keys and values are sums over the blocks: taken in float32, whatever the type of k and v.
        one_block = jax.checkpoint(functools.partial(_one_block, request=request, dtypes=(k.dtype, v.dtype)))
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        whole = tq // block
        blocks = q[:, : whole * block].reshape(q.shape[0], whole, block, *q.shape[2:]).swapaxes(0, 1)
        starts = jnp.arange(whole, dtype=jnp.int32) * block
        out, lse = jax.lax.map(lambda x: one_block(x[0], k, v, x[1]), (blocks, starts))  # [n, B, block, ...]
        out = out.swapaxes(0, 1).reshape(q.shape[0], whole * block, *out.shape[3:])
        lse = jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], whole * block)
        if whole * block == tq:
            return named(out, lse)
        # A shorter block of its own: slices of masks and biases that reach past the end would be moved back.
        last_out, last_lse = one_block(q[:, whole * block :], k, v, whole * block)
        return named(jnp.concatenate([out, last_out], axis=1), jnp.concatenate([lse, last_lse], axis=2))

    def _block(self, request: Request) -> int:
        """Queries a block has: a power of two, so that the usual lengths are multiples of it."""
        batch, _, heads, _ = request.q_shape
        budget = self.budget or (_CPU_BUDGET if platforms.current().kind == "cpu" else _BUDGET)
        queries = max(budget // (4 * batch * heads * request.k_shape[1]), _LEAST)
        return 2 ** (queries.bit_length() - 1)


def _one_block(q, k, v, start, *, request, dtypes):
    return attend(q, k.astype(dtypes[0]), v.astype(dtypes[1]), request, start)
