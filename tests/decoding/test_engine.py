"""The engine: the same tokens whatever the batch, the slots and the order, and one compile for each shape."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import STOP_IDS, Engine, EngineConfig
from jaxlm.decoding.forced import ForcedEnd
from jaxlm.decoding.penalties import RepetitionPenalty
from jaxlm.decoding.processors import Processor
from jaxlm.decoding.requests import Finish, Request
from jaxlm.decoding.sampling import NEVER, SamplingConfig, drawable_ids
from jaxlm.layers import AttentionConfig, EmbeddingConfig, LearnedPositions, Rope
from jaxlm.training.compiles import CompileCounter

GQA = AttentionConfig(4, 8, num_kv_heads=2, position=Rope())
WINDOWED = dataclasses.replace(GQA, window=(5, 0))
PROMPTS = [[5, 6, 7], [9], list(range(2, 25)), [], [4, 4], [3] * 7]
WAYS = [
    SamplingConfig(9, temperature=0.0),
    SamplingConfig(20),
    SamplingConfig(3, temperature=0.7, top_k=10),
    SamplingConfig(12, top_p=0.9, min_p=0.01),
    SamplingConfig(1),
    SamplingConfig(15, typical_p=0.8),
]
REQUESTS = [Request(prompt, way, seed=5) for prompt, way in zip(PROMPTS, WAYS)]


@pytest.fixture(scope="module")
def model(config, build):
    return CachedModel(build(config(Architecture.CAUSAL_DECODER, GQA, WINDOWED, repeats=1)), start_id=0)


@pytest.fixture(scope="module")
def answers(model):
    """What three slots make of REQUESTS."""
    return Engine(model, EngineConfig(slots=3, steps=8)).generate(REQUESTS)


def test_greedy_is_the_likeliest_token_each_time(model, answers, config, build, uncached):
    plain = build(config(Architecture.CAUSAL_DECODER, GQA, WINDOWED, repeats=1))
    row = [0, *PROMPTS[0]]
    for token, log_probability in zip(answers[0].tokens, answers[0].log_probabilities, strict=True):
        logits = uncached(plain, row)[-1].astype(np.float64)
        best, second = np.sort(logits)[::-1][:2]
        assert best - second > 1e-4, "a tie would make this test depend on rounding; choose another seed"
        assert token == logits.argmax()
        assert log_probability == pytest.approx(best - np.log(np.exp(logits).sum()), abs=1e-4)
        row.append(int(token))
    assert answers[0].finish is Finish.LENGTH and len(answers[0].tokens) == 9


def test_the_same_tokens_whatever_the_batch_the_slots_and_the_order(model, answers):
    """Greedy and drawn ones: alone, all at a time and in reverse."""
    assert [len(answer.tokens) for answer in answers] == [way.max_new_tokens for way in WAYS]
    alone = Engine(model, EngineConfig(slots=1, steps=4)).generate(REQUESTS)
    reverse = Engine(model, EngineConfig(slots=6, steps=8)).generate(REQUESTS[::-1])[::-1]
    for expected, one, other in zip(answers, alone, reverse, strict=True):
        assert expected.tokens.tolist() == one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(expected.log_probabilities, one.log_probabilities, atol=1e-4)
    again = Engine(model, EngineConfig(slots=3, steps=8)).generate(
        [dataclasses.replace(request, sample=1) for request in REQUESTS]
    )
    assert again[0].tokens.tolist() == answers[0].tokens.tolist()  # greedy
    assert again[1].tokens.tolist() != answers[1].tokens.tolist()  # another sample


def test_a_step_of_one_slot_copies_no_cache(model):
    """Tokens are written where they belong; a copy of the caches for each would cost more than attention."""
    engine = Engine(model, EngineConfig(slots=1, steps=4))
    engine.generate(REQUESTS[:1])
    arguments = (model.params, engine._slots, np.ones(1, bool), engine._drawable, np.bool_(False))
    text = engine._programs.run.lower(*arguments).compile().as_text()
    for keys in (block.attention.keys.values for block in engine._slots.caches.blocks):
        shape = ",".join(map(str, keys.shape))
        assert f"f32[{shape}]" in text and not re.search(rf"f32\[{shape}\]\S* copy\(", text)


def test_a_text_ends_at_its_own_stop_alone(model, answers):
    """Stop ids are not part of a text; `complete` cuts it; the others go on."""
    stop = int(answers[1].tokens[6])
    first = answers[1].tokens.tolist().index(stop)
    requests = [
        REQUESTS[0],
        dataclasses.replace(REQUESTS[1], stop_ids=(stop, 39)),
        dataclasses.replace(REQUESTS[5], complete=lambda tokens: 2 if len(tokens) >= 4 else None),
    ]
    whole, stopped, cut = Engine(model, EngineConfig(slots=3, steps=8)).generate(requests)
    assert whole.tokens.tolist() == answers[0].tokens.tolist()
    assert stopped.tokens.tolist() == answers[1].tokens.tolist()[:first] and stopped.finish is Finish.STOP
    assert cut.tokens.tolist() == answers[5].tokens.tolist()[:2] and cut.finish is Finish.STOP
    assert len(cut.log_probabilities) == 2


def test_a_text_up_to_the_last_learned_position_leaves_its_slot_clean(config, build):
    """Its slot stands still while the other goes on; who comes after finds nothing of it."""
    learned = EmbeddingConfig(positions=LearnedPositions(16))
    attention = dataclasses.replace(GQA, position=None)
    short_model = CachedModel(build(config(Architecture.CAUSAL_DECODER, attention, embedding=learned)), start_id=0)
    engine = Engine(short_model, EngineConfig(slots=2, steps=4))
    busy, full, short = (
        Request(prompt, SamplingConfig(n, 0.0)) for prompt, n in (([11], 15), ([5, 6, 7], 13), ([9], 4))
    )
    (alone,) = engine.generate([short])
    for answer, request in zip(engine.generate([busy, full]), (busy, full)):
        assert len(answer.tokens) == request.sampling.max_new_tokens
    *_, after = engine.generate([busy, full, short])
    assert after.tokens.tolist() == alone.tokens.tolist()
    np.testing.assert_allclose(after.log_probabilities, alone.log_probabilities, atol=1e-4)


def test_streams_are_what_is_answered(model, answers):
    parts = {i: [] for i in range(len(REQUESTS))}
    engine = Engine(model, EngineConfig(slots=3, steps=8))
    finished = 0
    for progress in engine.stream(REQUESTS):
        parts[progress.request] += progress.tokens.tolist()
        if progress.answer is not None:
            finished += 1
            assert progress.answer.tokens.tolist() == parts[progress.request]
    assert finished == len(REQUESTS)
    assert [parts[i] for i in range(len(REQUESTS))] == [answer.tokens.tolist() for answer in answers]


def test_one_compile_for_each_shape(model):
    """A second engine of this shape, other requests and other ways to draw compile nothing."""
    rng = np.random.default_rng(0)
    mixed = [
        Request(
            rng.integers(1, 40, rng.integers(0, 25)).tolist(),
            dataclasses.replace(WAYS[i % len(WAYS)], max_new_tokens=int(rng.integers(1, 20))),
            seed=i,
            stop_ids=(7,),
        )
        for i in range(24)
    ]
    engine = Engine(model, EngineConfig(slots=3, steps=5))
    engine.generate(mixed)  # whatever shapes these have
    step = engine._programs.run
    shapes = step._cache_size()
    assert shapes <= 3  # capacities 16, 32 and 64
    with CompileCounter() as compiles:
        found = Engine(model, EngineConfig(slots=3, steps=5)).generate(mixed)
    assert compiles.names == [] and step._cache_size() == shapes and len(found) == 24


@dataclasses.dataclass(frozen=True)
class AddToLogit(Processor):
    """Adds to one id's logit what the request says, unless the id was written before."""

    token: int

    def check(self, options):
        return ("add",)

    def slot_state(self, request):
        return np.float32(request.options.get("add", 0.0))

    def __call__(self, logits, texts, state):
        seen = jnp.any((texts.tokens == self.token) & texts.written(prompt=False), axis=1)
        return logits.at[:, self.token].add(jnp.where(seen, 0.0, state))


