"""Attention behind one call. Who can compute it is in `pallas_kernels.attention_backends`."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import dropout, masks
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.biases import Bias, DenseBias
from pallas_kernels.requests import WHOLE, Origin, Request, UnsupportedAttention

__all__ = ["Origin", "UnsupportedAttention", "attention", "attention_gradients", "with_sinks"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask,
    bias: Bias | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    origin: Origin = WHOLE,
    return_lse: bool = False,
    backend: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * q k^T + bias, over the keys `mask` shows) v, for each head.

    A query that sees no key gives 0 and passes no gradient. The softmax is taken in float32.

    Args:
      q: [B, Tq, Hq, D].
      k: [B, Tk, Hkv, D]; Hkv divides Hq, and query head h uses key head h // (Hq / Hkv).
      v: [B, Tk, Hkv, Dv].
      mask: see `pallas_kernels.masks`.
      bias: a `Bias`, or an array broadcastable to [B, Hq, Tq, Tk], whose gradient is an error; a learned one is
        `DenseBias(array, differentiable=True)`.
      scale: multiplies q . k; None is 1 / sqrt(D).
      soft_cap: caps the scores smoothly at +-soft_cap (Gemma 2, arXiv 2408.00118, 2).
      sinks: [Hq] logits of a key that has no value and takes part in each head's softmax.
      dropout_rate: share of weights to drop, the rest growing by 1 / (1 - rate). No effect without `dropout_key`.
      dropout_key: jax key; which weights drop is a function of the key and the global (b, h, q, k) alone.
      origin: where these arrays lie in the whole, if they are one device's part of it; matters to dropout only.
      return_lse: also return the log-sum-exp of the scores, [B, Hq, Tq] float32 (natural logarithm, -inf where a query
        sees nothing, sinks counted in). It is differentiable, so that parts of a row can be combined.
      backend: a name from `pallas_kernels.attention_backends`, or "auto": the fastest that can.

    Returns:
      [B, Tq, Hq, Dv] in v's type; with `return_lse` also the log-sum-exp.

    Raises:
      UnsupportedAttention: the named backend does not exist or refuses.
      ValueError: shapes do not fit.
    """
    if sinks is not None and jnp.shape(sinks) != (q.shape[2],):
        raise ValueError(f"sinks must be [Hq] = [{q.shape[2]}], got {list(jnp.shape(sinks))}.")
    needs_lse = return_lse or sinks is not None
    request = _request(q, k, v, mask, bias, scale, soft_cap, dropout_rate, dropout_key, origin, needs_lse)
    out, lse = ATTENTION.choose(backend, request).run(q, k, v, request)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def attention_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lse: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
    mask: masks.Mask,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    origin: Origin = WHOLE,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
    """What the keys given here add to the gradients, where the queries' softmax runs over others as well.

    The backward pass of attention that is computed in parts: the sum over the parts is the gradient of the whole.

    Args:
      q, k, v, mask, bias, scale, soft_cap, dropout_rate, dropout_key, origin, backend: of the part, as for `attention`.
      lse: float32 [B, Hq, Tq], the log-sum-exp of all scores of a query, in whatever part.
      delta: float32 [B, Hq, Tq], the whole result times its gradient, summed over Dv, less the gradient of `lse`.
      gradient: of the whole result, [B, Tq, Hq, Dv].

    Returns:
      Gradients of q, k, v, in their shapes, and of bias.

    Raises:
      UnsupportedAttention, ValueError: as `attention`.
    """
    request = _request(q, k, v, mask, bias, scale, soft_cap, dropout_rate, dropout_key, origin, True)
    return ATTENTION.choose(backend, request).gradients(q, k, v, request, lse, delta, gradient)


def _request(q, k, v, mask, bias, scale, soft_cap, dropout_rate, dropout_key, origin, needs_lse) -> Request:
    _check_shapes(q, k, v)
    sizes = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    mask.check(*sizes)
    if bias is not None:
        bias = bias if isinstance(bias, Bias) else DenseBias(bias)
        bias.check(*sizes)
        bias = bias.guarded()
    drops = dropout_rate > 0.0 and dropout_key is not None
    return Request(
        mask=mask,
        bias=bias,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        soft_cap=soft_cap,
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_seed=dropout.seed_of(dropout_key) if drops else None,
        origin=origin,
        needs_lse=needs_lse,
        q_shape=q.shape,
        k_shape=k.shape,
        v_shape=v.shape,
        dtype=jnp.dtype(q.dtype),
    )


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds exp(sink) to each softmax's normaliser: whatever a backend gave shrinks by what that adds.

    Args:
      out: [B, Tq, Hq, Dv].
      lse: [B, Hq, Tq].
      sinks: [Hq].
    """
    sinks = sinks.astype(jnp.float32)[None, :, None]
    share = jax.nn.sigmoid(lse - sinks)  # of the keys, [B, H, Tq]
    return (out * share.swapaxes(1, 2)[..., None]).astype(out.dtype), jnp.logaddexp(lse, sinks)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"attention takes q, k, v of 4 axes [B, T, H, D], got {q.shape}, {k.shape}, {v.shape}.")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention needs q [B, Tq, Hq, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv]; got {q.shape}, {k.shape}, "
            f"{v.shape}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"The {k.shape[2]} key heads must divide the {q.shape[2]} query heads.")
