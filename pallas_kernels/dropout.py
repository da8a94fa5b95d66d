"""Dropout as a hash of where an entry lies, so that every backend, mesh and pass drops the same entries."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

_ODD = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE3D))


def seed_of(key: jax.Array) -> jax.Array:
    """uint32 seed of a jax key."""
    return jax.random.bits(key, (), jnp.uint32)


def keep(
    seed: jax.Array, batch: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array, rate: float
) -> jax.Array:
    """True where the weight of (batch, head, query, key) is kept, with probability 1 - rate.

    Integer arithmetic only, elementwise over broadcastable integer arrays of *global* indices. Each index in turn is
    mixed in by MurmurHash3's finaliser; only the last of the four rounds is at the cost of a whole score matrix.

    Args:
      seed: uint32 scalar, see `seed_of`.
      batch, head, query, key: integer arrays that broadcast against each other.
      rate: share of weights to drop, in [0, 1).
    """
    return keep_in_row(row(seed, batch, head, query), key, rate)


def row(seed: jax.Array, batch: jax.Array, head: jax.Array, query: jax.Array) -> jax.Array:
    """uint32: the hash of a row of scores, from which `keep_in_row` tells its entries. Arguments as in `keep`."""
    batch, head, query = (x.astype(jnp.uint32) for x in (batch, head, query))
    return _mix(_mix(_mix(seed ^ (batch * _ODD[0])) ^ (head * _ODD[1])) ^ (query * _ODD[2]))


def keep_in_row(rows: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """`keep`, given the hashes of the rows; the only part a kernel has to do for every score."""
    return _mix(rows ^ (key.astype(jnp.uint32) * _ODD[0])) >= np.uint32(round(rate * 2**32))


def keep_entries(seed: jax.Array, indices: Iterable[jax.Array], rate: float) -> jax.Array:
    """True where an entry of an array is kept, with probability 1 - rate; the same hash over its indices.

    Args:
      seed: uint32 scalar, see `seed_of`.
      indices: along each axis, integers that broadcast against each other (`jnp.indices(shape, sparse=True)`).
      rate: share of entries to drop, in [0, 1).
    """
    return entry_bits(seed, indices) >= np.uint32(round(rate * 2**32))


def entry_bits(seed: jax.Array, indices: Iterable[jax.Array]) -> jax.Array:
    """uint32: the hash of the indices of each entry of an array.

    Args:
      seed: uint32, a scalar, or [N, 1, ...] with as many ones as there are indices: then for N such arrays.
      indices: as for `keep_entries`.
    """
    x = seed
    for index, odd in zip(indices, itertools.cycle(_ODD)):
        x = _mix(x ^ (index.astype(jnp.uint32) * odd))
    return x


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
