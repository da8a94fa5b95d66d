"""A mixture of experts equals its definition, drops nothing, and its router's losses are those of the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.layers.context import LOCAL
from jaxlm.layers.feed_forward import Activation, FeedForwardConfig
from jaxlm.layers.mixture_of_experts import MixtureOfExpertsConfig, Scoring, highest
from jaxlm.layers.parameters import InitConfig, InitScheme, ParameterMaker, Parametrization, PathKey

F32 = jnp.dtype("float32")
B, T, E = 2, 6, 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, E)), jnp.float32)
PRESENT = jnp.arange(T) < jnp.array([[6], [4]])
PLAIN = MixtureOfExpertsConfig(24, Activation.SILU, num_experts=4, experts_per_token=2, balance_loss=0.02, z_loss=0.003)
CONFIGS = {
    "mixtral": PLAIN,
    "switch": dataclasses.replace(PLAIN, experts_per_token=1, normalize=False, gated=False, activation="relu"),
    "deepseek": dataclasses.replace(
        PLAIN, num_experts=6, experts_per_token=3, scoring="sigmoid", scale=2.5, z_loss=0.0, shared=FeedForwardConfig(8)
    ),
    "qwen2": dataclasses.replace(
        PLAIN, normalize=False, shared=FeedForwardConfig(8), shared_gate=Activation.SIGMOID, z_loss=0.0
    ),
    "all of them": dataclasses.replace(PLAIN, num_experts=3, experts_per_token=3),
}


def layer_of(config, make, build):
    return build(lambda key: config.build(make, residual_gain=1.0, dtype=F32, key=key))


def definition(config, params, x, present):
    """Token by token: output [B, T, E] and the losses, sums over tokens; in float64."""

    def act(y):
        return y / (1 + np.exp(-y)) if config.activation is Activation.SILU else np.maximum(y, 0)

    def feed_forward(y, up, down, gate=None):
        return (act(y @ up) if gate is None else act(y @ gate) * (y @ up)) @ down

    logits = x @ params["router"]
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-logits))
    scores = softmax if config.scoring is Scoring.SOFTMAX else sigmoid
    out, choices = np.zeros_like(x), np.zeros(config.num_experts)
    for b, t in np.ndindex(B, T):
        best = np.argsort(-scores[b, t])[: config.experts_per_token]
        weights = scores[b, t, best] / (scores[b, t, best].sum() if config.normalize else 1)
        if present[b, t]:
            choices[best] += 1
            for e, weight in zip(best, weights):
                kernels = {name: kernel[e] for name, kernel in params["experts"].items()}
                out[b, t] += config.scale * weight * feed_forward(x[b, t], **kernels)
        if config.shared:
            shared = {name: linear["kernel"] for name, linear in params["shared"].items()}
            weight = 1.0 if config.shared_gate is None else 1 / (1 + np.exp(-x[b, t] @ params["shared_gate"]))
            out[b, t] += weight * feed_forward(x[b, t], **shared)
    tokens = present.sum()
    mean_share = (scores / scores.sum(-1, keepdims=True))[present].mean(0)
    balance = config.num_experts * (choices / choices.sum() * mean_share).sum()
    losses = {"router_balance": config.balance_loss * balance * tokens}
    if config.z_loss:
        losses["router_z"] = config.z_loss * (np.log(np.exp(logits).sum(-1)) ** 2)[present].sum()
    entropy = -(softmax * np.log(softmax)).sum(-1)[present].mean() if config.scoring is Scoring.SOFTMAX else None
    return out, losses, choices.max() / choices.mean(), entropy


def float64(layer):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(layer)))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_token_goes_through_its_experts(name, make, build):
    config = CONFIGS[name]
    layer = layer_of(config, make, build)
    present = np.asarray(PRESENT)
    expected, losses, load, entropy = definition(config, float64(layer), np.asarray(X, np.float64), present)
    out, side = layer(X, LOCAL, present=PRESENT)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert set(side.losses) == set(losses)
    for term, value in losses.items():
        np.testing.assert_allclose(side.losses[term], value, rtol=1e-5)
    np.testing.assert_allclose(side.metrics["router/load"], (load, 1), rtol=1e-6)
    if entropy is not None:
        total, weight = side.metrics["router/entropy"]
        np.testing.assert_allclose((total / weight, weight), (entropy, present.sum()), rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_gradients_are_those_of_the_dense_form(name, make, build):
    """Every expert on every token, times a weight that is 0 for those not chosen."""
    config = CONFIGS[name]
    graph, state = nnx.split(layer_of(config, make, build))

    def sparse(state, x):
        out, side = nnx.merge(graph, state)(x, LOCAL, present=PRESENT)
        return jnp.sum(jnp.sin(out)) + sum(side.losses.values())

    def dense(state, x):
        layer = nnx.merge(graph, state)
        kernels = {name: kernel[...] for name, kernel in layer.experts.items()}
        logits = x @ layer.router[...]
        scores = jax.nn.softmax(logits) if config.scoring is Scoring.SOFTMAX else jax.nn.sigmoid(logits)
        threshold = jnp.sort(scores, -1)[..., -config.experts_per_token, None]
        chosen = jax.lax.stop_gradient((scores >= threshold) * PRESENT[..., None])
        weights = scores * (scores >= threshold)
        weights = weights / weights.sum(-1, keepdims=True) * config.scale * chosen
        hidden = jnp.einsum("bte,xef->btxf", x, kernels["up"])
        hidden = hidden * jax.nn.silu(jnp.einsum("bte,xef->btxf", x, kernels["gate"]))
        out = jnp.einsum("btxf,xfe,btx->bte", hidden, kernels["down"], weights)
        if config.shared:
            out = out + layer.shared(x, LOCAL)[0]
        share = (scores / scores.sum(-1, keepdims=True) * PRESENT[..., None]).sum((0, 1)) / PRESENT.sum()
        balance = config.num_experts * (chosen.sum((0, 1)) / chosen.sum() * share).sum()
        z = (jax.nn.logsumexp(logits, -1) ** 2 * PRESENT).sum()
        return jnp.sum(jnp.sin(out)) + config.balance_loss * balance * PRESENT.sum() + config.z_loss * z

    ours, theirs = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(state, X) for f in (sparse, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_highest_is_top_k():
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 5, (7, 9)), jnp.float32)  # with equal ones
    jax.tree.map(np.testing.assert_array_equal, highest(scores, 4), tuple(jax.lax.top_k(scores, 4)))


def test_router_losses_by_hand(make):
    """Four tokens, two experts, logits (log 3, 0): shares (3/4, 1/4), all choose the first: f . P = 3/4, twice that."""
    config = MixtureOfExpertsConfig(8, num_experts=2, experts_per_token=1, balance_loss=1.0, z_loss=1.0)
    layer = config.build(make, residual_gain=1.0, dtype=F32, key=PathKey(jax.random.key(0)))
    layer.router[...] = jnp.zeros((E, 2)).at[0, 0].set(np.log(3.0))
    x = jnp.zeros((1, 6, E)).at[:, :, 0].set(1.0)
    _, side = layer(x, LOCAL, present=jnp.array([[True] * 4 + [False] * 2]))
    np.testing.assert_allclose(side.losses["router_balance"], 4 * 2 * 0.75, rtol=1e-6)
    np.testing.assert_allclose(side.losses["router_z"], 4 * np.log(4.0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(side.metrics["router/load"][0], 2.0)
    # Half of them choose the other: in balance.
    x = x.at[:, :2, 0].set(-1.0)
    _, side = layer(x, LOCAL, present=jnp.array([[True] * 4 + [False] * 2]))
    np.testing.assert_allclose(side.losses["router_balance"], 4 * 1.0, rtol=1e-6)
    np.testing.assert_allclose(side.metrics["router/load"][0], 1.0)


def test_no_token_is_dropped_when_all_choose_one_expert(make, build):
    config = dataclasses.replace(PLAIN, experts_per_token=1)
    layer = layer_of(config, make, build)
    layer.router[...] = jnp.zeros((E, 4)).at[:, 2].set(1.0)
    x = jnp.abs(X)
    out, side = layer(x, LOCAL)
    kernels = {name: kernel[2] for name, kernel in float64(layer)["experts"].items()}
    hidden = np.asarray(x, np.float64) @ kernels["gate"]
    expected = (hidden / (1 + np.exp(-hidden)) * (np.asarray(x) @ kernels["up"])) @ kernels["down"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert side.metrics["router/load"] == (4.0, 1.0)


def test_padding_is_neither_routed_nor_counted(make, build):
    """Nothing about it, NaN included, reaches a loss or another token; and all padding gives zeros."""
    layer = layer_of(PLAIN, make, build)

    def run(x):
        (out, side), pull = jax.vjp(lambda x: layer(x, LOCAL, present=PRESENT), x)
        return out, side, pull((jnp.ones_like(out), jax.tree.map(jnp.ones_like, side)))[0]

    out, *others = run(X)
    other, *with_nan = run(jnp.where(PRESENT[..., None], X, jnp.nan))
    np.testing.assert_array_equal(out[PRESENT], other[PRESENT])
    others[1], with_nan[1] = others[1][PRESENT], with_nan[1][PRESENT]
    jax.tree.map(np.testing.assert_array_equal, others, with_nan)
    assert not np.asarray(other)[~np.asarray(PRESENT)].any()
    empty, side = layer(X, LOCAL, present=jnp.zeros_like(PRESENT))
    assert not np.asarray(empty).any() and all(float(leaf) == 0 for leaf in jax.tree.leaves(side))


def test_initialisation_counts_one_experts_inputs():
    init = InitConfig(scheme=InitScheme.FAN_IN, std=1.0)
    maker = ParameterMaker(init, Parametrization("mup", base_width=16), width=64)
    config = dataclasses.replace(PLAIN, num_experts=8, hidden=256)
    layer = config.build(maker, residual_gain=0.5, dtype=F32, key=PathKey(jax.random.key(0)))
    up, down = (np.asarray(layer.experts[name][...]) for name in ("up", "down"))
    assert up.shape == (8, 64, 256) and abs(up.std() * 8 - 1) < 0.02
    assert abs(down.std() * 16 / 0.5 - 1) < 0.02
    # The router is an output: its scale is that of the base width, and its logits are divided by the ratio.
    assert layer.router.get_metadata()["role"] == "output" and abs(layer.router[...].std() * 4 - 1) < 0.1
    x = jnp.ones((1, 1, 64))
    np.testing.assert_allclose(layer._logits(x, LOCAL)[0, 0], layer.router[...].sum(0) / 4, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(experts_per_token=5), "experts_per_token=5 must lie between 1 and num_experts=4"),
        (dict(bias=True), "use BlockConfig.dropout"),
        (dict(dropout=0.1), "dropout=0.1; use BlockConfig.dropout"),
        (dict(scoring="sigmoid"), "scoring is sigmoid; set it to 0"),
        (dict(scoring="hash"), "'hash' is not a valid Scoring"),
        (dict(backend="cutlass"), "backend='cutlass' does not exist; there are"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)
