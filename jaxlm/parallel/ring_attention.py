"""Attention over rows that lie on several devices: keys and values travel, and queries stay where they are.

Everything here runs on one device's part, inside `shard_map`. A query's result over some of its keys and the
log-sum-exp of their scores are enough to join it with the result over the others (Milakov & Gimelshein, arXiv
1805.02867), so any backend that gives both can compute any part. The backward pass walks the same parts again, with the
log-sum-exp of all, so that a device never holds more than its share of keys, values and their gradients (Liu et al.,
arXiv 2310.01889).

What a query sees comes as the intervals of the whole row, cut to the keys at hand: segments that cross from device to
device, prefixes and windows need nothing more, and nothing about keys travels with them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.parallel.row_order import RowOrder
from pallas_kernels.attention import Origin, attention, attention_gradients
from pallas_kernels.biases import Bias
from pallas_kernels.masks import BlockSparse, Intervals, Mask
from pallas_kernels.plans import Rows

Keys = tuple[jax.Array, jax.Array]  # k [B, S, G, D] and v [B, S, G, Dv]


@dataclasses.dataclass(frozen=True)
class Route:
    """Whom a device's queries meet, known before the program is compiled. Hashable.

    Attributes:
      axis: the mesh axis along which rows are split.
      queries: how rows of queries lie on it.
      keys: how rows of keys lie on it; None if every device has all keys.
      gathered: keys are brought together first, instead of going round.
      forward: over how many places keys travel to the next device.
      backward: over how many they travel to the device before.
    """

    axis: str | tuple[str, ...]
    queries: RowOrder
    keys: RowOrder | None
    gathered: bool = False
    forward: int = 0
    backward: int = 0

    @classmethod
    def ring(cls, axis: str | tuple[str, ...], queries: RowOrder, keys: RowOrder, mask: Mask) -> "Route":
        """Keys go as far round as the mask is known to reach, in the shorter direction or in both."""
        devices, (left, right) = keys.devices, mask.reach
        q_first = np.asarray(queries.order).reshape(devices, 1, -1, 1) * queries.run_length
        k_first = np.asarray(keys.order).reshape(1, devices, 1, -1) * keys.run_length
        seen = np.ones((devices, devices, queries.runs, keys.runs), bool)
        if left is not None:
            seen &= k_first + keys.run_length - 1 >= q_first - left
        if right is not None:
            seen &= k_first <= q_first + queries.run_length - 1 + right
        # Keys that moved d places forward are those of device i - d.
        places = {(i - j) % devices for i, j in np.argwhere(seen.any(axis=(2, 3)))}
        ways = [
            (forward + back, back)
            for forward in range(devices)
            for back in range(devices - forward)
            if places <= {*range(forward + 1), *range(devices - back, devices)}
        ]
        total, back = min(ways)
        return cls(axis, queries, keys, forward=total - back, backward=back)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Surroundings:
    """What a device needs to know of the call, beside q, k, v and the bias. Integers alone: nothing has a gradient.

    Attributes:
      rows: the keys that each of its queries sees, in positions of the whole row.
      blocks: bool [B|1, H|1, query blocks, key blocks], those of its own queries, or None.
      dropout_key: jax key or None.
      batch, head: the first example and head that it has.
    """

    rows: Rows
    blocks: jax.Array | None
    dropout_key: jax.Array | None
    batch: jax.Array | int
    head: jax.Array | int


@dataclasses.dataclass(frozen=True)
class Options:
    """What is the same on every device and in every part. Hashable; see `pallas_kernels.attention.attention`."""

    scale: float | None
    soft_cap: float | None
    dropout_rate: float
    backend: str
    block: tuple[int, int] | None  # of a block-sparse mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def split_attention(
    route: Route,
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: Bias | None,
    around: Surroundings,
) -> tuple[jax.Array, jax.Array]:
    """One device's part of attention over whole rows, inside shard_map.

    Args:
      route: whom its queries meet.
      options: see `Options`.
      q: [B, T, H, D], its queries, one run after the other.
      k, v: [B, S, G, D], [B, S, G, Dv], its keys and values, or all of them (`Route.keys` is None).
      bias: of the whole row; not dense.
      around: see `Surroundings`.

    Returns:
      [B, T, H, Dv] in v's type, and the log-sum-exp of the scores, float32 [B, H, T].
    """
    return attend(route, options, q, k, v, bias, around)


def attend(route, options, q, k, v, bias, around) -> tuple[jax.Array, jax.Array]:
    """`split_attention` whose gradient is left to jax: keeps all keys, values and partial results of the way."""
    call = _Call(route, options, around)
    batch, length, heads, _ = q.shape
    total = (
        jnp.zeros((batch, length, heads, v.shape[-1]), jnp.float32),
        jnp.full((batch, heads, length), -jnp.inf, jnp.float32),
    )

    def see(total, keys, part):
        mine = tuple(_cut(x, part.row, part.tq, axis) for x, axis in zip(total, (1, 2)))
        found = call.attention(_cut(q, part.row, part.tq), *keys, bias, part)
        return tuple(_put(x, y, part.row, axis) for x, y, axis in zip(total, _join(mine, found), (1, 2)))

    total, _ = call.walk(see, total, (k, v), None)
    return total[0].astype(v.dtype), total[1]


def _forward(route, options, q, k, v, bias, around):
    out, lse = attend(route, options, q, k, v, bias, around)
    return (out, lse), (q, k, v, bias, around, out, lse)


def _backward(route, options, residuals, gradients):
    q, k, v, bias, around, out, lse = residuals
    d_out, d_lse = gradients
    call = _Call(route, options, around)
    delta = jnp.einsum("bqhd,bqhd->bhq", d_out, out, preferred_element_type=jnp.float32) - d_lse

    def see(sums, keys, part):
        """Adds to the gradients of queries and bias; returns those of the part's keys."""
        dq, d_bias = sums
        d_query, dk, dv, more = call.gradients(
            _cut(q, part.row, part.tq),
            *keys,
            bias,
            part,
            lse=_cut(lse, part.row, part.tq, 2),
            delta=_cut(delta, part.row, part.tq, 2),
            gradient=_cut(d_out, part.row, part.tq),
        )
        d_query = _cut(dq, part.row, part.tq) + d_query.astype(jnp.float32)
        return (_put(dq, d_query, part.row, 1), jax.tree.map(jnp.add, d_bias, more)), (dk, dv)

    sums = jnp.zeros(q.shape, jnp.float32), jax.tree.map(jnp.zeros_like, bias)
    (dq, d_bias), (dk, dv) = call.walk(see, sums, (k, v), tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v)))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias, jax.tree.map(_no_gradient, around)


