"""Sampling gives what the model says: against a loop without padding, jit or batches, for each architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.decoding import sample as sampling
from jaxlm.decoding.sample import SamplingConfig, draw, fill_masks, sample
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import LearnedPositions, Rope
from jaxlm.layers.stack import StackConfig
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.models.language_model import LanguageModel

GREEDY = SamplingConfig(max_new_tokens=4, temperature=0.0)
PROMPTS = [[5, 6, 7], [9]]
NO_EOS = -1  # an id that is never drawn


def make_model(architecture, seed=0, positions=None):
    """A small model whose random logits are spread enough that rounding does not change a choice."""
    attention = AttentionConfig(num_heads=2, head_dim=8, position=None if positions else Rope())
    cross = AttentionConfig(num_heads=2, head_dim=8)
    parts = {"feed_forward": FeedForwardConfig(hidden=32), "norm": NormConfig()}
    plain = StackConfig(blocks=(BlockConfig(attention=attention, **parts),), num_layers=2, final_norm=NormConfig())
    crossing = StackConfig(
        blocks=(BlockConfig(attention=attention, cross_attention=cross, **parts),),
        num_layers=2,
        final_norm=NormConfig(),
    )
    both = architecture is Architecture.ENCODER_DECODER
    config = LanguageModelConfig(
        architecture=architecture,
        vocab_size=40,
        width=16,
        embedding=EmbeddingConfig(positions=positions),
        head=HeadConfig(tied=True),
        init=InitConfig(std=0.5),
        encoder=plain if both or architecture is Architecture.ENCODER else None,
        decoder=crossing if both else plain if architecture.has_decoder_features else None,
    )
    return LanguageModel(config, key=jax.random.key(seed))


@nnx.jit
def logits_of(model, batch):
    return model.head(model.hidden_states(batch)[0])


def next_logits(model, prompt, tokens):
    """Logits [V] of the token after `tokens`, from a row of exactly their length."""
    architecture = model.config.architecture
    if architecture is Architecture.ENCODER_DECODER:
        row, extra = (
            tokens,
            {
                "encoder_input_tokens": jnp.array([prompt]),
                "encoder_segment_ids": jnp.ones((1, len(prompt)), jnp.int32),
                "encoder_positions": jnp.arange(len(prompt))[None],
            },
        )
    else:
        row, extra = prompt + tokens, {}
    length = len(row) + 1
    batch = {
        "decoder_input_tokens": jnp.array([[0, *row]]),
        "decoder_segment_ids": jnp.ones((1, length), jnp.int32),
        "decoder_positions": jnp.arange(length)[None],
        **extra,
    }
    if architecture is Architecture.PREFIX_DECODER:
        batch["decoder_causal_attention"] = (jnp.arange(length)[None] <= len(prompt)).astype(jnp.int32)
    return np.array(logits_of(model, batch)[0, -1])


@pytest.mark.parametrize(
    "architecture", [Architecture.CAUSAL_DECODER, Architecture.PREFIX_DECODER, Architecture.ENCODER_DECODER]
)
def test_greedy_equals_the_plain_loop(architecture):
    """Rows of different lengths, padded and batched, give each prompt's own continuation."""
    model = make_model(architecture)
    found = sample(model, PROMPTS, key=jax.random.key(0), config=GREEDY, eos_id=NO_EOS)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        expected = []
        while len(expected) < GREEDY.max_new_tokens:
            logits = next_logits(model, prompt, expected)
            logits[0] = -np.inf  # padding is never drawn
            best, second = np.sort(logits)[::-1][:2]
            assert best - second > 1e-4, "a tie would make this test depend on rounding; choose another seed"
            expected.append(int(logits.argmax()))
        assert continuation.tolist() == expected


def test_end_of_text_ends_a_row_alone():
    """A row stops at its first end-of-text token, which is not returned, and the others go on."""
    model = make_model(Architecture.CAUSAL_DECODER)
    whole = sample(model, PROMPTS, key=jax.random.key(0), config=GREEDY, eos_id=NO_EOS)
    eos = int(whole[0][2])
    cut = sample(model, PROMPTS, key=jax.random.key(0), config=GREEDY, eos_id=eos)
    for full, short in zip(whole, cut, strict=True):
        tokens = full.tolist()
        assert short.tolist() == (tokens[: tokens.index(eos)] if eos in tokens else tokens)


