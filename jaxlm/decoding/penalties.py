"""Penalties on tokens that were written before: repetition, presence and frequency."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.processor_config import Function, Option, ProcessorConfig
from jaxlm.decoding.processors import Texts


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(ProcessorConfig):
    """Logits of tokens that the prompt or the text has are divided by `penalty`, or multiplied where negative.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858, 4.1), for logits of either sign as in `transformers`.

    A request may bring its own as the option `repetition_penalty`.

    Attributes:
      penalty: above 1 discourages repetition, 1.2 is the paper's value; below 1 encourages it.
    """

    penalty: float = 1.2

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"RepetitionPenalty.penalty is {self.penalty}; it must be above 0 (1 changes nothing).")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        return Function(penalize_repetition, (np.float32(self.penalty),), (Option("repetition_penalty", above=0),))


@dataclasses.dataclass(frozen=True)
class CountPenalty(ProcessorConfig):
    """Logits less `presence` for each token that the new text has, and less `frequency` for each time it has it.

    The prompt does not count. As in OpenAI's interface, by whose names a request may bring its own: the options
    `presence_penalty` and `frequency_penalty`.

    Attributes:
      presence: nats, once a token; negative encourages repetition.
      frequency: nats, each time.
    """

    presence: float = 0.0
    frequency: float = 0.0

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        arguments = np.float32(self.presence), np.float32(self.frequency)
        return Function(penalize_counts, arguments, (Option("presence_penalty"), Option("frequency_penalty")))


def penalize_repetition(penalty: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] after a repetition penalty [B]."""
    penalty = penalty[:, None]
    seen = counts(texts, logits.shape[1], prompt=True) > 0
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(presence: jax.Array, frequency: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] after presence and frequency penalties [B]."""
    times = counts(texts, logits.shape[1], prompt=False)
    return logits - presence[:, None] * (times > 0) - frequency[:, None] * times


def counts(texts: Texts, vocab_size: int, *, prompt: bool) -> jax.Array:
    """int32 [B, V]: how often each token was written, with or without the prompt."""
    rows = jnp.arange(len(texts.lengths))[:, None]
    ids = jnp.where(texts.written(prompt=prompt), texts.tokens, vocab_size)  # one past the end is dropped
    return jnp.zeros((len(texts.lengths), vocab_size), jnp.int32).at[rows, ids].add(1, mode="drop")
