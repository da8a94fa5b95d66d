"""What happens to a tile of scores between two matrix products: soft cap, bias, mask, dropout.

The forward kernel has queries along sublanes and keys along lanes, the backward kernel the reverse, because of what
each sums over. All that is written here holds for both: a `Tile` knows which axis is which. Scores are in units of
log 2, so that a power of two is all that the softmax takes of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dropout

LANES = 128
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

HIDDEN_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Of a hidden key. Minus infinity would make NaN of a difference of two."""

LOWEST_MAXIMUM = -1e30
"""Where a row's maximum starts: a hidden key's weight is 0 against it, and no true score is below."""

UNSEEN_LSE = 1e30
"""The log-sum-exp of a row that sees nothing, as the backward kernel has it: every weight is 0 against it."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Static facts of a call's scores.

    Attributes:
      scale, soft_cap, dropout_rate: as in `Request`.
    """

    scale: float
    soft_cap: float | None
    dropout_rate: float

    @property
    def kept(self) -> float:
        """The share of weights that dropout leaves."""
        return 1.0 - self.dropout_rate

    @property
    def query_factor(self) -> float:
        """By which queries are multiplied beforehand.

        All that multiplies products can be in it, for the price of rounding queries once more. The plain form rounds
        them too, unless its scale is a power of two; then the products, in float32, are multiplied instead.
        """
        return 1.0 if math.frexp(self.scale)[0] in (0.0, 0.5) else self._product_factor

    @property
    def _product_factor(self) -> float:
        return self.scale / self.soft_cap if self.soft_cap else self.scale * LOG2_E

    def score(self, products: jax.Array) -> jax.Array:
        """Scores in units of log 2 of products of keys and queries, these multiplied by `query_factor`."""
        if self.soft_cap:
            return self.soft_cap * LOG2_E * self._bounded(products)
        return self._scaled(products)

    def slope(self, products: jax.Array) -> jax.Array | float:
        """The derivative of a score in natural units by the product of query and key, divided by `scale`."""
        return 1.0 - jnp.square(self._bounded(products)) if self.soft_cap else 1.0

    def _bounded(self, products: jax.Array) -> jax.Array:
        return jnp.tanh(self._scaled(products))

    def _scaled(self, products: jax.Array) -> jax.Array:
        return products * self._product_factor if self.query_factor == 1.0 else products


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile of scores lies and how.

    Attributes:
      shape: of the tile.
      keys_axis: the axis along which keys run: 1 forward, 0 backward.
      first_query, first_key: the tile's first, counted in the arrays that the kernel was given.
    """

    shape: tuple[int, int]
    keys_axis: int
    first_query: jax.Array
    first_key: jax.Array

    def queries(self) -> jax.Array:
        """int32 of `shape`: 0, 1, ... along the queries."""
        return jax.lax.broadcasted_iota(jnp.int32, self.shape, 1 - self.keys_axis)

    def keys(self) -> jax.Array:
        """int32 of `shape`: 0, 1, ... along the keys."""
        return jax.lax.broadcasted_iota(jnp.int32, self.shape, self.keys_axis)

    def spread(self, by_query: jax.Array) -> jax.Array:
        """A number for each query, as its kernel holds it, repeated over the keys.

        Forward that is [queries, 128], equal along lanes; backward [1, queries], which repeats by itself.
        """
        return jnp.tile(by_query, (1, self.shape[1] // LANES)) if self.keys_axis == 1 else by_query

    def visible(self, starts: list[jax.Array] | None, counts: list[jax.Array]) -> jax.Array:
        """bool of `shape`: whether the key is in one of the query's intervals.

        Args:
          starts: the first key of each interval, by query; None where there is one, from the first key of all on.
          counts: how many keys each interval has, by query; not negative.
        """
        if starts is None:
            return self.keys() < self.spread(counts[0] - self.first_key)
        inside = []
        for start, count in zip(starts, counts):
            # One comparison for both ends: as unsigned numbers, keys before the start are far beyond the count.
            offset = self._keys_from(start).astype(jnp.uint32)
            inside.append(offset < self.spread(count).astype(jnp.uint32))
        return functools.reduce(jnp.logical_or, inside)

    def _keys_from(self, start: jax.Array) -> jax.Array:
        """int32 of `shape`: how many keys after `start`, a number by query, each key is."""
        start = start - self.first_key
        if self.keys_axis == 0:
            return self.keys() - start
        # Along lanes: of the first 128 keys, and from these on by adding constants, which takes no more registers.
        first = jax.lax.broadcasted_iota(jnp.int32, start.shape, 1) - start
        return jnp.concatenate([first + lane for lane in range(0, self.shape[1], LANES)], axis=1)

    def distances(self) -> jax.Array:
        """float32 of `shape`: how far query and key are apart."""
        difference = self.queries() - self.keys() + (self.first_query - self.first_key)
        return jnp.abs(difference).astype(jnp.float32)

    def kept(self, seed: jax.Array, example: jax.Array, head: jax.Array, origin: tuple, rate: float) -> jax.Array:
        """bool of `shape`: the weights that dropout leaves.

        Args:
          seed: uint32 scalar.
          example, head: of the tile, counted globally.
          origin: global indices of the first query and key of the arrays.
          rate: share that is dropped.
        """
        query_start, key_start = self.first_query + origin[0], self.first_key + origin[1]
        if self.keys_axis == 1:
            by_query, by_key = (self.shape[0], LANES), self.shape
        else:
            by_query, by_key = (1, self.shape[1]), (self.shape[0], 1)
        queries = jax.lax.broadcasted_iota(jnp.int32, by_query, 1 - self.keys_axis) + query_start
        keys = jax.lax.broadcasted_iota(jnp.int32, by_key, self.keys_axis) + key_start
        rows = dropout.row(seed, example, head, queries)
        return dropout.keep_in_row(self.spread(rows), keys, rate)


def skew(window: jax.Array) -> jax.Array:
    """A square of which every diagonal is one number: [128, 128] with entry (x, y) = window[0, y - x + 127].

    Args:
      window: float32 [1, 256].
    """
    rows = jnp.broadcast_to(window, (LANES, 2 * LANES))
    return pltpu.roll(rows, LANES + 1, axis=1, stride=1, stride_axis=0)[:, :LANES]


def sum_diagonals(square: jax.Array) -> jax.Array:
    """The reverse of `skew`: [1, 256] with entry c = the sum of the [128, 128] entries (x, y) where y - x + 127 = c."""
    rows = jnp.concatenate([square, jnp.zeros_like(square)], axis=1)
    x = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    bit = 1
    while bit < LANES:  # row x moves by 127 - x, one power of two after the other
        rows = jnp.where(x & bit == 0, pltpu.roll(rows, bit, axis=1), rows)
        bit *= 2
    return rows.sum(axis=0, keepdims=True)


def toeplitz(windows: Mapping[int, jax.Array], height: int, width: int) -> jax.Array:
    """[128 * height, 128 * width] of squares that are equal along diagonals.

    Args:
      windows: {column - row of a square: its window [1, 256], see `skew`}.
      height, width: in squares.
    """
    squares = {diagonal: skew(window) for diagonal, window in windows.items()}
    rows = [jnp.concatenate([squares[y - x] for y in range(width)], axis=1) for x in range(height)]
    return jnp.concatenate(rows, axis=0)
