"""What a running kernel reads for one tile of scores."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu import scores
from pallas_kernels.tpu.operands import Sizes
from pallas_kernels.tpu.schedule import Step
from pallas_kernels.tpu.scores import LANES, Tile


@dataclasses.dataclass(frozen=True)
class Here:
    """One tile of a kernel's current block.

    Attributes:
      given: the kernel's inputs by name.
      scalars: reference to `operands.SCALARS`.
      step: the block.
      sizes: of the call.
      keys_axis: as of `Tile`.
      queries, keys: which of the block's the tile has.
    """

    given: Mapping[str, Any]
    scalars: Any
    step: Step
    sizes: Sizes
    keys_axis: int
    queries: slice
    keys: slice

    @property
    def tile(self) -> Tile:
        """The tile's place among all scores."""
        blocks = self.sizes.blocks
        shape = (self.queries.stop - self.queries.start, self.keys.stop - self.keys.start)
        return Tile(
            shape if self.keys_axis == 1 else shape[::-1],
            self.keys_axis,
            self.step.query_block * blocks.queries + self.queries.start,
            (self.step.key_block + self.scalars[0]) * blocks.keys + self.keys.start,
        )

    def bounds(self, name: str) -> list[jax.Array] | None:
        """Of each interval of the tile's queries, what `name` says, by query; None if nothing does."""
        if name not in self.given:
            return None
        bounds = self.given[name]
        if self.keys_axis == 1:
            return [bounds[n, self.queries, :] for n in range(bounds.shape[0])]
        return [bounds[n : n + 1, self.queries] for n in range(bounds.shape[0])]

    def kept(self, rate: float) -> jax.Array:
        """bool: the weights that dropout leaves."""
        example, head, query, key, seed = (self.scalars[n] for n in range(1, 6))
        seed = jax.lax.bitcast_convert_type(seed, jnp.uint32)
        return self.tile.kept(seed, self.step.example + example, self.step.head + head, (query, key), rate)

    def add_bias(self, score: jax.Array) -> jax.Array:
        """The scores, in units of log 2, plus the bias that the call has."""
        if "slopes" in self.given:
            score = score - self.given["slopes"][self.step.head] * self.tile.distances()
        if "diagonals" in self.given:
            windows = {d: self.given["diagonals"][:, self.window(d)] for d in self.diagonals()}
            score = score + scores.toeplitz(windows, *self.squares())
        if "dense_bias" in self.given:
            score = score + self._dense_bias()
        return score

    def squares(self) -> tuple[int, int]:
        """How many squares of 128 the tile has along its axes."""
        height, width = self.tile.shape
        return height // LANES, width // LANES

    def diagonals(self) -> range:
        """The diagonals that these squares are on: column minus row."""
        height, width = self.squares()
        return range(1 - height, width)

    def window(self, diagonal: int) -> pl.Slice:
        """What of the array of diagonals the tile's squares on one diagonal show."""
        tile, rows = self.tile, self.sizes.padded_queries
        row, column = tile.first_query, tile.first_key
        if self.keys_axis == 0:
            row, column, rows = column, row, self.sizes.padded_keys
        start = column - row + diagonal * LANES + rows - LANES
        return pl.ds(pl.multiple_of(start, LANES), 2 * LANES)

    def _dense_bias(self) -> jax.Array:
        block = self.given["dense_bias"]
        axes = zip(block.shape, (self.queries, self.keys))
        bias = block[tuple(slice(None) if size == 1 else part for size, part in axes)]
        bias = bias.astype(jnp.float32) * scores.LOG2_E
        return bias if self.keys_axis == 1 else bias.T
