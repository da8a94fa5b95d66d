"""A convolution beside a block sees its neighbours in the text, and nothing of another one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import AttentionConfig, ConvolvedBlockConfig, FeedForwardConfig, NormConfig, NormKind
from jaxlm.layers.block import Block, Surroundings
from jaxlm.layers.context import LOCAL
from pallas_kernels.masks import Causal, Full, Segments

T, E = 9, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, E)), jnp.float32)
CONFIG = ConvolvedBlockConfig(
    AttentionConfig(2, 8), FeedForwardConfig(24), NormConfig(NormKind.LAYER), taps=5, convolution_activation="relu"
)


@pytest.fixture
def block(make, build):
    return build(lambda key: CONFIG.build(make, dtype=jnp.dtype("float32"), key=key))


def run(block, x, mask):
    return block(x, Surroundings(mask, {}), LOCAL)[0]


def test_it_is_its_definition(block):
    inside = np.asarray(Block.__call__(block, X, Surroundings(Full(), {}), LOCAL)[0])[0]
    kernel, bias = np.asarray(block.convolution.kernel[...]), np.asarray(block.convolution.bias[...])
    padded = np.pad(np.asarray(X[0]), ((2, 2), (0, 0)))
    beside = np.stack([np.einsum("ke,kef->f", padded[t : t + 5], kernel) for t in range(T)]) + bias
    y = inside + np.maximum(beside, 0)
    y = y - y.mean(-1, keepdims=True)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + CONFIG.norm.epsilon)
    expected = expected * np.asarray(block.convolution_norm.scale[...])
    np.testing.assert_allclose(run(block, X, Full())[0], expected, atol=1e-5)


def test_a_packed_row_is_its_texts(block):
    packed = run(block, X, Segments(jnp.array([[1] * 4 + [2] * 5])))
    apart = [run(block, x, Full()) for x in (X[:, :4], X[:, 4:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-5)


def test_it_serves_encoders(block):
    with pytest.raises(ValueError, match="serves encoders; it cannot do what the mask"):
        run(block, X, Causal())
    with pytest.raises(ValueError, match="writes no text; it serves encoders"):
        block.prefill(X, None)
    with pytest.raises(ValueError, match="taps=4 must be odd"):
        ConvolvedBlockConfig(AttentionConfig(2, 8), FeedForwardConfig(24), NormConfig(), taps=4)
