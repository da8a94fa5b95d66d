"""Processors as a configuration names them, built for a model: a pure function, and each slot's arguments."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, override

import jax
import numpy as np

from jaxlm.decoding.processors import Processor, Texts
from jaxlm.decoding.requests import Request

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


class ProcessorConfig(abc.ABC):
    """How the next token's logits are changed. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def build(self, vocabulary: "Vocabulary", *, vocab_size: int, end_ids: Sequence[int]) -> Processor:
        """The processor of a model.

        Args:
          vocabulary: of the model.
          vocab_size: of the model's logits, at least the vocabulary's size (tables are rounded up).
          end_ids: each of these tokens ends a text.

        Raises:
          ValueError: the configuration does not go with the vocabulary.
        """


@dataclasses.dataclass(frozen=True)
class Function(Processor):
    """A pure function of logits [B, V] and texts, with arguments that each slot may have its own of.

    Arguments are a slot's state, so that processors which differ in them alone share a compiled program.

    Attributes:
      function: (*arguments, each with a leading axis B, logits, texts) -> logits.
      arguments: of every slot: arrays or numbers.
      options: for each argument the name in `Request.options` under which a request may bring its own number; None
        where it may not. Empty: nowhere.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...] = dataclasses.field(compare=False)
    options: tuple[str | None, ...] = dataclasses.field(default=(), compare=False)

    @override
    def slot_state(self, request: Request) -> tuple[np.ndarray, ...]:
        named = self.options or (None,) * len(self.arguments)
        return tuple(
            np.asarray(default if name is None else request.options.get(name, default), np.asarray(default).dtype)
            for default, name in zip(self.arguments, named, strict=True)
        )

    @override
    def __call__(self, logits: jax.Array, texts: Texts, state: tuple[jax.Array, ...]) -> jax.Array:
        return self.function(*state, logits, texts)


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises if one of `ids`, which the field `name` holds, is no id of the model."""
    strange = [i for i in ids if not 0 <= i < vocab_size]
    if strange:
        raise ValueError(f"{name} has the id {strange[0]}, but the model's ids are 0 to {vocab_size - 1}.")
