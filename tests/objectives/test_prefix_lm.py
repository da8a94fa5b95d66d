"""Prefix LM: where texts are split, and the study's layout for encoder-decoders."""

import itertools

import numpy as np
import objective_zoo as zoo
import pytest

from jaxlm.architecture import Architecture
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.prefix_lm import Pairing, PrefixLM

STUDY = {"inputs": 626, "targets": 626}


def test_splits_are_uniform():
    """On 1..L-1, ends included: for L = 6, each of 5 places 1 time in 5."""
    raw = {"targets": zoo.text(6, np.random.default_rng(0))}
    rng = zoo.generator(0)
    counts = np.bincount([len(PrefixLM().corrupt(raw, zoo.VOCABULARY, rng).inputs) for _ in range(5000)], minlength=7)
    assert counts[0] == counts[6] == 0
    # 4 degrees of freedom: chi-squared exceeds 18.5 once in 1,000.
    assert ((counts[1:6] - 1000) ** 2 / 1000).sum() < 18.5


def test_lengths():
    decoder = {"inputs": 512, "targets": 114}
    assert PrefixLM().raw_length(decoder, Architecture.PREFIX_DECODER) == 626
    assert PrefixLM().raw_length({"targets": 626}, Architecture.CAUSAL_DECODER) == 626
    assert FullLM().raw_length(decoder, Architecture.CAUSAL_DECODER) == 626
    # One text may have 626 inputs and one target, or the other way round.
    assert PrefixLM().raw_length(STUDY, Architecture.ENCODER_DECODER) == 627
    assert PrefixLM(pairing=Pairing.COMPLEMENTARY).raw_length(STUDY, Architecture.ENCODER_DECODER) == 1252
    assert PrefixLM(suffix_share=0.25).raw_length({"inputs": 75, "targets": 25}, Architecture.ENCODER_DECODER) == 100


def test_complementary_pairs_fill_both_rows():
    """enc = row0[:i] ++ row1[:626 - i], dec = row0[i:] ++ row1[626 - i:] (arXiv 2204.05832, appendix C)."""
    text = zoo.text(1252, np.random.default_rng(0))
    objective = PrefixLM(pairing=Pairing.COMPLEMENTARY)
    for seed in range(20):
        example = objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(seed))
        assert len(example.inputs) == len(example.targets) == 626
        split = int((example.input_segments == 1).sum())
        assert 1 <= split <= 625
        first, second = text[:626], text[626:]
        np.testing.assert_array_equal(example.inputs, np.concatenate([first[:split], second[: 626 - split]]))
        np.testing.assert_array_equal(example.targets, np.concatenate([first[split:], second[626 - split :]]))
        np.testing.assert_array_equal(example.segments, [1] * (626 - split) + [2] * split)
        np.testing.assert_array_equal(example.input_segments, [1] * split + [2] * (626 - split))


def test_documents_apart_are_split_where_they_are_together():
    """Document masks change what is seen and nothing else; the middle of a pair begins a text of its own."""
    text, segments = zoo.text(12, np.random.default_rng(0)), np.array([1] * 3 + [2] * 5 + [3] * 4, np.int32)
    for seed, objective in itertools.product(range(10), (PrefixLM(), PrefixLM(pairing=Pairing.COMPLEMENTARY))):
        together = objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(seed))
        raw = {"targets": text, "segments": segments}
        apart = objective.corrupt(raw, zoo.VOCABULARY, zoo.generator(seed))
        np.testing.assert_array_equal(apart.inputs, together.inputs)
        np.testing.assert_array_equal(apart.targets, together.targets)
        if objective.pairing is Pairing.SINGLE:
            np.testing.assert_array_equal(np.append(apart.input_segments, apart.segments), segments)
        else:
            split = int((together.input_segments == 1).sum())
            first, second = np.array([1, 1, 1, 2, 2, 2]), np.array([3, 3, 4, 4, 4, 4])
            np.testing.assert_array_equal(apart.input_segments, np.append(first[:split], second[: 6 - split]))
            np.testing.assert_array_equal(apart.segments, np.append(first[split:], second[6 - split :]))
    assert PrefixLM().takes_segments and not PrefixLM(mode_token="[S]").takes_segments


def test_full_lm_keeps_a_prompt_apart():
    raw = {"inputs": np.array([30, 31], np.int32), "targets": np.array([40], np.int32)}
    example = FullLM().corrupt(raw, zoo.VOCABULARY, zoo.generator(0))
    assert example.inputs.tolist() == [30, 31] and example.targets.tolist() == [40]


def test_bad_settings():
    with pytest.raises(ValueError, match="suffix_share"):
        PrefixLM(suffix_share=1.0)
    with pytest.raises(ValueError, match="leave suffix_share None"):
        PrefixLM(suffix_share=0.5, pairing=Pairing.COMPLEMENTARY)
