"""Matrix products in 8 bits, forward and backward, from operands in bfloat16.

Both operands of a product are scaled so that the largest entry along what is contracted, a token's row or an output's
column, becomes the largest number of the 8-bit type; the result is scaled back. Scales are of the numbers at hand, so
there is no state and nothing to calibrate. A NaN in an operand gives NaNs in its row or column.
"""

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class _Types:
    """8-bit types of the operands of the three products of a linear layer, y = x w.

    Attributes:
      forward: of x and w, wherever they appear.
      gradient: of y's gradient.
      accumulator: of results before they are scaled back.
      weights_too: whether w's gradient is such a product; else it is one in bfloat16.
    """

    forward: jnp.dtype
    gradient: jnp.dtype
    accumulator: jnp.dtype
    weights_too: bool


class Quantization(enum.Enum):
    """How the linear layers of the stacks multiply.

    INT8: y and x's gradient in int8, rounded to nearest; w's gradient, whose sum over tokens is the longest and whose
      rounding errors would stay in the weights, in bfloat16 (SwitchBack: Wortsman et al. 2023, arXiv 2304.13013, 2).
    FP8: all three products in 8-bit floats: x and w with 3 bits of mantissa (e4m3), gradients with 2 (e5m2) and thereby
      a wider range (Micikevicius et al. 2022, arXiv 2209.05433, 3).
    """

    INT8 = "int8"
    FP8 = "fp8"

    @property
    def types(self) -> _Types:
        """What is multiplied in what."""
        if self is Quantization.INT8:
            return _Types(jnp.dtype("int8"), jnp.dtype("int8"), jnp.dtype("int32"), weights_too=False)
        forward, gradient = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
        return _Types(forward, gradient, jnp.dtype("float32"), weights_too=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(x: jax.Array, w: jax.Array, contracted: int, quantization: Quantization) -> jax.Array:
    """x times w over x's last and w's first `contracted` axes.

    Args:
      x: bfloat16 [*tokens, *inputs].
      w: bfloat16 [*inputs, *outputs].
      contracted: number of input axes.
      quantization: how.

    Returns:
      bfloat16 [*tokens, *outputs].
    """
    types = quantization.types
    tokens, inputs = x.ndim - contracted, tuple(range(contracted))
    return _product(x, _last(x, contracted), types.forward, w, inputs, types.forward, types).reshape(
        *x.shape[:tokens], *w.shape[contracted:]
    )


def _forward(x, w, contracted, quantization):
    return quantized_matmul(x, w, contracted, quantization), (x, w)


def _backward(contracted, quantization, residuals, gradient):
    x, w = residuals
    types, tokens = quantization.types, tuple(range(x.ndim - contracted))
    outputs = w.ndim - contracted
    dx = _product(gradient, _last(gradient, outputs), types.gradient, w, _last(w, outputs), types.forward, types)
    if types.weights_too:
        dw = _product(x, tokens, types.forward, gradient, tokens, types.gradient, types)
    else:
        dw = jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())), preferred_element_type=w.dtype)
    return dx.reshape(x.shape), dw.reshape(w.shape)


quantized_matmul.defvjp(_forward, _backward)


def _product(
    left: jax.Array,
    left_axes: tuple[int, ...],
    left_type: jnp.dtype,
    right: jax.Array,
    right_axes: tuple[int, ...],
    right_type: jnp.dtype,
    types: _Types,
) -> jax.Array:
    """left times right over these axes, each in its 8-bit type; in left's own type, [*rest of left, *rest of right]."""
    small_left, left_scale = _quantize(left, left_axes, left_type)
    small_right, right_scale = _quantize(right, right_axes, right_type)
    sums = jax.lax.dot_general(
        small_left, small_right, ((left_axes, right_axes), ((), ())), preferred_element_type=types.accumulator
    )
    left_scale = left_scale.reshape(*left_scale.shape, *(1,) * right_scale.ndim)
    return (sums.astype(jnp.float32) * left_scale * right_scale).astype(left.dtype)


def _quantize(x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x / scale in `dtype`, and the float32 scale: one for all entries along `axes`, which it lacks."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if is_integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    highest = jnp.max(jnp.abs(x), axes, keepdims=True)
    scale = jnp.where(highest == 0.0, 1.0, highest / largest)
    scaled = jnp.clip(x / scale, -largest, largest)
    return (jnp.round(scaled) if is_integer else scaled).astype(dtype), jnp.squeeze(scale, axes)


def _last(x: jax.Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))
