"""Linear attention against sums over pairs of tokens in float64; and the laws of packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import (
    Activation,
    ChannelDecay,
    FeatureMap,
    FixedDecay,
    HeadDecay,
    LinearAttentionConfig,
    NormConfig,
    Rope,
)
from jaxlm.layers.context import LOCAL
from jaxlm.layers.positions import rotation
from pallas_kernels.masks import Causal, PrefixLM, Segments

F32 = jnp.dtype("float32")
LENGTH = 21
CONFIGS = {
    "katharopoulos": LinearAttentionConfig(2, 6, 4, feature_map=FeatureMap.ELU_PLUS_ONE, normalized=True),
    "hedgehog": LinearAttentionConfig(2, 6, feature_map=FeatureMap.SOFTMAX, normalized=True, qkv_bias=True),
    "retention": LinearAttentionConfig(
        2, 6, 4, position=Rope(), decay=FixedDecay(1.0), output_norm=NormConfig(), gate=Activation.SILU
    ),
    "gated retention": LinearAttentionConfig(2, 6, 4, decay=HeadDecay(2.0), scale=1.0, output_bias=True),
    "gla": LinearAttentionConfig(2, 6, 4, decay=ChannelDecay(3, 2.0), feature_map="silu", gate="silu"),
}
X = np.random.default_rng(1).normal(size=(2, LENGTH, 16)).astype(np.float32)
SEGMENTS = np.stack([np.repeat([1, 2, 0], [8, 10, 3]), np.ones(LENGTH, int)]).astype(np.int32)
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in (8, 10, 3)]), np.arange(LENGTH)]).astype(np.int32)


def linear(module, x):
    """x [T, *inputs] -> [T, *outputs]."""
    out = np.tensordot(x, np.asarray(module.kernel, np.float64), module.contracted)
    return out if module.bias is None else out + np.asarray(module.bias, np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


MAPS = {
    FeatureMap.IDENTITY: lambda x: x,
    FeatureMap.SILU: lambda x: x * sigmoid(x),
    FeatureMap.ELU_PLUS_ONE: lambda x: np.where(x > 0, x + 1, np.exp(x)),
    FeatureMap.SOFTMAX: softmax,
}


def turned(x, base=10000.0):
    """RoPE of x [T, H, D]: the first half of a head's dimensions with the second."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] / base ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def definition(layer, x):
    """o_t = sum over j <= t of (q_t . prod of decays . k_j) v_j, for one text x [T, E]."""
    config = layer.config
    q, k = (MAPS[config.feature_map](linear(projection, x)) for projection in (layer.query, layer.key))
    if config.position is not None:
        q, k = turned(q), turned(k)
    v = linear(layer.value, x)
    kept = np.ones(k.shape)
    match config.decay:
        case FixedDecay(first, step):
            kept = kept * (1 - 2.0 ** -(first + step * np.arange(config.num_heads)))[None, :, None]
        case HeadDecay(temperature):
            kept = kept * sigmoid(linear(layer.decay.up, x))[..., None] ** (1 / temperature)
        case ChannelDecay(_, temperature):
            kept = sigmoid(linear(layer.decay.up, linear(layer.decay.down, x))) ** (1 / temperature)
    out = np.zeros(v.shape)
    for t in range(len(x)):
        weights = [(q[t] * kept[j + 1 : t + 1].prod(0) * k[j]).sum(-1) for j in range(t + 1)]
        total = np.sum(weights, axis=0)[:, None] if config.normalized else 1 / layer.scale
        out[t] = sum(w[:, None] * v[j] for j, w in enumerate(weights)) / total
    if config.output_norm is not None:
        out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(layer.norm.scale)
    if config.gate is not None:
        gate = linear(layer.gate, x)
        out = out * gate * sigmoid(gate)
    return linear(layer.output, out)


@pytest.fixture
def layer(make, build):
    return lambda name: build(lambda key: CONFIGS[name].build(make, residual_gain=1.0, dtype=F32, key=key))


def applied(module, x, mask=None):
    turns = None if module.config.position is None else rotation(module.config.position, POSITIONS[: len(x)], 6)
    mask = Causal() & Segments(jnp.asarray(SEGMENTS[: len(x)])) if mask is None else mask
    return module(x, x, mask, rotation=turns, bias=None, context=LOCAL)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_is_its_texts_by_the_definition(name, layer):
    module = layer(name)
    found = np.asarray(jax.jit(lambda x: applied(module, x))(X))
    for row, text in ((0, 1), (0, 2), (1, 1)):
        inside = SEGMENTS[row] == text
        expected = definition(module, X[row, inside].astype(np.float64))
        np.testing.assert_allclose(found[row, inside], expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["katharopoulos", "gla"])
def test_texts_of_a_row_do_not_touch_not_even_by_nans(name, layer):
    """Law 1, forwards and backwards: the second text and the padding are NaN, then something else."""
    module = layer(name)
    first = SEGMENTS[:1] == 1

    @jax.jit
    def run(x):
        def loss(x):
            out = applied(module, x)
            return jnp.sum(jnp.where(first[..., None], jnp.sin(out), 0.0)), out

        return jax.grad(loss, has_aux=True)(x)

    results = [run(jnp.where(first[..., None], X[:1], other)) for other in (X[1:], np.nan)]
    for gradient, out in results:
        np.testing.assert_array_equal(out[first], results[0][1][first])
        np.testing.assert_array_equal(gradient[first], results[0][0][first])
        assert np.isfinite(out[first]).all() and np.abs(gradient[first]).max() > 0


def test_what_it_cannot_do_is_refused(layer):
    with pytest.raises(TypeError, match="it cannot do what the mask PrefixLM & Segments says"):
        applied(layer("gla"), X, PrefixLM(3) & Segments(jnp.asarray(SEGMENTS)))
    with pytest.raises(ValueError, match="normalized divides by a sum of weights, which feature_map='silu'"):
        LinearAttentionConfig(2, 6, feature_map="silu", normalized=True)
    with pytest.raises(ValueError, match="LinearAttentionConfig.backend='flash' does not exist"):
        LinearAttentionConfig(2, 6, backend="flash")
    with pytest.raises(ValueError, match="FixedDecay needs first > 0"):
        FixedDecay(0.0)
