"""What TPU kernels declare of their work, so that XLA's scheduler, and whoever adds up a program's work, counts it.

XLA sees a kernel as one opaque call. Counted is what the static grid makes: blocks that a mask hides only at run time
count as visited, and the visible part of a block as the whole. An upper bound, then, exact where nothing is hidden.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


def estimate(flops: float, transcendentals: float, *moved: tuple[Iterable[Any], int]) -> pl.CostEstimate:
    """The cost of a kernel.

    Args:
      flops: a multiplication and an addition are two.
      transcendentals: exponentials, mostly.
      *moved: (arrays, or what has `shape` and `dtype`; how often each goes between the chip and its main memory).
    """
    return pl.CostEstimate(
        flops=int(flops),
        transcendentals=int(transcendentals),
        bytes_accessed=sum(
            math.prod(array.shape) * jnp.dtype(array.dtype).itemsize * times
            for arrays, times in moved
            for array in arrays
        ),
    )
