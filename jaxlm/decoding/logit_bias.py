"""A constant added to the logits of some tokens."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxlm.decoding.history import History, ProcessorConfig, check_ids


@dataclasses.dataclass(frozen=True)
class LogitBias(ProcessorConfig):
    """Adds to each token's logit.

    Attributes:
      biases: pairs of an id and what is added to its logit, in nats.
    """

    biases: tuple[tuple[int, float], ...]

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        check_ids("LogitBias.biases", [i for i, _ in self.biases], vocab_size)
        bias = np.zeros(vocab_size, np.float32)
        for i, amount in self.biases:
            bias[i] += amount
        return Partial(add_bias, jnp.asarray(bias))


def add_bias(bias: jax.Array, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] and bias [V] or [B, V]."""
    return logits + bias
