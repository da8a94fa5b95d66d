"""Speculative decoding: one pass of the model verifies several drafted tokens, and the text stays the model's own.

A draft x is accepted with probability min(1, p(x) / q(x)); in place of the first that is not, a token is drawn from
max(0, p - q), divided by its sum; after the last that is, one more from p. So each token has the model's distribution
p, whatever the drafts' distribution q is (Leviathan et al. 2023, arXiv 2211.17192, A.1), after temperature, filters and
processors, which both go through. Greedy texts are those of greedy decoding, token by token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.decoding.cached_model import CachedModel, bucket, extend_slots, to_host
from jaxlm.decoding.drafts import ACCEPT, REPLACE, Drafter, Drafts, ModelDrafter, NGramLookup, Rules, kept
from jaxlm.decoding.processors import Processor, Texts, advance, check_options, prompts_as_texts, states_of
from jaxlm.decoding.requests import Answer, Finish, Request
from jaxlm.decoding.sampling import Sampling, draw
from jaxlm.layers.context import Context

STOP_IDS = 8
"""Most stop ids of one request, as the engine has it."""


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How texts are drafted and verified.

    Attributes:
      drafts: k, tokens that are drafted for one pass of the model; it reads k + 1.
      lookup: drafts come from the text itself; None: from a draft model.
      rounds: most passes before the host looks at the texts, which is how often stop strings are looked for.
    """

    drafts: int = 4
    lookup: NGramLookup | None = None
    rounds: int = 16

    def __post_init__(self):
        for name in ("drafts", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"SpeculativeConfig.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, eq=False)
class SpeculativeAnswer(Answer):
    """An answer, and what it took.

    Attributes:
      passes: of the model, the one over the prompt not counted.
      drafted: tokens that were drafted for them.
      accepted: how many of these were accepted.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a pass yields, on average: 1 where no draft is ever accepted."""
        return 1.0 + self.accepted / max(self.passes, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """B texts between two passes.

    Attributes:
      memory, draft_memory: of the model and of the drafter: each text but its last token.
      texts: prompts and new tokens, one of these at least.
      states: of the processors.
      log_probabilities: float32 [B, N + k + 1] of the new tokens under the model itself.
      limits: int32 [B], most new tokens.
      stop_ids: int32 [B, STOP_IDS], -1 where there are fewer.
      active: bool [B], whether a text goes on.
      stopped: bool [B], whether a stop id has ended it.
      passes, drafted, accepted: int32 [B], see `SpeculativeAnswer`.
    """

    memory: Any
    draft_memory: Any
    texts: Texts
    states: tuple[Any, ...]
    log_probabilities: jax.Array
    limits: jax.Array
    stop_ids: jax.Array
    active: jax.Array
    stopped: jax.Array
    passes: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def speculate(
    model: CachedModel,
    requests: Sequence[Request],
    config: SpeculativeConfig,
    *,
    draft: CachedModel | None = None,
    processors: Sequence[Processor] = (),
    drawable: np.ndarray | None = None,
    slots: int = 8,
) -> list[SpeculativeAnswer]:
    """Continues texts as `Engine.generate` does, with drafts.

    Args:
      model: whose texts these are; `CacheConfig.extension` at least k + 1.
      requests: what is asked for. Constraints are not taken: they look at one token at a time.
      config: how it is drafted.
      draft: the smaller model, where `config.lookup` is None; of the same vocabulary, read in the same way.
      processors: change the logits of both models, in this order.
      drawable: bool [V], the ids that may be drawn at all; None: all.
      slots: texts that are continued at a time.

    Returns:
      the answers, in the order of the requests. The same request and seed give the same text in any company; with a
      temperature of 0 it is the engine's, otherwise another of the same distribution.

    Raises:
      ValueError: models, configuration and requests do not go together, or see `CachedModel.check`.
    """
    _check(model, requests, config, draft, processors)
    answers = []
    for first in range(0, len(requests), slots):
        chunk = requests[first : first + slots]
        answers += _speculate_together(model, chunk, config, draft, tuple(processors), drawable)
    return answers


def _check(
    model: CachedModel,
    requests: Sequence[Request],
    config: SpeculativeConfig,
    draft: CachedModel | None,
    processors: Sequence[Processor],
) -> None:
    """Raises if models, configuration and requests do not go together."""
    if (draft is None) == (config.lookup is None):
        raise ValueError("Speculative decoding needs a draft model or SpeculativeConfig.lookup, one of the two.")
    for name, one in (("model", model), ("draft model", draft)):
        if one is not None and one.caching.extension < config.drafts + 1:
            raise ValueError(
                f"The {name}'s caches are extended by {one.caching.extension} tokens at a time, and {config.drafts} "
                f"drafts need {config.drafts + 1}; make it with caching=CacheConfig(extension={config.drafts + 1})."
            )
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"The draft model has {draft.config.vocab_size} ids and the model {model.config.vocab_size}; both must "
            f"have the same vocabulary."
        )
    if draft is not None and draft.crosses != model.crosses:
        raise ValueError("The draft model must read prompts as the model does: both with an encoder, or both without.")
    for request in requests:
        if request.constraint is not None:
            raise ValueError("Speculative decoding takes no constraint; draw with the engine instead.")
        if len(request.stop_ids) > STOP_IDS:
            raise ValueError(f"A request has {len(request.stop_ids)} stop ids; {STOP_IDS} are taken at most.")
        check_options(processors, request.options)
        for one in filter(None, (model, draft)):
            one.check(request.prompt, request.sampling.max_new_tokens)


def _speculate_together(
    model: CachedModel,
    requests: Sequence[Request],
    config: SpeculativeConfig,
    draft: CachedModel | None,
    processors: tuple[Processor, ...],
    drawable: np.ndarray | None,
) -> list[SpeculativeAnswer]:
    """The answers to no more requests than there are slots."""
    prompts = [list(request.prompt) for request in requests]
    slots = bucket(len(prompts), least=1)
    padded = [*requests, *[requests[-1]] * (slots - len(requests))]
    room = max(request.sampling.max_new_tokens for request in requests) + config.drafts + 1
    own = [model, *([draft] if draft else [])]
    columns = bucket(max(one.text_length(prompt) for one in own for prompt in prompts) + room)
    # What an encoder has read may be looked up too.
    source_columns = bucket(max(map(len, prompts))) if model.crosses else 0
    sources = prompts_as_texts(prompts if model.crosses else [], slots, source_columns)
    memory, logits = model.prefill(prompts, slots=slots)
    stop_ids = np.full((slots, STOP_IDS), -1, np.int32)
    for row, request in zip(stop_ids, padded, strict=True):
        row[: len(request.stop_ids)] = request.stop_ids
    counts = np.zeros((3, slots), np.int32)
    state = State(
        memory=memory,
        draft_memory=sources if draft is None else draft.prefill(prompts, slots=slots)[0],
        texts=prompts_as_texts([] if model.crosses else prompts, slots, columns),
        states=states_of(processors, requests, slots),
        log_probabilities=np.zeros((slots, columns), np.float32),
        limits=np.array([request.sampling.max_new_tokens for request in padded], np.int32),
        stop_ids=stop_ids,
        active=np.arange(slots) < len(requests),
        stopped=np.zeros(slots, bool),
        passes=counts[0],
        drafted=counts[1],
        accepted=counts[2],
    )
    sampling = Sampling.of([r.sampling for r in padded], [(r.seed, r.sample) for r in padded])
    drawable = np.ones(logits.shape[1], bool) if drawable is None else np.asarray(drawable, bool)
    rules = Rules(drawable, sampling, processors)
    definitions = (model.graphdef, model.context), draft and (draft.graphdef, draft.context)
    start, run = _programs(*definitions, config.lookup, config.drafts, config.rounds)
    params = model.params, draft and draft.params
    state = start(logits, state, rules, columns)
    kept_tokens: dict[int, int] = {}
    while True:
        texts, active = jax.tree.map(to_host, state.texts), to_host(state.active).copy()
        written = [row[p:n] for row, p, n in zip(texts.tokens, texts.prompt_lengths, texts.lengths, strict=True)]
        for i, request in enumerate(requests):
            if request.complete is not None and i not in kept_tokens and len(written[i]):
                count = request.complete(written[i].tolist())
                if count is not None:
                    kept_tokens[i], active[i] = count, False
        if not active.any():
            break
        state = run(params, state, rules, active)
    scores, stopped = to_host(state.log_probabilities), to_host(state.stopped)
    counts = [to_host(x) for x in (state.passes, state.drafted, state.accepted)]
    answers = []
    for i in range(len(requests)):
        count = kept_tokens.get(i, len(written[i]))
        finish = Finish.STOP if i in kept_tokens or stopped[i] else Finish.LENGTH
        answers.append(SpeculativeAnswer(written[i][:count], scores[i, :count], finish, *(int(x[i]) for x in counts)))
    return answers


@functools.cache
def _programs(
    target: tuple[Any, Context],
    draft: tuple[Any, Context] | None,
    lookup: NGramLookup | None,
    count: int,
    rounds: int,
) -> tuple[Callable[..., State], Callable[..., State]]:
    """Compiled: (logits, state, rules, capacity) -> state with first tokens; (params, state, rules, alive) -> state."""

    def extension(definition: tuple[Any, Context], params: Any) -> Callable[..., tuple[jax.Array, Any]]:
        graphdef, context = definition
        model = nnx.merge(graphdef, params)

        def extend(caches, tokens, present):
            logits, caches = extend_slots(model, caches, tokens, present, context)
            return logits, caches.laid_out(context.ops.constrain)

        return extend

    def start(logits, state, rules, capacity):
        draft_memory = state.draft_memory if draft is None else state.draft_memory.grown(capacity)
        state = dataclasses.replace(state, memory=state.memory.grown(capacity), draft_memory=draft_memory)
        return begin(logits, state, rules)

    def run(params, state, rules, alive):
        extend = extension(target, params[0])
        drafter = lookup if draft is None else ModelDrafter(extension(draft, params[1]))

        def goes_on(carry):
            return (carry[0] < rounds) & jnp.any(carry[1].active)

        def one_more(carry):
            return carry[0] + 1, verify_once(extend, drafter, carry[1], rules, count)

        state = dataclasses.replace(state, active=state.active & alive)
        return jax.lax.while_loop(goes_on, one_more, (jnp.int32(0), state))[1]

    return jax.jit(start, static_argnums=3), jax.jit(run, donate_argnums=1)


def begin(logits: jax.Array, state: State, rules: Rules) -> State:
    """Draws the first token of each text from the logits [B, V] after its prompt, inside jit."""
    log_probabilities = rules.log_probabilities(logits, state.texts, state.states)
    tokens = draw(log_probabilities, _as_they_are(rules.sampling), state.texts.new_tokens)
    states = advance(rules.processors, state.states, state.texts, tokens, state.active)
    state = dataclasses.replace(state, states=states)
    return _written(state, tokens[:, None], jnp.ones_like(tokens), jax.nn.log_softmax(logits)[:, None])[0]


def verify_once(
    extend: Callable[..., tuple[jax.Array, Any]], drafter: Drafter, state: State, rules: Rules, count: int
) -> State:
    """One pass of the model over `count` drafts of each text, inside jit; `extend` as for `ModelDrafter`."""
    texts = state.texts
    drafts, draft_memory = drafter.propose(state.draft_memory, texts, state.states, rules, count)
    tokens = jnp.concatenate([texts.last(1), drafts.tokens], axis=1)  # [B, k + 1]
    logits, memory = extend(state.memory, tokens, None)

    def target(carry, xs):
        """The model's distribution after the first i drafts."""
        texts, states = carry
        logits, draft = xs
        log_probabilities = rules.log_probabilities(logits, texts, states)
        everywhere = jnp.ones(len(draft), bool)
        after = texts.append(draft, everywhere), advance(rules.processors, states, texts, draft, everywhere)
        return after, (log_probabilities, states)

    following = jnp.concatenate([drafts.tokens, drafts.tokens[:, -1:]], axis=1)  # the last is nobody's
    _, (targets, states) = jax.lax.scan(target, (texts, state.states), (logits.swapaxes(0, 1), following.T))
    targets = targets.swapaxes(0, 1)  # [B, k + 1, V]

    accepted, replacement = verified(drafts, targets, texts.new_tokens, rules)
    rows, columns = jnp.arange(len(accepted)), jnp.arange(count + 1)
    new = jnp.where(columns < accepted[:, None], following, replacement[:, None])  # [B, k + 1]
    # Processors have seen the accepted drafts; `_written` shows them the token after these.
    states = jax.tree.map(lambda x: x[accepted, rows], states)
    state = dataclasses.replace(
        state,
        states=advance(rules.processors, states, _with(texts, new, accepted), replacement, state.active),
        passes=state.passes + state.active,
        drafted=state.drafted + jnp.where(state.active, jnp.sum(_run(drafts.valid), axis=1), 0),
    )
    memory_before, drafter_before = state.memory, state.draft_memory
    state, written = _written(state, new, accepted + 1, jax.nn.log_softmax(logits, axis=-1))
    return dataclasses.replace(
        state,
        memory=kept(extend, memory_before, memory, written, tokens),
        draft_memory=drafter.keep(drafter_before, draft_memory, written, tokens),
        accepted=state.accepted + jnp.minimum(accepted, written),
    )


def verified(drafts: Drafts, targets: jax.Array, index: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """How many drafts of each slot are accepted, and the token that follows them.

    Args:
      drafts: k a slot.
      targets: float32 [B, k + 1, V], the model's log-probabilities after 0, 1, ..., k drafts.
      index: int32 [B], the number of the first draft among its text's new tokens.
      rules: for their keys.

    Returns:
      int32 [B] each.
    """
    count = drafts.tokens.shape[1]
    chosen = drafts.tokens[:, :, None]
    log_ratio = jnp.take_along_axis(targets[:, :count], chosen, axis=2)[:, :, 0]
    if drafts.log_probabilities is not None:
        log_ratio -= jnp.take_along_axis(drafts.log_probabilities, chosen, axis=2)[:, :, 0]
    uniform = jnp.stack([jax.vmap(jax.random.uniform)(rules.keys(index + i, ACCEPT)) for i in range(count)], axis=1)
    agreed = _run(drafts.valid & (uniform < jnp.exp(jnp.minimum(log_ratio, 0.0))))
    accepted = jnp.sum(agreed, axis=1)

    def at(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0]

    own = jnp.exp(at(targets))  # [B, V]
    if drafts.log_probabilities is None:
        drawn_from = jax.nn.one_hot(drafts.tokens, targets.shape[2])
    else:
        drawn_from = jnp.exp(drafts.log_probabilities)
    none = jnp.zeros_like(drawn_from[:, :1])
    refused = jnp.pad(drafts.valid, ((0, 0), (0, 1)))  # where there was no draft, none was refused
    drawn_from = at(jnp.concatenate([drawn_from, none], axis=1)) * at(refused[:, :, None])
    rest = jnp.maximum(own - drawn_from, 0.0)
    # Rounding may leave nothing where p and q are equal; then nothing was refused but by rounding.
    rest = jnp.where(jnp.sum(rest, axis=1, keepdims=True) > 0, rest, own)
    replacement = jax.vmap(jax.random.categorical)(rules.keys(index + accepted, REPLACE), jnp.log(rest))
    return accepted, replacement.astype(jnp.int32)


def _run(true: jax.Array) -> jax.Array:
    """bool [B, k]: up to the first False."""
    return jnp.cumprod(true, axis=1).astype(bool)


def _as_they_are(sampling: Sampling) -> Sampling:
    """The sampling that draws from logits that are filtered already."""
    ones, zeros = jnp.ones_like(sampling.temperature), jnp.zeros_like(sampling.min_p)
    return Sampling(ones, jnp.zeros_like(sampling.top_k), ones, zeros, ones, sampling.seeds)


def _with(texts: Texts, tokens: jax.Array, counts: jax.Array) -> Texts:
    """The texts with the first `counts` [B] of tokens [B, t] at their ends."""
    for i in range(tokens.shape[1]):
        texts = texts.append(tokens[:, i], i < counts)
    return texts


def _written(
    state: State, tokens: jax.Array, counts: jax.Array, log_probabilities: jax.Array
) -> tuple[State, jax.Array]:
    """The state with the first `counts` [B] of tokens [B, t] written, as far as texts go; and how many that were.

    `log_probabilities`, [B, t, V], are the model's own of each of the tokens.
    """
    columns = jnp.arange(tokens.shape[1])
    counted = (columns < counts[:, None]) & state.active[:, None]
    stops = counted & jnp.any(tokens[:, :, None] == state.stop_ids[:, None], axis=2)
    before_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), tokens.shape[1])
    at = state.texts.new_tokens
    counts = jnp.where(state.active, jnp.minimum(jnp.minimum(counts, before_stop), state.limits - at), 0)
    stopped = state.active & (before_stop <= counts) & jnp.any(stops, axis=1) & (at + before_stop < state.limits)
    scores = jnp.take_along_axis(log_probabilities, tokens[:, :, None], axis=2)[:, :, 0]
    places = jnp.where(columns < counts[:, None], at[:, None] + columns, state.log_probabilities.shape[1])
    rows = jnp.arange(len(counts))[:, None]
    texts = _with(state.texts, tokens, counts)
    return (
        dataclasses.replace(
            state,
            texts=texts,
            log_probabilities=state.log_probabilities.at[rows, places].set(scores, mode="drop"),
            stopped=state.stopped | stopped,
            active=state.active & ~stopped & (texts.new_tokens < state.limits),
        ),
        counts,
    )
