"""No n-gram twice (Paulus et al. 2017, arXiv 1705.04304, 2.5)."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxlm.decoding.history import History, ProcessorConfig
from jaxlm.decoding.sample import NEVER


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
        return Partial(forbid_repeats, jnp.zeros((self.size - 1,), bool))


def forbid_repeats(context: jax.Array, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] with NEVER where the token would repeat an n-gram; `context` [n - 1] says n by its shape."""
    n, (slots, length) = context.shape[0] + 1, history.tokens.shape
    if length < n:
        return logits
    last = history.last(n - 1)  # [B, n - 1]
    starts = length - n + 1
    repeats = jnp.arange(starts) + n <= history.lengths[:, None]  # [B, starts]: a whole n-gram begins here
    for i in range(n - 1):
        repeats &= history.tokens[:, i : i + starts] == last[:, i : i + 1]
    ids = jnp.where(repeats, history.tokens[:, n - 1 :], logits.shape[1])
    return logits.at[jnp.arange(slots)[:, None], ids].set(NEVER, mode="drop")
