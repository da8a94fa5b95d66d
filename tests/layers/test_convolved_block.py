"""A convolution beside a block sees its neighbours in the text, and nothing of another one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import AttentionConfig, ConvolvedBlockConfig, FeedForwardConfig, NormConfig, NormKind
from jaxlm.layers.block import Block, Surroundings
from jaxlm.layers.context import LOCAL, Context
from pallas_kernels import dropout
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


def definition(block, activation, context):
    """What the block makes of X, given what it makes of it without the convolution."""
    config = block.config
    inside = np.asarray(Block.__call__(block, X, Surroundings(Full(), {}), context)[0])[0]
    kernel, bias = np.asarray(block.convolution.kernel[...]), np.asarray(block.convolution.bias[...])
    padded = np.pad(np.asarray(X[0]), ((2, 2), (0, 0)))
    beside = np.stack([np.einsum("ke,kef->f", padded[t : t + 5], kernel) for t in range(T)]) + bias
    if context.dropout_key is not None:
        seed = dropout.seed_of(context.fold("convolution").dropout_key)
        beside *= dropout.keep_entries(seed, np.indices((1, T, E)), config.dropout)[0] / (1 - config.dropout)
    y = inside + activation(beside)
    y = y - y.mean(-1, keepdims=True)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm.epsilon)
    return expected * np.asarray(block.convolution_norm.scale[...])


def test_it_is_its_definition(block):
    expected = definition(block, lambda x: np.maximum(x, 0), LOCAL)
    np.testing.assert_allclose(run(block, X, Full())[0], expected, atol=1e-5)


def test_dropout_comes_before_the_activation(make, build):
    config = dataclasses.replace(CONFIG, dropout=0.4, convolution_activation="tanh")
    block = build(lambda key: config.build(make, dtype=jnp.dtype("float32"), key=key))
    context = Context(dropout_key=jax.random.key(3))
    found = block(X, Surroundings(Full(), {}), context)[0]
    np.testing.assert_allclose(found[0], definition(block, np.tanh, context), atol=1e-5)


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
