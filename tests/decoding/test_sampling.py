"""Draws have the distribution that is asked for, and are functions of seed and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.decoding.sampling import NEVER, Sampling, SamplingConfig, draw, drawable_ids, filtered

PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32)
WAYS = [
    (SamplingConfig(), PROBABILITIES),
    (SamplingConfig(temperature=0.5), PROBABILITIES**2 / sum(PROBABILITIES**2)),
    (SamplingConfig(top_k=2), np.array([0, 0.4, 0.25, 0, 0]) / 0.65),
    # 0.4 + 0.25 has not reached 0.7, so the next one is still in.
    (SamplingConfig(top_p=0.7), np.array([0, 0.4, 0.25, 0.2, 0]) / 0.85),
    (SamplingConfig(top_p=0.01), np.array([0, 1.0, 0, 0, 0])),
    (SamplingConfig(temperature=0.0), np.array([0, 1.0, 0, 0, 0])),
    (SamplingConfig(top_k=4, top_p=0.45), np.array([0, 0.4, 0.25, 0, 0]) / 0.65),
    # At least 0.3 * 0.4.
    (SamplingConfig(min_p=0.3), np.array([0, 0.4, 0.25, 0.2, 0]) / 0.85),
    # The entropy is 1.42 nats; surprises are 3.00, 0.92, 1.39, 1.61, 2.30, so 0.25 and 0.2 are nearest to it.
    (SamplingConfig(typical_p=0.3), np.array([0, 0, 0.25, 0.2, 0]) / 0.45),
]


def test_draws_have_the_right_distribution():
    """All ways in one call: frequencies of 20,000 draws each within 4 standard errors, and nothing that is left out."""
    count = 20_000
    sampling = Sampling.of([config for config, _ in WAYS], [(0, 0)] * len(WAYS))
    each = jax.tree.map(lambda x: np.repeat(x, count, axis=0), sampling)
    index = np.tile(np.arange(count, dtype=np.int32), len(WAYS))
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (len(index), 5))
    drawn = np.asarray(jax.jit(draw)(logits, each, index)).reshape(len(WAYS), count)
    for tokens, (config, expected) in zip(drawn, WAYS):
        found = np.bincount(tokens, minlength=5) / count
        assert (found[expected == 0] == 0).all(), config
        np.testing.assert_array_less(
            np.abs(found - expected), 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9, err_msg=str(config)
        )
    probabilities = np.asarray(jax.nn.softmax(filtered(logits[: len(WAYS)], sampling), axis=-1))
    np.testing.assert_allclose(probabilities, [expected for _, expected in WAYS], atol=1e-6)


def test_a_draw_depends_on_its_own_slot_alone():
    """The same seeds, index and logits give the same token in any slot, beside anything; others differ."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 1000)), jnp.float32)
    sampling = Sampling.of([SamplingConfig()] * 3 + [SamplingConfig(top_p=0.9)], [(7, 0), (7, 1), (8, 0), (7, 0)])
    index = np.array([3, 3, 3, 4], np.int32)
    drawn = np.asarray(draw(logits, sampling, index))
    back = slice(None, None, -1)
    reversed_ = draw(logits[back], jax.tree.map(lambda x: x[back], sampling), index[back])
    assert np.array_equal(drawn, np.asarray(reversed_)[back])
    same = draw(jnp.broadcast_to(logits[0], logits.shape), Sampling.of([SamplingConfig()] * 4, sampling.seeds), index)
    assert len(set(np.asarray(same).tolist())) == 4  # three pairs of seeds, and one of them at two places


def test_what_is_never_drawn():
    allowed = drawable_ids(8, vocab_size=6, never=(0,))
    assert allowed.tolist() == [False] + [True] * 5 + [False] * 2
    logits = jnp.where(allowed, 0.0, NEVER) + jnp.zeros((1000, 8))
    sampling = Sampling.of([SamplingConfig(temperature=5.0)] * 1000, [(i, 0) for i in range(1000)])
    drawn = np.asarray(draw(logits, sampling, np.zeros(1000, np.int32)))
    assert set(drawn.tolist()) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"temperature": -1.0}, {"min_p": 2.0}, {"typical_p": 0.0}])
def test_impossible_sampling_is_said(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"got {name}="):
        SamplingConfig(**wrong)
