"""Which data a run passes over having gone back, where the spike lies in another phase than the checkpoint."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.guard import RollBack, Skip, SpikeGuard
from jaxlm.training.loop import Loop, LoopConfig, TrainingDiverged
from jaxlm.training.metrics import Names
from jaxlm.training.spikes import RollBacks
from jaxlm.training.state import TrainState

FIRST, SECOND = (types.SimpleNamespace(start=start) for start in (0, 100))


class Loader:
    """A position is (batches read, training step)."""

    def __init__(self, read, step):
        self.position = (read, step)

    def __next__(self):
        self.position = (self.position[0] + 1, self.position[1] + 1)
        return {"tokens": np.zeros((2, 1), np.int32)}

    def state(self):
        return self.position

    def restore(self, state, *, step=None):
        self.position = (state[0], state[1] if step is None else step)


def passed_over(rollbacks, phase, step):
    loader = Loader(step, step)
    rollbacks.pass_over(loader, phase, step)
    return loader.position


def test_a_spike_of_the_next_phase_is_passed_over_when_that_begins():
    """From 103 in the second phase back to 90 in the first, which is done again with its own data."""
    rollbacks = RollBacks(SpikeGuard(policy=RollBack(skip=2)))
    rollbacks.add(TrainingDiverged(103, (3, 103)), SECOND, newest_saved=90)
    assert passed_over(rollbacks, FIRST, 90) == (90, 90)
    assert passed_over(rollbacks, SECOND, 100) == (5, 100)


def test_a_spike_behind_the_checkpoint_is_history():
    rollbacks = RollBacks(SpikeGuard(policy=RollBack()))
    rollbacks.add(TrainingDiverged(57, (57, 57)), FIRST, newest_saved=50)
    assert passed_over(rollbacks, FIRST, 50) == (57, 50)
    rollbacks.add(TrainingDiverged(63, (70, 63)), FIRST, newest_saved=60)
    assert passed_over(rollbacks, FIRST, 60) == (70, 60)
    assert passed_over(rollbacks, FIRST, 64) == (64, 64)


def test_patience_is_for_each_checkpoint_and_other_policies_have_none():
    rollbacks = RollBacks(SpikeGuard(policy=RollBack(patience=2)))
    for step in (53, 52):
        rollbacks.add(TrainingDiverged(step, None), FIRST, newest_saved=50)
    rollbacks.add(TrainingDiverged(61, None), FIRST, newest_saved=60)
    with pytest.raises(TrainingDiverged, match="step 51"):
        rollbacks.add(TrainingDiverged(51, None), FIRST, newest_saved=50)
    for guard in (None, SpikeGuard(policy=Skip())):
        with pytest.raises(TrainingDiverged):
            RollBacks(guard).add(TrainingDiverged(7, None), FIRST, newest_saved=0)


def test_nothing_of_the_diverged_state_stays_on_the_devices():
    """There must be room for the one that is restored."""

    def step(state, batch):
        done = int(state.step) + 1
        one, bad = jnp.float32(1), jnp.float32(done == 3)
        found = {"loss": (one, one), "tokens": (one, one), "grad_norm": (one, one), "diverged": (bad, one)}
        return TrainState(jnp.int32(done), {"kernel": state.params["kernel"] + 1}, {}), found

    parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
    loop = Loop(step=step, parallel=parallel, config=LoopConfig(log_period=1), names=Names())
    rollbacks = RollBacks(SpikeGuard(policy=RollBack()))
    try:
        loop.run(TrainState(jnp.int32(0), {"kernel": jnp.zeros(12345)}, {}), Loader(0, 0), until=9)
    except TrainingDiverged as spike:
        rollbacks.add(spike, FIRST, newest_saved=0)
        assert not [x for x in jax.live_arrays() if x.shape == (12345,)]
    assert passed_over(rollbacks, FIRST, 0) == (3, 0)
