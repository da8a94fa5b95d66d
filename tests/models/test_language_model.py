"""The laws of the language model: architectures share parameters, packing changes nothing, nothing leaks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.architecture import Architecture
from jaxlm.layers import (
    Activation,
    BlockConfig,
    Context,
    EmbeddingConfig,
    LearnedPositions,
    LinearAttentionConfig,
    MambaBlockConfig,
    MambaConfig,
    NormConfig,
    NormKind,
    Parametrization,
    SinusoidalPositions,
    StackConfig,
)
from jaxlm.models import HeadConfig
from jaxlm.models.language_model import prefix_ends, self_mask
from pallas_kernels.masks import PrefixLM, Segments

CAUSAL, PREFIX, ENCODER, BOTH = Architecture
RNG = np.random.default_rng(0)


def tokens(n):
    return RNG.integers(1, 40, n)


# Two rows: [6 + 4 tokens, 2 of padding], and one row of 12.
SEGMENTS = [(tokens(5), tokens(6), 4), (tokens(6), tokens(4), 2), (tokens(12), tokens(12), 7)]
ROWS = [SEGMENTS[:2], SEGMENTS[2:]]


def side_of(architecture):
    return "decoder" if architecture.has_decoder_features else "encoder"


@pytest.fixture(scope="module")
def hidden(config, parameters, with_parameters):
    """A function (architecture, batch) -> hidden states, compiled once an architecture; one set of parameters."""
    runs = {}

    def run(architecture, batch):
        if architecture not in runs:
            made = config(architecture)
            params = parameters(made)
            runs[architecture] = jax.jit(lambda batch: with_parameters(made, params).hidden_states(batch)[0])
        return np.asarray(runs[architecture](batch))

    return run


@pytest.mark.parametrize("marked", [0, 1])
def test_prefix_of_length_zero_or_one_is_causal_bit_for_bit(marked, config, parameters, with_parameters, batch):
    """Nothing marked, or the first position alone, which is what the converter marks where there are no inputs."""
    rows = batch([[(e, d, marked) for e, d, _ in row] for row in ROWS])
    assert np.asarray(rows["decoder_causal_attention"]).sum() == marked * len(SEGMENTS)
    params = parameters(config(CAUSAL))

    def loss(params, architecture):
        model = with_parameters(config(architecture), params)
        return jnp.sum(jnp.sin(model.head(model.hidden_states(rows)[0])))

    results = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, a) for a in (CAUSAL, PREFIX)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_prefix_of_whole_segments_is_an_encoder_bit_for_bit(hidden, batch):
    rows = batch([[(d, d, len(d)) for _, d, _ in row] for row in ROWS])
    seen = np.asarray(rows["decoder_segment_ids"]) > 0
    np.testing.assert_array_equal(hidden(PREFIX, rows)[seen], hidden(ENCODER, rows)[seen])
    assert not np.allclose(hidden(CAUSAL, rows)[seen], hidden(ENCODER, rows)[seen])


def test_the_name_of_a_single_stack_does_not_matter(config, parameters, with_parameters, hidden, batch):
    """An encoder's stack under a causal mask is a decoder."""
    rows = batch(ROWS)
    params = parameters(config(CAUSAL))
    renamed = {"encoder": params["decoder"], "embedding": params["embedding"]}
    model = with_parameters(config(CAUSAL, stack_name="encoder"), renamed)
    np.testing.assert_array_equal(jax.jit(model.hidden_states)(rows)[0], hidden(CAUSAL, rows))


@pytest.mark.parametrize("architecture", list(Architecture), ids=str)
def test_a_packed_batch_equals_its_examples(architecture, hidden, batch):
    packed = hidden(architecture, batch(ROWS))
    alone = [hidden(architecture, batch([[s], SEGMENTS[2:]])) for s in SEGMENTS]
    index = 1 if architecture.has_decoder_features else 0
    first, second = (len(s[index]) for s in SEGMENTS[:2])
    expected = np.concatenate([alone[0][0, :first], alone[1][0, :second], alone[2][0]])
    got = np.concatenate([packed[0, : first + second], packed[1]])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", list(Architecture), ids=str)
