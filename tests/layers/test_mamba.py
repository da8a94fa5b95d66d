"""Mamba and Mamba-2 against their recurrences, one token after the other in float64; and the laws of packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import (
    InitConfig,
    Mamba2Config,
    MambaBlockConfig,
    MambaConfig,
    NormConfig,
    Parametrization,
    ResidualInit,
    StackConfig,
    StepSizes,
)
from jaxlm.layers.block import Surroundings
from jaxlm.layers.context import LOCAL
from jaxlm.layers.parameters import ParameterMaker, PathKey
from jaxlm.layers.stack import Stack
from pallas_kernels.masks import Causal, Full, PrefixLM, Segments, Window

F32 = jnp.dtype("float32")
LENGTH = 21
MIXERS = {
    "mamba": MambaConfig(12, step_rank=3, state=4, bias=True),
    "mamba2": Mamba2Config(6, head_dim=4, state=5, groups=2, bias=True, step_limit=(0.1, 1.0)),
}
X = np.random.default_rng(1).normal(size=(2, LENGTH, 16)).astype(np.float32)
# Two texts and padding; one text.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [8, 10, 3]), np.ones(LENGTH, int)]).astype(np.int32)


@pytest.fixture
def mixer(make, build):
    return lambda name: build(lambda key: MIXERS[name].build(make, residual_gain=1.0, dtype=F32, key=key))


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def linear(module, x):
    """x [T, *inputs] -> [T, *outputs]."""
    out = np.tensordot(x, np.asarray(module.kernel, np.float64), module.contracted)
    return out if module.bias is None else out + np.asarray(module.bias, np.float64)


def convolved(module, x):
    """x [T, ...], zeros before it."""
    kernel = np.asarray(module.kernel, np.float64)
    padded = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
    out = sum(padded[tap : tap + len(x)] * kernel[tap] for tap in range(len(kernel)))
    return out + np.asarray(module.bias, np.float64)


def mamba(layer, x):
    """arXiv 2312.00752, algorithm 2, for one text x [T, E]."""
    u, gate = silu(convolved(layer.convolution, linear(layer.value, x))), linear(layer.gate, x)
    dt = softplus(linear(layer.step_up, linear(layer.step_down, u)) + np.asarray(layer.step_bias))
    write, read = linear(layer.write, u), linear(layer.read, u)
    a, state, ys = -np.exp(np.asarray(layer.log_decay, np.float64)), 0.0, []
    for t in range(len(x)):
        state = np.exp(dt[t][:, None] * a) * state + (dt[t] * u[t])[:, None] * write[t]
        ys.append(state @ read[t] + np.asarray(layer.skip) * u[t])
    return linear(layer.output, np.array(ys) * silu(gate))


def mamba2(layer, x):
    """arXiv 2405.21060, section 7, for one text x [T, E]."""
    config = layer.config
    u = silu(convolved(layer.value_convolution, linear(layer.value, x)))
    write = silu(convolved(layer.write_convolution, linear(layer.write, x)))
    read = silu(convolved(layer.read_convolution, linear(layer.read, x)))
    dt = np.clip(softplus(linear(layer.step, x) + np.asarray(layer.step_bias)), *config.step_limit)
    a, ys = -np.exp(np.asarray(layer.log_decay, np.float64)), np.zeros(u.shape)
    for head in range(config.num_heads):
        group, state = head * config.groups // config.num_heads, np.zeros((config.head_dim, config.state))
        for t in range(len(x)):
            state = np.exp(dt[t, head] * a[head]) * state + np.outer(dt[t, head] * u[t, head], write[t, group])
            ys[t, head] = state @ read[t, group] + np.asarray(layer.skip)[head] * u[t, head]
    gated = (ys * silu(linear(layer.gate, x))).reshape(len(x), config.groups, -1)
    normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + config.epsilon)
    return linear(layer.output, normed.reshape(ys.shape) * np.asarray(layer.scale))


@pytest.mark.parametrize("name", MIXERS)
def test_a_packed_row_is_its_texts_by_the_recurrence(name, mixer):
    layer = mixer(name)
    found = np.asarray(jax.jit(lambda x, s: layer(x, s, LOCAL))(X, SEGMENTS))
    for row, text in ((0, 1), (0, 2), (1, 1)):
        inside = SEGMENTS[row] == text
        expected = {"mamba": mamba, "mamba2": mamba2}[name](layer, X[row, inside].astype(np.float64))
        np.testing.assert_allclose(found[row, inside], expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(layer(X[1:], None, LOCAL), layer(X[1:], SEGMENTS[1:], LOCAL))


@pytest.mark.parametrize("name", MIXERS)
def test_texts_of_a_row_do_not_touch_not_even_by_nans(name, mixer):
    """Law 1, forwards and backwards: the second text and the padding are NaN, then something else."""
    layer = mixer(name)
    first = SEGMENTS[:1] == 1

    @jax.jit
    def run(x):
        def loss(x):
            out = layer(x, SEGMENTS[:1], LOCAL)
            return jnp.sum(jnp.where(first[..., None], jnp.sin(out), 0.0)), out

        return jax.grad(loss, has_aux=True)(x)

    results = [run(jnp.where(first[..., None], X[:1], other)) for other in (X[1:], np.nan, 1e30)]
    for gradient, out in results:
        np.testing.assert_array_equal(out[first], results[0][1][first])
        np.testing.assert_array_equal(gradient[first], results[0][0][first])
        assert np.isfinite(out[first]).all() and np.abs(gradient[first]).max() > 0
    gradient, _ = results[0]
    np.testing.assert_array_equal(gradient[~first], 0.0)


def test_where_parameters_start():
    """Step sizes log-uniform in [0.001, 0.1], decays 1 ... N and between 1 and 16, D 1: the papers' code."""
    make = ParameterMaker(InitConfig(), Parametrization(), width=16)
    configs = (MambaConfig(4000, 4, state=3), Mamba2Config(4000, 1, state=2))
    layers = [c.build(make, residual_gain=1.0, dtype=F32, key=PathKey(jax.random.key(0))) for c in configs]
    for layer in layers:
        steps = softplus(np.asarray(layer.step_bias, np.float64))
        assert steps.min() >= 0.00099 and steps.max() <= 0.1001
        # The logarithm is uniform: mean log 0.01, standard deviation log(100) / sqrt(12).
        assert abs(np.log(steps).mean() - np.log(0.01)) < 0.1
        assert abs(np.log(steps).std() - np.log(100) / np.sqrt(12)) < 0.05
        np.testing.assert_array_equal(layer.skip, 1.0)
    np.testing.assert_allclose(np.exp(layers[0].log_decay), np.broadcast_to([1, 2, 3], (4000, 3)), rtol=1e-6)
    decays = np.exp(layers[1].log_decay)
    assert decays.min() >= 1 and decays.max() <= 16 and abs(decays.mean() - 8.5) < 0.3
    floored = MambaConfig(64, 4, steps=StepSizes(1e-6, 1e-6, floor=0.01))
    biases = floored.build(make, residual_gain=1.0, dtype=F32, key=PathKey(jax.random.key(0))).step_bias
    np.testing.assert_allclose(softplus(np.asarray(biases, np.float64)), 0.01, rtol=1e-4)


