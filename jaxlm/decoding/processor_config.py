"""Processors as a configuration names them, built for a model: a pure function, and each slot's arguments."""

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
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
class Option:
    """A number that a request may bring in place of a processor's own (`Request.options`).

    Attributes:
      name: in the request.
      above: it must be greater than this; None: see `least`.
      least: it must be at least this; None: any.
    """

    name: str
    above: float | None = None
    least: float | None = None

    def check(self, value: Any, *, whole: bool) -> None:
        """Raises ValueError unless it is such a number, and a `whole` one where that is asked for."""
        number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        fits = number and math.isfinite(value)
        fits = fits and (self.above is None or value > self.above) and (self.least is None or value >= self.least)
        if not fits:
            bounds = [
                f" {word} {x:g}" for word, x in (("above", self.above), ("of at least", self.least)) if x is not None
            ]
            raise ValueError(
                f"A request has the option {self.name} = {value!r}; it must be a {'whole ' * whole}number"
                f"{''.join(bounds)}."
            )


@dataclasses.dataclass(frozen=True)
class Function(Processor):
    """A pure function of logits [B, V] and texts, with arguments that each slot may have its own of.

    Arguments are a slot's state, so that processors which differ in them alone share a compiled program.

    Attributes:
      function: (*arguments, each with a leading axis B, logits, texts) -> logits.
      arguments: of every slot: arrays or numbers.
      options: for each argument under which name, and within which bounds, a request may bring its own number; None
        where it may not. Empty: nowhere.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...] = dataclasses.field(compare=False)
    options: tuple[Option | None, ...] = dataclasses.field(default=(), compare=False)

    @override
    def check(self, options: Mapping[str, Any]) -> Collection[str]:
        taken = [pair for pair in self._by_option() if pair[1] is not None]
        for default, option in taken:
            if option.name in options:
                option.check(options[option.name], whole=np.issubdtype(np.asarray(default).dtype, np.integer))
        return [option.name for _, option in taken]

    @override
    def slot_state(self, request: Request) -> tuple[np.ndarray, ...]:
        return tuple(
            np.asarray(
                default if option is None else request.options.get(option.name, default), np.asarray(default).dtype
            )
            for default, option in self._by_option()
        )

    def _by_option(self) -> list[tuple[Any, Option | None]]:
        """Each argument, with the option that may stand for it."""
        return list(zip(self.arguments, self.options or (None,) * len(self.arguments), strict=True))

    @override
    def __call__(self, logits: jax.Array, texts: Texts, state: tuple[jax.Array, ...]) -> jax.Array:
        return self.function(*state, logits, texts)


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises if one of `ids`, which the field `name` holds, is no id of the model."""
    strange = [i for i in ids if not 0 <= i < vocab_size]
    if strange:
        raise ValueError(f"{name} has the id {strange[0]}, but the model's ids are 0 to {vocab_size - 1}.")
