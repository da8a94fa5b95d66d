"""A score is what the model says of one text alone in a row, however texts are packed and whatever they share."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.evaluation import scoring
from jaxlm.evaluation.scoring import Request, Scorer, ScoringConfig
from jaxlm.layers.positions import Alibi, LearnedPositions
from tests.evaluation.models import T5_TABLE, make_model

CAUSAL, PREFIX = Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER
ENCODER, BOTH = Architecture.ENCODER, Architecture.ENCODER_DECODER
START, MASK = 0, 39
PADDED = 48  # one shape for the reference, so that it compiles once a model
CONFIG = ScoringConfig(row_length=32, batch_tokens=64)
APART = ScoringConfig(row_length=64, batch_tokens=64, share_context=False)

RANDOM = np.random.default_rng(0)


def random_ids(count):
    return RANDOM.integers(3, 39, count)


REQUESTS = [
    Request(random_ids(9), [random_ids(n) for n in (5, 1, 7, 3)]),
    Request(random_ids(2), [random_ids(4)]),
    Request(random_ids(20), [random_ids(n) for n in (6, 6, 14)]),
    Request(random_ids(1), [random_ids(1), random_ids(1)]),
]


@nnx.jit
def log_probabilities_of(model, batch):
    return jax.nn.log_softmax(model.head(model.hidden_states(batch)[0]))


def alone(model, context, tokens, start=START):
    """Log-probabilities [N] of `tokens` after `context`, from whole logits of one padded row each."""
    architecture = model.config.architecture

    def row(ids):
        return jnp.asarray([[*ids, *[0] * (PADDED - len(ids))]], jnp.int32)

    def features(side, ids):
        segments = row([1] * len(ids))
        return {
            f"{side}_input_tokens": row(ids),
            f"{side}_segment_ids": segments,
            f"{side}_positions": row(range(len(ids))),
        }

    context, tokens = list(context), list(tokens)
    if architecture is ENCODER:
        found = []
        for place, token in enumerate(tokens, len(context)):
            text = context + tokens
            text[place] = MASK
            found.append(log_probabilities_of(model, features("encoder", text))[0, place, token])
        return np.array(found)
    if architecture is BOTH:
        batch = features("encoder", context) | features("decoder", [start, *tokens[:-1]])
        first = 0
    else:
        read = ([] if start is None else [start]) + context
        batch, first = features("decoder", [*read, *tokens[:-1]]), len(read) - 1
        if architecture is PREFIX:
            batch["decoder_causal_attention"] = row([1] * len(read))
    found = log_probabilities_of(model, batch)[0]
    return np.array([found[first + i, token] for i, token in enumerate(tokens)])


MODELS = {
    "causal": (CAUSAL, {}, True),
    "causal without start": (CAUSAL, {"start": None}, True),
    "causal, learned positions": (CAUSAL, {"embedded": LearnedPositions(48)}, True),
    "causal, T5's table": (CAUSAL, {"position": T5_TABLE}, True),
    "causal, a table for all layers": (CAUSAL, {"position": None, "shared": T5_TABLE}, True),
    "causal, ALiBi": (CAUSAL, {"position": Alibi()}, True),
    "causal, window": (CAUSAL, {"window": (4, 0)}, False),
    "causal, recurrent": (CAUSAL, {"recurrent": True}, False),
    "prefix": (PREFIX, {}, True),
    "prefix, T5's table": (PREFIX, {"position": T5_TABLE}, True),
    "encoder-decoder": (BOTH, {"position": T5_TABLE}, True),
    "encoder": (ENCODER, {}, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_text_alone(name):
    """Packed with contexts shared, and packed apart in other rows; tokens and sums."""
    architecture, options, shares = MODELS[name]
    start = options.get("start", START)
    model = make_model(architecture, **{k: v for k, v in options.items() if k != "start"})
    packed, apart = (Scorer(model, start_id=start, mask_id=MASK, config=c) for c in (CONFIG, APART))
    assert (packed.shares_context, apart.shares_context) == (shares, False)
    first, second = packed.score(REQUESTS), apart.score(REQUESTS)
    for request, *found in zip(REQUESTS, first, second, strict=True):
        for i, tokens in enumerate(request.continuations):
            expected = alone(model, request.context, tokens, start)
            for scores in found:
                np.testing.assert_allclose(scores[i].log_probabilities, expected, atol=1e-5)
                assert scores[i].total == pytest.approx(expected.sum(), abs=1e-4)


def test_greedy_continuation_is_greedy():
    model = make_model(CAUSAL)
    context, tokens = random_ids(6), []
    for _ in range(4):
        scores = Scorer(model, start_id=START, config=CONFIG).score(
            [Request([*context, *tokens], [[i] for i in range(40)])]
        )
        tokens.append(int(np.argmax([s.total for s in scores[0]])))
        assert [s.is_greedy for s in scores[0]] == [i == tokens[-1] for i in range(40)]
    other = [*tokens[:-1], (tokens[-1] + 1) % 40]
    (found,) = Scorer(model, start_id=START, config=CONFIG).score([Request(context, [tokens, other])])
    assert [s.is_greedy for s in found] == [True, False]
    assert found[1].correct.tolist() == [True, True, True, False]


def test_a_bucket_compiles_once():
    """Whatever the texts, the programs are as many as shapes: rows of two lengths here."""
    scoring._token_scores.clear_cache()
    scorer = Scorer(make_model(CAUSAL), start_id=START, config=ScoringConfig(row_length=32, batch_tokens=32))
    for seed in range(4):
        r = np.random.default_rng(seed)
        scorer.score([Request(r.integers(3, 39, n), [r.integers(3, 39, 10)] * 2) for n in r.integers(2, 8, 12)])
    assert scoring._token_scores._cache_size() == 1
    scorer.score([Request(random_ids(40), [random_ids(10)])])
    assert scoring._token_scores._cache_size() == 2


def test_no_logits_of_all_tokens():
    """The program holds no array of [tokens, vocabulary]: only what is scored meets the vocabulary."""
    model = make_model(CAUSAL, vocab_size=512)
    scorer = Scorer(model, start_id=START, config=ScoringConfig(row_length=64, batch_tokens=128, share_context=False))
    requests = [Request(r, [r[:2]]) for r in (random_ids(28) for _ in range(4))]
    ((_, batch),) = scorer._batches(
        [u for r in requests for u, _ in scorer._units(r.context, [(0, r.continuations[0])])]
    )
    assert batch.at.shape == (2, 8)  # 2 x 2 tokens a row, in steps of 8
    text = scoring._token_scores.lower(
        scorer._graph, scorer._state, batch.features, batch.at, batch.labels, context=scorer.context
    ).as_text()
    assert "x64x16x" in text  # hidden states of all tokens
    assert "x64x512x" not in text and "128x512x" not in text


def test_long_contexts_lose_their_beginning_or_are_refused():
    """As lm-evaluation-harness: the last tokens that have room, for each continuation its own."""
    model = make_model(CAUSAL)
    context, short, long = random_ids(30), random_ids(2), random_ids(8)
    scorer = Scorer(model, start_id=None, context_length=16, config=CONFIG)
    ((a, b),) = scorer.score([Request(context, [short, long])])
    assert (a.dropped, b.dropped) == (15, 21)  # 30 + 2 - 1 - 16 and 30 + 8 - 1 - 16
    np.testing.assert_allclose(a.log_probabilities, alone(model, context[15:], short, None), atol=1e-5)
    np.testing.assert_allclose(b.log_probabilities, alone(model, context[21:], long, None), atol=1e-5)
    kept = Scorer(model, start_id=START, context_length=16, config=CONFIG).score([Request(context, [short])])[0][0]
    assert kept.dropped == 16  # the start token takes a place
    np.testing.assert_allclose(kept.log_probabilities, alone(model, context[16:], short), atol=1e-5)
    refusing = ScoringConfig(row_length=32, batch_tokens=32, too_long="refuse")
    with pytest.raises(ValueError, match="context of request 0 has 30 tokens, but there is room for 15"):
        Scorer(model, start_id=None, context_length=16, config=refusing).score([Request(context, [short])])
    with pytest.raises(ValueError, match="continuation of request 0 has 20 tokens, but the model reads 16"):
        scorer.score([Request([1], [random_ids(20)])])


@pytest.mark.parametrize("start", [None, START])
def test_rolling_predicts_every_token_once(start):
    """Windows of lm-evaluation-harness: disjoint, the last full."""
    model = make_model(CAUSAL)
    text = random_ids(25)
    scorer = Scorer(model, start_id=start, context_length=10, config=CONFIG)
    (found, empty) = scorer.rolling([text, []], prefix=[] if start is not None else [2])
    assert empty.total == 0.0
    expected = np.concatenate(
        [
            alone(model, [] if start is not None else [2], text[:10], start),
            alone(model, text[10:10] if start is not None else text[9:10], text[10:20], start),
            alone(model, text[15:20] if start is not None else text[14:20], text[20:], start),
        ]
    )
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-5)


def test_what_cannot_be_scored_is_said():
    causal, both = make_model(CAUSAL), make_model(BOTH)
    scorer = Scorer(causal, start_id=None, config=CONFIG)
    with pytest.raises(ValueError, match="Request 1 has the token id 40, but the model has 40 ids"):
        scorer.score([REQUESTS[0], Request([40], [[1]])])
    with pytest.raises(ValueError, match="Request 0 has no context, and the model no start_id"):
        scorer.score([Request([], [[1]])])
    with pytest.raises(ValueError, match="Request 0 has no continuation, or one without tokens"):
        scorer.score([Request([1], [[1], []])])
    with pytest.raises(ValueError, match="an encoder needs at least one token"):
        Scorer(both, start_id=0, config=CONFIG).score([Request([], [[1]])])
    with pytest.raises(ValueError, match="needs start_id"):
        Scorer(both, start_id=None)
    with pytest.raises(ValueError, match="no mask token"):
        Scorer(make_model(ENCODER), start_id=None)
    with pytest.raises(ValueError, match="needs one prefix token"):
        scorer.rolling([[1, 2]])
    with pytest.raises(ValueError, match="row_length <= batch_tokens"):
        ScoringConfig(row_length=64, batch_tokens=32)
    assert scorer.score([]) == []


def test_a_mesh_gives_the_scores_of_one_device(run_python):
    """Rows over data and FSDP, heads and vocabulary over tensor; a mesh that cuts rows is refused."""
    found = json.loads(run_python(["tests/evaluation/scoring_program.py"], devices=8).stdout.splitlines()[-1])
    assert set(found["differences"]) == {"prefix_decoder", "encoder_decoder"}
    assert max(found["differences"].values()) < 1e-5
    assert "MeshConfig.sequence" in found["refusal"]
