"""Pipeline stages hold what they say, run each layer once on each microbatch, and refuse what cannot be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.stacking import StackLayout, stack, unstack
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.pipeline import StackedLayers
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.parallel.stages import Pipeline, Recompute, Stages
from jaxlm.planning.costs import costs
from jaxlm.planning.topology import topology
from pallas_kernels import ahead_of_time


def test_stages_are_the_same_layers_in_sequence(run_python):
    """Toy layers with NaN wherever nothing should be: in idle stages, in identity layers."""
    answer = json.loads(run_python(["tests/parallel/pipeline_program.py"], devices=8).stdout.splitlines()[-1])
    assert len(answer) == 3
    for name, difference in answer.items():
        assert difference != "NaN" and difference <= 2e-6, (name, answer)


def layer(ops, x, index, w, rows, shared):
    """A product with a split matrix."""
    return x + jnp.tanh(x @ w) * (1 + index), {}


@pytest.mark.parametrize("pipeline", [Pipeline(4), Pipeline(4, 2, "stage")], ids=["gpipe", "circular"])
def test_only_microbatches_cross_stages_on_tpus(pipeline):
    """Compiled for four v5e: no parameter and no gradient goes over the axis `stage`."""
    if reason := ahead_of_time.why_not("v5e:2x2"):
        pytest.skip(reason)
    mesh = MeshConfig(data=1, stage=2, fsdp=2)
    parallel = ParallelConfig(mesh, pipeline=pipeline).on(topology("v5e:2x2").devices())

    def loss(w, x):
        y, _ = ShardedOps(parallel).run_layers(layer, StackedLayers(w, 4, parallel.stages), x, (), ())
        return jnp.sum(y * jnp.cos(jnp.arange(256)))

    w, x = (4, 256, 256), (16, 8, 256)
    places = parallel.sharding(("layers", "embed", "mlp"), w), parallel.sharding(("batch", "length", "embed"), x)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at) for shape, at in zip((w, x), places)]
    with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=places).lower(*shapes).compile()
    found = costs(compiled.as_text(), dict(parallel.mesh.shape)).collectives
    crossing = {c.kind: c.bytes for c in found if "stage" in c.axes or not c.axes}
    microbatch, steps = 4 * 8 * 256 * 4 / 2, parallel.stages.steps(4)
    assert set(crossing) == {"collective-permute"}, found
    # Forwards and backwards, or forwards twice: to the next stage, and on from slot to slot; and each row's number.
    assert crossing["collective-permute"] <= 2 * (2 * steps) * (microbatch + 4 * 4), found
    assert any(c.kind in ("all-gather", "all-reduce", "reduce-scatter") and c.axes == ("fsdp",) for c in found)


@pytest.mark.parametrize(
    ("stages", "repeats", "order"),
    [
        (Stages(), 3, [0, 1, 2]),
        (Stages(2), 4, [0, 1, 2, 3]),
        (Stages(2), 5, [0, 1, 2, 3, 4, 5]),  # 5 is an identity layer
        (Stages(2, rounds=2), 4, [0, 2, 1, 3]),
        (Stages(2, rounds=2), 7, [0, 1, 4, 5, 2, 3, 6, 7]),
    ],
    ids=str,
)
def test_the_order_of_layers(stages, repeats, order):
    assert stages.order(repeats).tolist() == order
    assert stages.padding(repeats) == len(order) - repeats


def test_idle_time():
    """Huang et al. 2019, 2.3: (K - 1) / (M + K - 1); Narayanan et al. 2021, 2.2: fewer by the number of rounds."""
    assert Stages(4).bubble(12) == 3 / 15
    assert Stages(4, rounds=3).bubble(12) == 3 / 39


def test_layers_come_out_of_a_stack_one_by_one_in_their_own_order():
    layout = StackLayout(("decoder",), pattern=2, repeats=7, stages=Stages(2, rounds=2))
    layers = {str(i): {"w": np.full((3,), i, np.float32)} for i in range(14)}
    stacked = stack({"decoder": {"layers": layers}}, (layout,))["decoder"]["layers"]
    assert stacked["1"]["w"][:, 0].tolist() == [1, 3, 9, 11, 5, 7, 13, 0]  # an identity layer is zeros
    again = unstack({"decoder": {"layers": stacked}}, (layout,))["decoder"]["layers"]
    jax.tree.map(np.testing.assert_array_equal, again, layers)
    shapes = jax.eval_shape(lambda: stacked)
    assert stack(unstack({"decoder": {"layers": shapes}}, (layout,)), (layout,)) == {"decoder": {"layers": shapes}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline(0), "Pipeline.microbatches is 0; it must be at least 1"),
        (lambda: Pipeline(4, rounds=2), "rounds is 2, which needs Pipeline.recompute = 'stage'"),
        (
            lambda: ParallelConfig(MeshConfig(stage=4)),
            "ParallelConfig.pipeline is None; set it to a Pipeline with a mult",
        ),
        (
            lambda: ParallelConfig(MeshConfig(stage=4), pipeline=Pipeline(6)),
            "must be a multiple of MeshConfig.stage = 4: with 8 of them stages are idle for 27% of the time",
        ),
        (lambda: Stages(4, rounds=2).order(7), "7 repeats of its pattern cannot fill 4 pipeline stages in 2 rounds"),
    ],
)
def test_what_cannot_be_is_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_stage_needs_no_pipeline_and_ignores_one():
    """The same gin file on one CPU."""
    config = ParallelConfig(MeshConfig(), pipeline=Pipeline(5, 2, Recompute.STAGE))
    parallel = config.on(jax.devices()[:1])
    assert parallel.stages == Stages()
    parallel.batch_sharding(3)


def test_a_batch_that_does_not_make_microbatches_is_refused():
    class FakeMesh:
        shape = dataclasses.asdict(MeshConfig(data=2, stage=2))

    fake = Parallelism(FakeMesh(), ParallelConfig(MeshConfig(data=2, stage=2), pipeline=Pipeline(4)))
    with pytest.raises(ValueError, match="12 examples cannot be cut into 4 microbatches .* a multiple of 8"):
        fake.batch_sharding(12)
