"""Multi-token prediction: targets further on, never across a segment; one head is full LM."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.context import LOCAL
from jaxlm.layers.side_values import NO_SIDE_VALUES
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.multi_token import MultiTokenPrediction, ahead
from pallas_kernels.cross_entropy import OutputProjection

BATCH = {
    "decoder_target_tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
    "decoder_loss_weights": jnp.array([[1.0, 1.0, 1.0, 0.5, 1.0, 0.0]]),
    "decoder_segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]),
}


def test_targets_do_not_cross_segments():
    expected = {
        0: ([5, 6, 7, 8, 9], [1, 1, 1, 0.5, 1, 0]),
        1: ([6, 7, 8, 9, 0], [1, 1, 0, 1, 0, 0]),
        2: ([7, 8, 9, 0, 0], [1, 0, 0, 0, 0, 0]),
        3: ([8, 9, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    }
    for k, (targets, weights) in expected.items():
        found = ahead(BATCH, k)
        assert found[0][0, :5].tolist() == targets and found[1][0].tolist() == weights


def model(n):
    keys = jax.random.split(jax.random.key(0), n + 1)
    head = jax.random.normal(keys[n], (4, 12))
    states = tuple(jax.random.normal(key, (1, 6, 4)) for key in keys[:n])
    return types.SimpleNamespace(
        future_hidden_states=lambda batch, context: (states, NO_SIDE_VALUES),
        hidden_states=lambda batch, context: (states[0], NO_SIDE_VALUES),
        output=lambda hidden, context: (hidden, OutputProjection(head)),
        logits=lambda k: np.asarray(states[k] @ head),
    )


def test_each_head_predicts_its_token():
    objective, net = MultiTokenPrediction(num_future=3, weights=(1.0, 0.5, 0.25)), model(3)
    sums, metrics, _ = objective.loss_sums(net, BATCH, context=LOCAL, config=LossConfig())
    weights = objective.loss_weights(BATCH)
    assert dict(objective.coefficients) == {"cross_entropy": 1.0, "future_2": 0.5, "future_3": 0.25}
    assert set(sums) == set(weights) == set(objective.coefficients)
    for k, term in enumerate(sums):
        logits = net.logits(k)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets, w = ahead(BATCH, k)
        expected = -(log_p[np.arange(6), targets[0]] * w[0]).sum()
        np.testing.assert_allclose(sums[term], expected, rtol=1e-5)
        np.testing.assert_allclose(weights[term], w.sum())
        np.testing.assert_allclose(metrics[term], (expected, w.sum()), rtol=1e-5)


def test_one_head_is_full_lm():
    net, config = model(1), LossConfig(z_loss=1e-3, label_smoothing=0.1)
    one, *_ = MultiTokenPrediction(num_future=1).loss_sums(net, BATCH, context=LOCAL, config=config)
    full, *_ = FullLM().loss_sums(net, BATCH, context=LOCAL, config=config)
    assert one == full


def test_bad_settings():
    with pytest.raises(ValueError, match="predicts 4 tokens but the model has 3 heads"):
        MultiTokenPrediction().loss_sums(model(3), BATCH, context=LOCAL, config=LossConfig())
    with pytest.raises(ValueError, match="one weight for each of 4 heads"):
        MultiTokenPrediction(weights=(1.0,))
