"""Log-likelihood of continuations given contexts, for every architecture, in packed rows.

`Scorer.score` takes ids and gives log-probabilities token by token. Rows are packed (`jaxlm.data.packing`), a context
with several continuations is read once where the model allows it, and logits exist only where a token is scored and
never all at a time (`pallas_kernels.cross_entropy.token_scores`). Shapes are bucketed, one compile a bucket; a score
does not depend on what else is scored, up to rounding.

Which tokens see which: the context of a causal decoder is causal, that of a prefix decoder visible in both directions,
that of an encoder-decoder in its encoder. An encoder gives pseudo-log-likelihoods: each token of the continuation is
masked in turn, all others visible (Salazar et al. 2020, arXiv 1910.14659).
"""

import collections
import dataclasses
import enum
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.data.packing import pack_windows
from jaxlm.evaluation import scored_rows
from jaxlm.evaluation.scored_rows import Layout, RowShape, ScoredBatch, Unit
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.positions import NtkScaling
from jaxlm.models.language_model import LanguageModel
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps

_LOOK_AHEAD = 2048  # units that are packed together
_IN_FLIGHT = 2  # batches whose results are not fetched yet


class TooLong(enum.Enum):
    """What happens to a context that leaves no room for its continuation.

    TRUNCATE: its first tokens are dropped, as lm-evaluation-harness does; `Score.dropped` says how many.
    REFUSE: an error.
    """

    TRUNCATE = "truncate"
    REFUSE = "refuse"


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How texts are scored. No field changes a score.

    Attributes:
      row_length: columns of a packed row; what does not fit gets rows of twice the length, four times, ...
      batch_tokens: columns of a batch, over all devices.
      share_context: continuations of one context share its hidden states, where `scored_rows.can_share` allows it.
      too_long: see `TooLong`.
    """

    row_length: int = 512
    batch_tokens: int = 8192
    share_context: bool = True
    too_long: TooLong = TooLong.TRUNCATE

    def __post_init__(self):
        object.__setattr__(self, "too_long", TooLong(self.too_long))
        if not 1 <= self.row_length <= self.batch_tokens:
            raise ValueError(
                f"ScoringConfig needs 1 <= row_length <= batch_tokens, not {self.row_length} and {self.batch_tokens}."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Continuations to score, each after the same context.

    Attributes:
      context: token ids [M] as the vocabulary gives them: an encoder-decoder trained with an end-of-text token on its
        inputs wants one here too. May be empty for encoders, and for decoders that have a `start_id`.
      continuations: token ids [N] each, none empty.
    """

    context: Sequence[int] | np.ndarray
    continuations: Sequence[Sequence[int] | np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What a model says of a continuation.

    Attributes:
      log_probabilities: float32 [N], nats, of each token given those before it (encoder: given all others).
      correct: bool [N], where no token was likelier.
      dropped: tokens of the context that had no room.
    """

    log_probabilities: np.ndarray
    correct: np.ndarray
    dropped: int = 0

    @property
    def total(self) -> float:
        """log p(continuation | context), nats."""
        return float(self.log_probabilities.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give the continuation."""
        return bool(self.correct.all())


class Scorer:
    """Scores texts with one model."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        start_id: int | None,
        mask_id: int | None = None,
        context_length: int | None = None,
        config: ScoringConfig = ScoringConfig(),
        parallel: Parallelism | None = None,
    ):
        """Prepares a model; nothing is compiled yet.

        Args:
          model: a `LanguageModel` of any architecture, its values where `parallel` says.
          start_id: what a decoder reads before the first token (the padding id for models trained here); None where
            texts begin with a token of their own, as with Hugging Face decoders.
          mask_id: the id of [MASK]; encoders need it.
          context_length: the longest row that the model reads, in tokens; None is no limit but learned positions.
          config: rows and batches.
          parallel: the mesh that the model lies on; None is one device.

        Raises:
          ValueError: the model is not a `LanguageModel`, an id that its architecture needs is missing, or the mesh
            splits rows.
        """
        if not isinstance(model, LanguageModel):
            raise ValueError(f"A {type(model).__name__} gives no log-likelihoods; score with a LanguageModel.")
        self._architecture = model.config.architecture
        if self._architecture is Architecture.ENCODER_DECODER and start_id is None:
            raise ValueError("An encoder-decoder needs start_id, the token that its decoder reads first.")
        if self._architecture is Architecture.ENCODER and mask_id is None:
            raise ValueError(
                "An encoder is scored by masking one token at a time, but the vocabulary has no mask token; give one "
                "with named_tokens."
            )
        if parallel is not None and (parallel.degree(("sequence",)) > 1 or parallel.degree(("stage",)) > 1):
            raise ValueError(
                "Scoring keeps rows whole and runs all layers in sequence; set MeshConfig.sequence and "
                "MeshConfig.stage to 1."
            )
        self.config = config
        self.shares_context = config.share_context and scored_rows.can_share(model.config)
        self._start, self._mask = start_id, mask_id
        self._limit = min(_limits(model, context_length), default=None)
        # Rows longer than that would change the frequencies of dynamic NTK.
        self._row_length = min([config.row_length, *_dynamic_lengths(model)])
        self._parallel = parallel
        self.context = LOCAL if parallel is None else Context(ops=ShardedOps(parallel))
        self._graph, self._state = nnx.split(model)
        self._vocab_size = model.config.vocab_size

    def score(self, requests: Sequence[Request]) -> list[list[Score]]:
        """Scores every continuation of every request.

        Args:
          requests: any number; all are packed together.

        Returns:
          for each request the scores of its continuations, in order.

        Raises:
          ValueError: an id is outside the vocabulary, there is nothing to score or nothing to score it from, or it
            has no room.
        """
        units, places, dropped = [], [], {}
        for number, request in enumerate(requests):
            context = _ids(request.context)
            continuations = [_ids(tokens) for tokens in request.continuations]
            self._check(number, context, continuations)
            groups = collections.defaultdict(list)  # continuations by what of the context they leave room for
            for index, tokens in enumerate(continuations):
                dropped[number, index] = self._excess(number, context, tokens)
                groups[dropped[number, index]].append((index, tokens))
            for excess, members in groups.items():
                for unit, indices in self._units(context[excess:], members):
                    units.append(unit)
                    places.append([(number, index) for index in indices])
        found = collections.defaultdict(list)
        for unit, log_probabilities, correct in self._run(units):
            start = 0
            for place, tokens in zip(places[unit], units[unit].continuations, strict=True):
                stop = start + len(tokens)
                found[place].append((units[unit].masked, log_probabilities[start:stop], correct[start:stop]))
                start = stop
        return [
            [_joined(found[number, index], dropped[number, index]) for index in range(len(request.continuations))]
            for number, request in enumerate(requests)
        ]

    def rolling(self, texts: Sequence[Sequence[int] | np.ndarray], *, prefix: Sequence[int] = ()) -> list[Score]:
        """Log-likelihood of whole texts, however long: each token predicted once, with what context there is room for.

        A text is cut into windows of the model's length, one after the other; the last reaches back over the one
        before it so that it is full (lm-evaluation-harness' `loglikelihood_rolling`). Windows overlap by one token
        where a model has no `start_id`, so that each token has one to be predicted from. Encoders and
        encoder-decoders cannot read a text so.

        Args:
          texts: token ids; an empty text scores 0.
          prefix: begins a text for a model without `start_id`: one token.

        Returns:
          one score a text.
        """
        if not self._architecture.has_decoder_features or self._architecture is Architecture.ENCODER_DECODER:
            raise ValueError(f"A rolling log-likelihood needs a decoder, not an {self._architecture.value}.")
        if self._start is None and len(prefix) != 1:
            raise ValueError("A model without start_id needs one prefix token, from which a text's first is predicted.")
        requests, owners = [], []
        for number, text in enumerate(texts):
            for context, targets in rolling_windows(_ids(text), _ids(prefix), self._limit, self._start is not None):
                requests.append(Request(context, [targets]))
                owners.append(number)
        scores = collections.defaultdict(list)
        for number, (score,) in zip(owners, self.score(requests), strict=True):
            scores[number].append(score)
        empty = Score(np.zeros(0, np.float32), np.zeros(0, bool))
        return [
            Score(
                *(
                    np.concatenate([getattr(score, field) for score in scores[number]])
                    for field in ("log_probabilities", "correct")
                )
            )
            if scores[number]
            else empty
            for number in range(len(texts))
        ]

    def _check(self, number: int, context: np.ndarray, continuations: list[np.ndarray]) -> None:
        ids = np.concatenate([context, *continuations])
        outside = ids[(ids < 0) | (ids >= self._vocab_size)]
        if len(outside):
            raise ValueError(
                f"Request {number} has the token id {outside[0]}, but the model has {self._vocab_size} ids; encode "
                f"texts with the model's own vocabulary."
            )
        if not continuations or not all(map(len, continuations)):
            raise ValueError(f"Request {number} has no continuation, or one without tokens; give at least one token.")
        if not len(context) and self._start is None and self._architecture is not Architecture.ENCODER:
            raise ValueError(
                f"Request {number} has no context, and the model no start_id: its first token has nothing to be "
                f"predicted from; begin the context with the tokenizer's bos or eos token."
            )
        if not len(context) and self._architecture is Architecture.ENCODER_DECODER:
            raise ValueError(f"Request {number} has no context; an encoder needs at least one token, such as eos.")

    def _excess(self, number: int, context: np.ndarray, continuation: np.ndarray) -> int:
        """How many tokens of the context have no room."""
        if self._limit is None:
            return 0
        count = len(continuation)
        if self._architecture is Architecture.ENCODER_DECODER:
            taken, fits = 0, count <= self._limit  # each has a stack of its own
        else:
            decoder_only = self._architecture is not Architecture.ENCODER
            # A decoder does not read the last token.
            taken = count - 1 + (self._start is not None) if decoder_only else count
            fits = taken + (decoder_only and self._start is None) <= self._limit
        if not fits:
            raise ValueError(
                f"A continuation of request {number} has {count} tokens, but the model reads {self._limit}; score it "
                f"as a text, in windows (rolling)."
            )
        excess = max(len(context) - (self._limit - taken), 0)
        if excess and self.config.too_long is TooLong.REFUSE:
            raise ValueError(
                f"The context of request {number} has {len(context)} tokens, but there is room for "
                f"{self._limit - taken} before a continuation of {count}; shorten it, or set ScoringConfig.too_long to "
                f"'truncate'."
            )
        return excess

    def _units(
        self, context: np.ndarray, members: list[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[Unit, tuple[int, ...]]]:
        """Units for (index, continuation)s of one context, and the indices in each."""
        if self._architecture is Architecture.ENCODER:
            for index, tokens in members:
                text = np.concatenate([context, tokens])
                for place, token in enumerate(tokens):
                    yield Unit(text, (token[None],), len(context) + place), (index,)
            return
        if self._architecture is not Architecture.ENCODER_DECODER and self._start is not None:
            context = np.concatenate([[self._start], context]).astype(np.int32)
        together: list[tuple[int, np.ndarray]] = []
        layout = self._layout(self.shares_context)
        for member in members:
            # More than a row's worth of continuations goes into several units, each with the context again.
            if together:
                room = self._bucket(max(layout.columns(_unit(context, together)[0])))
                if not self.shares_context or max(layout.columns(_unit(context, [*together, member])[0])) > room:
                    yield _unit(context, together)
                    together = []
            together.append(member)
        yield _unit(context, together)

    def _layout(self, shares: bool) -> Layout:
        if self._architecture is Architecture.ENCODER_DECODER:
            return scored_rows.EncoderDecoderLayout(self._start)
        if self._architecture is Architecture.ENCODER:
            return scored_rows.EncoderLayout(self._mask)
        return scored_rows.DecoderLayout(self._architecture is Architecture.PREFIX_DECODER, shares)

    def _run(self, units: list[Unit]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(index of the unit, log-probabilities, whether correct) of every unit, a batch at a time."""
        waiting = collections.deque()
        for members, batch in self._batches(units):
            waiting.append((members, batch, self._dispatch(batch)))
            if len(waiting) > _IN_FLIGHT:
                yield from _fetched(units, *waiting.popleft())
        while waiting:
            yield from _fetched(units, *waiting.popleft())

    def _batches(self, units: list[Unit]) -> Iterator[tuple[list[int], ScoredBatch]]:
        """Units packed into rows and batches, with the indices of each batch's units."""
        layout = self._layout(self.shares_context and any(len(unit.continuations) > 1 for unit in units))
        by_length = collections.defaultdict(list)
        for index, unit in enumerate(units):
            by_length[self._bucket(max(layout.columns(unit)))].append(index)
        for length, indices in sorted(by_length.items()):
            columns = np.array([layout.columns(units[i]) for i in indices])
            scored = np.array([units[i].scored for i in indices])
            lengths = (length,) * columns.shape[1]
            shape = RowShape(lengths, _scored_columns(columns, scored, length))
            sizes = np.concatenate([columns, scored[:, None]], axis=1)
            members, offsets = pack_windows(sizes, (*lengths, shape.scored), _LOOK_AHEAD)
            rows = [members[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
            size = self._batch_size(length, len(rows))
            for start in range(0, len(rows), size):
                chosen = [[indices[i] for i in row] for row in rows[start : start + size]]
                batch = layout.batch([[units[i] for i in row] for row in chosen], size, shape)
                yield [i for row in chosen for i in row], batch

    def _bucket(self, columns: int) -> int:
        """The length of rows for a unit: `row_length` doubled until it fits, but no more than the model reads."""
        length = self._row_length
        while length < columns:
            length *= 2
        return length if self._limit is None else min(length, max(self._limit, self._row_length))

    def _batch_size(self, length: int, rows: int) -> int:
        """Rows of a batch: what `batch_tokens` allow, or the next power of two if all are fewer."""
        parts = 1 if self._parallel is None else self._parallel.batch_parts
        most = max(self.config.batch_tokens // length, 1)
        size = min(most, 1 << (rows - 1).bit_length())
        return -(-size // parts) * parts

    def _dispatch(self, batch: ScoredBatch) -> tuple[jax.Array, jax.Array]:
        arrays = (batch.features, batch.at, batch.labels)
        if self._parallel is not None:
            sharding = self._parallel.batch_sharding(len(batch.at))
            arrays = jax.tree.map(
                lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]), arrays
            )
        return _token_scores(self._graph, self._state, *arrays, context=self.context)


@functools.partial(jax.jit, static_argnames=("graph", "context"))
def _token_scores(graph, state, features, at, labels, *, context):
    """(log-probabilities [B, N], correct [B, N]) of labels after the columns `at`."""
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden_states(features, context=context)
    chosen = jnp.take_along_axis(hidden, at[..., None], axis=1)  # [B, N, E]
    outputs, projection = model.output(chosen, context=context)
    scores = context.ops.token_scores(outputs, projection, labels)
    return scores.log_probability, scores.correct > 0


def rolling_windows(
    text: np.ndarray, prefix: np.ndarray, limit: int | None, has_start: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(context, targets) of the windows that cover a text, every token a target once.

    Args:
      text: int32 [N].
      prefix: int32 [1], read before the text by a model that begins rows with nothing of its own.
      limit: tokens that the model reads; None reads the whole text at once.
      has_start: whether the model begins every row with a token of its own, which then takes one of `limit`.
    """
    if limit is not None and limit < 2:
        raise ValueError(f"A rolling log-likelihood needs a model that reads 2 tokens, not {limit}.")
    limit = len(text) + 1 if limit is None else limit
    # A row of `limit` predicts `limit` tokens, of which the first window's are all new.
    if len(text):
        yield (prefix if not has_start else text[:0]), text[:limit]
    overlap = 0 if has_start else 1
    for start in range(limit, len(text), limit):
        stop = min(start + limit, len(text))
        yield text[stop - limit - overlap : start], text[start:stop]


def _unit(context: np.ndarray, members: list[tuple[int, np.ndarray]]) -> tuple[Unit, tuple[int, ...]]:
    return Unit(context, tuple(tokens for _, tokens in members)), tuple(index for index, _ in members)


def _ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(tokens, np.int32).reshape(-1)


def _limits(model: LanguageModel, context_length: int | None) -> list[int]:
    """Whatever limits how many tokens the model reads."""
    lengths = (context_length, *map(model.config.learned_length, model.config.stacks), *_dynamic_lengths(model))
    return [length for length in lengths if length]


def _dynamic_lengths(model: LanguageModel) -> list[int]:
    """Row lengths beyond which rotary frequencies depend on the row's length (dynamic NTK)."""
    blocks = [block for stack in model.config.stacks.values() for block in stack.all_blocks]
    scalings = [rope.scaling for block in blocks for rope, _ in block.rotations]
    return [s.original_length for s in scalings if isinstance(s, NtkScaling) and s.original_length is not None]


def _scored_columns(columns: np.ndarray, scored: np.ndarray, length: int) -> int:
    """How many tokens of a row can be scored: what is scored on average and a tenth more, in steps of an eighth.

    Packing keeps to it, so that hidden states go to the vocabulary for few tokens in vain.
    """
    share = scored.sum() / max(columns.sum(0).max(), 1)
    needed = max(int(np.ceil(1.1 * share * length)), int(scored.max()))
    step = max(length // 8, 1)
    return -(-needed // step) * step


def _fetched(units, members, batch, results) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    log_probabilities, correct = (_to_host(x) for x in results)
    for index, (row, start) in zip(members, batch.where, strict=True):
        stop = start + units[index].scored
        yield index, log_probabilities[row, start:stop], correct[row, start:stop]


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process of the job."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _joined(parts: list[tuple[int, np.ndarray, np.ndarray]], dropped: int) -> Score:
    """One score from its parts: a single one, or an encoder's tokens, ordered by their place."""
    parts = sorted(parts, key=lambda part: part[0])
    return Score(np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts]), dropped)
