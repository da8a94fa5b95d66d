"""Guards training against spikes: finds them inside the jitted step, and says what becomes of the run.

Finding is pure and its state part of the checkpoint; the host reads nothing until the next log. Whatever the policy,
the update of a spike is never taken.
"""

import abc
import dataclasses
from typing import NamedTuple, override

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """What becomes of a run at a spike."""

    @abc.abstractmethod
    def gives_up(self, skip: jax.Array, in_a_row: jax.Array) -> jax.Array:
        """Whether the loop must not build upon this step, bool scalar; inside jit.

        Args:
          skip: whether the step is a spike.
          in_a_row: spikes in a row, with this one.
        """


@dataclasses.dataclass(frozen=True)
class Skip(Policy):
    """Goes on with the next batch, from the same parameters.

    Attributes:
      patience: the run ends after this many skipped steps in a row.
    """

    patience: int = 20

    @override
    def gives_up(self, skip: jax.Array, in_a_row: jax.Array) -> jax.Array:
        return in_a_row >= self.patience


@dataclasses.dataclass(frozen=True)
class RollBack(Policy):
    """Goes back to the newest checkpoint, and on from there with the data after the spike's batch.

    PaLM did so by hand, from about 100 steps before a spike and over 200 to 500 batches (arXiv 2204.02311, section
    5.1); the same batches did no harm to other parameters. Nothing about it is kept outside the checkpoints: a run
    killed on the way meets the same spike again and goes back again.

    Attributes:
      skip: batches after the spike's own that are passed over too. Those between checkpoint and spike always are.
      patience: the run ends when it would go back to one checkpoint more often.
    """

    skip: int = 0
    patience: int = 3

    @override
    def gives_up(self, skip: jax.Array, in_a_row: jax.Array) -> jax.Array:
        return skip


@dataclasses.dataclass(frozen=True)
class Stop(Policy):
    """Ends the run; the newest checkpoint is from before the spike."""

    @override
    def gives_up(self, skip: jax.Array, in_a_row: jax.Array) -> jax.Array:
        return skip


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """When a step counts as a spike (OLMo 2, arXiv 2501.00656, skips steps by this rule), and what follows.

    Attributes:
      sigma: a loss or gradient norm above mean + sigma standard deviations is a spike. So is one that isn't finite.
      window: number of earlier steps that mean and deviation are taken over. The guard only watches until half of
        them have been seen (steps that are not finite are spikes from the start).
      policy: `Skip` (also if None), `RollBack` or `Stop`.
    """

    sigma: float = 6.0
    window: int = 128
    policy: Policy | None = None

    def __post_init__(self):
        if self.window < 4:
            raise ValueError(f"SpikeGuard.window is {self.window}; a deviation needs at least 4 steps.")

    def init(self) -> "GuardState":
        """The state before the first step."""
        return GuardState(
            jnp.zeros(self.window, jnp.float32),
            jnp.zeros(self.window, jnp.float32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def judge(self, state: "GuardState", loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array, "GuardState"]:
        """Whether the step is to be skipped, bool scalar, and the state after it.

        Finite spikes enter the window, so that a loss that moved to a higher level for good is accepted after a while.
        """
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        skip = ~finite | self._outlier(state.losses, state.count, loss)
        skip |= self._outlier(state.grad_norms, state.count, grad_norm)
        slot = state.count % self.window
        return skip, GuardState(
            losses=jnp.where(finite, state.losses.at[slot].set(loss), state.losses),
            grad_norms=jnp.where(finite, state.grad_norms.at[slot].set(grad_norm), state.grad_norms),
            count=state.count + finite.astype(jnp.int32),
            skipped=state.skipped + skip.astype(jnp.int32),
            in_a_row=jnp.where(skip, state.in_a_row + 1, 0),
        )

    def _outlier(self, history: jax.Array, count: jax.Array, value: jax.Array) -> jax.Array:
        seen = jnp.minimum(count, self.window)
        valid = jnp.arange(self.window) < seen
        mean = jnp.sum(jnp.where(valid, history, 0.0)) / jnp.maximum(seen, 1)
        variance = jnp.sum(jnp.where(valid, (history - mean) ** 2, 0.0)) / jnp.maximum(seen - 1, 1)
        return (seen >= self.window // 2) & (value > mean + self.sigma * jnp.sqrt(variance))


class GuardState(NamedTuple):
    """What the guard remembers.

    Attributes:
      losses, grad_norms: f32 [window], of the latest finite steps.
      count: int32, finite steps so far.
      skipped, in_a_row: int32, steps skipped in all, and in a row up to now.
    """

    losses: jax.Array
    grad_norms: jax.Array
    count: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
