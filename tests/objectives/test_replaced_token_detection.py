"""Replaced-token detection: labels, gradients that stay apart, draws, and the uniform generator."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import objective_zoo as zoo
import pytest

from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.side_values import NO_SIDE_VALUES
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.replaced_token_detection import Draws, Generator, ReplacedTokenDetection
from pallas_kernels.cross_entropy import OutputProjection

B, S, E, V = 2, 12, 6, 40
PLAIN = LossConfig()


def params_and_batch():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "embedding": normal(V, E),
        "generator": {"mixer": normal(E, E), "head": normal(E, V)},
        "discriminator": {"mixer": normal(E, E), "head": normal(E)},
    }
    originals = rng.integers(5, V, (B, S))
    weights = (rng.random((B, S)) < 0.4).astype(np.float32)
    segments = np.ones((B, S), np.int32)
    segments[1, 9:], weights[1, 9:], originals[1, 9:] = 0, 0, 0
    batch = {
        "encoder_input_tokens": np.where(weights > 0, 4, originals),
        "encoder_target_tokens": originals,
        "encoder_loss_weights": weights,
        "encoder_segment_ids": segments,
    }
    return params, jax.tree.map(jnp.asarray, batch)


def model_of(params, *, tied=False, uniform=False):
    """A bag-of-neighbours generator and discriminator; they share the embedding only if tied."""
    seen = []

    def mix(tokens, embedding, mixer):
        x = embedding[tokens]
        return jnp.tanh((x + x.mean(1, keepdims=True)) @ mixer)

    def discriminator_logits(batch, context):
        seen.append(batch["encoder_input_tokens"])
        embedding = params["embedding"] if tied else jax.lax.stop_gradient(params["embedding"])
        own = params["discriminator"]
        return mix(batch["encoder_input_tokens"], embedding, own["mixer"]) @ own["head"], NO_SIDE_VALUES

    generator = types.SimpleNamespace(
        hidden_states=lambda batch, context: (
            mix(batch["encoder_input_tokens"], params["embedding"], params["generator"]["mixer"]),
            NO_SIDE_VALUES,
        ),
        output=lambda hidden, context: (hidden, OutputProjection(params["generator"]["head"])),
    )
    return types.SimpleNamespace(
        generator=None if uniform else generator, discriminator_logits=discriminator_logits, shown=seen
    )


def run(params, batch, objective, context=LOCAL, config=PLAIN, **options):
    model = model_of(params, **options)
    sums, metrics, _ = objective.loss_sums(model, batch, context=context, config=config)
    return sums, metrics, model.shown[-1]


def test_loss_is_mlm_plus_fifty_times_bce():
    params, batch = params_and_batch()
    objective = ReplacedTokenDetection()
    sums, metrics, shown = run(params, batch, objective)
    weights = objective.loss_weights(batch)
    assert dict(objective.coefficients) == {"cross_entropy": 1.0, "discriminator": 50.0}
    assert weights["cross_entropy"] == batch["encoder_loss_weights"].sum()
    assert weights["discriminator"] == 21  # all that is not padding
    # By definition: labels from what was shown, binary cross-entropy over the 21 tokens.
    labels = np.asarray(shown != batch["encoder_target_tokens"])
    logits = np.asarray(model_of(params).discriminator_logits({"encoder_input_tokens": shown}, None)[0], np.float64)
    p = 1 / (1 + np.exp(-logits))
    present = np.asarray(batch["encoder_segment_ids"]) > 0
    bce = -np.where(labels, np.log(p), np.log(1 - p))
    np.testing.assert_allclose(sums["discriminator"], bce[present].sum(), rtol=1e-5)
    right = ((p > 0.5) == labels)[present]
    np.testing.assert_allclose(metrics["detection_accuracy"], (right.sum(), 21))
    np.testing.assert_allclose(metrics["replaced"], (labels[present].sum(), 21))
    assert 0 < labels.sum() < batch["encoder_loss_weights"].sum() + 1


def test_only_masked_positions_are_replaced():
    params, batch = params_and_batch()
    for objective in (ReplacedTokenDetection(), ReplacedTokenDetection(disallow_correct=True)):
        _, _, shown = run(params, batch, objective, Context(dropout_key=jax.random.key(0)))
        masked = np.asarray(batch["encoder_loss_weights"]) > 0
        originals = np.asarray(batch["encoder_target_tokens"])
        np.testing.assert_array_equal(np.asarray(shown)[~masked], originals[~masked])
    assert (np.asarray(shown)[masked] != originals[masked]).all()  # disallow_correct


def test_a_draw_equal_to_the_original_counts_as_original():
    """A generator that is always right leaves nothing to detect."""
    params, batch = params_and_batch()
    model = model_of(params)
    right = jax.nn.one_hot(batch["encoder_target_tokens"], V)
    model.generator.output = lambda hidden, context: (right, OutputProjection(1e4 * jnp.eye(V)))
    _, metrics, _ = ReplacedTokenDetection().loss_sums(model, batch, context=LOCAL, config=LossConfig())
    assert metrics["replaced"][0] == 0 and metrics["accuracy"][0] == metrics["accuracy"][1]


@pytest.mark.parametrize("token_chunk", [0, 8])
def test_gradients_stay_apart(token_chunk):
    """d discriminator / d generator == 0 exactly, but for a tied embedding; d MLM / d discriminator == 0."""
    params, batch = params_and_batch()
    objective, config = ReplacedTokenDetection(), LossConfig(token_chunk=token_chunk)

    def gradient(term, tied):
        return jax.grad(lambda p: run(p, batch, objective, config=config, tied=tied)[0][term])(params)

    for tied in (False, True):
        of_discriminator, of_generator = gradient("discriminator", tied), gradient("cross_entropy", tied)
        for leaf in jax.tree.leaves(of_discriminator["generator"]) + jax.tree.leaves(of_generator["discriminator"]):
            assert not leaf.any()
        for leaf in jax.tree.leaves(of_discriminator["discriminator"]) + jax.tree.leaves(of_generator["generator"]):
            assert leaf.any()
        assert of_discriminator["embedding"].any() == tied
        assert of_generator["embedding"].any()


def test_draws_follow_the_softmax():
    """Shares of a fixed distribution over 4 ids, at temperature 1 and 0.5, over 20,000 draws (error below 0.4%)."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    batch = {
        "encoder_input_tokens": jnp.full((20, 1000), 3),
        "encoder_target_tokens": jnp.full((20, 1000), 3),
        "encoder_loss_weights": jnp.ones((20, 1000)),
        "encoder_segment_ids": jnp.ones((20, 1000), jnp.int32),
    }
    for objective, expected in (
        (ReplacedTokenDetection(), p),
        (ReplacedTokenDetection(temperature=0.5), p**2 / (p**2).sum()),
        (ReplacedTokenDetection(disallow_correct=True), np.array([4, 3, 2, 0]) / 9),
    ):
        shown = []

        def discriminator_logits(batch, context, shown=shown):
            shown.append(batch["encoder_input_tokens"])
            return jnp.zeros((20, 1000)), NO_SIDE_VALUES

        generator = types.SimpleNamespace(
            hidden_states=lambda batch, context: (jnp.zeros((20, 1000, 1)), NO_SIDE_VALUES),
            output=lambda hidden, context: (
                hidden,
                OutputProjection(jnp.zeros((1, 4)), jnp.log(jnp.asarray(p, jnp.float32))),
            ),
        )
        model = types.SimpleNamespace(generator=generator, discriminator_logits=discriminator_logits)
        objective.loss_sums(model, batch, context=Context(dropout_key=jax.random.key(1)), config=LossConfig())
        shares = np.bincount(np.asarray(shown[0]).ravel(), minlength=4) / 20_000
        np.testing.assert_allclose(shares, expected, atol=0.015)


