"""How texts begin and when they may end: forced first tokens, a least length, a forced end."""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxlm.decoding.history import History, ProcessorConfig, check_ids
from jaxlm.decoding.sample import NEVER


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
        return Partial(force_begin, jnp.asarray(ids, jnp.int32))


@dataclasses.dataclass(frozen=True)
class ForcedEnd(ProcessorConfig):
    """A text that is still going on ends with its `length`-th new token.

    Attributes:
      length: new tokens, the end included; the request's `max_new_tokens`, as a rule.
    """

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"ForcedEnd.length is {self.length}; it must be at least 1.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        return Partial(force_end, jnp.int32(self.length), _end_ids("ForcedEnd", end_ids))


@dataclasses.dataclass(frozen=True)
class MinNewTokens(ProcessorConfig):
    """No text ends before it has `length` new tokens, the end not counted.

    Attributes:
      length: new tokens.
    """

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"MinNewTokens.length is {self.length}; it must be at least 1.")

    @override
    def build(self, vocabulary, *, vocab_size, end_ids):
        return Partial(delay_end, jnp.int32(self.length), _end_ids("MinNewTokens", end_ids))


def force_begin(ids: jax.Array, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] that are 0 for the n-th of ids [N] at the n-th new token, and NEVER for all others."""
    at = history.new_tokens
    forced = jnp.arange(logits.shape[1]) == ids[jnp.minimum(at, len(ids) - 1)][:, None]
    return jnp.where((at < len(ids))[:, None], jnp.where(forced, 0.0, NEVER), logits)


def force_end(length: jax.Array, end_ids: jax.Array, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] with NEVER for all but end_ids [N] at the last of `length`, a number or [B], new tokens.

    An end that was forbidden before is allowed then, with logit 0.
    """
    last = history.new_tokens >= length - 1
    end = jnp.zeros(logits.shape[1], bool).at[end_ids].set(True)
    ending = jnp.where(end, jnp.where(logits <= NEVER, 0.0, logits), NEVER)
    return jnp.where(last[:, None], ending, logits)


def delay_end(length: jax.Array, end_ids: jax.Array, logits: jax.Array, history: History) -> jax.Array:
    """Logits [B, V] with NEVER for end_ids [N] while there are fewer than `length`, a number or [B], new tokens."""
    early = history.new_tokens < length
    return logits.at[:, end_ids].set(jnp.where(early[:, None], NEVER, logits[:, end_ids]))


def _end_ids(name, end_ids):
    if not end_ids:
        raise ValueError(f"{name} needs to know which token ends a text, and there is none; name an end id.")
    return jnp.asarray(end_ids, jnp.int32)
