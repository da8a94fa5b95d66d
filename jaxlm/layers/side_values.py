"""Side values: what layers give beside their output. Losses of their own, and figures about what they do."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SideValues:
    """Added up over the layers of a model and over microbatches. Dense layers have none, which costs nothing.

    Attributes:
      losses: float32 scalars, each a sum over tokens, with its coefficient: the step divides them by the batch's tokens
        (padding does not count) and adds them to the loss. Their metrics are "loss/<name>".
      metrics: (sum, weight) pairs of float32, which become metrics of these names.
    """

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "SideValues") -> "SideValues":
        """Sums of what both have, and what one has."""
        return SideValues(_added(self.losses, other.losses), _added(self.metrics, other.metrics))


def _added(a: dict, b: dict) -> dict:
    return a | {name: jax.tree.map(jnp.add, a[name], value) if name in a else value for name, value in b.items()}


NO_SIDE_VALUES = SideValues()
