"""Cross-entropy of a batch equals its definition; whole or in chunks, with z-loss, smoothing and accounting."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.side_values import NO_SIDE_VALUES
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.prefix_lm import PrefixLM
from pallas_kernels.cross_entropy import OutputProjection

B, T, E, V = 2, 10, 8, 50
PLAIN, FULL_LM = LossConfig(), FullLM()


def params_and_batch(stack="decoder"):
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(E, V)), jnp.float32),
    }
    weights = (rng.random((B, T)) < 0.7) * rng.random((B, T))
    batch = {
        f"{stack}_target_tokens": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        f"{stack}_loss_weights": jnp.asarray(weights, jnp.float32),
        "dataset_ids": jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32),
        "objective_ids": jnp.asarray(rng.integers(0, 2, (B, T)), jnp.int32),
    }
    return params, batch


def model_of(params):
    return types.SimpleNamespace(
        hidden_states=lambda batch, context: (params["hidden"], NO_SIDE_VALUES),
        output=lambda hidden, context: (hidden, OutputProjection(params["head"])),
    )


def sums(params, batch, config=PLAIN, objective=FULL_LM):
    terms, metrics, side = objective.loss_sums(model_of(params), batch, context=LOCAL, config=config)
    assert side is NO_SIDE_VALUES
    return terms, metrics


def log_softmax(params):
    """The definition, in numpy and float64."""
    logits = np.asarray(params["hidden"], np.float64) @ np.asarray(params["head"], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), logits


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_cross_entropy_and_accuracy(stack):
    params, batch = params_and_batch(stack)
    log_p, _ = log_softmax(params)
    targets, weights = (np.asarray(batch[f"{stack}_{name}"]) for name in ("target_tokens", "loss_weights"))
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    terms, metrics = sums(params, batch)
    assert set(terms) == {"cross_entropy"} == set(FullLM().coefficients) == set(FullLM().loss_weights(batch))
    np.testing.assert_allclose(terms["cross_entropy"], (weights * nll).sum(), rtol=1e-6)
    np.testing.assert_allclose(FullLM().loss_weights(batch)["cross_entropy"], weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"], ((weights * nll).sum(), weights.sum()), rtol=1e-6)
    right = (log_p.argmax(-1) == targets) * weights
    np.testing.assert_allclose(metrics["accuracy"], (right.sum(), weights.sum()), rtol=1e-6)
    assert set(metrics) == {"cross_entropy", "accuracy"}


def test_z_loss():
    """z_loss * log(Z)^2, of which the metric `cross_entropy` knows nothing."""
    params, batch = params_and_batch()
    _, logits = log_softmax(params)
    z = (np.asarray(batch["decoder_loss_weights"]) * np.log(np.exp(logits).sum(-1)) ** 2).sum()
    plain, _ = sums(params, batch)
    terms, metrics = sums(params, batch, LossConfig(z_loss=0.01))
    np.testing.assert_allclose(terms["cross_entropy"] - plain["cross_entropy"], 0.01 * z, rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"][0], 0.01 * z, rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy"][0], plain["cross_entropy"], rtol=1e-7)


def test_label_smoothing():
    """Cross-entropy with (1 - e) one-hot + e / V; for equal logits it is log V whatever e is."""
    params, batch = params_and_batch()
    log_p, _ = log_softmax(params)
    targets, weights = np.asarray(batch["decoder_target_tokens"]), np.asarray(batch["decoder_loss_weights"])
    soft = 0.9 * np.eye(V)[targets] + 0.1 / V
    expected = -(weights * (soft * log_p).sum(-1)).sum()
    terms, _ = sums(params, batch, LossConfig(label_smoothing=0.1))
    np.testing.assert_allclose(terms["cross_entropy"], expected, rtol=1e-6)
    flat, _ = sums({**params, "head": jnp.zeros((E, V))}, batch, LossConfig(label_smoothing=0.3))
    np.testing.assert_allclose(flat["cross_entropy"], weights.sum() * np.log(V), rtol=1e-6)


CHUNKED = {
    "3 positions of 20": LossConfig(token_chunk=3),
    "8 positions of 20": LossConfig(token_chunk=8),
    "again in the backward pass": LossConfig(recompute_logits=True),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_equal_the_whole(name):
    """Sums, metrics and gradients to 1e-6, with every option on."""
    params, batch = params_and_batch()
    options = dict(z_loss=0.01, label_smoothing=0.1, num_datasets=3)

    def run(config):
        def total(params):
            terms, metrics = sums(params, batch, config)
            return terms["cross_entropy"], metrics

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    whole, chunked = (run(dataclasses.replace(config, **options)) for config in (PLAIN, CHUNKED[name]))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(a).max())


def test_the_chunk_is_the_configurations():
    """The program of both passes holds logits of `token_chunk` tokens, and of no more."""
    params, batch = params_and_batch()

    def shapes(config):
        step = jax.grad(lambda p: sums(p, batch, config)[0]["cross_entropy"])
        return str(jax.make_jaxpr(step)(params))

    whole, eight = f"f32[{B * T},{V}]", f"f32[7,{V}]"  # 20 tokens in 3 equal chunks
    assert whole in shapes(PLAIN) and whole not in shapes(LossConfig(token_chunk=8))
    assert eight in shapes(LossConfig(token_chunk=8))


def test_the_head_is_handed_the_context():
    """A head with layers of its own runs as the rest of the model does."""
    params, batch = params_and_batch()
    seen = []

    def output(hidden, context):
        seen.append(context)
        return hidden, OutputProjection(params["head"])

    model = model_of(params)
    model.output = output
    context = Context(dropout_key=jax.random.key(0))
    FULL_LM.loss_sums(model, batch, context=context, config=PLAIN)
    assert seen == [context]


def test_accounting_by_dataset_and_objective():
    params, batch = params_and_batch()
    mixture = Mixture(members=(FullLM(), PrefixLM()), weights=(1.0, 1.0))
    _, metrics = sums(params, batch, LossConfig(num_datasets=3), mixture)
    log_p, _ = log_softmax(params)
    nll = -np.take_along_axis(log_p, np.asarray(batch["decoder_target_tokens"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["decoder_loss_weights"])
    for group, count in (("dataset", 3), ("objective", 2)):
        ids = np.asarray(batch[f"{group}_ids"])
        expected = [((weights * nll)[ids == i].sum(), weights[ids == i].sum()) for i in range(count)]
        np.testing.assert_allclose(np.stack(metrics[f"cross_entropy_by_{group}"], 1), expected, rtol=1e-5)


def test_microbatches_sum_to_the_batch():
    """Sums and weights over halves of the batch add up, so that accumulation can divide by the whole's weight."""
    params, batch = params_and_batch()
    halves = [
        ({**params, "hidden": params["hidden"][i : i + 1]}, {name: x[i : i + 1] for name, x in batch.items()})
        for i in range(B)
    ]
    for f in (lambda p, b: sums(p, b)[0], lambda p, b: FullLM().loss_weights(b)):
        np.testing.assert_allclose(
            f(params, batch)["cross_entropy"], sum(f(*half)["cross_entropy"] for half in halves), rtol=1e-6
        )


def test_bfloat16_states_are_scored_in_float32():
    params, batch = params_and_batch()
    narrow = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
    found, _ = sums(narrow, batch)
    rounded = {name: x.astype(jnp.float32) for name, x in narrow.items()}
    assert found["cross_entropy"].dtype == jnp.float32
    np.testing.assert_allclose(found["cross_entropy"], sums(rounded, batch)[0]["cross_entropy"], rtol=1e-6)
