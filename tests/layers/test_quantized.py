"""Products in 8 bits: what they give, forward and backward, and that compilers keep them in 8 bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.quantized import Quantization, quantized_matmul
from pallas_kernels import ahead_of_time

X = jax.random.normal(jax.random.key(0), (3, 5, 64)).astype(jnp.bfloat16)
W = jax.random.normal(jax.random.key(1), (64, 4, 8)).astype(jnp.bfloat16)

# Relative rounding errors of one operand: int8 keeps the largest entry of 64 normal ones, about 2.4 deviations, as 127,
# so that steps are 0.019 deviations and their error 0.019 / sqrt(12) = 0.55%; e4m3 has 3 bits of mantissa, errors of
# 2.5%, and e5m2 2 bits, 5%. A product has both operands' errors, and the output's rounding to bfloat16, 0.2%.
ERRORS = {
    Quantization.INT8: {"y": 0.01, "dx": 0.01, "dw": 0.003},
    Quantization.FP8: {"y": 0.045, "dx": 0.07, "dw": 0.07},
}


def results(multiply):
    weights = jax.random.normal(jax.random.key(2), (3, 5, 4, 8))
    y = multiply(X, W)
    dx, dw = jax.grad(lambda x, w: jnp.sum(multiply(x, w).astype(jnp.float32) * weights), (0, 1))(X, W)
    return {"y": y, "dx": dx, "dw": dw}


@pytest.mark.parametrize("quantization", Quantization, ids=str)
def test_products_and_gradients_err_as_their_types_round(quantization):
    exact = results(lambda x, w: jnp.einsum("bte,ehd->bthd", x, w, preferred_element_type=jnp.float32))
    found = results(lambda x, w: quantized_matmul(x, w, 1, quantization))
    for name, bound in ERRORS[quantization].items():
        assert (found[name].dtype, found[name].shape) == (jnp.bfloat16, exact[name].shape)
        error = np.linalg.norm(np.float32(found[name]) - np.float32(exact[name])) / np.linalg.norm(exact[name])
        assert bound / 4 < error < bound or (name, quantization) == ("dw", Quantization.INT8) and error < bound, name


@pytest.mark.parametrize("quantization", Quantization, ids=str)
def test_scales_are_of_each_row_and_column(quantization):
    """A token a million times larger than the others costs them nothing; zeros stay zeros, NaNs stay where they are."""
    x = X.at[0, 0].multiply(1e6).at[1, 1].set(0.0).at[2, 2, 3].set(jnp.nan)
    plain, found = quantized_matmul(X, W, 1, quantization), quantized_matmul(x, W, 1, quantization)
    untouched = np.ones((3, 5), bool)
    untouched[[0, 1, 2], [0, 1, 2]] = False
    np.testing.assert_array_equal(np.float32(found)[untouched], np.float32(plain)[untouched])
    np.testing.assert_array_equal(np.float32(found)[1, 1], 0.0)
    assert np.isnan(np.float32(found)[2, 2]).all()


@pytest.mark.parametrize(
    "topology, quantization, operand",
    [("v6e:2x2", Quantization.INT8, "s8"), ("h200", Quantization.FP8, "f8e4m3fn")],
    ids=str,
)
def test_compiled_products_have_8_bit_operands(topology, quantization, operand):
    """Forward, the input's gradient, and in fp8 the kernel's."""
    if reason := ahead_of_time.why_not(topology):
        pytest.skip(reason)
    x, w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)

    def step(x, w, g):
        y, back = jax.vjp(lambda x, w: quantized_matmul(x, w, 1, quantization), x, w)
        return y, back(g)

    g = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    text = ahead_of_time.compile_for(topology, step, x, w, g).as_text()
    types = dict(re.findall(r"%([\w.\-]+) = ([a-z]\w*)\[", text))
    products = re.findall(r"= \S+ (?:convolution|dot|custom-call)\(%([\w.\-]+), %([\w.\-]+)", text)
    small = [pair for pair in products if operand in (types.get(pair[0]), types.get(pair[1]))]
    assert len(small) >= (2 if quantization is Quantization.INT8 else 3), products
