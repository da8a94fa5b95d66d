"""A constant added to the logits of some tokens."""

import dataclasses
from typing import override

import jax
import numpy as np

from jaxlm.decoding.processor_config import Function, ProcessorConfig, check_ids
from jaxlm.decoding.processors import Texts


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
        return Function(add_bias, (bias,))


def add_bias(bias: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] and what is added to them, [B, V]."""
    return logits + bias
