"""What has been written so far, slot by slot: all that a logits processor may look at."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of each slot, prompt first.

    An encoder-decoder's history is what its decoder has written; the encoder's prompt is not part of it. The token that
    starts a decoder's input, where there is one, is not part of it either.

    Attributes:
      tokens: int32 [B, L]; what lies beyond a slot's length has no meaning.
      lengths: int32 [B], prompt and new tokens.
      prompt_lengths: int32 [B].
    """

    tokens: jax.Array
    lengths: jax.Array
    prompt_lengths: jax.Array

    @property
    def new_tokens(self) -> jax.Array:
        """int32 [B]: how many tokens follow the prompt."""
        return self.lengths - self.prompt_lengths

    def written(self, *, prompt: bool) -> jax.Array:
        """bool [B, L]: where a token is, with or without those of the prompt."""
        at = jnp.arange(self.tokens.shape[1])
        there = at < self.lengths[:, None]
        return there if prompt else there & (at >= self.prompt_lengths[:, None])

    def last(self, count: int) -> jax.Array:
        """int32 [B, count]: the last tokens of each slot in order; -1 where a slot has fewer."""
        at = self.lengths[:, None] - count + jnp.arange(count)
        return jnp.where(at >= 0, jnp.take_along_axis(self.tokens, jnp.maximum(at, 0), axis=1), -1)

    def push(self, tokens: jax.Array, keep: jax.Array | None = None) -> Self:
        """With `tokens`, int32 [B], at the end of each slot; where `keep`, bool [B], is false the slot stays as it is.

        A slot that is full loses the token: L must cover all that will be written.
        """
        rows = jnp.arange(len(tokens))
        keep = jnp.ones(len(tokens), bool) if keep is None else keep
        at = jnp.where(keep, self.lengths, self.tokens.shape[1])
        return dataclasses.replace(
            self, tokens=self.tokens.at[rows, at].set(tokens, mode="drop"), lengths=self.lengths + keep
        )

    def take(self, indices: jax.Array) -> Self:
        """The slots `indices`, int32 [C], in their order."""
        return jax.tree.map(lambda x: x[indices], self)


LogitsProcessor = Callable[[jax.Array, History], jax.Array]
"""(float32 logits [B, V], history) -> logits [B, V], a pure function.

It is a `jax.tree_util.Partial` of a function and its arrays: a compiled step takes it as an argument, so that other
values of the same processor need no other program.
"""


class ProcessorConfig(abc.ABC):
    """How the next token's logits are changed. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def build(self, vocabulary: "Vocabulary", *, vocab_size: int, end_ids: Sequence[int]) -> LogitsProcessor:
        """The processor of a model.

        Args:
          vocabulary: of the model.
          vocab_size: of the model's logits, at least the vocabulary's size (tables are rounded up).
          end_ids: each of these tokens ends a text.

        Raises:
          ValueError: the configuration does not go with the vocabulary.
        """


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises if one of `ids`, which the field `name` holds, is no id of the model."""
    strange = [i for i in ids if not 0 <= i < vocab_size]
    if strange:
        raise ValueError(f"{name} has the id {strange[0]}, but the model's ids are 0 to {vocab_size - 1}.")


def process(processors: Sequence[LogitsProcessor], logits: jax.Array, history: History) -> jax.Array:
    """`processors` one after the other on logits [B, V]."""
    for processor in processors:
        logits = processor(logits, history)
    return logits