def test_when_draws_change():
    """FRESH follows the context's key, and the batch's contents where there is none; FROZEN only the contents."""
    params, batch = params_and_batch()
    other = {**batch, "encoder_input_tokens": batch["encoder_input_tokens"].at[0, 0].add(1)}
    fresh, frozen = ReplacedTokenDetection(), ReplacedTokenDetection(draws=Draws.FROZEN)
    keys = [Context(dropout_key=jax.random.key(seed)) for seed in range(2)]

    def same(a, b):
        masked = batch["encoder_loss_weights"] > 0
        return bool((jnp.where(masked, a[2], 0) == jnp.where(masked, b[2], 0)).all())

    assert same(run(params, batch, fresh, keys[0]), run(params, batch, fresh, keys[0]))
    assert not same(run(params, batch, fresh, keys[0]), run(params, batch, fresh, keys[1]))
    assert same(run(params, batch, fresh), run(params, batch, fresh))
    assert same(run(params, batch, frozen, keys[0]), run(params, batch, frozen, keys[1]))
    assert same(run(params, batch, frozen, keys[0]), run(params, batch, fresh))
    assert not same(run(params, batch, frozen), run(params, other, frozen))


def test_chunks_keep_the_generator_loss():
    params, batch = params_and_batch()
    whole, chunked = (
        run(params, batch, ReplacedTokenDetection(), config=LossConfig(token_chunk=chunk)) for chunk in (0, 8)
    )
    np.testing.assert_allclose(whole[0]["cross_entropy"], chunked[0]["cross_entropy"], rtol=1e-6)


def test_uniform_generator():
    """Replacements come from the host; the model has no generator and the loss no MLM term."""
    objective = ReplacedTokenDetection(generator=Generator.UNIFORM)
    text = zoo.text(20_000, np.random.default_rng(0))
    example = objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(0))
    changed = example.inputs != text
    assert example.weights.sum() == 3000 and not changed[example.weights == 0].any()
    # A draw hits its original 1 time in 680: about 4 of 3,000.
    assert 2980 <= changed.sum() < 3000
    strict = dataclasses.replace(objective, disallow_correct=True)
    example = strict.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(0))
    assert (example.inputs != text).sum() == 3000
    drawn = example.inputs[example.weights > 0]
    assert not zoo.VOCABULARY.is_special[drawn].any() and len(np.unique(drawn)) > 650

    params, batch = params_and_batch()
    sums, _, shown = run(params, batch, objective, uniform=True)
    assert set(sums) == {"discriminator"} == set(objective.loss_weights(batch)) == set(objective.coefficients)
    assert shown is batch["encoder_input_tokens"]


def test_model_and_objective_must_agree():
    params, batch = params_and_batch()
    with pytest.raises(ValueError, match="generator MODEL but the model has no generator"):
        run(params, batch, ReplacedTokenDetection(), uniform=True)
    with pytest.raises(ValueError, match="generator UNIFORM but the model has one"):
        run(params, batch, ReplacedTokenDetection(generator=Generator.UNIFORM))
    with pytest.raises(ValueError, match="temperature must be positive"):
        ReplacedTokenDetection(temperature=0.0)
