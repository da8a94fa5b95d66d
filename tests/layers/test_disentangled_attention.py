"""DeBERTa's attention is its definition, and a packed row is its texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers import (
    AttentionConfig,
    BlockConfig,
    DisentangledAttentionConfig,
    FeedForwardConfig,
    NormConfig,
    QKNorm,
    RelativeEmbeddings,
    StackConfig,
)
from jaxlm.layers.context import LOCAL, Context
from jaxlm.layers.disentangled_attention import RelativeVectors
from pallas_kernels import dropout
from pallas_kernels.masks import Segments

F32 = jnp.dtype("float32")
T, E, H, D = 11, 16, 2, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(1, T, E)), jnp.float32)
BOTH = DisentangledAttentionConfig(H, D, qkv_bias=True)
CONFIGS = {
    "both": BOTH,
    "shared": dataclasses.replace(BOTH, shared_projections=True),
    "content to position": dataclasses.replace(BOTH, position_to_content=False),
    "position to content": dataclasses.replace(BOTH, content_to_position=False, scale=0.3),
}
VECTORS = RelativeVectors(jnp.asarray(RNG.normal(size=(12, E)), jnp.float32), RelativeEmbeddings(6, max_distance=9))


def layer_of(config, make, build):
    layer = build(lambda key: config.build(make, residual_gain=1.0, dtype=F32, key=key))
    for linear in ("query", "key", "value", "position_key", "position_query"):
        if (found := getattr(layer, linear)) is not None:
            found.bias[...] = jnp.asarray(RNG.normal(size=found.bias.shape), jnp.float32)
    return layer


def attend(layer, x, segments, context=LOCAL):
    return layer(x, x, Segments(jnp.asarray(segments)), rotation=None, bias=VECTORS, context=context)


def bucket(distance):
    """Of 6 vectors a side, three stand for one distance each; up to distance 9 the others share the rest."""
    size = abs(distance)
    if size > 3:
        size = int(np.ceil(np.log(size / 3) / np.log(8 / 3) * 2) + 3)
    return int(np.clip(np.sign(distance) * size + 6, 0, 11))


def definition(layer, config, x, segments, context=LOCAL):
    """Query by query and key by key, in float64; with a dropout key, what it keeps of vectors and of shares."""

    def projected(y, linear):
        return np.tensordot(y, np.float64(linear.kernel[...]), 1) + np.float64(linear.bias[...])

    q, k, v = (projected(np.float64(x[0]), linear) for linear in (layer.query, layer.key, layer.value))
    table, keeps = np.float64(VECTORS.table), np.ones((H, T, T))
    if context.dropout_key is not None:
        seed = dropout.seed_of(context.fold("positions").dropout_key)
        table *= dropout.keep_entries(seed, np.indices(table.shape), config.dropout) / (1 - config.dropout)
        indices = (jnp.asarray(index) for index in np.indices((1, H, T, T)))
        keeps = np.float64(dropout.keep(dropout.seed_of(context.dropout_key), *indices, config.dropout)[0])
        keeps /= 1 - config.dropout
    terms = config.content_to_position + config.position_to_content
    scale = (D * (1 + terms)) ** -0.5 if config.scale is None else config.scale
    out = np.zeros((T, H, D))
    for h, i in np.ndindex(H, T):
        seen = [j for j in range(T) if segments[0][i] == segments[0][j]]
        scores = []
        for j in seen:
            score = q[i, h] @ k[j, h]
            if config.content_to_position:
                linear = layer.key if config.shared_projections else layer.position_key
                score += q[i, h] @ projected(table[bucket(i - j)], linear)[h]
            if config.position_to_content:
                linear = layer.query if config.shared_projections else layer.position_query
                score += k[j, h] @ projected(table[bucket(i - j)], linear)[h]
            scores.append(scale * score)
        shares = np.exp(scores - np.max(scores))
        out[i, h] = shares / shares.sum() * keeps[h, i, seen] @ v[seen, h]
    return np.tensordot(out, np.float64(layer.output.kernel[...]), 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_its_definition(name, make, build):
    config = CONFIGS[name]
    layer = layer_of(config, make, build)
    segments = np.array([[1] * 7 + [2] * 4])
    found, expected = attend(layer, X, segments)[0], definition(layer, config, X, segments)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["both", "shared"])
def test_dropout_is_on_relative_vectors_and_on_shares(name, make, build):
    """Both terms read the same vectors, of which some entries are gone before they are projected."""
    config = dataclasses.replace(CONFIGS[name], dropout=0.3)
    layer, context = layer_of(config, make, build), Context(dropout_key=jax.random.key(5))
    segments = np.array([[1] * 7 + [2] * 4])
    found, expected = attend(layer, X, segments, context)[0], definition(layer, config, X, segments, context)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_a_packed_row_is_its_texts(make, build):
    layer = layer_of(BOTH, make, build)
    packed = attend(layer, X, np.array([[1] * 7 + [2] * 4]))
    apart = [attend(layer, x, np.ones((1, x.shape[1]), int)) for x in (X[:, :7], X[:, 7:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=2e-6)


def test_positions_have_gradients(make, build):
    """Of every term, at every row of the table that the text's distances reach."""
    layer = layer_of(BOTH, make, build)

    def loss(table):
        vectors = dataclasses.replace(VECTORS, table=table)
        mask = Segments(jnp.ones((1, T), int))
        return jnp.sum(jnp.sin(layer(X, X, mask, rotation=None, bias=vectors, context=LOCAL)))

    gradient = jax.grad(loss)(VECTORS.table)
    assert set(np.flatnonzero(np.abs(gradient).max(-1) > 1e-6)) == {bucket(d) for d in range(1 - T, T)}


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: RelativeEmbeddings(0), "span=0 must be positive"),
        (lambda: RelativeEmbeddings(16, max_distance=8), "half of it must lie between 1 and max_distance - 1"),
        (
            lambda: dataclasses.replace(BOTH, content_to_position=False, position_to_content=False),
            "use AttentionConfig",
        ),
        (lambda: dataclasses.replace(BOTH, num_kv_heads=1), "as many key heads as query heads"),
        (
            lambda: dataclasses.replace(BOTH, qk_norm=QKNorm.HEAD, qk_norm_config=NormConfig()),
            "does not normalise them",
        ),
        (lambda: stack(BOTH, None), "go together in all blocks of a stack"),
        (lambda: stack(AttentionConfig(H, D), RelativeEmbeddings(6)), "go together in all blocks of a stack"),
    ],
)
def test_what_makes_no_sense_is_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def stack(attention, relative):
    return StackConfig((BlockConfig(attention, FeedForwardConfig(8), NormConfig()),), 1, relative_positions=relative)


def test_it_neither_crosses_nor_generates(make, build):
    with pytest.raises(ValueError, match="cross-attention needs another"):
        build(lambda key: BOTH.build(make, residual_gain=1.0, dtype=F32, key=key, source_width=E))
    with pytest.raises(ValueError, match="has no cache to generate from; it serves encoders"):
        layer_of(BOTH, make, build).prefill(X, X, None)
