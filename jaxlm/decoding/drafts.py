"""Drafts for speculative decoding: a few tokens that a text may go on with, guessed cheaply.

A drafter says with what probability it drew each token; one that looks them up says nothing, and is sure of its own.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, override

import jax
import jax.numpy as jnp

from jaxlm.decoding.processors import Processor, Texts, advance, process
from jaxlm.decoding.sampling import NEVER, Sampling, filtered, keys

DRAFT, ACCEPT, REPLACE = 1, 2, 3
"""What of a token a key is for: its draft, whether that is accepted, what takes its place."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """What makes logits a distribution: the same for drafts and for the model that verifies them.

    Attributes:
      drawable: bool [V], the ids that may be drawn at all.
      sampling: how each slot draws.
      processors: change the logits first.
    """

    drawable: jax.Array
    sampling: Sampling
    processors: tuple[Processor, ...] = dataclasses.field(metadata={"static": True})

    def log_probabilities(self, logits: jax.Array, texts: Texts, states: tuple[Any, ...]) -> jax.Array:
        """float32 [B, V] of each slot's next token; about NEVER where there is none."""
        logits = process(self.processors, jnp.where(self.drawable, logits, NEVER), texts, states)
        return jax.nn.log_softmax(filtered(logits, self.sampling), axis=-1)

    def keys(self, index: jax.Array, purpose: int) -> jax.Array:
        """jax keys [B] for one purpose at each slot's new token number `index` [B]."""
        return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys(self.sampling.seeds, index))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Drafts:
    """What k tokens each slot may go on with.

    Attributes:
      tokens: int32 [B, k].
      valid: bool [B, k]; what follows the first False is no draft.
      log_probabilities: float32 [B, k, V], of what each was drawn from; None: they were not drawn, but certain.
    """

    tokens: jax.Array
    valid: jax.Array
    log_probabilities: jax.Array | None


class Drafter(abc.ABC):
    """Makes drafts, inside jit. It has a memory of its own, a pytree."""

    @abc.abstractmethod
    def propose(
        self, memory: Any, texts: Texts, states: tuple[Any, ...], rules: Rules, count: int
    ) -> tuple[Drafts, Any]:
        """`count` drafts of each slot and the memory after them.

        Args:
          memory: holds each text but its last token.
          texts: each with one new token at least, and room for the drafts.
          states: of the processors.
          rules: how tokens are drawn.
          count: k.
        """

    @abc.abstractmethod
    def keep(self, before: Any, after: Any, lengths: jax.Array, tokens: jax.Array) -> Any:
        """The memory where of the k + 1 tokens [B, k + 1] since `before` the first `lengths` [B] are to stay."""


@dataclasses.dataclass(frozen=True)
class NGramLookup(Drafter):
    """What followed the last tokens where they stood before: in the text, or in the text that an encoder read.

    Prompt lookup decoding (Saxena 2023). It costs no model; drafts are good where a text repeats itself or its source.

    Attributes:
      longest: the last so many tokens are looked for first,
      shortest: then fewer, down to so many.
    """

    longest: int = 3
    shortest: int = 1

    def __post_init__(self):
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"NGramLookup needs 1 <= shortest <= longest, not shortest={self.shortest} and longest={self.longest}."
            )

    @override
    def propose(self, memory, texts, states, rules, count):
        sources: Texts = memory  # what encoders read; no columns where there are none
        found = jnp.zeros((len(texts.lengths), count), jnp.int32)
        valid = jnp.zeros(found.shape, bool)
        # From the worst place to look to the best, so that the best has the last word.
        for size in range(self.shortest, self.longest + 1):
            suffix = texts.last(size)
            for place in (sources, texts):
                tokens, there = follow(place, suffix, count)
                found = jnp.where(there[:, :1], tokens, found)
                valid = jnp.where(there[:, :1], there, valid)
        return Drafts(found, valid, None), memory

    @override
    def keep(self, before, after, lengths, tokens):
        return before


def follow(texts: Texts, suffix: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` tokens after the last place where `suffix` [B, n] stands with something behind it.

    Returns:
      int32 [B, count], and bool [B, count], where there are such tokens.
    """
    size, columns = suffix.shape[1], texts.tokens.shape[1]
    starts = columns - size
    if starts < 1:
        return jnp.zeros((len(suffix), count), jnp.int32), jnp.zeros((len(suffix), count), bool)
    stands = jnp.arange(starts) + size < texts.lengths[:, None]
    for i in range(size):
        stands &= texts.tokens[:, i : i + starts] == suffix[:, i : i + 1]
    last = starts - 1 - jnp.argmax(stands[:, ::-1], axis=1)
    at = last[:, None] + size + jnp.arange(count)
    there = jnp.any(stands, axis=1)[:, None] & (at < texts.lengths[:, None])
    return jnp.take_along_axis(texts.tokens, jnp.minimum(at, columns - 1), axis=1), there


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Tokens drawn from a smaller model under the same rules (Leviathan et al. 2023, arXiv 2211.17192, 2.3).

    Attributes:
      extend: (memory, int32 [B, t] tokens, bool [B, t] present) -> (float32 [B, t, V] logits after them, memory).
    """

    extend: Callable[[Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]

    @override
    def propose(self, memory, texts, states, rules, count):
        def draw_one(carry, i):
            memory, texts, states, token = carry
            logits, memory = self.extend(memory, token[:, None], None)
            log_probabilities = rules.log_probabilities(logits[:, 0], texts, states)
            draws = jax.vmap(jax.random.categorical)(rules.keys(texts.new_tokens, DRAFT), log_probabilities)
            draws, everywhere = draws.astype(jnp.int32), jnp.ones(len(draws), bool)
            states = advance(rules.processors, states, texts, draws, everywhere)
            return (memory, texts.append(draws, everywhere), states, draws), (draws, log_probabilities)

        start = (memory, texts, states, texts.last(1)[:, 0])
        (memory, *_, token), (tokens, log_probabilities) = jax.lax.scan(draw_one, start, jnp.arange(count))
        # The last draft is remembered too, for the case that all are accepted.
        _, memory = self.extend(memory, token[:, None], None)
        tokens = tokens.T
        return Drafts(tokens, jnp.ones(tokens.shape, bool), log_probabilities.swapaxes(0, 1)), memory

    @override
    def keep(self, before, after, lengths, tokens):
        return kept(self.extend, before, after, lengths, tokens)


def kept(extend: Callable[..., tuple[jax.Array, Any]], before: Any, after: Any, lengths: jax.Array, tokens: jax.Array):
    """A model's memory with the first `lengths` [B] of the tokens [B, k + 1] that were read since `before`.

    Keys and values are forgotten by length. A recurrent state goes back to `before` and reads again what stays.
    """
    if after.rewindable:
        return after.rewind(before.lengths + lengths)
    return extend(before, tokens, jnp.arange(tokens.shape[1]) < lengths[:, None])[1]
