"""A digest of arrays: equal arrays have equal ones, on any mesh; to see in a log what a change left as it was."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest(tree: Any) -> jax.Array:
    """uint32: a sum over all entries' bits, mixed with where they stand, so that it does not depend on its order.

    Not against malice: two trees that differ have the same digest once in 2^32. Leaves in the host's memory are fetched
    one after the other.

    Args:
      tree: of arrays. Keys, shapes and types count as values do.
    """
    total = np.uint32(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}"
        total = _add(total, leaf, np.uint32(zlib.crc32(name.encode())))
    return total


@jax.jit
def _add(total: jax.Array, leaf: jax.Array, salt: jax.Array) -> jax.Array:
    """The digest with one more leaf. A program a leaf, so that what is fetched is gone before the next one is."""
    bits = _bits(jax.device_put(leaf, jax.memory.Space.Device))
    place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) * jnp.uint32(2654435761)
    mixed = (bits ^ (place + salt)) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return total + (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each entry, uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
