"""No n-gram twice (Paulus et al. 2017, arXiv 1705.04304, 2.5)."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.processor_config import Function, ProcessorConfig
from jaxlm.decoding.processors import Texts
from jaxlm.decoding.sampling import NEVER


@dataclasses.dataclass(frozen=True)
class NoRepeatNGram(ProcessorConfig):
    """No sequence of `size` tokens is written that prompt and text have already.

    Attributes:
      size: n; 1 writes no token twice.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"NoRepeatNGram.size is {self.size}; it must be at least 1.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        # The size shapes the program, so it travels in an array's shape, which is static.
        return Function(forbid_repeats, (np.zeros(self.size - 1, bool),))


def forbid_repeats(context: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] with NEVER where the token would repeat an n-gram; `context` [B, n - 1] says n by its shape."""
    n, (slots, length) = context.shape[1] + 1, texts.tokens.shape
    if length < n:
        return logits
    last = texts.last(n - 1)  # [B, n - 1]
    starts = length - n + 1
    repeats = jnp.arange(starts) + n <= texts.lengths[:, None]  # [B, starts]: a whole n-gram begins here
    for i in range(n - 1):
        repeats &= texts.tokens[:, i : i + starts] == last[:, i : i + 1]
    ids = jnp.where(repeats, texts.tokens[:, n - 1 :], logits.shape[1])
    return logits.at[jnp.arange(slots)[:, None], ids].set(NEVER, mode="drop")
