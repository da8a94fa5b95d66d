"""Models with experts: packed rows are their examples, and side values those of all stacks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.layers import FeedForwardConfig, MixtureOfExpertsConfig

RNG = np.random.default_rng(0)
EXPERTS = MixtureOfExpertsConfig(
    24, num_experts=4, experts_per_token=2, shared=FeedForwardConfig(8), balance_loss=0.1, z_loss=0.1
)
DOCUMENTS = [RNG.integers(1, 40, n) for n in (5, 4, 12)]


@pytest.fixture
def with_experts(config):
    """A function that gives a model of an architecture in which every second block has experts."""

    def make(architecture):
        made = config(architecture)

        def stack(plain):
            first, second, *_ = plain.blocks
            return dataclasses.replace(
                plain, blocks=(dataclasses.replace(first, feed_forward=EXPERTS), second), num_layers=4
            )

        return dataclasses.replace(made, **{name: stack(plain) for name, plain in made.stacks.items()})

    return make


def test_a_packed_batch_equals_its_examples(with_experts, parameters, with_parameters, batch):
    """Hidden states, and the z-loss, a sum over tokens: routing asks no other token and padding no one."""
    made = with_experts(Architecture.CAUSAL_DECODER)
    model = with_parameters(made, parameters(made))
    run = jax.jit(model.hidden_states)

    def rows(*documents):
        return batch([[(d, d, 0) for d in row] for row in documents])

    packed, side = run(rows(DOCUMENTS[:2], DOCUMENTS[2:]))
    alone = [run(rows([document], [])) for document in DOCUMENTS]
    expected = [hidden[0, : len(document)] for (hidden, _), document in zip(alone, DOCUMENTS)]
    got = np.concatenate([packed[0, :9], packed[1]])
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=2e-5, atol=2e-5)
    z = sum(float(side.losses["router_z"]) for _, side in alone)
    np.testing.assert_allclose(side.losses["router_z"], z, rtol=1e-5)
    # Two layers with experts; 21 tokens.
    assert side.metrics["router/load"][1] == 2 and side.metrics["router/entropy"][1] == 2 * 21
    assert 1.0 <= side.metrics["router/load"][0] / 2 <= 2.0


def test_an_encoder_decoder_adds_up_both_stacks(with_experts, parameters, with_parameters, batch):
    made = with_experts(Architecture.ENCODER_DECODER)
    model = with_parameters(made, parameters(made))
    rows = batch([[(DOCUMENTS[0], DOCUMENTS[1], 0)], [(DOCUMENTS[2], DOCUMENTS[1], 0)]])
    _, side = jax.jit(model.hidden_states)(rows)
    assert side.metrics["router/load"][1] == 4
    assert side.metrics["router/entropy"][1] == 2 * (5 + 12) + 2 * (4 + 4)
    assert all(jnp.isfinite(value) and value > 0 for value in side.losses.values())
