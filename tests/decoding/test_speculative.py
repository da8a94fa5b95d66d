"""Speculative texts are the model's own: greedy ones token by token, others in distribution."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.architecture import Architecture
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.drafts import ModelDrafter, NGramLookup, Rules, follow
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.penalties import RepetitionPenalty
from jaxlm.decoding.processors import Texts, prompts_as_texts, states_of
from jaxlm.decoding.requests import Finish, Request
from jaxlm.decoding.sampling import Sampling, SamplingConfig
from jaxlm.decoding.speculative import STOP_IDS, SpeculativeConfig, State, begin, speculate, verify_once
from jaxlm.layers import Mamba2Config, MambaBlockConfig, MambaConfig
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.cache import CacheConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import LearnedPositions, Rope
from jaxlm.layers.stack import Layers, StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.models.language_model import LanguageModel

V, N, K = 5, 3, 2
PROMPT = [1, 2, 1, 2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Toy:
    """The memory of a toy model: every token, or, where it cannot go back, the last two."""

    tokens: jax.Array  # [S, C]
    lengths: jax.Array  # [S]
    rewindable: bool = dataclasses.field(default=True, metadata={"static": True})

    def rewind(self, lengths):
        assert self.rewindable
        return dataclasses.replace(self, lengths=lengths)


def toy(table):
    """A model whose next logits are table [V, V, V] at the last two tokens."""

    def extend(memory, tokens, present):
        logits, rows = [], jnp.arange(len(tokens))
        for i in range(tokens.shape[1]):
            keep = jnp.ones(len(tokens), bool) if present is None else present[:, i]
            new = memory.tokens.at[rows, memory.lengths].set(tokens[:, i])
            memory = Toy(jnp.where(keep[:, None], new, memory.tokens), memory.lengths + keep, memory.rewindable)
            logits.append(table[new[rows, jnp.maximum(memory.lengths - 2, 0)], new[rows, memory.lengths - 1]])
        return jnp.stack(logits, axis=1), memory

    return extend


def distribution(table, sampling, penalty):
    """{text of N tokens: its probability}, by the definition."""
    found = {}
    for text in itertools.product(range(V), repeat=N):
        ids, total = list(PROMPT), 1.0
        for token in text:
            logits = np.array(table[ids[-2], ids[-1]], np.float64)
            for i in set(ids):
                logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
            p = np.exp(logits / sampling.temperature)
            p /= p.sum()
            order = np.argsort(-p)
            kept = order[: 1 + int((np.cumsum(p[order]) < sampling.top_p).sum())]
            total *= p[token] / p[kept].sum() if token in kept else 0.0
            ids.append(token)
        found[text] = total
    return found


@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.full), "stateful", "lookup"])
def test_texts_have_the_distribution_of_the_model(kind):
    """Chi-squared over all texts of three tokens, of 10,000 texts: temperature, top-p and a processor included."""
    rng = np.random.default_rng(0)
    table, other = (jnp.asarray(rng.normal(size=(V, V, V)), jnp.float32) for _ in range(2))
    sampling, penalty, slots = SamplingConfig(N, temperature=0.8, top_p=0.9), 1.5, 10_000
    processor = RepetitionPenalty(penalty).build(ByteVocabulary(), vocab_size=V, end_ids=())
    rules = Rules(np.ones(V, bool), Sampling.of([sampling] * slots, [(i, 0) for i in range(slots)]), (processor,))
    drafter = NGramLookup(2, 1) if kind == "lookup" else ModelDrafter(toy(other))
    columns = len(PROMPT) + N + K + 1
    texts = prompts_as_texts([PROMPT] * slots, slots, columns)
    memory = Toy(texts.tokens, texts.lengths, rewindable=kind != "stateful")
    zeros = np.zeros(slots, np.int32)
    state = State(
        memory=memory,
        draft_memory=prompts_as_texts([], slots, 0) if kind == "lookup" else memory,
        texts=texts,
        states=states_of((processor,), [Request(PROMPT)], slots),
        log_probabilities=np.zeros((slots, columns), np.float32),
        limits=np.full(slots, N, np.int32),
        stop_ids=np.full((slots, STOP_IDS), -1, np.int32),
        active=np.ones(slots, bool),
        stopped=np.zeros(slots, bool),
        passes=zeros,
        drafted=zeros,
        accepted=zeros,
    )

    @jax.jit
    def run(state, rules):
        logits = jnp.broadcast_to(table[PROMPT[-2], PROMPT[-1]], (slots, V))
        once = functools.partial(verify_once, toy(table), drafter, rules=rules, count=K)
        return jax.lax.while_loop(lambda s: jnp.any(s.active), once, begin(logits, state, rules))

    end = run(state, rules)
    drawn = np.asarray(end.texts.tokens)[:, len(PROMPT) : len(PROMPT) + N]
    assert (np.asarray(end.texts.lengths) == len(PROMPT) + N).all()
    expected = distribution(np.asarray(table), sampling, penalty)
    found = dict.fromkeys(expected, 0)
    for text in map(tuple, drawn.tolist()):
        found[text] += 1
    assert all(found[text] == 0 for text, p in expected.items() if p == 0)
    likely = [text for text, p in expected.items() if p * slots >= 5]
    rest = slots - sum(found[text] for text in likely), slots * (1 - sum(expected[text] for text in likely))
    observed, wanted = [found[t] for t in likely] + [rest[0]], [expected[t] * slots for t in likely] + [rest[1]]
    if rest[1] < 1e-6:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(likely) > 20
    assert stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue > 1e-3
    # Some drafts were accepted, and some were not: both ways were taken.
    assert 0.05 < int(end.accepted.sum()) / int(end.drafted.sum()) < 0.95
    scores = jax.nn.log_softmax(table)[drawn[:, 0], drawn[:, 1], drawn[:, 2]]
    np.testing.assert_allclose(end.log_probabilities[:, 2], scores, rtol=1e-5)


def test_lookups_find_what_followed_last():
    ids = [[7, 8, 9, 7, 8, 5, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], [4, 4, 4, 0, 0, 0, 0, 0, 0, 0]]
    texts = Texts(jnp.array(ids), jnp.array([8, 9, 3]), jnp.array([1, 1, 1]))
    run = jax.jit(lambda texts, size: follow(texts, texts.last(size), 3), static_argnums=1)
    tokens, there = run(texts, 2)
    assert tokens[0].tolist() == [5, 7, 8] and there[0].all()  # the later of the two places
    assert not there[1].any()
    assert tokens[2, 0] == 4 and there[2].tolist() == [True, False, False]  # the text has no more to copy
    assert not run(texts, 10)[1].any()


# Models ---------------------------------------------------------------------------------------------------------


def make_model(architecture, seed=0, positions=None, layers=2, vocab_size=40, window=None):
    """A small model whose random logits are spread enough that rounding does not change a choice."""
    attention = AttentionConfig(num_heads=2, head_dim=8, position=None if positions else Rope(), window=window)
    parts = {"attention": attention, "feed_forward": FeedForwardConfig(hidden=32), "norm": NormConfig()}
    options = {"num_layers": layers, "final_norm": NormConfig(), "layers": Layers.UNROLL}
    plain = StackConfig(blocks=(BlockConfig(**parts),), **options)
    cross = BlockConfig(cross_attention=AttentionConfig(num_heads=2, head_dim=8), **parts)
    both = architecture is Architecture.ENCODER_DECODER
    config = LanguageModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        width=16,
        embedding=EmbeddingConfig(positions=positions),
        head=HeadConfig(tied=True),
        init=InitConfig(std=0.5),
        encoder=plain if both else None,
        decoder=StackConfig(blocks=(cross,), **options) if both else plain,
    )
    return LanguageModel(config, key=jax.random.key(seed))


def cached(model):
    return CachedModel(model, start_id=0, caching=CacheConfig(extension=K + 1))


PROMPTS = [[5, 6, 7], [9], [11, 12, 11, 12, 11]]


@pytest.mark.parametrize("architecture", [Architecture.CAUSAL_DECODER, Architecture.ENCODER_DECODER], ids=str)
def test_greedy_texts_are_those_of_the_engine(architecture, full):
    # Learned positions end with the longest text, and windows are shorter: drafts must do no harm in either.
    longest = 1 + len(PROMPTS[2]) + 12 - 1
    positions = LearnedPositions(longest) if architecture is Architecture.CAUSAL_DECODER else None
    model = cached(make_model(architecture, positions=positions, layers=1, window=(4, 0) if positions else None))
    draft = cached(make_model(architecture, seed=1, layers=1))
    sampling = [SamplingConfig(12, temperature=0.0), SamplingConfig(5, temperature=0.0)]
    requests = [Request(prompt, sampling[i == 1]) for i, prompt in enumerate(PROMPTS)]
    engine = Engine(model, EngineConfig(slots=4))
    wanted = engine.generate(requests)
    # The longest text goes on to its end, and once more up to a stop id that it has in its middle.
    stop = int(wanted[2].tokens[6])
    requests.append(Request(PROMPTS[2], sampling[0], stop_ids=(stop,)))
    wanted = engine.generate(requests)
    assert len(wanted[2].tokens) == 12 and wanted[3].finish is Finish.STOP
    ways = [(SpeculativeConfig(K), draft), (SpeculativeConfig(K), model), (SpeculativeConfig(K, NGramLookup()), None)]
    if not full:
        ways = ways[1:] if architecture is Architecture.CAUSAL_DECODER else ways[:1]
    for config, drafter in ways:
        found = speculate(model, requests, config, draft=drafter)
        for answer, expected in zip(found, wanted, strict=True):
            assert answer.tokens.tolist() == expected.tokens.tolist()
            assert answer.finish is expected.finish
            np.testing.assert_allclose(answer.log_probabilities, expected.log_probabilities, atol=1e-4)
            assert answer.passes <= len(expected.tokens) and answer.accepted <= answer.drafted
        if drafter is None:
            assert found[2].accepted < found[2].drafted  # some were refused
        if drafter is model:  # its own drafts are all accepted: one token from the prompt, then K + 1 a pass
            assert [answer.passes for answer in found[:2]] == [-(-11 // (K + 1)), -(-4 // (K + 1))]
            assert found[0].acceptance_length == K + 1


@pytest.mark.full
def test_a_recurrent_state_goes_on_from_what_was_accepted(config, build):
    """Mamba, Mamba-2 and attention within a window: greedy texts are those of the engine."""
    norm, made = (
        NormConfig(),
        config(Architecture.CAUSAL_DECODER, AttentionConfig(2, 8, position=Rope(), window=(4, 0))),
    )
    mixers = (MambaConfig(24, 2, state=4), Mamba2Config(4, 6, state=5, groups=2))
    blocks = (*(MambaBlockConfig(mixer, norm) for mixer in mixers), *made.decoder.blocks)
    stack = dataclasses.replace(made.decoder, blocks=blocks, num_layers=3)
    model = cached(build(dataclasses.replace(made, decoder=stack)))
    requests = [Request(prompt, SamplingConfig(12, temperature=0.0)) for prompt in PROMPTS]
    wanted = Engine(model, EngineConfig(slots=4)).generate(requests)
    for found, answer in zip(speculate(model, requests, SpeculativeConfig(K, NGramLookup())), wanted, strict=True):
        assert found.tokens.tolist() == answer.tokens.tolist()


def test_texts_by_chance_are_functions_of_seed_and_request_alone():
    model, draft = (cached(make_model(Architecture.CAUSAL_DECODER, seed, layers=1)) for seed in (0, 1))
    sampling = SamplingConfig(7, top_k=10)
    requests = [Request(prompt, sampling, seed=i + 5) for i, prompt in enumerate(PROMPTS)]
    together = speculate(model, requests, SpeculativeConfig(K), draft=draft)
    apart = speculate(model, requests[::-1], SpeculativeConfig(K, rounds=1), draft=draft, slots=1)[::-1]
    for one, other in zip(together, apart, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
    other_seed = speculate(
        model, [dataclasses.replace(r, seed=99) for r in requests], SpeculativeConfig(K), draft=draft
    )
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(together, other_seed, strict=True))
    # What ends a text without being a token cuts it where it says.
    complete = lambda tokens: 3 if len(tokens) >= 4 else None  # noqa: E731
    cut = speculate(
        model, [dataclasses.replace(requests[0], complete=complete)], SpeculativeConfig(K, rounds=1), draft=draft
    )[0]
    assert cut.tokens.tolist() == together[0].tokens[:3].tolist() and cut.finish is Finish.STOP


def test_what_does_not_go_together_is_refused():
    model = make_model(Architecture.CAUSAL_DECODER, layers=1)
    ours, wide = cached(model), cached(make_model(Architecture.CAUSAL_DECODER, layers=1, vocab_size=48))
    reads = cached(make_model(Architecture.ENCODER_DECODER, layers=1))
    request = Request([5], SamplingConfig(4))
    for options, message in (
        ({"config": SpeculativeConfig(K)}, "needs a draft model or SpeculativeConfig.lookup"),
        ({"config": SpeculativeConfig(K + 1, NGramLookup())}, r"make it with caching=CacheConfig\(extension=4\)"),
        ({"config": SpeculativeConfig(K), "draft": wide}, "has 48 ids and the model 40"),
        ({"config": SpeculativeConfig(K), "draft": reads}, "both with an encoder, or both without"),
        (
            {"config": SpeculativeConfig(K, NGramLookup()), "requests": [Request([5], constraint=lambda: None)]},
            "takes no constraint",
        ),
        ({"config": SpeculativeConfig(K, NGramLookup()), "requests": [Request([99])]}, "has the id 99"),
        (
            {"config": SpeculativeConfig(K, NGramLookup()), "requests": [Request([5], options={"penalty": 2})]},
            "has the option 'penalty'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            speculate(**{"model": ours, "requests": [request], **options})
    for make in (lambda: SpeculativeConfig(0), lambda: NGramLookup(1, 2), lambda: SpeculativeConfig(rounds=0)):
        with pytest.raises(ValueError):
            make()
