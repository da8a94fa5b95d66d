"""A stack gives the same numbers scanned or unrolled, with and without recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.feed_forward import FeedForward, FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, ParameterMaker, Parametrization, PathKey, ResidualInit
from jaxlm.layers.positions import RelativePositions, Rope
from jaxlm.layers.remat import Remat
from jaxlm.layers.side_values import SideValues
from jaxlm.layers.stack import Layers, Stack, StackConfig
from jaxlm.layers.stacking import StackLayout, stack, unstack
from pallas_kernels.masks import Causal


@dataclasses.dataclass(frozen=True)
class MeasuredConfig(FeedForwardConfig):
    """A feed-forward layer with a loss of its own and a metric."""

    def build(self, make, **options):
        return Measured(self, make, **options)


class Measured(FeedForward):
    def __call__(self, x, context, *, present=None):
        out, _ = super().__call__(x, context)
        squares = jnp.square(out).sum(-1) * present
        return out, SideValues({"size": 0.1 * squares.sum()}, {"largest": (squares.max(), jnp.float32(1.0))})


LOCAL_BLOCK = BlockConfig(
    AttentionConfig(2, 8, position=Rope(), window=(2, 0), dropout=0.2), FeedForwardConfig(24, dropout=0.2), NormConfig()
)
GLOBAL_BLOCK = BlockConfig(AttentionConfig(2, 8), MeasuredConfig(16), NormConfig(), dropout=0.2)
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
PRESENT = POSITIONS < jnp.array([[8], [5]])


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
    def run(params):
        def loss(params):
            stack = nnx.merge(graph, params)
            out, side = stack(X, Causal(), POSITIONS, context=context, present=PRESENT)
            return jnp.sum(out * jnp.cos(jnp.arange(16.0))) + side.losses["size"], side.metrics

        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return (total, metrics["largest"]), gradient

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
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours[0], theirs[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), ours[1], theirs[1]
    )


@pytest.mark.parametrize("policy", [Remat.NONE, Remat.FULL], ids=str)
def test_scanned_equals_unrolled(scanned, expected, policy):
    """With dropout on: each layer must drop the same entries either way, and again when it is recomputed."""
    unrolled = dataclasses.replace(CONFIG, layers=Layers.UNROLL, remat=policy)
    loss, grads = loss_and_gradient(unrolled, unstack(scanned, LAYOUTS), dropout_seed=1)
    assert_same((loss, stack(grads, LAYOUTS)), expected)


@pytest.mark.parametrize("policy", [Remat.DOTS, Remat.BLOCK, Remat.OFFLOAD], ids=str)
def test_recomputing_changes_nothing(scanned, expected, policy):
    assert_same(loss_and_gradient(dataclasses.replace(CONFIG, remat=policy), scanned, dropout_seed=1), expected)


def test_dropout_follows_its_key(scanned, expected):
    (loss, _), _ = loss_and_gradient(CONFIG, scanned, dropout_seed=2)
    assert abs(loss - expected[0][0]) > 1e-3 * abs(expected[0][0])


def test_side_values_are_those_of_every_layer(scanned, expected):
    """Three of the five layers have them."""
    stack = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: made(CONFIG))), scanned)
    x, sizes = X, []
    around = stack.surroundings(Causal(), POSITIONS, present=PRESENT)
    blocks = [stack.prologue["0"], *(nnx.merge(*_layer(stack, p, r)) for r in range(2) for p in range(2))]
    for block in blocks:
        x, side = block(x, around, LOCAL)
        sizes += [float(side.losses["size"])] if side.losses else []
    assert len(sizes) == 3 and min(sizes) > 0
    out, side = stack(X, Causal(), POSITIONS, context=LOCAL, present=PRESENT)
    np.testing.assert_allclose(side.losses["size"], sum(sizes), rtol=1e-5)
    assert side.metrics["largest"][1] == 3
    np.testing.assert_allclose(out, stack.norm(x), rtol=1e-4, atol=1e-5)


def _layer(stack, position, repeat):
    graph, values = nnx.split(stack.layers[str(position)])
    return graph, jax.tree.map(lambda x: x[repeat], values)


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
