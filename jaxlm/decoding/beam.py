"""Beam search: the likeliest texts found by keeping the best few at every length.

As in `transformers`, whose habits differ from the textbook's in when the search is over (`EarlyStopping`), and in that
a text counts as ended only if it is among the best `width` candidates of its step. With as many beams as there are
texts the search is exhaustive. Scores are sums of log-probabilities, of what processors leave, divided by a length
penalty: that of `transformers`, or of GNMT (Wu et al. 2016, arXiv 1609.08144, eq. 14).
"""

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.decoding.cached_model import CachedModel, bucket, extend_slots, to_host
from jaxlm.decoding.processors import Processor, Texts, advance, process, prompts_as_texts, states_of
from jaxlm.decoding.requests import Finish, Request
from jaxlm.decoding.sampling import NEVER
from jaxlm.layers.context import Context


class LengthPenalty(abc.ABC):
    """What a text's log-probability is divided by. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def __call__(self, length: np.ndarray) -> np.ndarray:
        """Of texts with `length` new tokens, the end included; from 1."""


@dataclasses.dataclass(frozen=True)
class PowerPenalty(LengthPenalty):
    """length ^ alpha, that of `transformers`.

    Attributes:
      alpha: 0 leaves log-probabilities as they are, 1 takes the mean of a token; larger favours longer texts.
    """

    alpha: float = 1.0

    @override
    def __call__(self, length):
        return length**self.alpha


@dataclasses.dataclass(frozen=True)
class GnmtPenalty(LengthPenalty):
    """((5 + length) / 6) ^ alpha, that of GNMT (arXiv 1609.08144, eq. 14) and T5X.

    Attributes:
      alpha: 0.6 in T5X, 0.2 in the paper.
    """

    alpha: float = 0.6

    @override
    def __call__(self, length):
        return ((5 + length) / 6) ** self.alpha


class EarlyStopping(enum.Enum):
    """When the search of a prompt is over.

    FULL: as soon as `width` texts have ended. HOPELESS: when the best text that goes on, were it to end now, would be
    worse than the worst of `width` that have. PROVEN: when it would be so at every length that it may still get.
    """

    FULL = "full"
    HOPELESS = "hopeless"
    PROVEN = "proven"


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """A beam search.

    Attributes:
      max_new_tokens: most tokens of a text, its end included; longer ones are cut there.
      width: K, texts that are kept at each length.
      penalty: the log-probability of a text is divided by it; None divides by nothing.
      early_stopping: see `EarlyStopping`.
      num_return: the best so many texts are returned.
    """

    max_new_tokens: int = 64
    width: int = 4
    penalty: LengthPenalty | None = None
    early_stopping: EarlyStopping = EarlyStopping.HOPELESS
    num_return: int = 1

    def __post_init__(self):
        object.__setattr__(self, "early_stopping", EarlyStopping(self.early_stopping))
        if self.max_new_tokens < 1 or self.width < 1:
            raise ValueError(
                f"BeamConfig needs max_new_tokens and width of at least 1, not {self.max_new_tokens} and {self.width}."
            )
        if not 1 <= self.num_return <= self.width:
            raise ValueError(
                f"BeamConfig.num_return is {self.num_return}; it must lie between 1 and width, which is {self.width}."
            )

    def penalties(self) -> np.ndarray:
        """float32 [N]: by what texts of 1, 2, ..., N tokens are divided."""
        lengths = np.arange(1, self.max_new_tokens + 1, dtype=np.float32)
        return np.ones_like(lengths) if self.penalty is None else np.asarray(self.penalty(lengths), np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredText:
    """A text that a search has found.

    Attributes:
      tokens: int32 [N], the new tokens, without the one that ends the text.
      score: log-probability of all of them and of the end, divided by the length penalty.
      finish: STOP if it has ended, LENGTH if it was cut.
    """

    tokens: np.ndarray
    score: float
    finish: Finish


def beam_search(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    config: BeamConfig,
    *,
    end_ids: Sequence[int],
    processors: Sequence[Processor] = (),
    drawable: np.ndarray | None = None,
) -> list[list[ScoredText]]:
    """The best texts that follow each prompt, the best first; all prompts together.

    Args:
      model: what says how likely texts are.
      prompts: token ids; an encoder-decoder's are its encoder's.
      config: how it is searched.
      end_ids: each of these tokens ends a text.
      processors: change the logits, in this order, before they become log-probabilities.
      drawable: bool [V], the ids that may be drawn at all; None: all.

    Returns:
      for each prompt `config.num_return` texts, fewer where there are no more.

    Raises:
      ValueError: a prompt cannot be continued by so many tokens, see `CachedModel.check`.
    """
    for prompt in prompts:
        model.check(prompt, config.max_new_tokens)
    processors, end_ids = tuple(processors), tuple(sorted({int(i) for i in end_ids}))
    caches, logits = model.prefill(prompts)
    slots = len(logits)
    capacity = max(bucket(max(map(model.text_length, prompts)) + config.max_new_tokens), caches.capacity)
    requests = [Request(prompt) for prompt in prompts]
    texts = prompts_as_texts([[] if model.crosses else p for p in prompts], slots, capacity)
    program = _program(model.graphdef, model.context, config, processors, end_ids, capacity)
    drawable = np.ones(logits.shape[1], bool) if drawable is None else drawable
    alive = np.arange(slots) < len(prompts)
    found = program(model.params, caches, logits, texts, states_of(processors, requests, slots), drawable, alive)
    tokens, lengths, scores = (to_host(x) for x in (found.tokens, found.lengths, found.scores))
    answers = []
    for row in range(len(prompts)):
        answers.append([])
        for i in range(config.num_return):
            if scores[row, i] > NEVER:
                text = tokens[row, i, : lengths[row, i]]
                ended = int(text[-1]) in end_ids
                finish = Finish.STOP if ended else Finish.LENGTH
                answers[-1].append(ScoredText(text[: len(text) - ended], float(scores[row, i]), finish))
    return answers


@functools.cache
def _program(
    graphdef: Any,
    context: Context,
    config: BeamConfig,
    processors: tuple[Processor, ...],
    end_ids: tuple[int, ...],
    capacity: int,
) -> Callable[..., "Found"]:
    """The compiled search of a model definition."""

    def run(params, caches, logits, texts, states, drawable, alive):
        model = nnx.merge(graphdef, params)

        def extend(caches, tokens):
            logits, caches = extend_slots(model, caches, tokens, None, context)
            return jnp.where(drawable, logits, NEVER), caches.laid_out(context.ops.constrain)

        options = {"end_ids": end_ids, "texts": texts, "processors": processors, "states": states, "alive": alive}
        return search(extend, caches.grown(capacity), jnp.where(drawable, logits, NEVER), config, **options)

    return jax.jit(run)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Texts that have ended, the best first.

    Attributes:
      tokens: int32 [B, K, N] new tokens, the end included; what follows it has no meaning.
      lengths: int32 [B, K].
      scores: float32 [B, K], log-probability divided by the length's penalty; NEVER where there is no text.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array

    def merged(self, other: "Found") -> "Found":
        """The best K of both."""
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, other)
        scores, chosen = jax.lax.top_k(both.scores, self.scores.shape[1])
        return Found(_choose(both.tokens, chosen), _choose(both.lengths, chosen), scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Beams:
    """The search between two tokens.

    Attributes:
      step: int32, tokens written.
      tokens: int32 [B, K, N] of the texts that go on.
      scores: float32 [B, K], their log-probabilities.
      found: those that have ended.
      searching: bool [B], False when a prompt's search is over.
      memory: of B K slots.
      logits: float32 [B K, V] of what follows.
      texts: of B K slots, with their prompts, for processors.
      states: of each processor.
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    found: Found
    searching: jax.Array
    memory: Any
    logits: jax.Array
    texts: Texts
    states: tuple[Any, ...]


