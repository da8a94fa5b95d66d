"""What is remembered is what would be computed again: cached = uncached, packed = alone, whatever the layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import CachedModel, pack
from jaxlm.layers import (
    Alibi,
    Arrangement,
    AttentionConfig,
    EmbeddingConfig,
    LearnedPositions,
    MixtureOfExpertsConfig,
    NormConfig,
    NtkScaling,
    QKNorm,
    RelativePositions,
    Rope,
    SinusoidalPositions,
)
from jaxlm.layers.cache import CacheConfig, CacheType, Int8

CAUSAL, PREFIX = Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER
CROSSING = Architecture.ENCODER_DECODER
GQA = AttentionConfig(4, 8, num_kv_heads=2, position=Rope(fraction=0.5))
PROMPTS = [[5, 6, 7], list(range(2, 13)), [9]]
NEW = np.random.default_rng(0).integers(1, 40, (3, 12))

# Features of layers and models, several in each: what is remembered of one layer is no other's business.
MODELS = {
    "causal: windows, sinks, biases, soft cap, norms, ALiBi, T5 tables, learned positions": (
        CAUSAL,
        (
            GQA,
            dataclasses.replace(GQA, window=(5, 0), sinks=True, qkv_bias=True, output_bias=True),
            dataclasses.replace(GQA, soft_cap=2.0, qk_norm=QKNorm.HEAD, qk_norm_config=NormConfig(), num_kv_heads=1),
            dataclasses.replace(GQA, position=Alibi()),
            dataclasses.replace(GQA, position=RelativePositions(8, 16, bidirectional=False), window=(3, 0)),
        ),
        {"embedding": EmbeddingConfig(positions=LearnedPositions(64)), "repeats": 1},
    ),
    "prefix: scanned, experts, parallel blocks, windows, sinusoids": (
        PREFIX,
        (GQA, dataclasses.replace(GQA, window=(4, 4))),
        {
            "embedding": EmbeddingConfig(positions=SinusoidalPositions()),
            "block_changes": {
                "feed_forward": MixtureOfExpertsConfig(num_experts=4, experts_per_token=2, hidden=24),
                "arrangement": Arrangement.PARALLEL_NORMS,
            },
        },
    ),
    "encoder-decoder: a shared T5 table": (
        CROSSING,
        (dataclasses.replace(GQA, position=None),),
        {"stack_changes": {"relative_positions": RelativePositions(8, 16)}},
    ),
}


def check_continuation(model, uncached, *, caching=None, atol=1e-5):
    """Prompts in shared rows, then new tokens by ones and threes, some that do not count, some forgotten again."""
    cached = CachedModel(model, start_id=0, caching=caching or CacheConfig(extension=3))
    held = [[0] + ([] if cached.crosses else list(prompt)) for prompt in PROMPTS]

    def expected(slot, count):
        row = uncached(model, held[slot], prompt=len(PROMPTS[slot]) + 1, source=PROMPTS[slot])
        return row[len(row) - count :]

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=atol * np.abs(wanted).max(), rtol=0)

    caches, logits = cached.prefill(PROMPTS)
    assert np.asarray(caches.lengths).tolist() == [*map(len, held), 0]
    for slot in range(len(held)):
        close(logits[slot], expected(slot, 1)[0])
    caches = caches.grown(32, 16)
    for column in range(2):
        tokens = NEW[:, column : column + 1]
        logits, caches = cached.extend(caches, np.pad(tokens, ((0, 1), (0, 0))))
        for slot in range(3):
            held[slot].append(int(tokens[slot, 0]))
            close(logits[slot], expected(slot, 1))
    for start, counts in ((2, (3, 2, 0)), (5, (1, 3, 3))):
        present = np.arange(3) < np.array([*counts, 0])[:, None]
        tokens = np.pad(NEW[:, start : start + 3], ((0, 1), (0, 0)))
        logits, caches = cached.extend(caches, tokens, present=present)
        for slot, count in enumerate(counts):
            held[slot] += tokens[slot, :count].tolist()
            if count:
                close(logits[slot, :count], expected(slot, count))
    # Drafts that are rejected leave no trace, not even in a window's ring.
    lengths = np.array(caches.lengths)
    _, caches = cached.extend(caches, np.pad(NEW[:, 8:11], ((0, 1), (0, 0))))
    caches = caches.rewind(lengths)
    caches = caches.take(jnp.array([2, 0, 0, 1]))
    order = (2, 0, 0, 1)
    tokens = np.array([[11], [12], [13], [14]])
    logits, caches = cached.extend(caches, tokens)
    before = [list(row) for row in held]
    for place, slot in enumerate(order):
        held[slot] = before[slot] + tokens[place].tolist()
        close(logits[place], expected(slot, 1))


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name, config, build, uncached):
    architecture, attentions, changes = MODELS[name]
    check_continuation(build(config(architecture, *attentions, **changes)), uncached)


def test_multi_token_prediction_continues_by_its_first_block(config, build, uncached):
    plain = config(CAUSAL, GQA, repeats=1)
    model = build(dataclasses.replace(plain, future_tokens=2, future_block=plain.decoder.blocks[0]))
    check_continuation(model, uncached)


def test_a_cache_of_8_bits_is_within_its_rounding(config, build):
    """Keys move by at most s_k / 2 and values by s_v / 2 in each number, s = max / 127; so do scores and outputs.

    A score moves by at most |q|_1 s_k / 2 * scale; weights then by a factor within exp(+-2 that); the output by half a
    step of the values and what the weights' change carries. Checked on one layer, where nothing else adds up.
    """
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 7, 8)).astype(np.float32) * rng.uniform(0.1, 30, (2, 3, 7, 1)).astype(np.float32)
    x[0, 0, 0] = 0.0  # a key of zeros stays one
    stored = Int8.of(jnp.asarray(x))
    bound = np.abs(x).max(-1, keepdims=True) / 254
    moved = np.abs(np.asarray(stored.read(jnp.float32)) - x)
    assert (moved <= bound * (1 + 1e-5)).all() and moved.max() > 0.5 * bound.max()

    model = build(config(CAUSAL, dataclasses.replace(GQA, window=(6, 0)), GQA))
    found = []
    for kind in CacheType:
        cached = CachedModel(model, start_id=0, caching=CacheConfig(kind))
        caches, _ = cached.prefill(PROMPTS)
        caches = caches.grown(32)
        found.append((caches.nbytes, cached.extend(caches, np.full((4, 1), 3))[0]))
    (plain_bytes, plain), (bytes_, rounded) = found
    assert bytes_ < 0.4 * plain_bytes  # 8 numbers of 4 bytes become 8 of 1 and a scale
    error = np.abs(plain - rounded)[:3].max() / np.abs(plain[:3]).max()
    assert 1e-6 < error < 0.05  # four layers of roundings of 0.4% each


def test_packed_prefill_equals_padded_and_alone(config, build):
    """One row for all, a row each, or one prompt at a time: the same caches and logits; and nothing leaks."""
    model = build(config(CAUSAL, GQA, dataclasses.replace(GQA, window=(5, 0))))
    cached = CachedModel(model, start_id=None)
    prompts = [[5, 6, 7], list(range(2, 15)), [9], [3, 3, 3, 3]]
    caches, packed = cached.prefill(prompts)
    for slot, prompt in enumerate(prompts):
        alone, logits = cached.prefill([prompt])
        np.testing.assert_allclose(packed[slot], logits[0], atol=1e-5)
        for one, all_ in zip(jax.tree.leaves(alone.blocks), jax.tree.leaves(caches.blocks)):
            length = min(len(prompt), one.shape[2])  # entries beyond it are nobody's
            np.testing.assert_allclose(one[0, :, :length], all_[slot, :, :length], atol=1e-5)
    changed = [prompts[0], [1] * 13, [1], [1] * 4]
    _, others = cached.prefill(changed)
    assert np.array_equal(others[0], packed[0]) and not np.allclose(others[1], packed[1])


def test_rows_hold_no_more_columns_than_padding_would():
    sizes = [8, 500, 60, 3, 300, 190, 12, 64]
    where, features = pack([[1] * size for size in sizes], 8, None)
    assert features["input_tokens"].shape == (3, 512)  # 1,137 tokens; a row each would be 8 rows
    taken = np.zeros((3, 512), int)
    for row, start, length in zip(where.rows, where.starts, where.lengths):
        taken[row, start : start + length] += 1
    assert taken.max() == 1 and taken.sum() == sum(sizes)
    assert np.array_equal(features["segment_ids"] > 0, taken > 0)
    rows = [len(pack([[1] * 16] * count, count, 16)[1]["positions"]) for count in (1, 5, 16, 17, 19, 33, 36)]
    assert rows == [1, 5, 16, 18, 20, 36, 36]  # few empty ones, and few different numbers
    assert len(pack([[1] * 16] * 17, 17, 16, parts=4)[1]["positions"]) == 20


def test_changed_parameters_compile_nothing(config, build):
    """Training shows samples again and again."""
    configuration = config(CAUSAL, GQA)
    first = CachedModel(build(configuration), start_id=0)
    _, logits = first.prefill(PROMPTS)
    compiled = first._programs.prefill._cache_size()
    second = CachedModel(build(configuration, seed=1), start_id=0)
    _, others = second.prefill(PROMPTS)
    assert second._programs.prefill._cache_size() == compiled and not np.allclose(logits, others)


def test_what_cannot_be_continued_is_said(config, build):
    short = EmbeddingConfig(positions=LearnedPositions(6))
    model = build(config(CAUSAL, dataclasses.replace(GQA, position=None), embedding=short))
    cached = CachedModel(model, start_id=0)
    cached.check([1, 2, 3], 3)  # start, 3 of the prompt, 2 of the new: the third is drawn and stands nowhere
    with pytest.raises(ValueError, match="3 tokens of prompt and 4 new ones .* context of 6 tokens; shorten"):
        cached.check([1, 2, 3], 4)
    with pytest.raises(ValueError, match="id 40, but the model's ids are 0 to 39"):
        cached.prefill([[1], [40]])
    with pytest.raises(ValueError, match="empty, and nothing stands before it"):
        CachedModel(model, start_id=None).prefill([[]])
    with pytest.raises(ValueError, match="fill_masks"):
        CachedModel(build(config(Architecture.ENCODER)), start_id=0)
    with pytest.raises(ValueError, match="needs a start_id"):
        CachedModel(build(config(CROSSING)), start_id=None)
    with pytest.raises(ValueError, match="start_id is 41"):
        CachedModel(model, start_id=41)
    dynamic = dataclasses.replace(GQA, position=Rope(scaling=NtkScaling(2.0, original_length=16)))
    assert CachedModel(build(config(CAUSAL, dynamic)), start_id=0, context_length=32).context_length == 16
    own = {"encoder_embedding": EmbeddingConfig(positions=LearnedPositions(4)), "embedding": short}
    crossing = CachedModel(build(config(CROSSING, dataclasses.replace(GQA, position=None), **own)), start_id=0)
    assert (crossing.source_length, crossing.context_length) == (4, 6)
    crossing.check([1] * 4, 6)
    with pytest.raises(ValueError, match="prompt of 5 tokens is longer than the 4 that the model's encoder reads; sho"):
        crossing.prefill([[1] * 5])
    with pytest.raises(ValueError, match="0 tokens of prompt and 7 new ones is longer than the model's context of 6"):
        crossing.check([1], 7)
    windowed = CachedModel(build(config(CAUSAL, dataclasses.replace(GQA, window=(4, 0)))), start_id=0)
    caches, _ = windowed.prefill([list(range(1, 12))])
    with pytest.raises(ValueError, match="3 tokens at once .* set CacheConfig.extension to 3"):
        windowed.extend(caches, np.zeros((1, 3), np.int32))
