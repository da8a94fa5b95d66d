"""Attention biases that depend on positions alone: small objects that every backend can evaluate where it needs them.

Positions are rows of the score matrix, as in `pallas_kernels.masks`: inside one segment of a packed row their
differences are those of the positions in the text. Where they are not, `PlacedBias` says the positions.
"""

import abc
import dataclasses
import functools
from typing import override

import jax
import jax.numpy as jnp
import numpy as np


class Bias(abc.ABC):
    """A number added to each score."""

    @abc.abstractmethod
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        """float32, broadcastable to [B, H, Tq, Tk]: of the queries start ... start + Tq."""

    @abc.abstractmethod
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        """Raises a ValueError that names the array which does not fit these sizes."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """What the axes of each of the bias's arrays run over, as `pallas_kernels.masks.Mask.axes`."""

    def guarded(self) -> "Bias":
        """The same, whose gradient is an error where kernels do not compute it."""
        return self

    @abc.abstractmethod
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> "Bias":
        """The bias of the queries query ... query + tq and the keys key ... key + tk, counted from 0 again."""

    def between(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """float32 [B, H, Tq, Tk]: of queries and keys at any positions, int32 [B, Tq] and [B, Tk].

        Raises:
          TypeError: it is not a function of positions.
        """
        raise TypeError(f"{type(self).__name__} is given for one grid of scores, not as a function of positions.")


def _toeplitz(by_offset: jax.Array, tq: int, tk: int) -> jax.Array:
    """[1, H, Tq, Tk] from [H, Tq + Tk], whose entry r is the bias of key - query = r modulo Tq + Tk."""
    # Repeating it Tq times and cutting rows of one less shifts it by one each row. Both directions are copies and
    # sums; a gather's gradient would scatter Tq * Tk numbers.
    heads, period = by_offset.shape
    rows = jnp.broadcast_to(by_offset[:, None], (heads, tq, period)).reshape(heads, tq * period)
    return rows[:, : tq * (period - 1)].reshape(heads, tq, period - 1)[None, :, :, :tk]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _constant(x: jax.Array, what: str) -> jax.Array:
    """`x`; asking for its gradient is an error that names it."""
    return x


def _refuse_gradient(what, residuals, gradient):
    raise ValueError(f"A gradient was asked for of {what}.")


_constant.defvjp(lambda x, what: (x, None), _refuse_gradient)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """Any bias, given as an array.

    Attributes:
      values: broadcastable to [B, H, Tq, Tk].
      differentiable: pass a gradient, for which kernels write an array [B, H, Tq, Tk]. Otherwise asking for it is an
        error.
    """

    values: jax.Array
    differentiable: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        shape = np.shape(self.values)
        names = ("batch", "heads", None, None)[4 - len(shape) :]
        return (tuple(name if size > 1 else None for name, size in zip(names, shape)),)

    @override
    def guarded(self) -> "DenseBias":
        if self.differentiable:
            return self
        return DenseBias(_constant(self.values, "an array given as bias; say DenseBias(array, differentiable=True)"))

    @override
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        values = jnp.asarray(self.values, jnp.float32)
        if values.ndim < 2 or values.shape[-2] == 1:
            return values
        return jax.lax.dynamic_slice_in_dim(values, start, tq, axis=-2)

    @override
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> "DenseBias":
        values = self.values
        for axis, start, size in ((-2, query, tq), (-1, key, tk)):
            if values.ndim >= -axis and values.shape[axis] > 1:
                values = jax.lax.dynamic_slice_in_dim(values, start, size, axis)
        return DenseBias(values, self.differentiable)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        shape, full = np.shape(self.values), (batch, heads, tq, tk)
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape[::-1], full[::-1])):
            raise ValueError(f"bias must be broadcastable to [B, H, Tq, Tk] = {list(full)}, got {list(shape)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalBias(Bias):
    """A bias that depends on key position minus query position, given for each: what a part of the others becomes.

    Attributes:
      values: float32 [H, Tq + Tk - 1], the bias of key k for query q at k - q + Tq - 1.
    """

    values: jax.Array

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return (("heads", None),)

    @override
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        period, queries = tq + tk, self.values.shape[1] + 1 - tk  # queries of the whole array, `start` among them
        by_offset = jax.lax.dynamic_slice_in_dim(self.values, queries - tq - start, period - 1, axis=1)
        return _toeplitz(jnp.roll(jnp.pad(by_offset, ((0, 0), (1, 0))), -tq, axis=1), tq, tk)

    @override
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> "DiagonalBias":
        raise TypeError("DiagonalBias is a part already; take parts of the bias that it came from.")

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        if np.shape(self.values) != (heads, tq + tk - 1):
            shape = [heads, tq + tk - 1]
            raise ValueError(f"DiagonalBias.values must be [H, Tq + Tk - 1] = {shape}, got {np.shape(self.values)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AlibiBias(Bias):
    """-slope * |q - k| (arXiv 2108.12409; symmetric, so that it also serves encoders).

    Attributes:
      slopes: float32 [H], constants.
    """

    slopes: jax.Array

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return (("heads",),)

    @override
    def guarded(self) -> "AlibiBias":
        return AlibiBias(_constant(self.slopes, "AlibiBias.slopes, which are constants; learn a RelativeBias instead"))

    @override
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        distance = jnp.abs(start + np.arange(tq)[:, None] - np.arange(tk)[None]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[None, :, None, None] * distance

    @override
    def between(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        distance = jnp.abs(queries[:, None, :, None] - keys[:, None, None, :]).astype(jnp.float32)
        return -jnp.asarray(self.slopes, jnp.float32)[None, :, None, None] * distance

    @override
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> DiagonalBias:
        distance = jnp.abs(np.arange(1 - tq, tk) + key - query).astype(jnp.float32)
        return DiagonalBias(-jnp.asarray(self.slopes, jnp.float32)[:, None] * distance)

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        if np.shape(self.slopes) != (heads,):
            raise ValueError(f"AlibiBias.slopes must be [H] = [{heads}], got {list(np.shape(self.slopes))}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """A learned number for each head and bucket of key position minus query position (T5, arXiv 1910.10683, 2.1).

    Attributes:
      table: [buckets, H].
      max_distance: from this distance on all positions share the last bucket.
      bidirectional: half of the buckets are for keys after the query; otherwise those share the bucket of distance 0.
    """

    table: jax.Array
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})
    bidirectional: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return ((None, "heads"),)

    @override
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        period = tq + tk
        offsets = (np.arange(period) + tq) % period - tq
        return _toeplitz(self.by_offset(offsets - start), tq, tk)

    @override
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> DiagonalBias:
        return DiagonalBias(self.by_offset(jnp.arange(1 - tq, tk) + key - query))

    @override
    def between(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        offsets = keys[:, None, :] - queries[:, :, None]  # [B, Tq, Tk]
        return jnp.moveaxis(self.by_offset(offsets.ravel()).reshape(-1, *offsets.shape), 0, 1)

    def by_offset(self, offsets: np.ndarray | jax.Array) -> jax.Array:
        """float32 [H, n]: the bias at each offset, key position minus query position, of the n given."""
        # Buckets are computed once, by numpy: another machine's logarithm could round to the other side of a border.
        far = self.max_distance
        known = relative_buckets(np.arange(-far, far + 1), self.table.shape[0], far, self.bidirectional)
        buckets = (jnp if isinstance(offsets, jax.Array) else np).take(known, offsets + far, mode="clip")
        return jnp.asarray(self.table, jnp.float32)[buckets].T

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        if np.ndim(self.table) != 2 or np.shape(self.table)[1] != heads:
            raise ValueError(
                f"RelativeBias.table must be [buckets, H] with H = {heads}, got {list(np.shape(self.table))}."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PlacedBias(Bias):
    """A bias between tokens whose positions in the text are given, since rows and columns do not say them.

    So may several texts stand behind one beginning that all of them see. It has no gradient. Pallas' kernels get it as
    an array [B, H, Tq, Tk].

    Attributes:
      bias: of positions.
      queries: int32 [B, Tq].
      keys: int32 [B, Tk].
    """

    bias: RelativeBias | AlibiBias
    queries: jax.Array
    keys: jax.Array

    @property
    @override
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        return (*self.bias.axes, ("batch", None), ("batch", None))

    @override
    def guarded(self) -> "PlacedBias":
        what = "a PlacedBias, which is for scoring alone"
        return dataclasses.replace(self, bias=jax.tree.map(lambda x: _constant(x, what), self.bias))

    @override
    def dense(self, tq: int, tk: int, start: jax.Array | int = 0) -> jax.Array:
        return self.bias.between(jax.lax.dynamic_slice_in_dim(self.queries, start, tq, axis=1), self.keys)

    @override
    def part(self, query: jax.Array | int, tq: int, key: jax.Array | int, tk: int) -> "PlacedBias":
        queries = jax.lax.dynamic_slice_in_dim(self.queries, query, tq, axis=1)
        return PlacedBias(self.bias, queries, jax.lax.dynamic_slice_in_dim(self.keys, key, tk, axis=1))

    @override
    def check(self, batch: int, heads: int, tq: int, tk: int) -> None:
        self.bias.check(batch, heads, tq, tk)
        for name, positions, length in (("queries", self.queries, tq), ("keys", self.keys, tk)):
            if np.shape(positions) != (batch, length):
                shape = list(np.shape(positions))
                raise ValueError(f"PlacedBias.{name} must be positions [B, T] = {[batch, length]}, got {shape}.")


def relative_buckets(offsets: np.ndarray, buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """T5's bucket of each offset (key position minus query position), int32 of the shape of `offsets`.

    Small distances have a bucket each, larger ones share buckets of logarithmically growing width.
    """
    distance, start = -offsets, np.zeros_like(offsets)
    if bidirectional:
        buckets //= 2
        start = np.where(distance < 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = buckets // 2
    # float32, as in the released T5 code: bucket borders lie where its rounding puts them.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    shared = exact + (ratio.astype(np.float32) * (buckets - exact)).astype(np.int32)
    return (start + np.where(distance < exact, distance, np.minimum(shared, buckets - 1))).astype(np.int32)