def test_nothing_leaks_across_segments(architecture, config, parameters, with_parameters, batch):
    """Law 1: the second segment says something else, then has the largest embeddings: the first sees no bit of it."""
    made = config(architecture)
    e, d, _ = SEGMENTS[0]
    others = [[(e, d, 4), (np.full(6, t), np.full(4, t), 2)] for t in (38, 39)]
    rows = [batch([others[i], SEGMENTS[2:]]) for i in range(2)]
    params = parameters(made)
    params["embedding"]["tokens"] = params["embedding"]["tokens"].at[39].set(1e18)
    length = len(d if architecture.has_decoder_features else e)

    @jax.jit
    def run(params, rows):
        def loss(params):
            out = with_parameters(made, params).hidden_states(rows)[0][0, :length]
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, first), _ = run(params, rows[0])
    (_, second), grads = run(params, rows[1])
    np.testing.assert_array_equal(first, second)
    table = np.asarray(grads["embedding"]["tokens"])
    assert np.all(table[39] == 0.0) and np.isfinite(table).all() and np.any(table != 0.0)


def test_who_sees_whom(hidden, batch):
    """Changing one token changes the outputs of exactly those that see it."""
    d = SEGMENTS[2][1]
    marked = 7

    def changed(architecture, at):
        other = d.copy()
        other[at] = other[at] % 39 + 1
        one, two = (hidden(architecture, batch([[(x, x, marked)], ROWS[1]]))[0] for x in (d, other))
        return np.any(one != two, axis=-1)

    place = np.arange(12)
    for at in (3, 9):
        np.testing.assert_array_equal(changed(CAUSAL, at), place >= at)
        np.testing.assert_array_equal(changed(PREFIX, at), (place >= at) | ((at < marked) & (place < marked)))
        np.testing.assert_array_equal(changed(ENCODER, at), place >= 0)


def test_a_decoder_sees_all_of_its_encoder(hidden, batch):
    e, d, _ = SEGMENTS[2]
    other = e.copy()
    other[-1] = other[-1] % 39 + 1
    one, two = (hidden(BOTH, batch([[(x, d, 0)], ROWS[1]]))[0] for x in (e, other))
    assert np.all(np.any(one != two, axis=-1))


_prefix_ends = jax.jit(prefix_ends)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=4))
def test_prefix_ends(segments):
    """Against the words of the contract: one past the segment's last marked position, for marked tokens."""
    segments = [(n, min(marked, n)) for n, marked in segments]
    ids, marks = (np.zeros(20, np.int32) for _ in range(2))  # one shape: one compilation
    begin = 0
    for i, (n, marked) in enumerate(segments):
        ids[begin : begin + n], marks[begin : begin + marked] = i + 1, 1
        begin += n
    expected, start = np.zeros_like(ids), 0
    for n, marked in segments:
        expected[start : start + marked] = start + marked
        start += n
    np.testing.assert_array_equal(_prefix_ends(marks[None], ids[None])[0], expected)


def test_masks_of_a_batch(batch):
    rows = batch(ROWS)
    mask = self_mask(rows, PREFIX)
    assert isinstance(mask.masks[0], PrefixLM) and isinstance(mask.masks[1], Segments)
    dense = np.asarray(mask.dense(12, 12))[0, 0]
    q, k = np.arange(6)[:, None], np.arange(6)[None]
    np.testing.assert_array_equal(dense[:6, :6], (k <= q) | (k < 4) & (q < 4))
    assert not dense[:6, 6:].any() and not dense[6:10, :6].any() and not dense[10:].any()


def test_bfloat16_computes_and_float32_keeps(config, parameters, with_parameters, hidden, batch):
    made = config(CAUSAL, compute="bfloat16")
    model = with_parameters(made, parameters(made))
    rows = batch(ROWS)
    out, _ = jax.jit(model.hidden_states)(rows)
    assert out.dtype == jnp.bfloat16 and model.head(out).dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(parameters(made)))
    exact = hidden(CAUSAL, rows)
    seen = np.asarray(rows["decoder_segment_ids"]) > 0
    error = np.linalg.norm(np.asarray(out, np.float32)[seen] - exact[seen]) / np.linalg.norm(exact[seen])
    assert error < 0.03  # three layers of roundings to 8 bits, 0.4% each


def test_dropout_needs_a_key(config, parameters, with_parameters, hidden, batch):
    plain = config(CAUSAL)
    made = dataclasses.replace(plain, embedding=dataclasses.replace(plain.embedding, dropout=0.5))
    model = with_parameters(made, parameters(made))
    run = jax.jit(lambda key: model.hidden_states(batch(ROWS), context=Context(dropout_key=key))[0])
    np.testing.assert_allclose(run(None), hidden(CAUSAL, batch(ROWS)), rtol=1e-5, atol=1e-5)
    a, b, c = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


