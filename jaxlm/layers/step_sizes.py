"""Mamba's step sizes: how long a token acts on the state, softplus(projection + bias), in float32."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxlm.layers.parameters import ParameterMaker, PathKey, Scaling


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """Where step sizes start: log-uniform (arXiv 2312.00752, 3.6).

    Attributes:
      smallest, largest: of the distribution.
      floor: none starts smaller.
    """

    smallest: float = 0.001
    largest: float = 0.1
    floor: float = 1e-4

    def __post_init__(self):
        if not 0 < self.smallest <= self.largest or self.floor <= 0:
            raise ValueError(
                f"StepSizes needs 0 < smallest <= largest and floor > 0, not {self.smallest}, {self.largest} and "
                f"{self.floor}."
            )

    def biases(self, key: PathKey, shape: tuple[int, ...]) -> jax.Array:
        """float32: softplus of them is distributed so."""
        low, high = math.log(self.smallest), math.log(self.largest)
        steps = jnp.maximum(jnp.exp(jax.random.uniform(key.key, shape, minval=low, maxval=high)), self.floor)
        return steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus


def refuse_scaling(make: ParameterMaker, what: str) -> None:
    """Raises a ValueError where widths are to be scaled: state space models need rules of their own, not there yet."""
    if make.parametrization.kind is not Scaling.STANDARD:
        raise ValueError(
            f"{what} has no {make.parametrization.kind.value} parametrisation: the rules of muP do not hold for "
            f"selective state spaces (Vankadara et al. 2024, On feature learning in structured state space models); "
            f"set Parametrization.kind to 'standard'."
        )
