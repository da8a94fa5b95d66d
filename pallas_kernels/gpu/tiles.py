"""Tiles of scores: what the forward and backward kernels do alike with 64 rows of them.

The kernels' tiles are [queries, keys] (forward, gradient of q) or [keys, queries] (gradients of k and v); the code here
serves both. Scores are in base 2: multiplied by log2(e), so that exp2 gives the weights.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dropout
from pallas_kernels.fused import Inputs

ROWS = 64
"""Rows of a tile: what one tensor core instruction of a warpgroup takes."""

LOG2_E = math.log2(math.e)

HIDDEN = -1e30
"""Score of a hidden key: so far below `LOWEST` that exp2(HIDDEN - maximum) is 0 whatever the maximum is."""

LOWEST = -1e29
"""Where the running maximum of a row starts; no visible score is below."""

Refs = dict[str, jax.Ref]
Bounds = list[tuple[jax.Array, jax.Array]]


def at(ref: jax.Ref, batch: jax.Array, head: jax.Array) -> jax.Ref:
    """ref[batch, head], of a ref [B|1, H|1, ...]."""
    return ref.at[batch if ref.shape[0] > 1 else 0, head if ref.shape[1] > 1 else 0]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of scores.

    Attributes:
      columns: how many of its columns there are; its rows are 64.
      query_axis: 0 if its rows are queries, 1 if they are keys.
      batch, head: of this tile.
      query, key: the first ones.
    """

    columns: int
    query_axis: int
    batch: jax.Array
    head: jax.Array
    query: jax.Array
    key: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return ROWS, self.columns

    @property
    def first(self) -> tuple[jax.Array, jax.Array]:
        """The first row and the first column."""
        return (self.key, self.query) if self.query_axis else (self.query, self.key)

    def spread(self, per_query: jax.Array) -> jax.Array:
        """One number for each query, as a tile."""
        return lax.broadcast_in_dim(per_query, self.shape, [self.query_axis])

    def index(self, axis: int) -> jax.Array:
        """int32 tile: the index along `axis`, counted within the tile."""
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=plgpu.Layout.WGMMA)

    @property
    def layout(self) -> plgpu.Layout:
        """Where registers hold one number for each query."""
        return plgpu.Layout.WGMMA.reduce(1 - self.query_axis)

    def per_query(self, ref: jax.Ref) -> jax.Array:
        """A number of each of the tile's queries, from `ref` [queries] in the GPU's memory."""
        queries = pl.ds(self.query, self.shape[self.query_axis])
        return plgpu.load(ref.at[queries], layout=self.layout, optimized=False)

    def hashes(self, refs: Refs) -> jax.Array:
        """Dropout's hash of each query."""
        return self.per_query(refs["hashes"].at[self.batch, self.head])

    def bounds(self, refs: Refs) -> Bounds:
        """The [lo, hi) of each of the queries' intervals of keys."""
        bounds = refs["bounds"].at[self.batch if refs["bounds"].shape[0] > 1 else 0]
        intervals = bounds.shape[0] // 2
        return [(self.per_query(bounds.at[r]), self.per_query(bounds.at[intervals + r])) for r in range(intervals)]

    def hide(self, scores: jax.Array, bounds: Callable[[], Bounds], whole: jax.Array) -> jax.Array:
        """The scores, HIDDEN where a query does not see a key.

        Args:
          scores: of this tile.
          bounds: called for the intervals of keys; see the method of that name.
          whole: 1 if all of the tile is seen, else 0.
        """

        def masked():
            keys = self.index(1 - self.query_axis)
            seen = [(keys >= self.spread(lo - self.key)) & (keys < self.spread(hi - self.key)) for lo, hi in bounds()]
            return jnp.where(seen[0] if len(seen) == 1 else seen[0] | seen[1], scores, HIDDEN)

        return lax.cond(whole == 1, lambda: scores, masked)

    def scores(self, products: jax.Array, inputs: Inputs, refs: Refs) -> tuple[jax.Array, jax.Array | None]:
        """Base-2 scores from q . k, before the mask; and the derivative of a soft cap, or None.

        Args:
          products: q . k.
          inputs: for scale and soft cap.
          refs: what `operands.bias_arrays` made.
        """
        slope = None
        if inputs.soft_cap is None:
            scores = products * (inputs.scale * LOG2_E)
        else:
            bounded = _tanh(products * (inputs.scale / inputs.soft_cap))
            slope = 1.0 - bounded * bounded
            scores = bounded * (inputs.soft_cap * LOG2_E)
        if "slopes" in refs:
            rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            rows = (rows + (self.first[0] - self.first[1])).astype(jnp.float32)
            distance = jnp.abs(self.index(1).astype(jnp.float32) - lax.broadcast_in_dim(rows, self.shape, [0]))
            scores = scores - distance * (refs["slopes"][self.head] * LOG2_E)
        if "diagonals" in refs:
            diagonals = refs["diagonals"]
            start = self.first[1] - self.first[0] + diagonals.shape[-1] // 2
            bias = diagonals.at[self.head, :, pl.ds(pl.multiple_of(start, ROWS), self.columns)]
            scores = scores + _load(bias) * LOG2_E
        if "dense_bias" in refs:
            rows, columns = pl.ds(self.first[0], ROWS), pl.ds(self.first[1], self.columns)
            bias = at(refs["dense_bias"], self.batch, self.head).at[rows, columns]
            scores = scores + _load(bias).astype(jnp.float32) * LOG2_E
        return scores, slope

    def keeps(self, hashes: jax.Array, refs: Refs, rate: float) -> jax.Array:
        """bool tile: which weights dropout keeps."""
        keys = self.index(1 - self.query_axis) + (self.key + refs["first_key"][0])
        return dropout.keep_in_row(self.spread(hashes), keys, rate)


def thin(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    """`x` after dropout: 0, or grown by 1 / (1 - rate); `x` itself if `kept` is None."""
    return x if kept is None else jnp.where(kept, x * (1.0 / (1.0 - rate)), 0.0)


def zeros(shape: tuple[int, int]) -> jax.Array:
    """float32 in the registers' layout of what a product is added to."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def per_row(value: float) -> jax.Array:
    """One number for each row of a tile."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _load(ref: jax.Ref) -> jax.Array:
    """A tile straight from the GPU's memory; `optimized` would insist on copy instructions this layout has none of."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _tanh(x: jax.Array) -> jax.Array:
    """By exp2 and a division: the hardware's own tanh has 11 bits, too few for scores."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2_E)))