HIDDEN = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)
HEADS = {
    "tied": (HeadConfig(), lambda h, p, table: h @ table.T),
    "T5's tied": (HeadConfig(scale_by_width=True), lambda h, p, table: h @ table.T / 4),
    "untied": (HeadConfig(tied=False), lambda h, p, table: h @ p["kernel"]),
    "Gemma's": (HeadConfig(soft_cap=2.0), lambda h, p, table: 2 * np.tanh(h @ table.T / 2)),
    "BERT's": (
        HeadConfig(bias=True, transform=Activation.TANH, transform_norm=NormConfig(NormKind.LAYER, bias=True)),
        lambda h, p, table: (
            layer_norm(np.tanh(h @ p["transform"]["kernel"] + p["transform"]["bias"]), p["norm"]) @ table.T + p["bias"]
        ),
    ),
}


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, config, parameters, with_parameters):
    head, formula = HEADS[name]
    made = config(ENCODER, head=head)
    params = parameters(made)
    arrays = jax.tree.map(np.asarray, params)
    expected = formula(np.asarray(HIDDEN), arrays.get("vocabulary_head"), arrays["embedding"]["tokens"])
    np.testing.assert_allclose(with_parameters(made, params).head(HIDDEN), expected, rtol=1e-4, atol=1e-5)


def test_mup_divides_logits_by_the_ratio_of_widths(config, parameters, with_parameters):
    plain, wide = config(CAUSAL), config(CAUSAL, parametrization=Parametrization("mup", base_width=4))
    params = parameters(plain)
    logits = with_parameters(plain, params).head(HIDDEN)
    np.testing.assert_allclose(with_parameters(wide, params).head(HIDDEN), logits / 4, rtol=1e-6)


def embedded(config, embedding, params, with_parameters, ids, positions, **options):
    return with_parameters(config(CAUSAL, embedding=embedding, head=HeadConfig(tied=False)), params).embedding(
        jnp.asarray(ids), jnp.asarray(positions), context=Context(), **options
    )


def test_embeddings(config, parameters, with_parameters):
    ids, positions = np.array([[3, 5, 3]]), np.array([[0, 1, 0]])

    def params_of(embedding):
        params = parameters(config(CAUSAL, embedding=embedding, head=HeadConfig(tied=False)))
        return params, jax.tree.map(np.asarray, params["embedding"])

    scaled = EmbeddingConfig(scale_by_width=True, positions=SinusoidalPositions())
    params, p = params_of(scaled)
    out = embedded(config, scaled, params, with_parameters, ids, positions)
    expected = p["tokens"][ids] * 4 + np.asarray(SinusoidalPositions()(jnp.asarray(positions), 16))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    bert = EmbeddingConfig(positions=LearnedPositions(4), types=2, norm=NormConfig(NormKind.LAYER, bias=True))
    params, p = params_of(bert)
    types = np.array([[0, 1, 1]])
    out = embedded(config, bert, params, with_parameters, ids, positions, types=jnp.asarray(types))
    total = p["tokens"][ids] + p["positions"][positions]
    np.testing.assert_allclose(out, layer_norm(total + p["types"][types], p["norm"]), rtol=1e-4, atol=1e-5)
    out = embedded(config, bert, params, with_parameters, ids, positions)
    np.testing.assert_allclose(out, layer_norm(total + p["types"][0], p["norm"]), rtol=1e-4, atol=1e-5)

    narrow = EmbeddingConfig(width=6)
    params, p = params_of(narrow)
    out = embedded(config, narrow, params, with_parameters, ids, positions)
    expected = p["tokens"][ids] @ p["projection"]["kernel"] + p["projection"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_ids_and_positions_beyond_their_tables_are_loud(config, parameters, with_parameters):
    embedding = EmbeddingConfig(positions=LearnedPositions(4))
    params = parameters(config(CAUSAL, embedding=embedding, head=HeadConfig(tied=False)))
    out = np.asarray(embedded(config, embedding, params, with_parameters, [[39, 40, 3]], [[3, 0, 4]]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, True, True]])


