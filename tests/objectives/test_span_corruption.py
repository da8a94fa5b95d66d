"""Span corruption is T5's, to the token."""

import itertools

import numpy as np
import objective_zoo as zoo
import pytest

from jaxlm.architecture import Architecture
from jaxlm.objectives.base import VocabularyInfo
from jaxlm.objectives.span_corruption import SpanCorruption, draw_spans, noise_counts


@pytest.mark.parametrize("architecture", [Architecture.ENCODER_DECODER, Architecture.PREFIX_DECODER])
def test_study_lengths(architecture):
    """568 tokens of text fill 512 + 114, as T5's random_spans_helper(512, 0.15, 3, 1, 1) says; 569 do not fit."""
    objective = SpanCorruption()
    assert objective.raw_length({"inputs": 512, "targets": 114}, architecture) == 568
    assert objective.sizes(568) == (512, 114)
    assert sum(objective.sizes(569)) > 626


@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, 3.0, 64.0])
def test_sizes_are_exact_and_never_fall(density, mean):
    objective = SpanCorruption(noise_density=density, mean_span_length=mean)
    rng = np.random.default_rng(0)
    before = (0, 0)
    for length in range(0, 150):
        example = objective.corrupt({"targets": zoo.text(length, rng)}, zoo.VOCABULARY, rng)
        sizes = len(example.inputs), len(example.targets)
        assert sizes == objective.sizes(length) and sizes >= before
        before = sizes


def test_layout():
    """Sentinels count down from the highest id, once in each text; both texts end with the end-of-sequence id."""
    rng = np.random.default_rng(0)
    text = zoo.text(568, rng)
    example = SpanCorruption().corrupt({"targets": text}, zoo.VOCABULARY, rng)
    noise, spans = noise_counts(568, 0.15, 3.0)
    assert (noise, spans) == (85, 28)  # round(568 * 0.15), round(85 / 3)
    sentinels = np.arange(zoo.SIZE - 1, zoo.SIZE - 1 - spans, -1)
    for tokens in (example.inputs, example.targets):
        np.testing.assert_array_equal(tokens[np.isin(tokens, zoo.VOCABULARY.sentinels)], sentinels)
        assert tokens[-1] == zoo.VOCABULARY.eos_id
    assert example.inputs[0] == text[0] and example.targets[0] == sentinels[0]  # starts with a text span
    assert example.inputs[-2] == sentinels[-1] and example.targets[-2] == text[-1]  # ends with a noise span


def test_every_segmentation_is_equally_likely():
    """7 tokens, 4 of them noise in 2 spans: 2 splits of the text x 3 of the noise, each drawn 1 time in 6."""
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(6000):
        mask = tuple(draw_spans(7, 4, 2, rng)[0].tolist())
        counts[mask] = counts.get(mask, 0) + 1
    expected = {
        tuple([False] * a + [True] * b + [False] * (3 - a) + [True] * (4 - b))
        for a, b in itertools.product((1, 2), (1, 2, 3))
    }
    assert set(counts) == expected
    # 5 degrees of freedom: chi-squared exceeds 20.5 once in 1,000.
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5


def test_mean_span_length_and_density():
    rng = np.random.default_rng(0)
    masks = [draw_spans(1000, *noise_counts(1000, 0.15, 3.0), rng)[0] for _ in range(20)]
    assert all(mask.sum() == 150 for mask in masks)
    assert all(
        np.diff(mask, prepend=False).astype(int).sum() == 99 for mask in masks
    )  # 50 starts, 49 ends before the last


def test_documents_apart_are_corrupted_one_by_one():
    """Each as if it were alone; what its own sentinels and ends leave no room for is left out at the row's end."""
    objective, rng = SpanCorruption(), np.random.default_rng(0)
    text = zoo.text(568, rng)
    whole = objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(0))
    one = objective.corrupt({"targets": text, "segments": np.ones(568, np.int32)}, zoo.VOCABULARY, zoo.generator(0))
    np.testing.assert_array_equal(one.inputs, whole.inputs)
    np.testing.assert_array_equal(one.targets, whole.targets)
    segments = np.repeat(np.array([1, 2, 3], np.int32), [100, 200, 268])
    example = objective.corrupt({"targets": text, "segments": segments}, zoo.VOCABULARY, zoo.generator(0))
    generator, kept = zoo.generator(0), 0
    for segment, length in ((1, 100), (2, 200), (3, None)):
        length = length or len(objective.restore(example, zoo.VOCABULARY)) - kept
        alone = objective.corrupt({"targets": text[kept : kept + length]}, zoo.VOCABULARY, generator)
        np.testing.assert_array_equal(example.inputs[example.input_segments == segment], alone.inputs)
        np.testing.assert_array_equal(example.targets[example.segments == segment], alone.targets)
        kept += length
    assert 540 < kept < 568 and len(example.inputs) <= 512 and 112 <= len(example.targets) <= 114


def test_documents_apart_share_the_columns_of_a_decoders_row():
    """Short ones have more sentinels and ends than 114 targets hold; where these may take columns of inputs they do."""
    text, segments = zoo.text(568, np.random.default_rng(0)), np.repeat(np.arange(1, 30, dtype=np.int32), 20)[:568]
    of = {"targets": text, "segments": segments}
    apart, shared = (
        SpanCorruption().corrupt(example, zoo.VOCABULARY, zoo.generator(0))
        for example in (of, of | {"columns": np.int64(626)})
    )
    assert len(apart.inputs) + len(apart.targets) < 560
    assert 626 - sum(SpanCorruption().sizes(20)) < len(shared.inputs) + len(shared.targets) <= 626
    assert len(shared.targets) > 114


def test_counts_are_float32s_as_t5s():
    """0.15 of 190 tokens is a half in float64, and a little more in T5's float32."""
    assert noise_counts(190, 0.15, 3.0) == (29, 10)
    assert noise_counts(30, 0.15, 3.0) == (4, 1)  # a half in both, to even


def test_too_few_sentinels():
    vocabulary = VocabularyInfo(size=100, sentinel_ids=(99, 98))
    with pytest.raises(ValueError, match="needs 5 sentinels for a text of 100 tokens, the vocabulary has 2; add"):
        SpanCorruption().corrupt({"targets": zoo.text(100, np.random.default_rng(0))}, vocabulary, zoo.generator(0))


@pytest.mark.parametrize("settings", [{"noise_density": 0.0}, {"noise_density": 1.0}, {"mean_span_length": 0.5}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=f"SpanCorruption.{next(iter(settings))} must"):
        SpanCorruption(**settings)
