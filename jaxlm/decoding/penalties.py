"""Penalties on tokens that were written before: repetition, presence and frequency."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxlm.decoding.history import History, ProcessorConfig


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(ProcessorConfig):
    """Logits of tokens that the prompt or the text has are divided by `penalty`, or multiplied where negative.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858, 4.1), for logits of either sign as in `transformers`.

    Attributes:
      penalty: above 1 discourages repetition, 1.2 is the paper's value; below 1 encourages it.
    """

    penalty: float = 1.2

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"RepetitionPenalty.penalty is {self.penalty}; it must be above 0 (1 changes nothing).")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        return Partial(penalize_repetition, self.penalty)


@dataclasses.dataclass(frozen=True)
class CountPenalty(ProcessorConfig):
    """Logits less `presence` for each token that the new text has, and less `frequency` for each time it has it.

    The prompt does not count. As in OpenAI's interface (presence_penalty, frequency_penalty).

    Attributes:
      presence: nats, once a token; negative encourages repetition.
      frequency: nats, each time.
    """

    presence: float = 0.0
    frequency: float = 0.0

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        return Partial(penalize_counts, self.presence, self.frequency)


def penalize_repetition(penalty: jax.Array | float, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] after a repetition penalty, a number or [B, 1]."""
    seen = counts(history, logits.shape[1], prompt=True) > 0
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(
    presence: jax.Array | float, frequency: jax.Array | float, logits: jax.Array, history: History
) -> jax.Array:
    """Logits [B, V] after presence and frequency penalties, numbers or [B, 1]."""
    times = counts(history, logits.shape[1], prompt=False)
    return logits - presence * (times > 0) - frequency * times


def counts(history: History, vocab_size: int, *, prompt: bool) -> jax.Array:
    """int32 [B, V]: how often each token was written, with or without the prompt."""
    rows = jnp.arange(len(history.lengths))[:, None]
    ids = jnp.where(history.written(prompt=prompt), history.tokens, vocab_size)  # one past the end is dropped
    return jnp.zeros((len(history.lengths), vocab_size), jnp.int32).at[rows, ids].add(1, mode="drop")
