"""The dense reference: plain jax that XLA compiles; it defines what every other backend must give."""

from typing import override

import jax
import jax.numpy as jnp

from pallas_kernels import dropout, masks
from pallas_kernels.requests import Backend, Request
from pallas_kernels.residuals import named

# Scores of hidden keys. Far below any score, and finite: a row of them has a maximum to subtract.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class XlaBackend(Backend):
    """Any mask, any bias, any platform; O(Tq Tk) memory."""

    name = "xla"

    @override
    def refuses(self, request: Request) -> list[str]:
        return []

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        return named(*attend(q, k, v, request))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, request: Request, start: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """`Backend.run` for the queries start, start + 1, ... of the rows that `request` is about."""
    batch, tq, heads, _ = q.shape
    tk, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    q = q * jnp.asarray(request.scale, q.dtype)
    if group == 1:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    else:  # Queries that share a key head are one axis of the product: k and v are never repeated.
        grouped = q.reshape(batch, tq, kv_heads, group, -1)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, heads, tq, tk)
    if request.soft_cap is not None:
        scores = request.soft_cap * jnp.tanh(scores / request.soft_cap)
    if request.bias is not None:
        scores = scores + request.bias.dense(tq, tk, start)
    if not isinstance(request.mask, masks.Full):
        scores = jnp.where(request.mask.dense(tq, tk, start), scores, _HIDDEN)
    weights, lse = _softmax(scores)
    if request.dropout_seed is not None:
        kept = dropout.keep(request.dropout_seed, *_indices(scores.shape, request, start), request.dropout_rate)
        weights = jnp.where(kept, weights / (1.0 - request.dropout_rate), 0.0)
    weights = weights.astype(v.dtype)
    if group == 1:
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v), lse
    weights = weights.reshape(batch, kv_heads, group, tq, tk)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, tq, heads, -1), lse


def _indices(shape: tuple[int, ...], request: Request, start: jax.Array | int) -> list[jax.Array]:
    """Global indices (batch, head, query, key) of scores of `shape`, each along its own axis."""
    batch, head, query, key = jnp.indices(shape, sparse=True)
    origin = request.origin
    return [batch + origin.batch, head + origin.head, query + origin.query + start, key + origin.key]


@jax.custom_jvp
def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis and log-sum-exp; of a row with nothing but hidden keys, 0 and -inf."""
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    visible = highest > 0.5 * _HIDDEN
    lse = jnp.where(visible, highest + jnp.log(total), -jnp.inf)
    return exponentials * jnp.where(visible, 1.0 / total, 0.0), lse[..., 0]


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    (weights, lse), (tangent,) = _softmax(*primals), tangents
    mean = jnp.sum(weights * tangent, axis=-1, keepdims=True)
    return (weights, lse), (weights * (tangent - mean), mean[..., 0])
