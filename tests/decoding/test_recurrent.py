"""What recurrent layers remember is what would be computed again: cached = uncached, packed = alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.layers import (
    AttentionConfig,
    ChannelDecay,
    FixedDecay,
    LinearAttentionConfig,
    Mamba2Config,
    MambaBlockConfig,
    MambaConfig,
    NormConfig,
    Rope,
)
from jaxlm.layers.cache import CacheConfig

PROMPTS = [[5, 6, 7], list(range(2, 13)), [9]]
NEW = np.random.default_rng(0).integers(1, 40, (3, 9))
MAMBA = (
    MambaBlockConfig(MambaConfig(24, 2, state=4, bias=True), NormConfig()),
    MambaBlockConfig(Mamba2Config(4, 6, state=5, groups=2, taps=3), NormConfig()),
)
LINEAR = (
    LinearAttentionConfig(2, 8, 6, decay=ChannelDecay(4), gate="silu", output_norm=NormConfig()),
    LinearAttentionConfig(2, 8, position=Rope(), decay=FixedDecay(1.0)),
    LinearAttentionConfig(2, 8, feature_map="elu_plus_one", normalized=True),
)


@pytest.fixture(params=["mamba", "linear attention"])
def model(request, config, build):
    """A hybrid of Mamba, Mamba-2 and attention within a window; or three kinds of linear attention."""
    if request.param == "linear attention":
        return build(config(Architecture.CAUSAL_DECODER, *LINEAR, repeats=1))
    made = config(Architecture.CAUSAL_DECODER, AttentionConfig(2, 8, position=Rope(), window=(4, 0)), repeats=1)
    stack = dataclasses.replace(made.decoder, blocks=(*MAMBA, *made.decoder.blocks), num_layers=6)
    return build(dataclasses.replace(made, decoder=stack))


def test_cached_equals_uncached(model, uncached):
    """Prompts in shared rows, then new tokens by ones and threes, some that do not count; reordered; never rewound."""
    cached = CachedModel(model, start_id=0, caching=CacheConfig(extension=3))
    held = [[0, *prompt] for prompt in PROMPTS]

    def close(found, slot, count):
        expected = uncached(model, held[slot])[-count:]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)

    caches, logits = cached.prefill(PROMPTS)
    for slot in range(3):
        close(logits[slot : slot + 1], slot, 1)
    caches = caches.grown(32)
    for start, counts in ((0, (3, 2, 0)), (3, (1, 3, 3))):
        present = np.arange(3) < np.array([*counts, 0])[:, None]
        tokens = np.pad(NEW[:, start : start + 3], ((0, 1), (0, 0)))
        logits, caches = cached.extend(caches, tokens, present=present)
        for slot, count in enumerate(counts):
            held[slot] += tokens[slot, :count].tolist()
            if count:
                close(logits[slot, :count], slot, count)
    assert not caches.rewindable
    with pytest.raises(TypeError, match="RecurrentCache cannot forget its last tokens; keep the caches of before"):
        caches.rewind(caches.lengths - 1)
    caches = caches.take(jnp.array([2, 0, 0, 1]))
    logits, _ = cached.extend(caches, np.array([[11], [12], [13], [14]]))
    before = [list(row) for row in held]
    for place, slot in enumerate((2, 0, 0, 1)):
        held[slot] = [*before[slot], 11 + place]
        close(logits[place], slot, 1)


def test_the_engine_draws_what_is_likeliest_of_the_whole_text(model, uncached):
    """Three requests through two slots: a slot that is taken over holds nothing of the text before."""
    engine = Engine(CachedModel(model, start_id=0), EngineConfig(slots=2, steps=2))
    requests = [Request(prompt, SamplingConfig(5 - i, temperature=0.0)) for i, prompt in enumerate(PROMPTS)]
    for answer, request in zip(engine.generate(requests), requests, strict=True):
        text = [0, *request.prompt]
        for token in answer.tokens:
            logits = uncached(model, text)[-1]
            assert logits[token] >= logits.max() - 1e-4  # a tie may fall either way
            text.append(int(token))
        assert len(answer.tokens) == request.sampling.max_new_tokens
