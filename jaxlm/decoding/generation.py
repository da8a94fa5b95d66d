"""How prompts are answered, as one configuration: sampling or beams, drafts, processors, a constraint, stop strings."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.decoding.beam import BeamConfig, beam_search
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.constraints import ConstraintConfig, GrammarConstraint
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.processor_config import ProcessorConfig
from jaxlm.decoding.processors import Constraint
from jaxlm.decoding.requests import Answer, Finish, Progress, Request
from jaxlm.decoding.sampling import SamplingConfig, drawable_ids
from jaxlm.decoding.speculative import SpeculativeAnswer, SpeculativeConfig, speculate
from jaxlm.decoding.text_stream import TextStream, pieces_of

if TYPE_CHECKING:
    from jaxlm.data.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How prompts are answered.

    Attributes:
      method: tokens are drawn (`SamplingConfig`) or searched for (`BeamConfig`).
      speculative: tokens are drafted, where they are drawn; None: one by one.
      processors: change the logits, in this order.
      constraint: what each answer must look like; None: anything.
      stop: an answer ends before the first of these strings.
      slots: prompts that are answered at a time.
      steps: tokens that are drawn before texts are looked at, see `EngineConfig`.
    """

    method: SamplingConfig | BeamConfig
    speculative: SpeculativeConfig | None = None
    processors: tuple[ProcessorConfig, ...] = ()
    constraint: ConstraintConfig | None = None
    stop: tuple[str, ...] = ()
    slots: int = 8
    steps: int = 16

    def __post_init__(self):
        object.__setattr__(self, "processors", tuple(self.processors))
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(self.stop):
            raise ValueError(f"GenerationConfig.stop has an empty string, which would end every text: {self.stop}.")
        for name in ("slots", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"GenerationConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if isinstance(self.method, BeamConfig):
            for name in ("speculative", "constraint", "stop"):
                if getattr(self, name):
                    raise ValueError(f"GenerationConfig.{name} goes with sampling, and method is a beam search.")
        if self.speculative is not None and self.constraint is not None:
            raise ValueError("GenerationConfig has a constraint, which speculative decoding does not take; drop one.")

    @property
    def extension(self) -> int:
        """`CacheConfig.extension` that this needs: tokens that are read at a time."""
        return 1 if self.speculative is None else self.speculative.drafts + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """An answer to a prompt.

    Attributes:
      text: as it reads after the prompt, up to the stop string if there is one.
      tokens: int32 [N], without the one that ends it; with those that spell a stop string.
      log_probabilities: float32 [N], of each token under the model itself; None of a beam search.
      score: of a beam search; None of a drawn text.
      finish: why it ends.
      acceptance_length: with drafts, tokens that each pass of the model yielded on average; else None.
    """

    text: str
    tokens: np.ndarray
    log_probabilities: np.ndarray | None
    score: float | None
    finish: Finish
    acceptance_length: float | None = None


class Generator:
    """Answers prompts.

    Example:
      >>> generator = Generator(model, vocabulary, GenerationConfig(BeamConfig(width=4)), end_ids=(1,))
      >>> generator.generate([vocabulary.encode("Once upon a time")])[0][0].text
    """

    def __init__(
        self,
        model: CachedModel,
        vocabulary: "Vocabulary",
        config: GenerationConfig,
        *,
        end_ids: Sequence[int],
        draft: CachedModel | None = None,
    ):
        """Makes a generator.

        Args:
          model: what writes; its `CacheConfig.extension` is at least `config.extension`.
          vocabulary: of the model. Its padding is never drawn, nor are ids that it does not have.
          config: how prompts are answered.
          end_ids: each of these tokens ends a text.
          draft: the draft model of `config.speculative`, where it has no lookup.

        Raises:
          ValueError: the configuration does not go with the vocabulary.
        """
        self.model = model
        self.vocabulary = vocabulary
        self.config = config
        self.end_ids = tuple(sorted({int(i) for i in end_ids}))
        self._draft = draft
        self._begun: dict[bool, GrammarConstraint] = {}
        self._inboxes: dict[int, collections.deque[Progress]] = {}
        rows, info = model.config.vocab_size, vocabulary.info()
        # Some vocabularies pad with the token that ends a text.
        never = () if info.pad_id in self.end_ids else (info.pad_id,)
        self._drawable = drawable_ids(rows, vocabulary.size, never)
        options = {"vocab_size": rows, "end_ids": self.end_ids}
        self._processors = tuple(one.build(vocabulary, **options) for one in config.processors)
        self._engine = None
        if isinstance(config.method, SamplingConfig) and config.speculative is None:
            engine = EngineConfig(slots=config.slots, steps=config.steps, processors=self._processors)
            self._engine = Engine(model, engine, drawable=self._drawable)

    def generate(self, prompts: Sequence[Sequence[int]], *, seed: int = 0, samples: int = 1) -> list[list[Generated]]:
        """The answers to each prompt: `samples` drawn ones, or as many as a beam search is to return, the best first.

        Args:
          prompts: token ids; an encoder-decoder's are its encoder's.
          seed: of the draws; the same prompt, seed and number of the sample give the same text in any company.
          samples: texts drawn for each prompt.

        Raises:
          ValueError: a prompt is too long, see `CachedModel.check`, or the constraint cannot be met.
        """
        method = self.config.method
        if isinstance(method, BeamConfig):
            answers = []
            options = {"end_ids": self.end_ids, "processors": self._processors, "drawable": self._drawable}
            for first in range(0, len(prompts), self.config.slots):
                answers += beam_search(self.model, prompts[first : first + self.config.slots], method, **options)
            return [
                [Generated(self._text(prompt, x.tokens), x.tokens, None, x.score, x.finish) for x in found]
                for prompt, found in zip(prompts, answers, strict=True)
            ]
        requests = self._requests(prompts, method, seed, samples)
        if self._engine is not None:
            drawn = {i: progress.answer for i, progress in self._drawn(requests) if progress.answer is not None}
            answers = [drawn[i] for i in range(len(requests))]
        else:
            options = {"draft": self._draft, "processors": self._processors, "drawable": self._drawable}
            answers = speculate(self.model, requests, self.config.speculative, slots=self.config.slots, **options)
        found = [self._generated(request.prompt, answer) for request, answer in zip(requests, answers, strict=True)]
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def stream(self, prompts: Sequence[Sequence[int]], *, seed: int = 0) -> Iterator[tuple[int, str, Generated | None]]:
        """Text as it becomes final: (number of the prompt, text, the whole answer with the last of it).

        What comes out is never taken back: not half a character, nor the beginning of a stop string. Streams may be
        taken in turn; one that is closed or forgotten before its end writes no more.

        Raises:
          ValueError: see `generate`; or the configuration is one whose texts do not come token by token.
        """
        if self._engine is None:
            raise ValueError("Only texts that are drawn one token after the other can be streamed; use generate.")
        streams = [self._stream(prompt) for prompt in prompts]
        for i, progress in self._drawn(self._requests(prompts, self.config.method, seed, 1)):
            text = streams[i].push(progress.tokens.tolist())
            if progress.answer is None:
                yield i, text, None
            else:
                yield i, text + streams[i].finish(), self._generated(prompts[i], progress.answer)

    def _drawn(self, requests: Sequence[Request]) -> Iterator[tuple[int, Progress]]:
        """What is written to each of the requests, by its place among them, until all are answered.

        Whoever asks first moves everything on that is being drawn, and puts by what is not its own.
        """
        numbers = self._engine.submit_all(requests)
        places = {number: i for i, number in enumerate(numbers)}
        mine: collections.deque[Progress] = collections.deque()
        self._inboxes |= dict.fromkeys(numbers, mine)
        left = len(numbers)
        try:
            while left:
                while not mine:
                    for progress in self._engine.step():
                        if progress.request in self._inboxes:
                            self._inboxes[progress.request].append(progress)
                progress = mine.popleft()
                if progress.error is not None:
                    raise progress.error
                left -= progress.answer is not None
                yield places[progress.request], progress
        finally:
            self._engine.cancel(numbers)
            for number in numbers:
                del self._inboxes[number]

    def _requests(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int, samples: int
    ) -> list[Request]:
        return [
            Request(
                prompt,
                sampling,
                seed=seed,
                sample=sample,
                stop_ids=self.end_ids,
                complete=self._complete(prompt) if self.config.stop else None,
                constraint=self._constraint(self._continues(prompt)) if self.config.constraint else None,
            )
            for prompt in prompts
            for sample in range(samples)
        ]

    def _continues(self, prompt: Sequence[int]) -> bool:
        """Whether an answer is read on from its prompt."""
        return not self.model.crosses and len(prompt) > 0

    def _stream(self, prompt: Sequence[int]) -> TextStream:
        return TextStream(pieces_of(self.vocabulary), stop=self.config.stop, continues=self._continues(prompt))

    def _text(self, prompt: Sequence[int], tokens: np.ndarray) -> str:
        stream = self._stream(prompt)
        return stream.push(tokens.tolist()) + stream.finish()

    def _generated(self, prompt: Sequence[int], answer: Answer) -> Generated:
        text = self._text(prompt, answer.tokens)
        length = answer.acceptance_length if isinstance(answer, SpeculativeAnswer) else None
        return Generated(text, answer.tokens, answer.log_probabilities, None, answer.finish, length)

    def _complete(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], int | None]:
        """Says, of all new tokens so far, how many of them make a text with its stop string."""
        stream = self._stream(prompt)

        def complete(tokens: Sequence[int]) -> int | None:
            stream.push(tokens[stream.count :])
            return None if stream.stopped is None else stream.count

        return complete

    def _constraint(self, continues: bool) -> Callable[[], Constraint]:
        """Makes constraints of new texts; what no text can meet is refused here, before any is begun."""
        if continues not in self._begun:
            self._begun[continues] = self.config.constraint.start(
                self.vocabulary,
                vocab_size=self.model.config.vocab_size,
                end_ids=self.end_ids,
                max_new_tokens=self.config.method.max_new_tokens,
                continues=continues,
            )
        return self._begun[continues].copy
