"""A trained model as evaluations see it: text in, scores and text out."""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.pretrained import Pretrained
from jaxlm.data.vocabularies import Vocabulary
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.requests import Request as DecodingRequest
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.evaluation.scoring import Request, Score, Scorer, ScoringConfig
from jaxlm.objectives.supervised import Eos
from jaxlm.parallel.parallelism import Parallelism


class Tokenize(enum.Enum):
    """How a context and what follows it become ids.

    TOGETHER: as one text, of which what follows has the ids beyond those of the context alone; spaces at the
      context's end go to what follows. As lm-evaluation-harness; an encoder-decoder's texts are apart in any case.
    APART: each for itself, as the pairs of supervised finetuning.
    """

    TOGETHER = "together"
    APART = "apart"


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How texts are put to a model.

    Attributes:
      delimiter: stands between a context and what follows it, and belongs to the latter; nothing does where the context
        is empty or in an encoder.
      tokenize: see `Tokenize`.
      eos: which texts end with the end-of-text id. None: contexts of encoder-decoders alone, as in
        lm-evaluation-harness. Models finetuned on pairs want what `Supervised.eos` was.
    """

    delimiter: str = " "
    tokenize: Tokenize = Tokenize.TOGETHER
    eos: Eos | None = None

    def __post_init__(self):
        object.__setattr__(self, "tokenize", Tokenize(self.tokenize))
        if self.eos is not None:
            object.__setattr__(self, "eos", Eos(self.eos))


class TextModel:
    """Scores and continues texts with a trained model."""

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        format: TextFormat = TextFormat(),
        scoring: ScoringConfig | None = None,
        decoding: EngineConfig | None = None,
        context_length: int | None = None,
        parallel: Parallelism | None = None,
    ):
        """Prepares a model.

        Args:
          pretrained: from `jaxlm.checkpoints.pretrained.load`.
          format: how texts are put to it.
          scoring, decoding: rows and slots; None are the defaults.
          context_length: tokens that it reads; None is what the model says.
          parallel: the mesh that it lies on; None is one device.

        Raises:
          ValueError: it has no vocabulary, or cannot be scored.
        """
        if pretrained.vocabulary is None:
            raise ValueError(f"{pretrained.source} cannot read text: {pretrained.no_vocabulary}")
        self.vocabulary: Vocabulary = pretrained.vocabulary
        self.format = format
        self._pretrained, self._decoding = pretrained, decoding
        self.context_length = context_length or pretrained.context_length
        self.start_id, self.eos_ids = pretrained.start_id, pretrained.eos_ids
        self.architecture = pretrained.config.architecture
        info = self.vocabulary.info()
        self.scorer = Scorer(
            pretrained.model,
            start_id=pretrained.start_id,
            mask_id=info.mask_id,
            context_length=self.context_length,
            config=scoring or ScoringConfig(),
            parallel=parallel,
        )
        # What a text begins with that has no context, for models whose rows do not begin with anything.
        self.prefix = () if self.start_id is not None else ((info.eos_id if info.bos_id is None else info.bos_id),)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores of texts after contexts, {(context, text)} in order; equal contexts are read once.

        Raises:
          ValueError: a text has no tokens.
        """
        return self.score_ids(self.encode(pairs))

    def score_ids(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Score]:
        """`score` of token ids."""
        groups: dict[bytes, list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            groups.setdefault(np.asarray(context, np.int32).tobytes(), []).append(index)
        members = list(groups.values())
        requests = [Request(pairs[indices[0]][0], [pairs[i][1] for i in indices]) for indices in members]
        scores: list[Score] = [None] * len(pairs)
        for indices, found in zip(members, self.scorer.score(requests), strict=True):
            for index, score in zip(indices, found, strict=True):
                scores[index] = score
        return scores

    def rolling(self, texts: Sequence[str]) -> list[Score]:
        """Log-likelihood of whole texts in windows, see `Scorer.rolling`."""
        return self.scorer.rolling(self.vocabulary.encode_batch(list(texts)), prefix=self.prefix)

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of contexts and of what follows them, as `Scorer` takes them.

        Raises:
          ValueError: a text has no tokens of its own.
        """
        two_stacks = self.architecture is Architecture.ENCODER_DECODER
        apart = two_stacks or self.format.tokenize is Tokenize.APART
        prepared = pairs if self.format.tokenize is Tokenize.APART else [self._joined(*pair) for pair in pairs]
        contexts = {context: i for i, context in enumerate(dict.fromkeys(context for context, _ in prepared))}
        context_ids = self.vocabulary.encode_batch(list(contexts))
        whole = self.vocabulary.encode_batch([text if apart else context + text for context, text in prepared])
        end = np.asarray(self.eos_ids[:1], np.int32)
        no_end = np.zeros(0, np.int32)
        after_context = self._after_context
        after_text = end if self.format.eos in (Eos.BOTH, Eos.TARGETS) else no_end
        encoded = []
        for (context, text), ids in zip(prepared, whole, strict=True):
            before = context_ids[contexts[context]]
            own = ids if apart else ids[len(before) :]
            if not len(own):
                raise ValueError(f"{text!r:.60} after {context[-40:]!r} has no tokens of its own; it cannot be scored.")
            if not len(before) and self.architecture is not Architecture.ENCODER and not two_stacks:
                before = np.asarray(self.prefix, np.int32)
            encoded.append((np.concatenate([before, after_context]), np.concatenate([own, after_text])))
        return encoded

    def generate(
        self,
        contexts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> list[str]:
        """What the model writes after each context, up to the first stop text or its end.

        Args:
          contexts: texts; those that leave no room lose their beginning.
          max_new_tokens: at most so many.
          stop: texts that end an answer and are no part of it.
          sampling: how tokens are drawn; None takes the likeliest. Its own `max_new_tokens` is of no account.
          seed: of the draws.

        Raises:
          ValueError: the model is an encoder, or reads no more than `max_new_tokens`.
        """
        prompts = [np.concatenate([ids, self._after_context]) for ids in self.vocabulary.encode_batch(list(contexts))]
        stop = tuple(text for text in stop if text)
        found = self.generate_ids(prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, seed=seed)
        return [until(self.vocabulary.decode(ids), stop) for ids in found]

    def generate_ids(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """`generate` of token ids, int32 [N] each; what stands after a stop text is not cut off."""
        sampling = dataclasses.replace(sampling or SamplingConfig(temperature=0.0), max_new_tokens=max_new_tokens)
        room = self._room(max_new_tokens)

        def complete(tokens: Sequence[int]) -> int | None:
            return len(tokens) if stop and _cut(self.vocabulary.decode(tokens), stop) is not None else None

        requests = []
        for index, prompt in enumerate(prompts):
            if room is not None and len(prompt) > room:
                prompt = prompt[len(prompt) - room :]
            if not len(prompt):
                prompt = np.asarray(self.prefix, np.int32)
            requests.append(
                DecodingRequest(prompt, sampling, seed, index, stop_ids=tuple(self.eos_ids), complete=complete)
            )
        return [answer.tokens for answer in self._engine.generate(requests)]

    @functools.cached_property
    def _engine(self) -> Engine:
        model = CachedModel(
            self._pretrained.model,
            start_id=self.start_id,
            context_length=self.context_length,
            context=self.scorer.context,
        )
        drawable = np.arange(self._pretrained.config.vocab_size) < self.vocabulary.size
        return Engine(model, self._decoding, drawable=drawable)

    def _room(self, max_new_tokens: int) -> int | None:
        """Tokens of a prompt that leave room for so many new ones."""
        if self.architecture is Architecture.ENCODER_DECODER:
            return self._engine.model.source_length
        if self.context_length is None:
            return None
        room = self.context_length - max_new_tokens - (self.start_id is not None)
        if room < 1:
            raise ValueError(
                f"The model reads {self.context_length} tokens, which leaves no room for a prompt and "
                f"{max_new_tokens} new ones; lower max_new_tokens (max_gen_toks)."
            )
        return room

    @property
    def _after_context(self) -> np.ndarray:
        """What is put at the end of a context: the end-of-text id or nothing."""
        two_stacks, eos = self.architecture is Architecture.ENCODER_DECODER, self.format.eos
        ends = eos is Eos.BOTH or (eos is None and two_stacks)
        return np.asarray(self.eos_ids[:1] if ends else (), np.int32)

    def _joined(self, context: str, text: str) -> tuple[str, str]:
        """The pair with the delimiter, and with the context's last spaces, at the beginning of the text."""
        if context and self.architecture is not Architecture.ENCODER_DECODER:
            text = self.format.delimiter + text
        stripped = context.rstrip()
        return stripped, context[len(stripped) :] + text


def until(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts in it."""
    return text if (end := _cut(text, stop)) is None else text[:end]


def _cut(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None if there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)
