"""Collectives with the gradients that they should have; for use inside `shard_map`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platforms

AxisName = str | tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, name: AxisName, dimension: int, sum_type: jnp.dtype = jnp.float32) -> jax.Array:
    """The whole array, of which each device along the mesh axis `name` holds a part of `dimension`.

    The gradient is that of `scatter_sum`.
    """
    return jax.lax.all_gather(x, name, axis=dimension, tiled=True)


def _gather_forward(x, name, dimension, sum_type):
    return gather(x, name, dimension, sum_type), None


def _gather_backward(name, dimension, sum_type, _, gradient):
    return (_scatter_sum(gradient, name, dimension, sum_type),)


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def scatter_sum(x: jax.Array, name: AxisName, dimension: int, sum_type: jnp.dtype = jnp.float32) -> jax.Array:
    """The sum over the devices along `name`; each keeps its own part of `dimension`.

    The sum is taken, and travels, in `sum_type`: float32 unless few of the summands are not 0.

    By the platform's reduce-scatter, or on TPUs by a ring. libtpu (0.0.51) makes of a reduce-scatter an all-reduce of
    the whole array, which sends twice as much and which nothing else can run beside. The gradient is that of `gather`.
    """
    return _scatter_sum(x, name, dimension, sum_type)


def _scatter_sum(x, name, dimension, sum_type):
    if platforms.current().kind == "tpu":
        return ring_sum(x, name, dimension, sum_type).astype(x.dtype)
    total = jax.lax.psum_scatter(x.astype(sum_type), name, scatter_dimension=dimension, tiled=True)
    return total.astype(x.dtype)


def _scatter_sum_forward(x, name, dimension, sum_type):
    return _scatter_sum(x, name, dimension, sum_type), None


def _scatter_sum_backward(name, dimension, sum_type, _, gradient):
    return (jax.lax.all_gather(gradient, name, axis=dimension, tiled=True),)


scatter_sum.defvjp(_scatter_sum_forward, _scatter_sum_backward)


def ring_sum(x: jax.Array, name: AxisName, dimension: int, sum_type: jnp.dtype = jnp.float32) -> jax.Array:
    """Sum over the devices along `name`, in `sum_type`; each keeps its own part of `dimension`.

    Two rings at a time, one in each direction: a part goes round from the device after (before) its owner to its owner
    and grows by what each has of it. Of an array of n parts a device sends n - 1.

    Args:
      x: on each device the whole array; `dimension` is a multiple of the devices.
      name: mesh axis, or several.
      dimension: that is split.
      sum_type: of the result, and of what travels.
    """
    count, own = jax.lax.axis_size(name), jax.lax.axis_index(name)
    size = x.shape[dimension] // count
    across = next((d for d in range(x.ndim) if d != dimension and x.shape[d] % 2 == 0), None)
    halves = [x] if across is None else jnp.split(x, 2, axis=across)

    def travel(half: jax.Array, direction: int) -> jax.Array:
        def part(index):
            return jax.lax.dynamic_slice_in_dim(half, index % count * size, size, dimension).astype(sum_type)

        def hop(step, total):
            total = jax.lax.ppermute(total, name, [(i, (i + direction) % count) for i in range(count)])
            return total + part(own - direction * (step + 1))

        return jax.lax.fori_loop(1, count, hop, part(own - direction))

    sums = [travel(half, direction) for half, direction in zip(halves, (1, -1))]
    return sums[0] if across is None else jnp.concatenate(sums, axis=across)