class EvenThenOdd:
    """An even id, then an odd one, and so on, four in all."""

    def __init__(self):
        self.count = 0

    def allowed(self):
        bits = np.zeros(64, np.uint8)
        bits[self.count % 2 : 40 : 2] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def advance(self, token):
        self.count += 1

    @property
    def finished(self):
        return self.count == 4


def test_processors_and_constraints(model, answers):
    """A processor with its state by slot and its look at what was written; a bit mask from the host, token by token."""
    engine = Engine(model, EngineConfig(slots=3, steps=8, processors=(AddToLogit(11),)))
    pushed = dataclasses.replace(REQUESTS[0], options={"add": 100.0})
    plain, other, constrained = engine.generate(
        [REQUESTS[0], pushed, dataclasses.replace(REQUESTS[5], constraint=EvenThenOdd)]
    )
    assert plain.tokens.tolist() == answers[0].tokens.tolist()
    assert other.tokens[0] == 11 and 11 not in other.tokens[1:]
    assert (constrained.tokens % 2).tolist() == [0, 1, 0, 1] and constrained.finish is Finish.COMPLETE


class DeadEnd(EvenThenOdd):
    """Three tokens, and then none that may follow."""

    def allowed(self):
        if self.count == 3:
            raise ValueError("nothing may follow here")
        return super().allowed()