def test_a_stack_of_mamba_counts_one_branch_a_layer(make):
    """Matrices that write to the residual stream start smaller by sqrt(layers), not sqrt(2 layers)."""
    block = MambaBlockConfig(MIXERS["mamba"], NormConfig())
    config = StackConfig((block,), 4)
    by_depth = ParameterMaker(InitConfig(residual=ResidualInit.BY_DEPTH), Parametrization(), width=16)
    stacks = [Stack(config, m, dtype=F32, key=PathKey(jax.random.key(0))) for m in (make, by_depth)]
    kernels = [stack.layers["0"].mixer.output.kernel[...] for stack in stacks]
    np.testing.assert_allclose(kernels[1], kernels[0] / 2, rtol=1e-6)


def test_what_a_running_state_cannot_do_is_refused(make):
    with pytest.raises(ValueError, match="no mup parametrisation"):
        scaled = ParameterMaker(InitConfig(), Parametrization("mup"), width=16)
        MIXERS["mamba2"].build(scaled, residual_gain=1.0, dtype=F32, key=PathKey(jax.random.key(0)))
    with pytest.raises(ValueError, match="groups=4 must divide num_heads=6"):
        Mamba2Config(6, groups=4)
    with pytest.raises(ValueError, match="MambaConfig.backend='cuda' does not exist"):
        MambaConfig(8, 1, backend="cuda")
    with pytest.raises(ValueError, match="step_limit must be"):
        Mamba2Config(6, step_limit=(1.0, 0.5))
    block = MambaBlockConfig(MIXERS["mamba"], NormConfig()).build(make, dtype=F32, key=PathKey(jax.random.key(0)))
    ids = jnp.asarray(SEGMENTS)
    for mask in (Full(), PrefixLM(3) & Segments(ids), Causal() & Window(3, 0), Causal(1), Segments(ids)):
        with pytest.raises(TypeError, match="A running state sees what came before it"):
            block(X, Surroundings(mask, {}), LOCAL)
