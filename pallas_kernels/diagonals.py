"""Sums along the diagonals of score matrices, by slices and sums of neighbouring rows: nothing is scattered."""

import jax
import jax.numpy as jnp


def diagonal_sums(scores: jax.Array) -> jax.Array:
    """The sum of each diagonal of [..., n, m] matrices: [..., n + m - 1], entry k - q + n - 1 for row q, column k."""
    *lead, n, m = scores.shape
    whole = [(0, 0)] * len(lead)
    rows, shift = scores[..., ::-1, :], 1  # row r is to move r columns to the right
    while (count := rows.shape[-2]) > 1:  # half as many, each the sum of two that lie `shift` apart
        rows = jnp.pad(rows, [*whole, (0, count % 2), (0, 0)])
        even, odd = rows[..., ::2, :], rows[..., 1::2, :]
        rows = jnp.pad(even, [*whole, (0, 0), (0, shift)]) + jnp.pad(odd, [*whole, (0, 0), (shift, 0)])
        shift *= 2
    return rows[..., 0, : n + m - 1]