def test_draws_are_a_function_of_the_key():
    """The same key gives the same texts, whatever stands beside a prompt; another key gives others."""
    model = make_model(Architecture.CAUSAL_DECODER)
    config = SamplingConfig(max_new_tokens=6)
    first = sample(model, PROMPTS, key=jax.random.key(1), config=config, eos_id=NO_EOS)
    again = sample(model, PROMPTS, key=jax.random.key(1), config=config, eos_id=NO_EOS)
    beside = sample(model, [PROMPTS[0], [2, 2]], key=jax.random.key(1), config=config, eos_id=NO_EOS)
    other = sample(model, PROMPTS, key=jax.random.key(2), config=config, eos_id=NO_EOS)
    assert [row.tolist() for row in first] == [row.tolist() for row in again]
    assert first[0].tolist() == beside[0].tolist()
    assert [row.tolist() for row in first] != [row.tolist() for row in other]


def test_new_parameters_do_not_compile_again():
    """Training draws samples again and again from changed parameters."""
    sampling._generate.clear_cache()
    for seed in (0, 1):
        sample(make_model(Architecture.CAUSAL_DECODER, seed), PROMPTS, key=jax.random.key(0), config=GREEDY)
    assert sampling._generate._cache_size() == 1


def test_encoder_fills_its_masks():
    model = make_model(Architecture.ENCODER)
    mask, texts = 39, [[5, 39, 7, 39], [39, 4, 3, 8, 39, 2]]
    found = fill_masks(model, texts, mask_id=mask, key=jax.random.key(0), config=GREEDY)
    for text, filled in zip(texts, found, strict=True):
        batch = {
            "encoder_input_tokens": jnp.array([text]),
            "encoder_segment_ids": jnp.ones((1, len(text)), jnp.int32),
            "encoder_positions": jnp.arange(len(text))[None],
        }
        logits = np.array(logits_of(model, batch)[0])
        logits[:, [0, mask]] = -np.inf
        expected = [int(logits[i].argmax()) if token == mask else token for i, token in enumerate(text)]
        assert filled.tolist() == expected


def test_ids_beyond_the_vocabulary_are_not_drawn():
    model = make_model(Architecture.CAUSAL_DECODER)
    config = SamplingConfig(max_new_tokens=20, temperature=3.0)
    found = sample(model, [[5]] * 4, key=jax.random.key(0), config=config, vocab_size=10, eos_id=NO_EOS)
    drawn = np.concatenate(found)
    assert len(drawn) == 80 and drawn.max() < 10 and drawn.min() > 0


PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), PROBABILITIES),
        (SamplingConfig(temperature=0.5), PROBABILITIES**2 / sum(PROBABILITIES**2)),
        (SamplingConfig(top_k=2), np.array([0, 0.4, 0.25, 0, 0]) / 0.65),
        # 0.4 + 0.25 has not reached 0.7, so the next one is still in.
        (SamplingConfig(top_p=0.7), np.array([0, 0.4, 0.25, 0.2, 0]) / 0.85),
        (SamplingConfig(top_p=0.01), np.array([0, 1.0, 0, 0, 0])),
        (SamplingConfig(temperature=0.0), np.array([0, 1.0, 0, 0, 0])),
        (SamplingConfig(top_k=4, top_p=0.45), np.array([0, 0.4, 0.25, 0, 0]) / 0.65),
    ],
)
def test_draws_have_the_right_distribution(config, expected):
    """Frequencies of 20,000 draws within 4 standard errors; what must not be drawn never is."""
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (count, 5))
    drawn = np.bincount(draw(jax.random.split(jax.random.key(0), count), logits, config), minlength=5) / count
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_array_less(np.abs(drawn - expected), 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def test_what_cannot_be_sampled_is_said():
    encoder = make_model(Architecture.ENCODER)
    short = make_model(Architecture.CAUSAL_DECODER, positions=LearnedPositions(6))
    options = {"key": jax.random.key(0), "config": GREEDY}
    with pytest.raises(ValueError, match="fill_masks"):
        sample(encoder, PROMPTS, **options)
    with pytest.raises(ValueError, match="rows of 7 tokens, but the model has learned 6"):
        sample(short, PROMPTS, **options)
    with pytest.raises(ValueError, match="needs an encoder"):
        fill_masks(short, PROMPTS, mask_id=2, **options)
    with pytest.raises(ValueError, match="at least one prompt"):
        sample(short, [], **options)
    with pytest.raises(ValueError, match="top_p"):
        SamplingConfig(top_p=0.0)
