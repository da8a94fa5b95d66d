"""FLOPs by formula equal those of the products in the traced program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    AttentionConfig,
    DisentangledAttentionConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MambaBlockConfig,
    MambaConfig,
    MixtureOfExpertsConfig,
    NormConfig,
    RelativeEmbeddings,
)
from jaxlm.models import EmbeddingSharing, HeadConfig, ReplacedTokenDetectorConfig
from jaxlm.models.accounting import count_parameters, flops_per_token

CAUSAL, PREFIX, ENCODER, BOTH = Architecture
T = 12


def product_flops(jaxpr):
    """2 x multiplications of every dot_general in a jaxpr, inner ones as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            left, right = (v.aval.shape for v in eqn.invars)
            shared = math.prod(left[i] for i in (*contract, *batch))
            total += 2 * math.prod(left) * math.prod(right) // shared
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


def traced(config, params, with_parameters, rows):
    def loss(params):
        model = with_parameters(config, params)
        if isinstance(config, ReplacedTokenDetectorConfig):
            generator = model.generator
            filled = generator.head(generator.hidden_states(rows)[0])
            return jnp.sum(jnp.sin(filled)) + jnp.sum(jnp.sin(model.discriminator_logits(rows)[0]))
        states = model.future_hidden_states(rows)[0] if config.future_tokens else model.hidden_states(rows)[:1]
        return sum(jnp.sum(jnp.sin(model.head(h))) for h in states)

    return product_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


def cases(config):
    plain = config(ENCODER)
    yield "encoder", plain
    grouped = dataclasses.replace(plain.decoder.blocks[0], attention=AttentionConfig(4, 8, 2))
    yield "grouped", dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, blocks=(grouped,)))
    yield "untied", dataclasses.replace(plain, head=HeadConfig(tied=False))
    bert = HeadConfig(transform="gelu", bias=True)
    narrow = dataclasses.replace(plain.embedding, width=8)
    yield "narrow embedding", dataclasses.replace(plain, head=bert, embedding=narrow)
    yield "encoder_decoder", config(BOTH)
    yield "two widths", config(BOTH, encoder_width=24, encoder_embedding=EmbeddingConfig())
    own = {"embedding": EmbeddingConfig(width=4), "encoder_embedding": EmbeddingConfig(width=6)}
    yield "two narrow embeddings", config(BOTH, head=HeadConfig(tied=False), **own)
    disentangled = dataclasses.replace(plain.decoder.blocks[0], attention=DisentangledAttentionConfig(2, 8))
    relative = RelativeEmbeddings(4)
    stack = dataclasses.replace(plain.decoder, blocks=(disentangled,), relative_positions=relative)
    yield "disentangled", dataclasses.replace(plain, decoder=stack)
    yield "detector", ReplacedTokenDetectorConfig(dataclasses.replace(plain, head=None), plain, EmbeddingSharing.UNTIED)
    yield "causal", config(CAUSAL)
    yield "three tokens", config(CAUSAL, future_tokens=3, future_block=plain.decoder.blocks[0])


@pytest.mark.parametrize(
    "name",
    [
        "encoder",
        "grouped",
        "untied",
        "narrow embedding",
        "encoder_decoder",
        "two widths",
        "two narrow embeddings",
        "detector",
        "causal",
        "three tokens",
        "disentangled",
    ],
)
def test_formula_equals_the_products_of_a_step(name, config, parameters, with_parameters, batch):
    made = dict(cases(config))[name]
    tokens = np.arange(1, T + 1)
    encodes = T if made.architecture is BOTH else 0
    got = flops_per_token(made, T, encodes) * (T + encodes)
    # The dense reference computes all T^2 pairs; the formula counts those below the diagonal, half, as nothing.
    layers = {"causal": 3, "three tokens": 6}.get(name, 3 if made.architecture is BOTH else 0)
    got += layers * 12 * 2 * 8 * T * T / 2
    if name == "disentangled":  # 8 relative positions are projected to keys and queries once a step, not once a token
        got += 3 * 6 * 2 * 8 * 16 * 16
    assert got == traced(made, parameters(made), with_parameters, batch([[(tokens, tokens, 0)]]))


