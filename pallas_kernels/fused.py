"""What our own kernels share on every machine: a call brought into their form, and its gradient.

A kernel sees masks as intervals and a block plan, and biases as one of three arrays. Sinks, padding and the rest of the
public call's variety stop here.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.biases import AlibiBias, Bias, DenseBias, DiagonalBias, PlacedBias, RelativeBias
from pallas_kernels.masks import And, BlockSparse, Full, IntervalMask, Mask
from pallas_kernels.plans import Rows
from pallas_kernels.requests import Origin, Request
from pallas_kernels.residuals import named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Everything beside q, k and v that a kernel needs.

    Attributes:
      rows: the keys each query sees.
      block_sparse: lists of blocks that narrow the rows further, or None.
      slopes: float32 [H] of ALiBi, or None.
      diagonals: float32 [H, Tq + Tk - 1], the bias of key k for query q at k - q + Tq - 1, or None.
      dense_bias: broadcastable to [B, H, Tq, Tk], or None.
      seed: uint32 scalar of dropout, or None.
      origin: global indices of the first score, for dropout.
      scale, soft_cap, dropout_rate: as in `Request`.
      dense_bias_gradient: whether `dense_bias` gets one.
      hides_nothing: known beforehand, that every query sees every key.
      from_first_key: known beforehand, that every query sees no key, or the first and some that follow it.
      places: int32 [B, Tq] and [B, Tk], the positions that slopes and diagonals go by in place of rows and columns;
        `diagonals`, float32 [H, 2 n + 1], has then the bias of key - query = -n ... n, and of what is further away at
        its ends. None: rows and columns. Only `xla_blocks` knows them, and has no gradient of such diagonals.
    """

    rows: Rows
    block_sparse: BlockSparse | None
    slopes: jax.Array | None
    diagonals: jax.Array | None
    dense_bias: jax.Array | None
    seed: jax.Array | None
    origin: Origin
    scale: float = dataclasses.field(metadata={"static": True})
    soft_cap: float | None = dataclasses.field(metadata={"static": True})
    dropout_rate: float = dataclasses.field(metadata={"static": True})
    dense_bias_gradient: bool = dataclasses.field(metadata={"static": True})
    hides_nothing: bool = dataclasses.field(metadata={"static": True})
    from_first_key: bool = dataclasses.field(metadata={"static": True})
    places: tuple[jax.Array, jax.Array] | None = None


class Kernels(Protocol):
    """The forward and backward kernels of one kind of machine. Hashable; two equal ones run the same code."""

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Output [B, Tq, Hq, Dv] in v's type; log-sum-exp float32 [B, Hq, Tq] (natural, -inf where nothing is seen)."""

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        inputs: Inputs,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """Gradients of q, k, v (their shapes), `diagonals` (None without) and `dense_bias` (None unless asked for).

        Args:
          q, k, v, inputs: as forward had them.
          lse: what forward returned; where these keys are a part of what the queries see, that of all of them.
          delta: float32 [B, Hq, Tq]; the gradient of a score is p * (gradient . v - delta), p = exp(score - lse).
          gradient: of the output, [B, Tq, Hq, Dv].
        """


def inputs_of(request: Request) -> Inputs:
    """The request in the kernels' form.

    Raises:
      TypeError: its mask is not made of intervals; backends refuse such a request before.
    """
    tq, tk = request.q_shape[1], request.k_shape[1]
    rows = request.mask.rows(tq, tk)
    if rows is None:
        raise TypeError(f"{request.mask} is not made of key intervals.")
    bias = request.bias
    return Inputs(
        rows=rows,
        block_sparse=request.mask.block_sparse,
        slopes=jnp.asarray(bias.slopes, jnp.float32) if isinstance(bias, AlibiBias) else None,
        diagonals=_diagonals(bias, tq, tk),
        dense_bias=_dense(bias, tq, tk),
        seed=request.dropout_seed,
        origin=request.origin,
        scale=request.scale,
        soft_cap=request.soft_cap,
        dropout_rate=request.dropout_rate,
        dense_bias_gradient=isinstance(bias, DenseBias) and bias.differentiable,
        hides_nothing=isinstance(request.mask, Full),
        from_first_key=_from_first_key(request.mask, tq, tk),
    )


def _diagonals(bias: Bias | None, tq: int, tk: int) -> jax.Array | None:
    match bias:
        case RelativeBias():
            return bias.by_offset(np.arange(1 - tq, tk))
        case DiagonalBias():
            return jnp.asarray(bias.values, jnp.float32)
        case _:
            return None


def _dense(bias: Bias | None, tq: int, tk: int) -> jax.Array | None:
    match bias:
        case DenseBias():
            return bias.values
        case PlacedBias():
            return bias.dense(tq, tk)
        case _:
            return None


def _from_first_key(mask: Mask, tq: int, tk: int) -> bool:
    """Whether the mask says, and does not compute, that its intervals start with key 0."""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    queries = jnp.arange(tq, dtype=jnp.int32)[None]
    starts = [part.bounds(queries, tk, 0)[0] if isinstance(part, IntervalMask) else None for part in parts]
    return all(isinstance(start, int) and start == 0 for start in starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_attention(
    kernels: Kernels, q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs
) -> tuple[jax.Array, jax.Array]:
    """`Backend.run` by `kernels`: the output [B, Tq, Hq, Dv] and its log-sum-exp [B, Hq, Tq], both differentiable."""
    return kernels.forward(q, k, v, inputs)


def fused_gradients(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    request: Request,
    lse: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
    """`Backend.gradients` by `kernels`: the backward kernels are given the log-sum-exp of all keys."""

    def inputs(bias: Bias | None) -> Inputs:
        return inputs_of(dataclasses.replace(request, bias=bias))

    dq, dk, dv, d_diagonals, d_dense = kernels.backward(q, k, v, inputs(request.bias), lse, delta, gradient)
    if d_diagonals is None and d_dense is None:
        return dq, dk, dv, jax.tree.map(jnp.zeros_like, request.bias)

    def arrays(bias: Bias | None) -> list[jax.Array]:
        found = inputs(bias)
        return [x for x, d in ((found.diagonals, d_diagonals), (found.dense_bias, d_dense)) if d is not None]

    _, pull = jax.vjp(arrays, request.bias)
    return dq, dk, dv, *pull([d for d in (d_diagonals, d_dense) if d is not None])


def _forward(kernels, q, k, v, inputs):
    out, lse = named(*kernels.forward(q, k, v, inputs))
    return (out, lse), (q, k, v, inputs, out, lse)


def _backward(kernels, residuals, gradients):
    q, k, v, inputs, out, lse = residuals
    gradient, lse_gradient = gradients
    # d lse / d score is the weight itself, so lse's gradient enters where the mean over the weights leaves.
    delta = jnp.einsum("bqhd,bqhd->bhq", gradient, out, preferred_element_type=jnp.float32) - lse_gradient
    delta = jnp.where(jnp.isneginf(lse), 0.0, delta)
    dq, dk, dv, d_diagonals, d_dense = kernels.backward(q, k, v, inputs, lse, delta, gradient)
    zeros = jax.tree.map(_no_gradient, inputs)
    if inputs.dense_bias is not None and d_dense is None:
        d_dense = jnp.zeros_like(inputs.dense_bias)
    if inputs.diagonals is not None and d_diagonals is None:
        d_diagonals = jnp.zeros_like(inputs.diagonals)
    return dq, dk, dv, dataclasses.replace(zeros, diagonals=d_diagonals, dense_bias=d_dense)


def _no_gradient(x):
    x = jnp.asarray(x)
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


fused_attention.defvjp(_forward, _backward)
