"""MoBA, mixture of block attention (arXiv 2502.13189, 2.2): the blocks whose mean key fits the query best.

    mask = moba_per_block(q, k, block=128, top=8)
    out = attention(q, k, v, mask=mask)

Attention's gradient goes through the chosen blocks; the choice itself has none (as in the paper, whose gate is not
learned either).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.masks import BlockSparse, Causal, Mask
from pallas_kernels.sparse import selection
from pallas_kernels.sparse.selection import Chooser


def moba_per_query(q: jax.Array, k: jax.Array, *, block: int, top: int, mask: Mask | None = None) -> Mask:
    """The paper's own selection: every query chooses its `top` blocks of keys, its own block always among them.

    Kernels compute blocks of many queries, which would have to agree; this mask, with blocks of one query, is for the
    backends xla, xla_chunked and xla_blocks. What kernels run is `moba_per_block`.

    Args:
      q: [B, T, H, D].
      k: [B, T, Hkv, D].
      block: keys of a block.
      top: how many blocks a query sees.
      mask: made of key intervals, narrowed by the lists; None is `Causal()`. No block is chosen that it hides.

    Returns:
      `BlockSparse` lists by example and head, and the mask.

    Raises:
      TypeError: the mask has no intervals, or has lists of blocks already.
      ValueError: q and k do not fit each other.
    """
    return _moba(q, k, mask, 1, block, top, Chooser.FIRST)


def moba_per_block(
    q: jax.Array, k: jax.Array, *, block: int, top: int, mask: Mask | None = None, chooser: Chooser = Chooser.FIRST
) -> Mask:
    """`moba_per_query` with one choice for all queries of a block, so that kernels skip what was not chosen.

    The paper's queries choose alone. Here one of them chooses, or their mean, for `block` of them; a block of one
    query would be the paper's. Arguments, result and errors are those of `moba_per_query`.
    """
    return _moba(q, k, mask, block, block, top, chooser)


def _moba(q: jax.Array, k: jax.Array, mask: Mask | None, bq: int, bk: int, top: int, chooser: Chooser) -> Mask:
    selection.check_shapes(q, k, "MoBA")
    length = q.shape[1]
    mask = Causal() if mask is None else mask
    q, k = jax.lax.stop_gradient((q, k))
    rows = selection.interval_rows(mask, length, "MoBA")
    queries, keys = selection.pool_queries(q, rows, bq, chooser), selection.pool_keys(k, rows, bk)
    visible = selection.visible_blocks(mask, length, bq, bk)
    own = (jnp.arange(-(-length // bq)) * bq // bk)[:, None] == jnp.arange(-(-length // bk))
    return BlockSparse(*selection.best(selection.products(queries, keys), visible, own, top), (bq, bk)) & mask