def search(
    extend: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    memory: Any,
    logits: jax.Array,
    config: BeamConfig,
    *,
    end_ids: Sequence[int],
    texts: Texts | None = None,
    processors: tuple[Processor, ...] = (),
    states: tuple[Any, ...] = (),
    alive: jax.Array | None = None,
) -> Found:
    """Beam search, inside jit.

    Args:
      extend: (memory of S slots, int32 [S, 1] new tokens) -> (float32 [S, 1, V] logits after them, memory).
      memory: of the B prompts; `take(indices)` reorders its slots, as `Caches` does.
      logits: float32 [B, V] after the prompts.
      config: how it is searched.
      end_ids: each of these tokens ends a text; none: only `max_new_tokens` does.
      texts: the B prompts, with room for the new tokens; without processors nobody asks for them.
      processors: change the logits; their `states` are of the B prompts.
      alive: bool [B], the prompts that are searched; None: all.
    """
    batch, vocab_size = logits.shape
    width, most = config.width, config.max_new_tokens
    # So many candidates, at least K of which do not end, however many ends there are.
    kept = min(max(2, 1 + len(end_ids)) * width, width * vocab_size)
    penalties = config.penalties()
    # What the best text that goes on may still be divided by.
    hopes = penalties if config.early_stopping is not EarlyStopping.PROVEN else _largest_from(penalties)
    penalties, hopes, ends = (jnp.asarray(x) for x in (penalties, hopes, np.array(end_ids, np.int32)))

    def step(beams: _Beams) -> _Beams:
        changed = process(processors, beams.logits, beams.texts, beams.states)
        log_probabilities = jax.nn.log_softmax(changed, axis=-1).reshape(batch, width, vocab_size)
        # A token that must not be drawn makes a text that there is not, rather than one that is very unlikely.
        log_probabilities = jnp.where(log_probabilities <= NEVER / 2, NEVER, log_probabilities)
        scores = jnp.maximum(beams.scores[:, :, None] + log_probabilities, NEVER).reshape(batch, -1)
        scores, chosen = jax.lax.top_k(scores, kept)
        parents, drawn = chosen // vocab_size, (chosen % vocab_size).astype(jnp.int32)
        tokens = _choose(beams.tokens, parents).at[:, :, beams.step].set(drawn)
        ended = jnp.any(drawn[:, :, None] == ends, axis=2) | (beams.step == most - 1)

        found = beams.found
        over = ~beams.searching
        if config.early_stopping is EarlyStopping.FULL:
            over |= jnp.all(found.scores > NEVER, axis=1)
        counts = ended & (jnp.arange(kept) < width) & ~over[:, None] & (scores > NEVER)
        lengths = jnp.full_like(drawn, beams.step + 1)
        found = found.merged(Found(tokens, lengths, jnp.where(counts, scores / penalties[beams.step], NEVER)))

        scores, going = jax.lax.top_k(jnp.where(ended, NEVER, scores), width)
        parents, drawn, tokens = (_choose(x, going) for x in (parents, drawn, tokens))
        hope = jnp.where(scores[:, 0] > NEVER, scores[:, 0] / hopes[beams.step], NEVER)
        # As long as fewer than K texts have ended, the worst of them scores NEVER.
        searching = ~over & (hope > found.scores[:, -1])
        if config.early_stopping is EarlyStopping.FULL:
            searching &= found.scores[:, -1] <= NEVER
        slots = (jnp.arange(batch)[:, None] * width + parents).reshape(-1)
        logits, memory = jax.lax.cond(
            jnp.any(searching) & (beams.step < most - 1),
            lambda: (lambda out: (out[0][:, 0], out[1]))(extend(beams.memory.take(slots), drawn.reshape(-1, 1))),
            lambda: (beams.logits, beams.memory),
        )
        texts, states = jax.tree.map(lambda x: x[slots], (beams.texts, beams.states))
        drawn, goes_on = drawn.reshape(-1), jnp.ones(batch * width, bool)
        states = advance(processors, states, texts, drawn, goes_on)
        texts = texts.append(drawn, goes_on)
        return _Beams(beams.step + 1, tokens, scores, found, searching, memory, logits, texts, states)

    repeated = jnp.repeat(jnp.arange(batch), width)
    if texts is None:
        texts = Texts(jnp.zeros((batch, 0), jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))
    empty = jnp.zeros((batch, width, most), jnp.int32)
    nothing = jnp.full((batch, width), NEVER, jnp.float32)
    start = _Beams(
        step=jnp.int32(0),
        tokens=empty,
        scores=nothing.at[:, 0].set(0.0),  # all beams are the same prompt: only the first is continued
        found=Found(empty, jnp.zeros((batch, width), jnp.int32), nothing),
        searching=jnp.ones(batch, bool) if alive is None else alive,
        memory=memory.take(repeated),
        logits=logits[repeated],
        texts=jax.tree.map(lambda x: x[repeated], texts),
        states=jax.tree.map(lambda x: x[repeated], states),
    )
    return jax.lax.while_loop(lambda b: (b.step < most) & jnp.any(b.searching), step, start).found


def _largest_from(penalties: np.ndarray) -> np.ndarray:
    """The largest penalty of each length or a greater one."""
    return np.maximum.accumulate(penalties[::-1])[::-1]


def _choose(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x [B, C, ...] and indices [B, D] -> [B, D, ...]."""
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)), axis=1)
