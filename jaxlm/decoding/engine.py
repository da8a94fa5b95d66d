"""The engine: many requests through a fixed number of slots, with continuous batching.

A request waits until a slot is free, is prefilled together with others in packed rows, and decodes beside whatever
stands in the other slots. Several steps are one call of a compiled program, which returns early when a slot could be
given to somebody who waits. There is one such program for each size of the caches, a power of two.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.decoding.cached_model import CachedModel, bucket, extend_slots, to_host
from jaxlm.decoding.processors import Constraint, Processor, Texts, advance, check_options, keep_allowed, process
from jaxlm.decoding.requests import Answer, Finish, Progress, Request
from jaxlm.decoding.sampling import NEVER, Sampling, draw
from jaxlm.layers.cache import Caches
from jaxlm.layers.context import Context

STOP_IDS = 8
"""Most stop ids of one request."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How requests share the device.

    Attributes:
      slots: texts that are continued at a time.
      steps: most tokens that each slot draws before the host looks at them, which is how often stop strings are looked
        for and streams are fed. Slots with a constraint make it 1.
      prefill_tokens: prompts are prefilled together while their rows have no more columns than this; one prompt may.
      processors: change the logits of all slots, in this order; see `jaxlm.decoding.processors.Processor`.
    """

    slots: int = 8
    steps: int = 16
    prefill_tokens: int = 8192
    processors: tuple[Processor, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "processors", tuple(self.processors))
        for name in ("slots", "steps", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"EngineConfig.{name} is {getattr(self, name)}; it must be at least 1.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """The slots on the device.

    Attributes:
      caches: what the layers remember, B slots.
      logits: float32 [B, V], of each slot's next token.
      texts: what the slots have written.
      limits: int32 [B], new tokens that each may write.
      stop_ids: int32 [B, STOP_IDS], -1 where there are fewer.
      active: bool [B], whether a slot still writes.
      sampling: how each draws.
      states: of each processor.
    """

    caches: Caches
    logits: jax.Array
    texts: Texts
    limits: jax.Array
    stop_ids: jax.Array
    active: jax.Array
    sampling: Sampling
    states: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What one call wrote.

    Attributes:
      tokens: int32 [B, steps], of which the first `counts` [B] of a slot are new.
      log_probabilities: float32 [B, steps].
      counts: int32 [B].
      stopped: bool [B], whether a stop id ended the slot's text in this call.
      active: bool [B], whether it goes on.
    """

    tokens: jax.Array
    log_probabilities: jax.Array
    counts: jax.Array
    stopped: jax.Array
    active: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions of an engine.

    Attributes:
      begin: (the first fresh slots, number of slots, capacities) -> Slots that hold nothing.
      grow: (slots, capacities) -> Slots with room for more.
      admit: (slots, fresh slots, places [N]) -> Slots with the fresh ones in these places.
      run: (params, slots, alive [B], drawable [V], whether somebody waits) -> (Slots, Written).
      run_constrained: the same for one step, with the allowed tokens, uint32 [B, ceil(V / 32)], as last argument.
    """

    begin: Callable[..., Slots]
    grow: Callable[..., Slots]
    admit: Callable[..., Slots]
    run: Callable[..., tuple[Slots, Written]]
    run_constrained: Callable[..., tuple[Slots, Written]]


@functools.cache
def programs(graphdef: Any, processors: tuple[Processor, ...], steps: int, context: Context) -> Programs:
    """The programs of a definition; asked for again, the same with what they have compiled."""

    def laid_out(slots: Slots) -> Slots:
        constrain = context.ops.constrain
        rest = {
            field.name: jax.tree.map(lambda x: constrain(x, ("batch", *[None] * (x.ndim - 1))), value)
            for field in dataclasses.fields(slots)
            if field.name not in ("caches", "logits")
            for value in [getattr(slots, field.name)]
        }
        return Slots(slots.caches.laid_out(constrain), constrain(slots.logits, ("batch", "vocab")), **rest)

    def grow(slots: Slots, capacity: int, source_capacity: int | None) -> Slots:
        tokens = slots.texts.tokens
        tokens = jnp.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
        caches = slots.caches.grown(capacity, source_capacity)
        return laid_out(
            dataclasses.replace(slots, caches=caches, texts=dataclasses.replace(slots.texts, tokens=tokens))
        )

    def begin(fresh: Slots, count: int, capacity: int, source_capacity: int | None) -> Slots:
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), fresh)
        return grow(empty, capacity, source_capacity)

    def admit(slots: Slots, fresh: Slots, places: jax.Array) -> Slots:
        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return x.at[places].set(new, mode="drop")

        texts, new = slots.texts, fresh.texts
        tokens = texts.tokens.at[places, : new.tokens.shape[1]].set(new.tokens, mode="drop")
        names = ("logits", "limits", "stop_ids", "active", "sampling", "states")
        return laid_out(
            Slots(
                caches=slots.caches.insert(fresh.caches, places),
                texts=Texts(tokens, put(texts.lengths, new.lengths), put(texts.prompt_lengths, new.prompt_lengths)),
                **{name: jax.tree.map(put, getattr(slots, name), getattr(fresh, name)) for name in names},
            )
        )

    def step(model, slots: Slots, drawable: jax.Array, allowed: jax.Array | None):
        """One token of each active slot: (slots, tokens [B], log-probabilities [B], stopped [B])."""
        texts, active = slots.texts, slots.active
        logits = process(processors, jnp.where(drawable, slots.logits, NEVER), texts, slots.states)
        if allowed is not None:
            logits = keep_allowed(logits, allowed)
        tokens = draw(logits, slots.sampling, texts.new_tokens)
        chosen = jnp.take_along_axis(slots.logits, tokens[:, None], axis=-1)[:, 0]
        log_probabilities = chosen - jax.nn.logsumexp(slots.logits, axis=-1)
        stopped = active & jnp.any(tokens[:, None] == slots.stop_ids, axis=-1)
        writes = active & ~stopped
        states = advance(processors, slots.states, texts, tokens, writes)
        texts = texts.append(tokens, writes)
        active = writes & (texts.new_tokens < slots.limits)
        # The last token of a text is drawn and goes nowhere: a slot that ends now does not extend its caches.
        logits, caches = extend_slots(model, slots.caches, tokens[:, None], active[:, None], context)
        slots = dataclasses.replace(
            slots, caches=caches, logits=logits[:, 0], texts=texts, active=active, states=states
        )
        return laid_out(slots), tokens, log_probabilities, stopped

    def run(params, slots: Slots, alive, drawable, waiting, count: int, allowed=None):
        model = nnx.merge(graphdef, params)
        slots = dataclasses.replace(slots, active=slots.active & alive)
        before, size = slots.texts.lengths, len(slots.active)
        started = slots.active

        def goes_on(carry):
            index, slots, *_ = carry
            some_left = jnp.any(started & ~slots.active)
            return (index < count) & jnp.any(slots.active) & ~(waiting & some_left)

        def one_more(carry):
            index, slots, tokens, log_probabilities, stopped = carry
            slots, new, new_log_probabilities, new_stopped = step(model, slots, drawable, allowed)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, new, index, 1)
            log_probabilities = jax.lax.dynamic_update_index_in_dim(log_probabilities, new_log_probabilities, index, 1)
            return index + 1, slots, tokens, log_probabilities, stopped | new_stopped

        start = (
            jnp.int32(0),
            slots,
            jnp.zeros((size, count), jnp.int32),
            jnp.zeros((size, count), jnp.float32),
            jnp.zeros(size, bool),
        )
        _, slots, tokens, log_probabilities, stopped = jax.lax.while_loop(goes_on, one_more, start)
        counts = slots.texts.lengths - before
        return laid_out(slots), Written(tokens, log_probabilities, counts, stopped, slots.active)

    def constrained(params, slots, alive, drawable, waiting, allowed):
        return run(params, slots, alive, drawable, waiting, 1, allowed)

    return Programs(
        begin=jax.jit(begin, static_argnums=(1, 2, 3)),
        grow=jax.jit(grow, static_argnums=(1, 2)),
        admit=jax.jit(admit, donate_argnums=0),
        run=jax.jit(functools.partial(run, count=steps), donate_argnums=1),
        run_constrained=jax.jit(constrained, donate_argnums=1),
    )


@dataclasses.dataclass(eq=False)
class _Running:
    """A request in a slot."""

    number: int
    request: Request
    constraint: Constraint | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Continues texts.

    Example:
      >>> engine = Engine(CachedModel(model, start_id=0), EngineConfig(slots=4))
      >>> answers = engine.generate([Request([5, 6, 7], stop_ids=(1,)), Request([9])])
    """

    def __init__(self, model: CachedModel, config: EngineConfig | None = None, *, drawable: np.ndarray | None = None):
        """Makes an engine.

        Args:
          model: what it runs.
          config: see `EngineConfig`.
          drawable: bool [V], the ids that may be drawn at all (`jaxlm.decoding.sampling.drawable_ids`); None: all.
        """
        self.model = model
        self.config = config or EngineConfig()
        self._drawable = np.ones(model.config.vocab_size, bool) if drawable is None else np.asarray(drawable, bool)
        if self._drawable.shape != (model.config.vocab_size,) or not self._drawable.any():
            raise ValueError(
                f"drawable must say of each of the model's {model.config.vocab_size} ids whether it may be drawn, and "
                f"allow one at least; got shape {self._drawable.shape} with {int(self._drawable.sum())} allowed."
            )
        self._programs = programs(model.graphdef, self.config.processors, self.config.steps, model.context)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._running: list[_Running | None] = [None] * self.config.slots
        self._slots: Slots | None = None
        self._number = 0

    def submit(self, request: Request) -> int:
        """Lets a request wait for a slot; its number.

        Raises:
          ValueError: see `CachedModel.check`; or it has too many stop ids, or options that the processors do not take.
        """
        self._check(request)
        self._waiting.append((self._number, request))
        self._number += 1
        return self._number - 1

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to these requests, in their order; see `stream`. None of them is left where that raises."""
        numbers = self.submit_all(requests)
        try:
            answers = {progress.request: progress.answer for progress in self.stream() if progress.answer is not None}
        finally:
            self.cancel(numbers)
        return [answers[number] for number in numbers]

    def stream(self, requests: Iterable[Request] = ()) -> Iterator[Progress]:
        """What is written, as it comes, until these and all requests submitted before are answered.

        Left early, they stay, and go on with whoever asks next; see `cancel`.

        Raises:
          ValueError: a request cannot be answered, see `submit`; then none of `requests` is begun.
          Exception: `Progress.error` of a request, after what the others have written meanwhile.
        """
        self.submit_all(requests)
        while self._waiting or any(self._running):
            written = self.step()
            yield from (progress for progress in written if progress.error is None)
            for progress in written:
                if progress.error is not None:
                    raise progress.error

    def cancel(self, numbers: Iterable[int]) -> None:
        """Gives up requests, whether they wait or run; those that are answered or unknown are passed over."""
        numbers = set(numbers)
        self._waiting = collections.deque(waiting for waiting in self._waiting if waiting[0] not in numbers)
        self._running = [None if one is not None and one.number in numbers else one for one in self._running]

    def submit_all(self, requests: Iterable[Request]) -> list[int]:
        """The numbers of all of them or, if one cannot be answered, of none; see `submit`."""
        requests = list(requests)
        for request in requests:
            self._check(request)
        return [self.submit(request) for request in requests]

    def _check(self, request: Request) -> None:
        self.model.check(request.prompt, request.sampling.max_new_tokens)
        check_options(self.config.processors, request.options)
        if len(request.stop_ids) > STOP_IDS:
            raise ValueError(f"A request has {len(request.stop_ids)} stop ids; the engine takes {STOP_IDS} at most.")

    def step(self) -> list[Progress]:
        """Fills free slots, and draws up to `EngineConfig.steps` tokens in each."""
        failed, allowed = [], None
        while self._waiting and None in self._running:
            taken = self._next_together()
            try:
                failed += self._admit(taken)
            except BaseException:  # they may be several callers'
                running = {one.number for one in self._running if one is not None}
                self._waiting.extendleft(one for one in reversed(taken) if one[0] not in running)
                raise
        if any(running is not None and running.constraint for running in self._running):
            allowed, dead = self._allowed()
            failed += dead
        if not any(self._running):
            return failed
        self._make_room()
        alive = np.array([running is not None for running in self._running])
        arguments = (self.model.params, self._slots, alive, self._drawable, np.bool_(bool(self._waiting)))
        if allowed is not None:
            self._slots, written = self._programs.run_constrained(*arguments, allowed)
        else:
            self._slots, written = self._programs.run(*arguments)
        return failed + self._read(jax.tree.map(to_host, written))

    def _next_together(self) -> list[tuple[int, Request]]:
        """Takes from those who wait as many as are prefilled together: free slots, and no more columns than said."""
        free, taken, longest = self._running.count(None), [], 0
        while self._waiting and len(taken) < free:
            longest = max(longest, self.model.prompt_columns(self._waiting[0][1].prompt))
            # Rows are as long as the longest needs; packing can only make fewer of them than there are prompts.
            if taken and bucket(longest) * (len(taken) + 1) > self.config.prefill_tokens:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _admit(self, requests: list[tuple[int, Request]]) -> list[Progress]:
        """Prefills requests and gives them slots; those whose constraints cannot be made."""
        # Two sizes only, so that few shapes are ever compiled.
        count = 1 if len(requests) == 1 else self.config.slots
        caches, logits = self.model.prefill([request.prompt for _, request in requests], slots=count)
        fresh = self._fresh(caches, logits, [request for _, request in requests], count)
        free = [place for place, running in enumerate(self._running) if running is None]
        places = np.full(count, self.config.slots, np.int32)
        places[: len(requests)] = free[: len(requests)]
        capacity = max(fresh.texts.tokens.shape[1], caches.capacity)
        if self._slots is None or len(free) == self.config.slots:  # nobody is there: begin as small as will do
            self._slots = self._programs.begin(fresh, self.config.slots, capacity, caches.source_capacity)
        self._grow(capacity, caches.source_capacity)
        self._slots = self._programs.admit(self._slots, fresh, places)
        failed = []
        for place, (number, request) in zip(free, requests):
            self._running[place] = running = _Running(number, request)
            if request.constraint is not None:
                try:
                    running.constraint = request.constraint()
                except Exception as error:
                    failed.append(self._given_up(place, error))
        return failed

    def _given_up(self, place: int, error: Exception) -> Progress:
        """Takes a request that cannot go on out of its slot."""
        number, self._running[place] = self._running[place].number, None
        return Progress(number, np.zeros(0, np.int32), np.zeros(0, np.float32), error=error)

    def _fresh(self, caches: Caches, logits: jax.Array, requests: list[Request], count: int) -> Slots:
        """Slots of these requests; those beyond them are copies of the last, which go nowhere."""
        padded = requests + [requests[-1]] * (count - len(requests))
        prompts = [[] if self.model.crosses else list(request.prompt) for request in padded]
        tokens = np.zeros((count, bucket(max(len(prompt) for prompt in prompts))), np.int32)
        stop_ids = np.full((count, STOP_IDS), -1, np.int32)
        for row, (prompt, request) in enumerate(zip(prompts, padded)):
            tokens[row, : len(prompt)] = prompt
            stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        states = tuple(
            jax.tree.map(lambda *x: np.stack(x), *[processor.slot_state(request) for request in padded])
            for processor in self.config.processors
        )
        return Slots(
            caches=caches,
            logits=logits,
            texts=Texts(tokens, lengths, lengths),
            limits=np.array([request.sampling.max_new_tokens for request in padded], np.int32),
            stop_ids=stop_ids,
            active=np.ones(count, bool),
            sampling=Sampling.of([r.sampling for r in padded], [(r.seed, r.sample) for r in padded]),
            states=states,
        )

    def _make_room(self) -> None:
        """Grows the caches where the next steps need it."""
        need = 0
        for running in filter(None, self._running):
            request = running.request
            left = request.sampling.max_new_tokens - len(running.tokens)
            length = self.model.text_length(request.prompt) + len(running.tokens)
            need = max(need, length + min(left, self.config.steps))
        self._grow(bucket(need), None)

    def _grow(self, capacity: int, source_capacity: int | None) -> None:
        held = self._slots.texts.tokens.shape[1]
        held_source = self._slots.caches.source_capacity
        more_source = source_capacity is not None and source_capacity > held_source
        if capacity > held or more_source:
            self._slots = self._programs.grow(
                self._slots, max(capacity, held), source_capacity if more_source else held_source
            )

    def _allowed(self) -> tuple[np.ndarray, list[Progress]]:
        """uint32 [B, ceil(V / 32)], what the constraints allow, everything in slots without one; and who is stuck."""
        words = -(-self.model.config.vocab_size // 32)
        allowed = np.full((self.config.slots, words), 0xFFFFFFFF, np.uint32)
        stuck = []
        for place, running in enumerate(self._running):
            if running is not None and running.constraint is not None:
                try:
                    allowed[place] = running.constraint.allowed()
                except Exception as error:
                    stuck.append(self._given_up(place, error))
        return allowed, stuck

    def _read(self, written: Written) -> list[Progress]:
        """What the host makes of the new tokens."""
        progress = []
        for place, running in enumerate(self._running):
            if running is None:
                continue
            count = int(written.counts[place])
            tokens, scores = written.tokens[place, :count], written.log_probabilities[place, :count]
            running.tokens += tokens.tolist()
            running.log_probabilities += scores.tolist()
            try:
                finish = self._finish(running, tokens, bool(written.stopped[place]), bool(written.active[place]))
            except Exception as error:
                progress.append(self._given_up(place, error))
                continue
            answer = None
            if finish is not None:
                self._running[place] = None
                answer = Answer(
                    np.array(running.tokens, np.int32), np.array(running.log_probabilities, np.float32), finish
                )
            progress.append(Progress(running.number, tokens, scores, answer))
        return progress

    def _finish(self, running: _Running, tokens: np.ndarray, stopped: bool, active: bool) -> Finish | None:
        """Why a text ends now, if it does; cuts what comes after its end."""
        if running.constraint is not None:
            for token in tokens.tolist():
                running.constraint.advance(token)
        if running.request.complete is not None:
            kept = running.request.complete(running.tokens)
            if kept is not None:
                del running.tokens[kept:], running.log_probabilities[kept:]
                return Finish.STOP
        if stopped:
            return Finish.STOP
        if running.constraint is not None and running.constraint.finished:
            return Finish.COMPLETE
        return None if active else Finish.LENGTH