def test_a_constraint_that_raises_gives_its_slot_back(model, answers):
    """Whoever asked is told; the others of its call are given up with it, and the next ones find a free slot."""
    engine = Engine(model, EngineConfig(slots=2, steps=8))
    stuck = dataclasses.replace(REQUESTS[5], constraint=DeadEnd)
    unmade = dataclasses.replace(REQUESTS[5], constraint=lambda: 1 / 0)
    for request, error in ((stuck, ValueError), (unmade, ZeroDivisionError)):
        with pytest.raises(error):
            engine.generate([request, *REQUESTS[:3]])
        assert engine.step() == []
    assert engine.generate(REQUESTS[:1])[0].tokens.tolist() == answers[0].tokens.tolist()
    wanted, number = {n: i for i, n in enumerate(engine.submit_all(REQUESTS[:2]))}, engine.submit(stuck)
    found, errors = {}, {}
    while progress := engine.step():
        found |= {wanted[one.request]: one.answer for one in progress if one.answer is not None}
        errors |= {one.request: one.error for one in progress if one.error is not None}
    assert list(errors) == [number] and str(errors[number]) == "nothing may follow here"
    assert [found[i].tokens.tolist() for i in (0, 1)] == [answers[i].tokens.tolist() for i in (0, 1)]


def test_what_could_not_be_prefilled_still_waits(model, answers, monkeypatch):
    """Several callers' requests are prefilled together: where that fails for one of them, the others lose nothing."""
    engine = Engine(model, EngineConfig(slots=2, steps=8))
    numbers = engine.submit_all(REQUESTS[:3])
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "prefill", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    found = {progress.request: progress.answer for progress in engine.stream() if progress.answer is not None}
    assert [found[n].tokens.tolist() for n in numbers] == [answers[i].tokens.tolist() for i in range(3)]


def test_what_is_cancelled_is_forgotten(model, answers):
    """Those that run, those that wait, and numbers that nobody has."""
    engine = Engine(model, EngineConfig(slots=2, steps=4))
    numbers = engine.submit_all(REQUESTS)
    assert {progress.request for progress in engine.step()} == set(numbers[:2])
    engine.cancel([numbers[0], *numbers[2:5], 99])
    ended = [(progress.request, progress.answer) for progress in engine.stream() if progress.answer is not None]
    assert sorted(number for number, _ in ended) == [numbers[1], numbers[5]]
    for number, answer in ended:
        assert answer.tokens.tolist() == answers[number].tokens.tolist()