def test_several_tokens_ahead(config, parameters, with_parameters, batch):
    """Gloeckle et al. 2024, section 2: blocks side by side on one trunk; the first predicts the next token."""
    plain = config(CAUSAL)
    block: BlockConfig = plain.decoder.blocks[0]
    made = config(CAUSAL, future_tokens=3, future_block=block)
    params, rows = parameters(made), batch(ROWS)
    model = with_parameters(made, params)
    first, *others = jax.jit(model.future_hidden_states)(rows)[0]
    np.testing.assert_allclose(jax.jit(model.hidden_states)(rows)[0], first, rtol=1e-5, atol=1e-5)
    assert len(others) == 2 and not np.allclose(others[0], others[1])
    # Block i on the trunk is the model whose stack ends with that block.
    for i, states in enumerate((first, *others)):
        stack = dataclasses.replace(plain.decoder, blocks=(*plain.decoder.blocks, block), num_layers=4)
        layers = {**params["decoder"]["layers"], "3": params["future"][str(i)]}
        taller = {**params, "decoder": {**params["decoder"], "layers": layers}}
        del taller["future"]
        expected = with_parameters(config(CAUSAL, decoder=stack), taller).hidden_states(rows)[0]
        np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="predicts one token ahead"):
        with_parameters(plain, parameters(plain)).future_hidden_states(rows)


def test_pooler(config, parameters, with_parameters):
    made = config(ENCODER, pooler=True)
    params = parameters(made)
    dense = jax.tree.map(np.asarray, params["pooler"]["dense"])
    expected = np.tanh(np.asarray(HIDDEN)[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(with_parameters(made, params).pooled(HIDDEN), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no pooler"):
        plain = config(ENCODER)
        with_parameters(plain, parameters(plain)).pooled(HIDDEN)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decoder=None), "has one stack: give either decoder or encoder"),
        (dict(architecture="encoder_decoder"), "needs both StackConfigs"),
        (dict(architecture="decoder"), "'decoder' is not a valid Architecture"),
        (dict(vocab_size=0), "must be positive"),
        (dict(embedding=EmbeddingConfig(width=8)), "The tied output has the embedding's width 8"),
        (dict(future_tokens=2), "do not go together"),
        (dict(compute="float16"), "'float16' is not a valid ComputeType"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message, config):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(CAUSAL), **change)


def test_an_encoder_of_its_own_width_needs_an_embedding_of_its_own(config):
    own = config(BOTH, encoder_width=24, encoder_embedding=EmbeddingConfig())
    assert (own.width_of("encoder"), own.width_of("decoder")) == (24, own.width)
    with pytest.raises(ValueError, match="cannot share its embedding: give encoder_embedding"):
        config(BOTH, encoder_width=24)
    with pytest.raises(ValueError, match="follows one width, but encoder_width=24"):
        dataclasses.replace(own, parametrization=Parametrization("mup"))
    with pytest.raises(ValueError, match="has one stack, with `width` and `embedding`"):
        config(CAUSAL, encoder_embedding=EmbeddingConfig())


def test_without_a_head_there_are_no_logits(config, parameters, with_parameters):
    headless = config(ENCODER, head=None)
    with pytest.raises(ValueError, match="no logits over a vocabulary; set LanguageModelConfig.head"):
        with_parameters(headless, parameters(headless)).head(jnp.zeros((1, headless.width)))


def test_cross_attention_belongs_to_an_encoder_decoder(config):
    both = config(BOTH)
    with pytest.raises(ValueError, match="nothing to attend to"):
        config(CAUSAL, decoder=both.decoder)
    with pytest.raises(ValueError, match="Every block of an encoder_decoder's decoder needs"):
        dataclasses.replace(both, decoder=both.encoder)
    with pytest.raises(ValueError, match="runs on a causal_decoder or prefix_decoder, not on encoder"):
        config(ENCODER, future_tokens=1, future_block=both.encoder.blocks[0])
    with pytest.raises(ValueError, match="transform_norm needs HeadConfig.transform"):
        HeadConfig(transform_norm=NormConfig())


@pytest.mark.parametrize("architecture", [PREFIX, ENCODER, BOTH])
def test_running_states_are_for_causal_stacks(architecture, config):
    """A prefix decoder and an encoder show tokens what follows them; the decoder of an encoder-decoder does not."""
    linear = LinearAttentionConfig(2, 8)
    made = config(architecture)
    stacks = {
        name: dataclasses.replace(
            stack, blocks=tuple(dataclasses.replace(block, attention=linear) for block in stack.blocks)
        )
        for name, stack in made.stacks.items()
    }
    message = f"architecture {architecture.value} shows .*, but a layer of LinearAttentionConfig carries a state"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made, **stacks)
    if architecture is BOTH:
        dataclasses.replace(made, decoder=stacks["decoder"])
    mamba = StackConfig((MambaBlockConfig(MambaConfig(32, 1), NormConfig()),), 2)
    with pytest.raises(ValueError, match="needs BlockConfig.cross_attention|layer of MambaConfig carries a state"):
        dataclasses.replace(made, decoder=mamba)
