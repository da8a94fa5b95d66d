"""A call's arrays in the layout of the TPU kernels, and which part of each a step loads."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.fused import Inputs
from pallas_kernels.tpu import costs
from pallas_kernels.tpu.block_sizes import Blocks, round_up, vmem
from pallas_kernels.tpu.schedule import Step, Walk
from pallas_kernels.tpu.scores import LANES, LOG2_E

# Tiles of scores in float32 that the compiler may spill, memory for whatever else it needs, and by how much more that
# can be where it fuses a kernel with what reads its results.
_SPILLED_TILES, _SPARE, _FUSED = 4, 4 << 20, 1.25

SCALARS = ("first_key_block", "example", "head", "query", "key", "seed")
"""Scalars that every kernel has: the first block of keys it is given, the origin of the scores, dropout's seed."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call, padded to whole blocks where it says so.

    Attributes:
      batch, heads, kv_heads: B, Hq, Hkv.
      queries, keys: Tq, Tk.
      size, v_size: D, Dv.
      blocks: of the kernel.
      key_parts: in how many parts of equal size the keys are taken.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    v_size: int
    blocks: Blocks
    key_parts: int = 1

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks) -> "Sizes":
        """Of a call's q, k, v."""
        batch, queries, heads, size = q.shape
        return cls(batch, heads, k.shape[2], queries, k.shape[1], size, v.shape[3], blocks)

    def in_parts(self, memory: int, dtype: jnp.dtype) -> "Sizes":
        """The same with the keys in as many parts as it takes to keep the gradients of one part in `memory` bytes."""
        columns = round_up(self.size, LANES) + round_up(self.v_size, LANES)
        a_key = columns * (4 + 2 * jnp.dtype(dtype).itemsize)  # the sum, and two copies of the result
        blocks = max(1, memory // (a_key * self.blocks.keys))
        return dataclasses.replace(self, key_parts=-(-self.key_blocks // blocks))

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def padded_queries(self) -> int:
        return round_up(self.queries, self.blocks.queries)

    @property
    def padded_keys(self) -> int:
        return round_up(self.keys, self.blocks.keys * self.key_parts)

    @property
    def query_blocks(self) -> int:
        return self.padded_queries // self.blocks.queries

    @property
    def key_blocks(self) -> int:
        return self.padded_keys // self.blocks.keys

    @property
    def part_blocks(self) -> int:
        """Blocks of keys in a part."""
        return self.key_blocks // self.key_parts


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array and what of it a step sees.

    Attributes:
      array: of any shape.
      block: shape of the part, None for axes that the kernel does not have.
      index: from the step to the part's block indices; None means the whole array, in scalar memory.
    """

    array: jax.Array
    block: tuple[int | None, ...] | None
    index: Callable[[Step, jax.Array], tuple] | None

    def spec(self, walk: Walk) -> pl.BlockSpec:
        """For `pallas_call`."""
        if self.index is None:
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        axes = len(walk.grid)

        def index_map(*where):
            *prefetch, scalars = where[axes:]
            return self.index(walk.step(*where[:axes], *prefetch), scalars)

        return pl.BlockSpec(self.block, index_map)


def compiler_params(
    walk: Walk, sizes: Sizes, loaded: Iterable[Operand], scratch: Iterable[Any]
) -> pltpu.CompilerParams:
    """How the compiler is to treat a kernel: which axes may be shared by cores, and the memory it may use on the chip.

    Examples and scopes may run on two cores; the steps within a scope follow each other.

    Args:
      walk: the kernel's grid.
      sizes: of the call.
      loaded: what the steps read and write, of which there are two copies on the chip, used and on the way.
      scratch: what the kernel keeps.
    """
    blocks = [(operand.block, operand.array.dtype) for operand in loaded if operand.block is not None]
    tile = sizes.blocks.sub_queries * sizes.blocks.sub_keys * 4
    needed = 2 * sum(_bytes(*block) for block in blocks) + sum(_bytes(x.shape, x.dtype) for x in scratch)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(walk.grid) - 2),
        vmem_limit_bytes=min(int(needed * _FUSED) + _SPILLED_TILES * tile + _SPARE, vmem(platforms.current().chip)),
    )


def cost(
    walk: Walk, sizes: Sizes, by_size: int, by_v_size: int, given: dict[str, Operand], results: dict[str, Operand]
) -> pl.CostEstimate:
    """What a kernel declares: keys and values are loaded at every step, all else once.

    Args:
      walk: the kernel's grid.
      sizes: of the call.
      by_size, by_v_size: matrix products of a block of scores with heads of size D, and of size Dv.
      given, results: what it reads and writes.
    """
    steps, blocks = walk.most_steps, sizes.blocks
    pairs = steps * blocks.queries * blocks.keys
    loaded = [jax.ShapeDtypeStruct((blocks.keys, size), given["k"].array.dtype) for size in (sizes.size, sizes.v_size)]
    once = [operand.array for name, operand in (*given.items(), *results.items()) if name not in ("k", "v")]
    return costs.estimate(
        2 * pairs * (by_size * sizes.size + by_v_size * sizes.v_size), pairs, (loaded, steps), (once, 1)
    )


def _bytes(shape: tuple[int | None, ...], dtype: jnp.dtype) -> int:
    """What an array takes on the chip, where rows have 128 lanes and columns 32 bytes at least."""
    *rest, rows, columns = (n for n in shape if n is not None) if sum(n is not None for n in shape) > 1 else (1, *shape)
    size = jnp.dtype(dtype).itemsize
    return math.prod(rest) * round_up(rows, 32 // size) * round_up(columns, LANES) * size


def scalars(inputs: Inputs, first_key_block: jax.Array | int = 0) -> jax.Array:
    """int32 [6], as `SCALARS` says."""
    seed = jnp.uint32(0) if inputs.seed is None else inputs.seed
    seed = jax.lax.bitcast_convert_type(jnp.asarray(seed, jnp.uint32), jnp.int32)
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (first_key_block, *inputs.origin, seed)])


def heads_first(x: jax.Array, length: int) -> jax.Array:
    """[B, H, length, D] of [B, T, H, D], with zeros at the end."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])


def by_query(sizes: Sizes, array: jax.Array) -> Operand:
    """[B, Hq, Tq, n], a block of queries of a head."""
    block = (None, None, sizes.blocks.queries, array.shape[3])
    return Operand(array, block, lambda step, _: (step.example, step.head, step.query_block, 0))


def by_key(sizes: Sizes, array: jax.Array) -> Operand:
    """[B, Hkv, Tk, n], a block of keys of a query head's key head."""
    block, group = (None, None, sizes.blocks.keys, array.shape[3]), sizes.group
    return Operand(
        array, block, lambda step, scalars: (step.example, step.head // group, step.key_block + scalars[0], 0)
    )


def row_numbers(sizes: Sizes, array: jax.Array) -> Operand:
    """float32 [B, Hq, Tq], as [1, queries] of a head."""
    padded = jnp.pad(array, [(0, 0), (0, 0), (0, sizes.padded_queries - array.shape[2])])[:, :, None]
    return Operand(
        padded, (None, None, 1, sizes.blocks.queries), lambda step, _: (step.example, step.head, 0, step.query_block)
    )


def intervals(sizes: Sizes, inputs: Inputs) -> dict[str, Operand]:
    """Starts and lengths of the queries' intervals, as [R, queries]; no starts where all are 0."""
    rows = inputs.rows.pad(sizes.padded_queries)
    block = (None, rows.lo.shape[1], sizes.blocks.queries)
    one = rows.lo.shape[0] == 1

    def index(step, _):
        return 0 if one else step.example, 0, step.query_block

    counts = Operand(jnp.maximum(rows.hi - rows.lo, 0), block, index)
    if inputs.from_first_key:
        return {"counts": counts}
    return {"starts": Operand(rows.lo, block, index), "counts": counts}


def biases(sizes: Sizes, inputs: Inputs, keys_axis: int) -> dict[str, Operand]:
    """Whatever bias the call has, in units of log 2 unless it is dense."""
    found = {}
    if inputs.slopes is not None:
        found["slopes"] = Operand(inputs.slopes * LOG2_E, None, None)
    if inputs.diagonals is not None:
        array = padded_diagonals(sizes, inputs.diagonals, keys_axis)[:, None] * LOG2_E
        found["diagonals"] = Operand(array, (None, 1, array.shape[2]), lambda step, _: (step.head, 0, 0))
    if inputs.dense_bias is not None:
        found["dense_bias"] = dense_bias(sizes, inputs.dense_bias)
    return found


def padded_diagonals(sizes: Sizes, diagonals: jax.Array, keys_axis: int) -> jax.Array:
    """[H, padded Tq + padded Tk] for `scores.diagonals_start`, whose rows are queries forward and keys backward."""
    if keys_axis == 0:
        diagonals = diagonals[:, ::-1]
    before = _diagonals_before(sizes, keys_axis)
    after = sizes.padded_queries + sizes.padded_keys - diagonals.shape[1] - before
    return jnp.pad(diagonals, [(0, 0), (before, after)])


def cut_diagonals(sizes: Sizes, padded: jax.Array, keys_axis: int) -> jax.Array:
    """The reverse of `padded_diagonals`."""
    before = _diagonals_before(sizes, keys_axis)
    diagonals = padded[:, before : before + sizes.queries + sizes.keys - 1]
    return diagonals[:, ::-1] if keys_axis == 0 else diagonals


def _diagonals_before(sizes: Sizes, keys_axis: int) -> int:
    return sizes.padded_keys - sizes.keys if keys_axis == 0 else sizes.padded_queries - sizes.queries


def dense_bias(sizes: Sizes, values: jax.Array) -> Operand:
    """A bias broadcastable to [B, H, Tq, Tk]; axes of size 1 stay so."""
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    of_one = [size == 1 for size in values.shape]
    padding = (0, 0, sizes.padded_queries - sizes.queries, sizes.padded_keys - sizes.keys)
    values = jnp.pad(values, [(0, 0 if one else n) for one, n in zip(of_one, padding)])
    queries, keys = (1 if one else n for one, n in zip(of_one[2:], (sizes.blocks.queries, sizes.blocks.keys)))

    def index(step, scalars):
        places = step.example, step.head, step.query_block, step.key_block + scalars[0]
        return tuple(0 if one else place for one, place in zip(of_one, places))

    return Operand(values, (None, None, queries, keys), index)
