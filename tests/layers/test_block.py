"""Attention, feed-forward and blocks against their formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.attention import Attention, AttentionConfig, QKNorm
from jaxlm.layers.block import Arrangement, Block, BlockConfig, Placement, Surroundings
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.feed_forward import Activation, FeedForward, FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import Parametrization
from jaxlm.layers.positions import Alibi, RelativePositions, Rope, rotation
from pallas_kernels.attention import attention
from pallas_kernels.masks import Causal, Full, Window

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
F32 = jnp.dtype("float32")
AROUND = Surroundings(Causal(), {})


def block_config(**options):
    return BlockConfig(AttentionConfig(2, 8), FeedForwardConfig(24), NormConfig(), **options)


def test_activations():
    x = np.linspace(-3, 3, 13)
    erf = np.vectorize(math.erf)
    expected = {
        Activation.GELU: x * 0.5 * (1 + erf(x / np.sqrt(2))),
        Activation.GELU_TANH: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        Activation.RELU: np.maximum(x, 0),
        Activation.SILU: x / (1 + np.exp(-x)),
        Activation.SIGMOID: 1 / (1 + np.exp(-x)),
        Activation.TANH: np.tanh(x),
        Activation.SQUARED_RELU: np.maximum(x, 0) ** 2,
        Activation.IDENTITY: x,
    }
    assert set(expected) == set(Activation)
    for activation, values in expected.items():
        np.testing.assert_allclose(activation(jnp.asarray(x, jnp.float32)), values, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("gated, bias", [(True, False), (False, True), (True, True)])
def test_feed_forward(gated, bias, make, build):
    layer = build(
        lambda key: FeedForward(
            FeedForwardConfig(24, Activation.RELU, gated, bias), make, residual_gain=1.0, dtype=F32, key=key
        )
    )

    def linear(module, x):
        return x @ np.asarray(module.kernel) + (np.asarray(module.bias) if bias else 0.0)

    hidden = linear(layer.up, X) * np.maximum(linear(layer.gate, X), 0) if gated else np.maximum(linear(layer.up, X), 0)
    out, side = layer(X, LOCAL)
    np.testing.assert_allclose(out, linear(layer.down, hidden), rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(side)


ATTENTIONS = {
    "plain": AttentionConfig(4, 8),
    "grouped, biases": AttentionConfig(4, 8, 2, qkv_bias=True, output_bias=True),
    "rope, norm of heads": AttentionConfig(4, 8, position=Rope(), qk_norm="head", qk_norm_config=NormConfig()),
    "norm of all, cap": AttentionConfig(4, 8, 2, qk_norm="all", qk_norm_config=NormConfig(), soft_cap=3.0),
    "window, scale, sinks": AttentionConfig(4, 8, window=(2, 0), scale=1.0, sinks=True),
    "alibi": AttentionConfig(4, 8, position=Alibi()),
    "relative": AttentionConfig(4, 8, position=RelativePositions(8, 6, False)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, make, build):
    config = ATTENTIONS[name]
    layer = build(lambda key: Attention(config, make, residual_gain=1.0, dtype=F32, key=key))
    positions = jnp.arange(6)[None].repeat(2, 0)
    turn = rotation(config.position, positions, 8) if isinstance(config.position, Rope) else None
    out = layer(X, X, Causal(), rotation=turn, bias=None, context=LOCAL)

    def project(linear):
        y = np.einsum("bte,ehd->bthd", X, linear.kernel[...])
        return y if linear.bias is None else y + np.asarray(linear.bias)

    q, k, v = project(layer.query), project(layer.key), project(layer.value)
    if config.qk_norm is not QKNorm.NONE:
        axes = (-1,) if config.qk_norm is QKNorm.HEAD else (-2, -1)
        q, k = (
            y / np.sqrt((y**2).mean(axes, keepdims=True) + 1e-6) * np.asarray(norm.scale)
            for y, norm in ((q, layer.query_norm), (k, layer.key_norm))
        )
    if turn is not None:
        frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
        turns = np.exp(1j * np.arange(6)[:, None, None] * frequencies)
        q, k = (np.concatenate([z.real, z.imag], -1) for z in ((y[..., :4] + 1j * y[..., 4:]) * turns for y in (q, k)))
    bias = None
    if isinstance(config.position, Alibi):
        distance = np.abs(np.arange(6)[:, None] - np.arange(6))
        bias = -(2.0 ** -np.array([2, 4, 6, 8]))[:, None, None] * distance
    elif isinstance(config.position, RelativePositions):
        # 8 buckets: distances 0..3 have their own; 5 lies 4 log(5/4) / log(6/4) = 2.2 buckets after 4.
        bucket = np.array([0, 1, 2, 3, 4, 6])[np.maximum(np.arange(6)[:, None] - np.arange(6), 0)]
        bias = np.asarray(layer.relative.table)[bucket].transpose(2, 0, 1)
    mask = Causal() & Window(2, 0) if config.window else Causal()
    options = dict(soft_cap=config.soft_cap, scale=config.scale, sinks=layer.sinks[...] if config.sinks else None)
    found = attention(*map(jnp.asarray, (q, k, v)), mask=mask, bias=bias, **options)
    expected = np.einsum("bthd,hde->bte", found, layer.output.kernel[...])
    expected = expected + (np.asarray(layer.output.bias) if config.output_bias else 0.0)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", list(Placement))
def test_placements(placement, make, build):
    block = build(lambda key: Block(block_config(placement=placement), make, dtype=F32, key=key))

    def attend(y):
        return block.attention(y, y, Causal(), rotation=None, bias=None, context=LOCAL)

    def branch(x, f, norms):
        formulas = {
            Placement.PRE: lambda: x + f(norms["before"](x)),
            Placement.POST: lambda: norms["after"](x + f(x)),
            Placement.SANDWICH: lambda: x + norms["after"](f(norms["before"](x))),
            Placement.OUTPUT: lambda: x + norms["after"](f(x)),
        }
        return formulas[placement]()

    x = branch(X, attend, block.attention_norms)
    x = branch(x, lambda y: block.feed_forward(y, LOCAL)[0], block.feed_forward_norms)
    np.testing.assert_allclose(block(X, AROUND, LOCAL)[0], x, rtol=1e-5, atol=1e-5)


def test_parallel_block_reads_one_norm_twice(make, build):
    block = build(lambda key: Block(block_config(arrangement=Arrangement.PARALLEL), make, dtype=F32, key=key))
    y = block.attention_norms["before"](X)
    expected = X + block.attention(y, y, Causal(), rotation=None, bias=None, context=LOCAL)
    expected = expected + block.feed_forward(y, LOCAL)[0]
    np.testing.assert_allclose(block(X, AROUND, LOCAL)[0], expected, rtol=1e-5, atol=1e-5)
    assert block.feed_forward_norms is None


def test_parallel_branches_may_have_a_norm_each(make, build):
    config = block_config(arrangement=Arrangement.PARALLEL_NORMS)
    block = build(lambda key: Block(config, make, dtype=F32, key=key))
    norms = block.attention_norms["before"], block.feed_forward_norms["before"]
    norms[1].scale[...] = jnp.linspace(0.5, 2.0, norms[1].scale[...].size)
    y = norms[0](X)
    expected = X + block.attention(y, y, Causal(), rotation=None, bias=None, context=LOCAL)
    expected = expected + block.feed_forward(norms[1](X), LOCAL)[0]
    np.testing.assert_allclose(block(X, AROUND, LOCAL)[0], expected, rtol=1e-5, atol=1e-5)


def test_cross_attention_reads_the_encoder(make, build):
    config = block_config(cross_attention=AttentionConfig(2, 8))
    block = build(lambda key: Block(config, make, dtype=F32, key=key))
    encoded = X[:, ::-1, :] * 2
    around = dataclasses.replace(AROUND, encoded=encoded, cross_mask=Full())
    y = block.attention_norms["before"](X)
    x = X + block.attention(y, y, Causal(), rotation=None, bias=None, context=LOCAL)
    y = block.cross_attention_norms["before"](x)
    x = x + block.cross_attention(y, encoded, Full(), rotation=None, bias=None, context=LOCAL)
    x = x + block.feed_forward(block.feed_forward_norms["before"](x), LOCAL)[0]
    np.testing.assert_allclose(block(X, around, LOCAL)[0], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["attention", "feed_forward", "block"])
def test_dropout_acts_where_it_is_set_and_only_with_a_key(where, make, build):
    plain = block_config()
    changes = {
        "attention": dict(attention=dataclasses.replace(plain.attention, dropout=0.5)),
        "feed_forward": dict(feed_forward=dataclasses.replace(plain.feed_forward, dropout=0.5)),
        "block": dict(dropout=0.5),
    }[where]
    reference = build(lambda key: Block(plain, make, dtype=F32, key=key))
    block = build(lambda key: Block(dataclasses.replace(plain, **changes), make, dtype=F32, key=key))
    np.testing.assert_array_equal(block(X, AROUND, LOCAL)[0], reference(X, AROUND, LOCAL)[0])
    first, again, other = (block(X, AROUND, Context(dropout_key=jax.random.key(i)))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, reference(X, AROUND, LOCAL)[0])


def test_dropout_keeps_the_mean():
    x = jnp.ones((200, 200))
    out = np.asarray(Context(dropout_key=jax.random.key(0)).dropout(x, 0.25))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs((out == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / out.size)


def test_residual_branches_follow_completep(make, build):
    def block(depth):
        deep = dataclasses.replace(make, depth=depth, parametrization=Parametrization("completep", 16, 2, 8))
        return build(lambda key: Block(block_config(), deep, dtype=F32, key=key))

    assert block(2).multiplier == 1.0 and block(8).multiplier == 0.25
    shallow, deep = (block(d) for d in (2, 8))
    deep.feed_forward_norms["before"].scale[...] *= 0.0  # the second branch is silent in both
    shallow.feed_forward_norms["before"].scale[...] *= 0.0
    (from_deep, _), (from_shallow, _) = (block(X, AROUND, LOCAL) for block in (deep, shallow))
    np.testing.assert_allclose(from_deep - X, (from_shallow - X) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make_config, message",
    [
        (lambda: AttentionConfig(6, 8, 4), "num_kv_heads=4 must divide num_heads=6"),
        (lambda: AttentionConfig(4, 8, qk_norm="head"), "set both or neither"),
        (lambda: AttentionConfig(4, 8, window=(-1, 0)), "neither negative"),
        (lambda: AttentionConfig(4, 8, backend="flash"), "AttentionConfig.backend='flash' does not exist; there are"),
        (lambda: AttentionConfig(4, 8, position=Rope(fraction=0.1)), "leaves no pair"),
        (lambda: AttentionConfig(4, 8, qk_norm="heads"), "'heads' is not a valid QKNorm"),
        (lambda: block_config(arrangement="parallel", placement="post"), "A parallel block has placement 'pre'"),
        (lambda: block_config(cross_attention=AttentionConfig(2, 8, position=Rope())), "must be None"),
        (lambda: RelativePositions(32, 16, False), "max_distance=16 must be greater than 16"),
        (lambda: FeedForwardConfig(8, "swish"), "'swish' is not a valid Activation"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()