split_attention.defvjp(_forward, _backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Part:
    """A run of queries and a run of keys.

    Attributes:
      row: the first query, of the device's.
      query, key: the first query and key, in the row.
      tq, tk: how many.
    """

    row: jax.Array
    query: jax.Array
    key: jax.Array
    tq: int = dataclasses.field(metadata={"static": True})
    tk: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Call:
    route: Route
    options: Options
    around: Surroundings

    def attention(self, q, k, v, bias, part: _Part) -> tuple[jax.Array, jax.Array]:
        """Result and log-sum-exp of one part."""
        bias = None if bias is None else _bias_of(bias, part)
        return attention(q, k, v, bias=bias, return_lse=True, **self._options(part))

    def gradients(self, q, k, v, bias, part: _Part, **whole: jax.Array) -> tuple:
        """What one part adds to the gradients of q, k, v and bias, see `attention_gradients`."""
        pull = None
        if bias is not None:
            bias, pull = jax.vjp(lambda bias: _bias_of(bias, part), bias)
        *found, d_bias = attention_gradients(q, k, v, bias=bias, **whole, **self._options(part))
        return *found, None if pull is None else pull(d_bias)[0]

    def _options(self, part: _Part) -> dict[str, Any]:
        around, options = self.around, self.options
        return dict(
            mask=self._mask(part),
            scale=options.scale,
            soft_cap=options.soft_cap,
            dropout_rate=options.dropout_rate,
            dropout_key=around.dropout_key,
            origin=Origin(around.batch, around.head, part.query, part.key),
            backend=options.backend,
        )

    def walk(self, see: Callable, sums: Any, keys: Keys, gradients: Keys | None) -> tuple[Any, Keys | None]:
        """Lets the device's queries meet the keys of all devices.

        Args:
          see: (sums, keys of a part, part) -> sums, or with `gradients` (sums, gradients of these keys).
          sums: what stays on the device.
          keys: the device's own.
          gradients: float32 zeros, like keys; or None.

        Returns:
          The sums, and the sums of the gradients of the device's own keys.
        """
        route = self.route
        if route.keys is None:
            return self._meet(see, sums, keys, gradients, jnp.zeros(1, jnp.int32))
        if route.gathered:
            return self._gather(see, sums, keys, gradients)
        me, devices = jax.lax.axis_index(route.axis), route.keys.devices

        def meet(sums, keys, gradients, place):
            return self._meet(see, sums, keys, gradients, route.keys.starts((me - place) % devices))

        sums, gradients = self._go_round(meet, sums, keys, gradients, 1, route.forward, skip_own=False)
        if route.backward:
            none = jax.tree.map(jnp.zeros_like, gradients)
            sums, more = self._go_round(meet, sums, keys, none, -1, route.backward, skip_own=True)
            gradients = jax.tree.map(jnp.add, gradients, more)
        return sums, gradients

    def _go_round(self, meet, sums, keys, gradients, direction, places, *, skip_own):
        """Keys travel over `places` devices, their gradients with them, and these return home."""
        devices = self.route.keys.devices

        def move(tree, by):
            pairs = [(i, (i + by) % devices) for i in range(devices)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.route.axis, pairs), tree)

        def step(state, place):
            sums, keys, gradients = state
            following = move(keys, direction)  # on their way while this device attends to what it has
            sums, gradients = meet(sums, keys, gradients, direction * place)
            return (sums, following, move(gradients, direction)), None

        if skip_own:
            keys, gradients = move(keys, direction), move(gradients, direction)
        if len(between := np.arange(int(skip_own), places)):
            (sums, keys, gradients), _ = jax.lax.scan(step, (sums, keys, gradients), between)
        sums, gradients = meet(sums, keys, gradients, direction * places)
        return sums, move(gradients, -direction * places)

    def _gather(self, see, sums, keys, gradients):
        """All keys at once, in the order of the row."""
        route = self.route

        def gather(x):
            return route.keys.restore(jax.lax.all_gather(x, route.axis, axis=1, tiled=True))

        def scatter(x):
            return jax.lax.psum_scatter(route.keys.arrange(x), route.axis, scatter_dimension=1, tiled=True)

        keys = jax.tree.map(gather, keys)
        if gradients is not None:
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)
        sums, gradients = self._meet(see, sums, keys, gradients, jnp.zeros(1, jnp.int32))
        return sums, jax.tree.map(scatter, gradients)

    def _meet(self, see, sums, keys, gradients, key_starts):
        """The device's queries meet keys that lie on one device, one pair of runs after the other.

        Args:
          key_starts: int32 [runs], the first key of each run, in the row.
        """
        queries = self.route.queries
        query_starts = queries.starts(jax.lax.axis_index(self.route.axis))
        tk = keys[0].shape[1] // len(key_starts)

        def pair(state, places):
            a, b = places
            part = _Part(a * queries.run_length, query_starts[a], key_starts[b], queries.run_length, tk)

            def visible(state):
                sums, gradients = state
                cut = tuple(_cut(x, b * tk, tk) for x in keys)
                if gradients is None:
                    return see(sums, cut, part), None
                sums, found = see(sums, cut, part)
                added = (_cut(x, b * tk, tk) + y.astype(jnp.float32) for x, y in zip(gradients, found))
                return sums, tuple(_put(x, y, b * tk, 1) for x, y in zip(gradients, added))

            return jax.lax.cond(self._rows(part).any, visible, lambda state: state, state), None

        pairs = np.indices((queries.runs, len(key_starts)), dtype=np.int32).reshape(2, -1)
        if pairs.shape[1] == 1:
            return pair((sums, gradients), (0, 0))[0]
        return jax.lax.scan(pair, (sums, gradients), tuple(jnp.asarray(pairs)))[0]

    def _rows(self, part: _Part) -> Rows:
        return self.around.rows.part(part.row, part.tq, part.key, part.tk)

    def _mask(self, part: _Part) -> Mask:
        rows, blocks = self._rows(part), self.around.blocks
        mask = Intervals(rows.lo, rows.hi)
        if blocks is None:
            return mask
        bq, bk = self.options.block
        blocks = _cut(_cut(blocks, part.row // bq, part.tq // bq, 2), part.key // bk, part.tk // bk, 3)
        return mask & BlockSparse.of_map(blocks, self.options.block)


def _join(one, other):
    """Two (result, log-sum-exp) over different keys as one over all of them, float32."""
    lse = jnp.logaddexp(one[1], other[1])
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    shares = (jnp.exp(x[1] - finite).swapaxes(1, 2)[..., None] for x in (one, other))
    return sum(x[0].astype(jnp.float32) * share for x, share in zip((one, other), shares)), lse


def _bias_of(bias: Bias, part: _Part) -> Bias:
    return bias.part(part.query, part.tq, part.key, part.tk)


def _cut(x: jax.Array, start: jax.Array | int, size: int, axis: int = 1) -> jax.Array:
    return x if x.shape[axis] == size else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: jax.Array, part: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    return part if x.shape == part.shape else jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)


def _no_gradient(x):
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
