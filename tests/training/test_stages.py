"""Stages: which phase a step belongs to, what is inherited, and what the optimizer carries over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.architecture import Architecture
from jaxlm.data.loader import DataConfig
from jaxlm.layers.parameters import Parametrization
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.piecewise import Piecewise
from jaxlm.training.guard import SpikeGuard
from jaxlm.training.optimizers import SGD, AdamW, Lion, OptimizerConfig, ScheduleFree, build_optimizer
from jaxlm.training.schedules import Constant, Join
from jaxlm.training.stages import Carry, Stage, carry_over, phase_at, phases, with_steps
from jaxlm.training.state import abstract_model, initializer


def test_phases_cover_the_run_and_inherit():
    ramp = Piecewise((0, 10, 1000), (4, 8, 16), linear=False)
    plan = phases(
        (
            Stage(steps=20, architecture=Architecture.CAUSAL_DECODER, batch_size=ramp, learning_rate=Constant(1.0)),
            Stage(steps=5, architecture=Architecture.PREFIX_DECODER, lengths=(("targets", 64),)),
            Stage(steps=5, batch_size=2, freeze=()),
        ),
        batch_size=32,
    )
    assert [(p.start, p.end, p.stage_index, p.batch_size) for p in plan] == [
        (0, 10, 0, 4), (10, 20, 0, 8), (20, 25, 1, 8), (25, 30, 2, 2)
    ]  # fmt: skip
    assert [p.stage.architecture.value for p in plan[1:]] == ["causal_decoder", "prefix_decoder", "prefix_decoder"]
    assert plan[-1].stage.lengths == (("targets", 64),) and plan[-1].stage.freeze == ()
    # A learning rate belongs to its stage: the next one goes on with the run's.
    assert plan[1].stage.learning_rate == Constant(1.0) and plan[2].stage.learning_rate is None
    assert (plan[1].stage_start, plan[1].stage_end) == (0, 20)
    assert [phase_at(plan, step).stage_index for step in (0, 19, 20, 29)] == [0, 0, 1, 2]
    assert phase_at(plan, 30) is None


def test_data_of_its_own_brings_its_lengths():
    """Lengths are inherited by the name of a mixture, which has none, but not by a whole configuration."""
    data = DataConfig("other", {"targets": 2048})
    short = Stage(4, lengths=(("targets", 512),))
    found = phases((short, Stage(4, data=data), Stage(4), Stage(4, data="third")), batch_size=8)
    assert [phase.stage.lengths for phase in found] == [(("targets", 512),), None, None, None]
    found = phases((short, Stage(4, data="other"), Stage(4, data=data, lengths=(("targets", 8),))), batch_size=8)
    assert [phase.stage.lengths for phase in found[1:]] == [(("targets", 512),), (("targets", 8),)]


def test_one_stage_may_have_the_rest():
    stages = (Stage(steps=20), Stage(steps=None), Stage(steps=5))
    assert [stage.steps for stage in with_steps(stages, 100)] == [20, 75, 5]
    for wrong, total in ((stages, 25), ((*stages, Stage(steps=None)), 100), (stages[:1], 21)):
        with pytest.raises(ValueError, match=f"The stages have 20 .*do not add up to train_steps = {total}"):
            with_steps(wrong, total)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        Stage(steps=0)
    with pytest.raises(ValueError, match="linear=False"):
        Stage(steps=10, batch_size=Piecewise((0, 5), (1, 2)))


PARALLEL = ParallelConfig(MeshConfig()).on(jax.devices()[:1])


@pytest.fixture
def trained(tiny):
    """A model, and a function that makes its optimizer and a state with moments that are not zero."""
    _, _, infos = abstract_model(tiny.Model)

    def optimizer(algorithm=AdamW(), **options):  # noqa: B008 (frozen)
        config = OptimizerConfig(algorithm, **{"learning_rate": Constant(0.1), **options})
        return build_optimizer(config, infos, total_steps=10, parametrization=Parametrization())

    def state(optimizer):
        fresh = initializer(tiny.Model, optimizer, PARALLEL)(0)
        opt_state = jax.tree.map(lambda x: x + 7 if x.dtype == jnp.int32 else x + 1.0, fresh.opt_state)
        return dataclasses.replace(fresh, opt_state=opt_state, step=jnp.int32(7))

    return optimizer, state


def test_carry_keeps_what_both_have(trained):
    optimizer, state = trained
    old, new = optimizer(freeze=("embedding",)), optimizer(freeze=("output",))
    after = carry_over(state(old), old, new, Carry.KEEP, parallel=PARALLEL)
    adam = after.opt_state["adamw"][0]
    assert int(adam.count) == 7 and int(after.step) == 7
    np.testing.assert_array_equal(adam.mu["scale"], 1.0)
    np.testing.assert_array_equal(adam.mu["embedding"], 0.0)
    assert "output" not in adam.mu


def test_reset_and_another_algorithm_start_afresh(trained):
    optimizer, state = trained
    old = optimizer()
    after = carry_over(state(old), old, optimizer(), Carry.RESET, parallel=PARALLEL)
    assert int(after.opt_state["adamw"][0].count) == 0 and int(after.step) == 7
    after = carry_over(state(old), old, optimizer(Lion()), Carry.KEEP, parallel=PARALLEL)
    np.testing.assert_array_equal(after.opt_state["lion"][0].mu["scale"], 0.0)


def test_the_guard_watches_each_stage_from_its_beginning(trained):
    """Another objective or batch has another loss, which is no spike."""
    optimizer, state = trained
    guarded = optimizer(guard=SpikeGuard(window=4))
    after = carry_over(state(guarded), guarded, guarded, Carry.KEEP, parallel=PARALLEL)
    assert int(after.opt_state["adamw"][0].count) == 7
    assert all(not np.any(leaf) for leaf in after.opt_state["guard"])


def test_schedule_free_averages_at_the_rate_of_the_stage_after_a_reset(trained):
    """The weights of iterates follow the run's step, as the rates do, not the count that was reset."""
    optimizer, state = trained
    rate = Join((Constant(0.0), Constant(0.1)), lengths=(7,))
    options = {"schedule_free": ScheduleFree(), "clip_global_norm": None}
    old, new = (optimizer(SGD(), learning_rate=r, **options) for r in (Constant(0.1), rate))
    begun = carry_over(state(old), old, new, Carry.RESET, parallel=PARALLEL)
    grads = jax.tree.map(jnp.ones_like, begun.params)
    updates, after, _ = new.update(grads, begun.opt_state, begun.params, step=begun.step, loss=jnp.float32(1.0))
    evaluated = new.evaluation_params(optax.apply_updates(begun.params, updates), after)
    np.testing.assert_allclose(evaluated["output"], begun.params["output"] - 0.1, rtol=1e-5)


def test_an_average_begins_at_the_parameters_and_goes_on(trained):
    optimizer, state = trained
    plain, averaged = optimizer(), optimizer(ema_decay=0.9)
    begun = carry_over(state(plain), plain, averaged, Carry.KEEP, parallel=PARALLEL)
    np.testing.assert_array_equal(begun.ema_params["output"], begun.params["output"])
    assert begun.ema_params["output"] is not begun.params["output"], "a donated state shares no buffers"
    moved = dataclasses.replace(begun, ema_params=jax.tree.map(jnp.zeros_like, begun.ema_params))
    np.testing.assert_array_equal(
        carry_over(moved, averaged, averaged, Carry.KEEP, parallel=PARALLEL).ema_params["output"], 0.0
    )
    assert carry_over(moved, averaged, plain, Carry.KEEP, parallel=PARALLEL).ema_params is None