def test_windows_and_causal_halves(config):
    """Long rows: a causal window of w costs w - w^2 / 2T pairs a query, an open side T / 2."""
    plain = config(CAUSAL)
    block = dataclasses.replace(plain.decoder.blocks[0], attention=AttentionConfig(2, 8))

    def cost(window, architecture=CAUSAL, length=1000):
        windowed = dataclasses.replace(block, attention=AttentionConfig(2, 8, window=window))
        stack = dataclasses.replace(plain.decoder, blocks=(windowed,), num_layers=1)
        made = dataclasses.replace(plain, architecture=architecture, decoder=stack)
        # Without attention: 6 FLOPs an entry of every matrix; learned positions and norms are none.
        entries = count_parameters(made, where=lambda path: path[-1] == "kernel") + 40 * 16
        return (flops_per_token(made, length) - 6 * entries) / (12 * 2 * 8)

    assert cost(None) == cost(None, PREFIX) == cost((5000, 0)) == 500
    assert cost((100, 0)) == cost((100, 50)) == 100 - 5
    assert cost(None, ENCODER) == 1000 and cost((100, 50), ENCODER) == (100 - 5) + (50 - 1.25)


def test_experts_count_by_those_that_a_token_goes_through(config):
    """Two of eight experts cost as much as one layer of twice their width, and the router's 16 x 8 entries."""
    plain = config(CAUSAL)

    def cost(feed_forward):
        blocks = tuple(dataclasses.replace(block, feed_forward=feed_forward) for block in plain.decoder.blocks)
        return flops_per_token(dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, blocks=blocks)), 8)

    experts = MixtureOfExpertsConfig(12, num_experts=8, experts_per_token=2)
    assert cost(experts) - cost(FeedForwardConfig(24)) == 3 * 6 * 16 * 8
    shared = dataclasses.replace(experts, shared=FeedForwardConfig(10))
    assert cost(shared) - cost(experts) == 3 * 6 * 3 * 16 * 10


def test_running_states_cost_what_is_written_and_read(config, parameters, with_parameters, batch):
    """Mamba's scan has no products of matrices: all that a step has of them are those of the formula without states."""
    plain = config(CAUSAL, embedding=EmbeddingConfig())

    def with_blocks(*blocks):
        stack = dataclasses.replace(plain.decoder, blocks=blocks, num_layers=len(blocks))
        return dataclasses.replace(plain, decoder=stack)

    def states(made):
        entries = count_parameters(made, where=lambda path: path[-1] == "kernel" and "convolution" not in path[-2])
        return flops_per_token(made, T) - 6 * (entries + 40 * 16)  # with the tied head

    mamba = with_blocks(*[MambaBlockConfig(MambaConfig(32, 3, state=4, taps=3), NormConfig())] * 2)
    # Channels x (12 entries + 6 taps).
    assert states(mamba) == 2 * 32 * (12 * 4 + 6 * 3)
    tokens = np.arange(1, T + 1)
    products = traced(mamba, parameters(mamba), with_parameters, batch([[(tokens, tokens, 0)]]))
    assert (flops_per_token(mamba, T) - states(mamba)) * T == products
    # Heads x size x (12 entries + 6 taps), and the taps of what two groups write and read with.
    mamba2 = with_blocks(MambaBlockConfig(Mamba2Config(4, 8, state=5, groups=2), NormConfig()))
    assert states(mamba2) == 4 * 8 * (12 * 5 + 6 * 4) + 2 * 2 * 5 * 6 * 4
    linear = dataclasses.replace(plain.decoder.blocks[0], attention=LinearAttentionConfig(2, 8, 6))
    assert states(with_blocks(linear)) == 12 * 2 * 8 * 6


def test_lengths_must_fit_the_architecture(config):
    with pytest.raises(ValueError, match="encoder_length=0 does not fit the architecture encoder_decoder"):
        flops_per_token(config(BOTH), 8)
    with pytest.raises(ValueError, match="encoder_length=8 does not fit the architecture causal_decoder"):
        flops_per_token(config(CAUSAL), 8, 8)
