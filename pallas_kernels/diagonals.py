"""Sums along the diagonals of score matrices, by reshaping: no index arrays, and nothing is scattered."""

import jax
import jax.numpy as jnp


def diagonal_sums(scores: jax.Array) -> jax.Array:
    """The sum of each diagonal of [..., n, m] matrices: [..., n + m - 1], entry k - q + n - 1 for row q, column k."""
    *lead, n, m = scores.shape
    # Laid out in rows of n + m numbers and read in rows of one less, row r of the reversed matrix moves r to the right.
    padded = jnp.pad(scores[..., ::-1, :], [(0, 0)] * (len(lead) + 1) + [(0, n)])
    skewed = padded.reshape(*lead, n * (n + m))[..., : n * (n + m - 1)]
    return skewed.reshape(*lead, n, n + m - 1).sum(axis=-2)
