"""What is asked of the engine, and what it answers."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.decoding.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A text to be continued or, by an encoder-decoder, answered.

    Attributes:
      prompt: token ids as the vocabulary gives them; may be empty where the model's `start_id` begins every text.
      sampling: how tokens are drawn, and how many at most.
      seed: of the draws, 0 to 2^32 - 1. The same prompt, sampling and seed give the same tokens, whatever else is drawn
        at the same time.
      sample: which of several samples of one prompt and seed this is.
      stop_ids: ids that end the text and are not part of it.
      complete: asked now and then, with all new tokens so far, how many of them to keep if they are the whole text;
        None: go on. For what ends a text but is no token, such as a stop string.
      constraint: makes what the text must look like, a `jaxlm.decoding.processors.Constraint`, when it is begun.
      options: what else the engine's processors want to know, by name; one that none of them reads is refused.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    sample: int = 0
    stop_ids: tuple[int, ...] = ()
    complete: Callable[[Sequence[int]], int | None] | None = None
    constraint: Callable[[], Any] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("seed", "sample"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"Request.{name} is {getattr(self, name)}; it must lie between 0 and 2^32 - 1.")


class Finish(enum.Enum):
    """Why a text ends: a STOP id or string, its constraint is COMPLETE, or its LENGTH."""

    STOP = "stop"
    COMPLETE = "complete"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What became of a request.

    Attributes:
      tokens: int32 [N], the new tokens, without the stop id.
      log_probabilities: float32 [N], of each under the model itself: before processors, temperature and filters.
      finish: why it ends.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray
    finish: Finish


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """New tokens of a request, while it runs.

    Attributes:
      request: its number, from `Engine.submit`.
      tokens: int32 [n], those drawn since the last time; final.
      log_probabilities: float32 [n].
      answer: the whole, once it is finished.
      error: what its constraint or `Request.complete` raised; it is given up then, and has no answer.
    """

    request: int
    tokens: np.ndarray
    log_probabilities: np.ndarray
    answer: Answer | None = None
    error: Exception | None = None
