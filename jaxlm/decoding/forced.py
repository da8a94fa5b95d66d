"""How texts begin and when they may end: forced first tokens, a least length, a forced end."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding.processor_config import Function, Option, ProcessorConfig, check_ids
from jaxlm.decoding.processors import Texts
from jaxlm.decoding.sampling import NEVER


@dataclasses.dataclass(frozen=True)
class ForcedBegin(ProcessorConfig):
    """The new tokens begin with these: a language's token, a sentinel, the opening of an answer.

    Attributes:
      text: what they say; special tokens by name.
      ids: or the tokens themselves.
    """

    text: str = ""
    ids: tuple[int, ...] = ()

    def __post_init__(self):
        if bool(self.text) == bool(self.ids):
            raise ValueError(f"ForcedBegin needs text or ids, one of them, not {self.text!r} and {self.ids}.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        ids = self.ids or tuple(int(i) for i in vocabulary.encode_with_specials(self.text))
        check_ids("ForcedBegin", ids, vocab_size)
        return Function(force_begin, (np.array(ids, np.int32),))


@dataclasses.dataclass(frozen=True)
class ForcedEnd(ProcessorConfig):
    """A text that is still going on ends with its `length`-th new token.

    Attributes:
      length: new tokens, the end included; as a rule a request's limit, which it may bring as the option
        `max_new_tokens`.
    """

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"ForcedEnd.length is {self.length}; it must be at least 1.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        arguments = np.int32(self.length), _end_ids("ForcedEnd", end_ids)
        return Function(force_end, arguments, (Option("max_new_tokens", least=1), None))


@dataclasses.dataclass(frozen=True)
class MinNewTokens(ProcessorConfig):
    """No text ends before it has `length` new tokens, the end not counted.

    Attributes:
      length: new tokens; a request may bring its own as the option `min_new_tokens`.
    """

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"MinNewTokens.length is {self.length}; it must be at least 1.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        arguments = np.int32(self.length), _end_ids("MinNewTokens", end_ids)
        return Function(delay_end, arguments, (Option("min_new_tokens", least=0), None))


def force_begin(ids: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] that are 0 for the n-th of ids [B, N] at the n-th new token, and NEVER for all others."""
    at = texts.new_tokens
    forced = jnp.arange(logits.shape[1]) == jnp.take_along_axis(ids, jnp.minimum(at, ids.shape[1] - 1)[:, None], axis=1)
    return jnp.where((at < ids.shape[1])[:, None], jnp.where(forced, 0.0, NEVER), logits)


def force_end(length: jax.Array, end_ids: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] with NEVER for all but end_ids [B, N] at the last of `length` [B] new tokens.

    An end that was forbidden before is allowed then, with logit 0.
    """
    last = texts.new_tokens >= length - 1
    end = jnp.any(jnp.arange(logits.shape[1]) == end_ids[:, :, None], axis=1)
    ending = jnp.where(end, jnp.where(logits <= NEVER, 0.0, logits), NEVER)
    return jnp.where(last[:, None], ending, logits)


def delay_end(length: jax.Array, end_ids: jax.Array, logits: jax.Array, texts: Texts) -> jax.Array:
    """Logits [B, V] with NEVER for end_ids [B, N] while there are fewer than `length` [B] new tokens."""
    early = texts.new_tokens < length
    end = jnp.any(jnp.arange(logits.shape[1]) == end_ids[:, :, None], axis=1)
    return jnp.where(early[:, None] & end, NEVER, logits)


def _end_ids(name, end_ids):
    if not end_ids:
        raise ValueError(f"{name} needs to know which token ends a text, and there is none; name an end id.")
    return np.array(end_ids, np.int32)
