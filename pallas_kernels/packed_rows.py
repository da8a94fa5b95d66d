"""Packed rows for mixers that carry a state: where it restarts, and how a broken segment stays alone.

Segment ids are [B, T] integers: 1, 2, ... for the segments of a row, each contiguous; 0 is padding. Padding neither
reads nor writes nor decays the state, so that the state after a row is the state after its last real step.
"""

import jax
import jax.numpy as jnp


def check_segment_ids(segment_ids: jax.Array, batch: int, length: int) -> None:
    """Raises a ValueError unless the ids are integers [batch, length]."""
    if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of shape [B, T] = {(batch, length)}, got {segment_ids.dtype} "
            f"{segment_ids.shape}; give one id for each step, 0 for padding."
        )


def restarts(segment_ids: jax.Array) -> jax.Array:
    """[B, T] bool: true at the first step of every segment but a row's first, which goes on from the initial state."""
    steps = jnp.arange(segment_ids.shape[1])
    last_real = jax.lax.cummax(jnp.where(segment_ids != 0, steps, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(last_real[:, :1], -1), last_real[:, :-1]], axis=1)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return (segment_ids != 0) & (before >= 0) & (id_before != segment_ids)


def is_broken(*arrays: jax.Array) -> jax.Array:
    """[B, T] bool: where any of the [B, T, ...] arrays holds something that is not finite."""
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))) for x in arrays]
    return ~jnp.all(jnp.stack(finite), axis=0)


def cleaned(x: jax.Array) -> jax.Array:
    """`x` with 0 in place of whatever is not finite, so that no product of matrices spreads it over its chunk."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def poison_after(broken: jax.Array, restart: jax.Array) -> jax.Array:
    """[B, T] float32: NaN from a broken step to the end of its segment, 0 elsewhere."""
    ordinal = jnp.cumsum(restart, axis=1)
    latest = jax.lax.cummax(jnp.where(broken, ordinal, -1), axis=1)
    return jnp.where(latest == ordinal, jnp.nan, 0.0)


def poison_around(broken: jax.Array, restart: jax.Array) -> jax.Array:
    """[B, T] float32: NaN in every segment that holds a broken step, 0 elsewhere."""
    ordinal = jnp.cumsum(restart, axis=1)
    beyond = ordinal[:, -1:] + 1
    following = jax.lax.cummin(jnp.where(broken, ordinal, beyond), axis=1, reverse=True)
    return jnp.where(following == ordinal, jnp.nan, poison_after(broken, restart))
