"""A stack gives the same numbers scanned or unrolled, with and without recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.context import Context
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, ParameterMaker, Parametrization, PathKey, ResidualInit
from jaxlm.layers.positions import RelativePositions, Rope
from jaxlm.layers.remat import Remat, SaveNamed
from jaxlm.layers.stack import Layers, Stack, StackConfig
from jaxlm.layers.stacking import StackLayout, stack, unstack
from pallas_kernels.masks import Causal

LOCAL_BLOCK = BlockConfig(
    AttentionConfig(2, 8, position=Rope(), window=(2, 0), dropout=0.2), FeedForwardConfig(24, dropout=0.2), NormConfig()
)
GLOBAL_BLOCK = BlockConfig(AttentionConfig(2, 8), FeedForwardConfig(16), NormConfig(), dropout=0.2)
CONFIG = StackConfig(
    (LOCAL_BLOCK, GLOBAL_BLOCK),
    num_layers=4,
    prologue=(GLOBAL_BLOCK,),
    final_norm=NormConfig(),
    relative_positions=RelativePositions(8, 16),
    dropout=0.2,
)
LAYOUTS = (StackLayout((), 2, 2),)
INIT = InitConfig(cut=2.0, residual=ResidualInit.BY_DEPTH)
MAKE = ParameterMaker(INIT, Parametrization(), width=16)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
POSITIONS = jnp.arange(8)[None].repeat(2, 0)


def made(config):
    return Stack(config, MAKE, dtype=jnp.dtype("float32"), key=PathKey(jax.random.key(0)))


@pytest.fixture(scope="module")
def scanned():
    """Parameters of the scanned stack, any numbers."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(made(CONFIG))))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32), shapes)


def loss_and_gradient(config, params, dropout_seed=None):
    graph = nnx.graphdef(nnx.eval_shape(lambda: made(config)))
    context = Context(dropout_key=None if dropout_seed is None else jax.random.key(dropout_seed))

    @jax.jit
    @jax.value_and_grad
    def run(params):
        out = nnx.merge(graph, params)(X, Causal(), POSITIONS, context=context)
        return jnp.sum(out * jnp.cos(jnp.arange(16.0)))

    return run(params)


def test_initialisation_is_the_same_to_the_last_bit_scanned_or_layer_by_layer():
    """Compiled as a whole with all layers at once, and operation by operation, one layer after the other."""
    block = BlockConfig(AttentionConfig(2, 8), FeedForwardConfig(16, gated=False), NormConfig())
    config = StackConfig((block, dataclasses.replace(block, dropout=0.1)), num_layers=4)
    scanned = nnx.to_pure_dict(jax.jit(lambda: nnx.state(made(config)))())
    one_by_one = nnx.to_pure_dict(nnx.state(made(dataclasses.replace(config, layers=Layers.UNROLL))))
    jax.tree.map(np.testing.assert_array_equal, unstack(scanned, LAYOUTS), one_by_one)
    jax.tree.map(np.testing.assert_array_equal, stack(one_by_one, LAYOUTS), scanned)
    kernels = [np.asarray(one_by_one["layers"][str(i)]["attention"]["query"]["kernel"]) for i in range(4)]
    assert len({k.tobytes() for k in kernels}) == 4


def test_layouts_and_axes(scanned):
    model = nnx.eval_shape(lambda: made(CONFIG))
    assert model.layouts(("decoder",)) == (StackLayout(("decoder",), 2, 2),)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert len(variable.axes) == len(variable.shape), path
        assert (variable.axes[0] == "layers") == (path[0] == "layers")
    unrolled = dataclasses.replace(CONFIG, layers=Layers.UNROLL)
    assert nnx.eval_shape(lambda: made(unrolled)).layouts(()) == ()


@pytest.fixture(scope="module")
def expected(scanned):
    """Loss and gradients of the scanned stack, with dropout, nothing recomputed."""
    return loss_and_gradient(CONFIG, scanned, dropout_seed=1)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), ours[1], theirs[1]
    )


@pytest.mark.parametrize("policy", [Remat.NONE, Remat.FULL], ids=str)
def test_scanned_equals_unrolled(scanned, expected, policy):
    """With dropout on: each layer must drop the same entries either way, and again when it is recomputed."""
    unrolled = dataclasses.replace(CONFIG, layers=Layers.UNROLL, remat=policy)
    loss, grads = loss_and_gradient(unrolled, unstack(scanned, LAYOUTS), dropout_seed=1)
    assert_same((loss, stack(grads, LAYOUTS)), expected)


@pytest.mark.parametrize("policy", [p for p in Remat if p is not Remat.NONE], ids=str)
def test_recomputing_changes_nothing(scanned, expected, policy):
    assert_same(loss_and_gradient(dataclasses.replace(CONFIG, remat=policy), scanned, dropout_seed=1), expected)


def test_dropout_follows_its_key(scanned, expected):
    loss, _ = loss_and_gradient(CONFIG, scanned, dropout_seed=2)
    assert abs(loss - expected[0]) > 1e-3 * abs(expected[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_layers=5), "positive multiple of the pattern's 2 blocks"),
        (dict(num_layers=0), "positive multiple"),
        (dict(blocks=()), "positive multiple of the pattern's 0 blocks"),
        (
            dict(prologue=(dataclasses.replace(GLOBAL_BLOCK, attention=AttentionConfig(4, 8)),)),
            "same number of heads in all blocks, got \\[2, 4\\]",
        ),
        (dict(remat="everything"), "'everything' is not a valid Remat"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
