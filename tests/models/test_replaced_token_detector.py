"""Generator and discriminator share embeddings as ELECTRA and DeBERTaV3 say: in values and in gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.layers import Activation, EmbeddingConfig, LearnedPositions
from jaxlm.models import EmbeddingSharing, HeadConfig, ReplacedTokenDetectorConfig, build_model
from jaxlm.models.accounting import count_parameters

SEGMENT = (np.array([3, 9, 9, 27, 1]), np.array([1]), 0)


@pytest.fixture(scope="module")
def detector(config):
    """A function that gives the configuration for a kind of sharing; the generator is half as wide."""

    def make(sharing, **changes):
        discriminator = config(Architecture.ENCODER, stack_name="encoder", head=None)
        narrow = dataclasses.replace(
            discriminator,
            width=8,
            embedding=EmbeddingConfig(width=16, positions=LearnedPositions(12)),
            head=HeadConfig(transform=Activation.GELU),
        )
        return dataclasses.replace(ReplacedTokenDetectorConfig(discriminator, narrow, sharing), **changes)

    return make


def gradients(config, params, with_parameters, rows):
    """d (discriminator's loss) and d (generator's loss) / d parameters."""

    def judge(params):
        return jnp.sum(jnp.sin(with_parameters(config, params).discriminator_logits(rows)[0]))

    def fill(params):
        generator = with_parameters(config, params).generator
        return jnp.sum(jnp.sin(generator.head(generator.hidden_states(rows)[0])))

    return jax.jit(lambda params: (jax.grad(judge)(params), jax.grad(fill)(params)))(params)


def test_untied_losses_do_not_meet(detector, parameters, with_parameters, batch):
    made = detector(EmbeddingSharing.UNTIED)
    params = parameters(made)
    judged, filled = gradients(made, params, with_parameters, batch([[SEGMENT]]))
    assert all(np.all(g == 0) for g in jax.tree.leaves((judged["generator"], filled["discriminator"])))
    assert np.any(judged["discriminator"]["embedding"]["tokens"] != 0) and np.any(
        filled["generator"]["embedding"]["tokens"] != 0
    )
    assert np.any(judged["verdict"]["kernel"] != 0)


def test_tied_is_one_table_trained_by_both(detector, parameters, with_parameters, batch):
    made = detector(EmbeddingSharing.TIED)
    params = parameters(made)
    assert "tokens" not in params["generator"]["embedding"] and "positions" not in params["generator"]["embedding"]
    model = with_parameters(made, params)
    assert model.generator.embedding.tokens is model.discriminator.embedding.tokens
    judged, filled = gradients(made, params, with_parameters, batch([[SEGMENT]]))
    for table in ("tokens", "positions"):
        assert np.any(judged["discriminator"]["embedding"][table] != 0)
        assert np.any(filled["discriminator"]["embedding"][table] != 0)
    shared = 40 * 16 + 12 * 16
    assert count_parameters(made) == count_parameters(detector(EmbeddingSharing.UNTIED)) - shared


def test_gradient_disentangled(detector, parameters, with_parameters, batch):
    """E_D = stop_gradient(E_G) + delta: the discriminator moves delta alone, and reads both."""
    made = detector(EmbeddingSharing.GRADIENT_DISENTANGLED)
    params = parameters(made)
    rows = batch([[SEGMENT]])
    judged, filled = gradients(made, params, with_parameters, rows)
    assert all(np.all(g == 0) for g in jax.tree.leaves((judged["generator"], filled["discriminator"])))
    assert np.any(judged["discriminator"]["embedding"]["tokens"] != 0)

    summed = jax.tree.map(lambda x: x, params)
    tables = [params[name]["embedding"]["tokens"] for name in ("generator", "discriminator")]
    summed["discriminator"]["embedding"]["tokens"] = tables[0] + tables[1]
    untied = detector(EmbeddingSharing.UNTIED)
    np.testing.assert_allclose(
        with_parameters(made, params).discriminator_logits(rows)[0],
        with_parameters(untied, summed).discriminator_logits(rows)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_delta_starts_at_zero(detector):
    model = build_model(detector(EmbeddingSharing.GRADIENT_DISENTANGLED), key=jax.random.key(0))
    assert np.all(model.discriminator.embedding.tokens[...] == 0)
    assert np.any(model.generator.embedding.tokens[...] != 0)
    assert nnx.state(model)["discriminator"]["embedding"]["tokens"].role == "input"


def test_verdicts(detector, parameters, with_parameters, batch):
    made = detector(EmbeddingSharing.UNTIED, generator=None)
    params, rows = parameters(made), batch([[SEGMENT]])
    model = with_parameters(made, params)
    assert model.generator is None
    logits, _ = model.discriminator_logits(rows)
    verdict = jax.tree.map(np.asarray, params["verdict"])
    hidden = np.asarray(model.discriminator.hidden_states(rows)[0])
    dense = jax.nn.gelu(hidden @ verdict["dense"]["kernel"] + verdict["dense"]["bias"], approximate=False)
    assert logits.shape == (1, 12) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, dense @ verdict["kernel"] + verdict["bias"], rtol=1e-4, atol=1e-5)


def test_layouts_name_both_models(detector):
    made = detector(EmbeddingSharing.UNTIED)

    def doubled(model):
        return dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, num_layers=6))

    made = dataclasses.replace(made, generator=doubled(made.generator), discriminator=doubled(made.discriminator))
    model = nnx.eval_shape(lambda: build_model(made, key=jax.random.key(0)))
    assert [layout.path for layout in model.layouts] == [("generator", "encoder"), ("discriminator", "encoder")]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: dict(generator=None), "needs a generator"),
        (
            lambda d: dict(generator=dataclasses.replace(d, vocab_size=41)),
            r"the generator's are \(41, 16\) and the discriminator's \(40, 16\)",
        ),
        (
            lambda d: dict(discriminator=dataclasses.replace(d, architecture=Architecture.CAUSAL_DECODER)),
            "must have the architecture encoder, not causal_decoder",
        ),
        (
            lambda d: dict(discriminator=dataclasses.replace(d, head=HeadConfig(tied=False))),
            "has no use for a vocabulary head",
        ),
        (lambda d: dict(sharing="half"), "'half' is not a valid EmbeddingSharing"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message, detector):
    made = detector(EmbeddingSharing.TIED)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made, **change(made.discriminator))
