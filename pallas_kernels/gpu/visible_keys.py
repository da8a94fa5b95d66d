"""The blocks of keys and values that a block of queries sees, brought to shared memory one after the other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu.blocks import QueryBlocks
from pallas_kernels.gpu.shared_memory import Ring, matrix
from pallas_kernels.gpu.tiles import Refs, at


@dataclasses.dataclass(frozen=True)
class VisibleKeys:
    """What the computing warpgroups of a block of queries take, and what the copying one brings.

    Attributes:
      keys, values: blocks of `size` rows, in the order of `visits`.
      visits: int32 [...], the block's number times 2, plus 1 where the mask shows all of it.
      steps: how many visits there are.
      size: keys of a block.
    """

    keys: Ring
    values: Ring
    visits: jax.Ref
    steps: jax.Array
    size: int

    @staticmethod
    def scratch(blocks: QueryBlocks, size: int, v_size: int, dtype: jnp.dtype) -> dict[str, Any]:
        """What to allocate, by the names of `of`."""
        return {
            "keys": Ring.scratch(matrix((blocks.key_stages, blocks.keys, size), dtype), blocks.warpgroups),
            "values": Ring.scratch(matrix((blocks.value_stages, blocks.keys, v_size), dtype), blocks.warpgroups),
        }

    @staticmethod
    def of(
        blocks: QueryBlocks, refs: Refs, batch: jax.Array, head: jax.Array, block: jax.Array, keys: Any, values: Any
    ) -> "VisibleKeys":
        """Those of a block of queries."""
        visits = at(refs["visits"], batch, head).at[block]
        return VisibleKeys(Ring(*keys), Ring(*values), visits, at(refs["count"], batch, head)[block], blocks.keys)

    def copy(self, refs: Refs, batch: jax.Array, kv_head: jax.Array) -> None:
        """Brings them all, as far ahead of the computing warpgroups as there is room."""

        @pl.loop(0, self.steps)
        def _(step):
            rows = pl.ds(self.place(self.visits[step]), self.size)
            self.keys.fill(step, refs["k"].at[batch, rows, kv_head])
            self.values.fill(step, refs["v"].at[batch, rows, kv_head])

        self.keys.drain(self.steps)
        self.values.drain(self.steps)

    def place(self, visit: jax.Array) -> jax.Array:
        """The first key of a visit."""
        return (visit >> 1) * self.size