def test_ids_that_may_not_be_drawn_are_not(model):
    engine = Engine(model, EngineConfig(slots=3, steps=8), drawable=drawable_ids(40, 10, (0,)))
    drawn = np.concatenate(
        [a.tokens for a in engine.generate([Request([5], SamplingConfig(20, 3.0), seed=s) for s in range(3)])]
    )
    assert len(drawn) == 60 and drawn.min() > 0 and drawn.max() < 10
    assert NEVER < -1e9


@pytest.mark.parametrize("architecture", [Architecture.PREFIX_DECODER, Architecture.ENCODER_DECODER])
def test_other_architectures(architecture, config, build, uncached):
    """Greedy continuations are those of the uncached model, over more requests than slots."""
    plain = build(config(architecture, GQA, repeats=1))
    cached = CachedModel(plain, start_id=0)
    prompts = [[5, 6, 7], [9], list(range(2, 20))]
    found = Engine(cached, EngineConfig(slots=2, steps=4)).generate(
        [Request(prompt, SamplingConfig(5, temperature=0.0)) for prompt in prompts]
    )
    for prompt, answer in zip(prompts, found):
        row = [0] if cached.crosses else [0, *prompt]
        for token in answer.tokens.tolist():
            assert token == uncached(plain, row, prompt=len(prompt) + 1, source=prompt)[-1].argmax()
            row.append(token)


def test_what_cannot_be_asked_is_said(model, config, build):
    engine = Engine(model, EngineConfig(slots=2))
    with pytest.raises(ValueError, match=f"9 stop ids; the engine takes {STOP_IDS}"):
        engine.submit(Request([1], stop_ids=tuple(range(9))))
    with pytest.raises(ValueError, match="id 77"):
        list(engine.stream([Request([1]), Request([77])]))
    assert engine.step() == []  # none of the two was begun
    with pytest.raises(ValueError, match="Request.seed is -1"):
        Request([1], seed=-1)
    built = [one.build(None, vocab_size=40, end_ids=(1,)) for one in (RepetitionPenalty(), ForcedEnd(4))]
    penalized = Engine(model, EngineConfig(slots=2, processors=tuple(built)))
    for options, message in (
        ({"repetition_penality": 1.1}, "option 'repetition_penality', .* take max_new_tokens, repetition_penalty"),
        ({"repetition_penalty": 0}, "option repetition_penalty = 0; it must be a number above 0"),
        ({"repetition_penalty": "1.2"}, "option repetition_penalty = '1.2'; it must be a number above 0"),
        ({"repetition_penalty": float("nan")}, "option repetition_penalty = nan"),
        ({"max_new_tokens": 0}, "option max_new_tokens = 0; it must be a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "option max_new_tokens = 2.5; it must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            penalized.submit(Request([1], options=options))
    penalized.submit(Request([1], options={"repetition_penalty": np.float32(2), "max_new_tokens": 3}))
    with pytest.raises(ValueError, match="option 'add', .* there is none"):
        engine.submit(Request([1], options={"add": 1.0}))
    with pytest.raises(ValueError, match="EngineConfig.slots is 0"):
        EngineConfig(slots=0)
    with pytest.raises(ValueError, match="allow one at least"):
        Engine(model, drawable=np.zeros(40, bool))
    learned = EmbeddingConfig(positions=LearnedPositions(8))
    attention = dataclasses.replace(GQA, position=None)
    short = CachedModel(build(config(Architecture.CAUSAL_DECODER, attention, embedding=learned)), start_id=0)
    with pytest.raises(ValueError, match="context of 8 tokens; shorten the prompt or max_new_tokens"):
        Engine(short).submit(Request([1, 2], SamplingConfig(7)))
