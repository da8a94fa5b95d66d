"""Native sparse attention, NSA (arXiv 2502.11089, 3): compressed, selected and near keys, each a call of attention.

Compressed keys are the model's own summary of `size` tokens every `stride` (a learned map in the paper). Attention to
them is the first branch, and tells which blocks of tokens the second branch sees; the third is a sliding window. The
gradient goes through all three, not through the selection, which learns because it uses the first branch's scores.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.masks import BlockSparse, Causal, Complete, Mask, Window
from pallas_kernels.sparse import selection


@dataclasses.dataclass(frozen=True)
class NativeSparseConfig:
    """How NSA selects; the defaults are the paper's (4.1).

    Attributes:
      size: tokens that a compressed key sums up (l).
      stride: tokens from one compressed key to the next (d), a divisor of `size` and `block`.
      block: tokens of a selected block (l').
      top: blocks a query sees (n), the next two among them.
      first: blocks at the start that are always selected.
      local: blocks up to the query's own that are always selected.
    """

    size: int = 32
    stride: int = 16
    block: int = 64
    top: int = 16
    first: int = 1
    local: int = 2

    def __post_init__(self) -> None:
        if self.size % self.stride or self.block % self.stride:
            raise ValueError(
                f"The stride of compressed keys must divide their size and the selected blocks, got stride "
                f"{self.stride}, size {self.size}, block {self.block}."
            )

    def count(self, length: int) -> int:
        """How many compressed keys `length` tokens have."""
        return max((length - self.size) // self.stride + 1, 0)


def nsa_per_query(q: jax.Array, compressed: jax.Array, config: NativeSparseConfig) -> Mask:
    """The paper's selection (equations 8 to 12): each query's `top` blocks, the same for heads that share a key head.

    Memory is O(T^2 / stride), and blocks of one query suit no kernel of ours but the backends xla, xla_chunked and
    xla_blocks; what other kernels run is `nsa_per_block`. (The paper's own kernel lets the query heads of one key head
    fill a block in place of neighbouring queries.)

    Args:
      q: [B, T, H, D].
      compressed: the compressed keys, [B, config.count(T), Hkv, D].
      config: what is selected.

    Returns:
      `BlockSparse` lists by example and head, and `Causal()`.

    Raises:
      ValueError: there is another number of compressed keys.
    """
    return _select(q, compressed, config, 1)


def nsa_per_block(q: jax.Array, compressed: jax.Array, config: NativeSparseConfig) -> Mask:
    """`nsa_per_query` with one choice for the queries of a block: the first's, which sees no more than the others.

    Arguments, result and errors are the same.
    """
    return _select(q, compressed, config, config.block)


def _select(q: jax.Array, compressed: jax.Array, config: NativeSparseConfig, bq: int) -> Mask:
    batch, length, heads, width = q.shape
    count = config.count(length)
    if compressed.shape != (batch, count, compressed.shape[2], width):
        raise ValueError(
            f"NSA with size {config.size} and stride {config.stride} needs compressed keys [B, n, Hkv, D] with n = "
            f"{count} for q {q.shape}, got {compressed.shape}."
        )
    q, compressed = jax.lax.stop_gradient((q, compressed))
    kv_heads = compressed.shape[2]
    chooser = jnp.arange(0, length, bq)
    complete = Complete(config.size, config.stride).dense(length, count)[:, :, chooser]
    scores = selection.products(q[:, chooser].swapaxes(1, 2), compressed.swapaxes(1, 2)) * width**-0.5
    blocks = -(-length // config.block)
    importance = _of_blocks(selection.softmax(scores, complete), config, blocks)
    importance = importance.reshape(batch, kv_heads, heads // kv_heads, *importance.shape[2:]).sum(axis=2)
    key, own = jnp.arange(blocks), chooser[:, None] // config.block
    always = (key < config.first) | (key > own - config.local)
    index, number = selection.best(importance, key <= own, always, config.top)
    index, number = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (index, number))
    return BlockSparse(index, number, (bq, config.block)) & Causal()


def _of_blocks(weights: jax.Array, config: NativeSparseConfig, blocks: int) -> jax.Array:
    """Attention to compressed keys [..., n] as attention to blocks of tokens [..., blocks] (equation 9).

    The sum over the pairs of a stride of the block and a compressed key that covers it, which is how we read the
    equation's indices.
    """
    strides, covered = blocks * config.block // config.stride, config.size // config.stride
    room = [(0, 0)] * (weights.ndim - 1)
    shifted = (jnp.pad(weights, [*room, (n, strides)])[..., :strides] for n in range(covered))
    return selection.sum_blocks(sum(shifted), config.block // config.stride)


class Branch(NamedTuple):
    """Keys [B, n, Hkv, D] and values [B, n, Hkv, Dv] of a branch; the paper's branches share neither."""

    k: jax.Array
    v: jax.Array


def native_sparse_attention(
    q: jax.Array,
    compressed: Branch,
    selected: Branch,
    near: Branch,
    gates: jax.Array,
    *,
    config: NativeSparseConfig,
    window: int = 512,
    per_block: bool = True,
    backend: str = "auto",
) -> jax.Array:
    """The gated sum of NSA's three branches (equation 5), for one causal text a row.

    Texts shorter than `config.size` have no compressed key, and that branch adds nothing.

    Args:
      q: [B, T, H, D].
      compressed: of config.count(T) compressed tokens.
      selected, near: of the T tokens.
      gates: [B, T, H, 3], the weights of the branches in this order.
      config: what is selected.
      window: tokens that the near branch sees, the query's own among them (w).
      per_block: one selection a block of queries, which kernels need, or the paper's own for each query.
      backend: of the three calls of `attention`.

    Returns:
      [B, T, H, Dv].
    """
    select = nsa_per_block if per_block else nsa_per_query
    calls = (
        (compressed, Complete(config.size, config.stride)),
        (selected, select(q, compressed.k, config)),
        (near, Causal() & Window(window - 1, 0)),
    )
    outs = {
        i: attention(q, branch.k, branch.v, mask=mask, backend=backend)
        for i, (branch, mask) in enumerate(calls)
        if branch.k.shape[1]
    }
    return sum(gates[..., i : i + 1] * out for i, out in outs.items())
