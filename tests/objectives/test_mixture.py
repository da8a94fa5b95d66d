"""Mixtures of objectives: rates, schedules, accounting, what may not be mixed; UL2's denoisers."""

import dataclasses

import numpy as np
import objective_zoo as zoo
import pytest

from jaxlm.architecture import Architecture
from jaxlm.objectives.codegen2 import CodeGen2
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.masked_lm import MaskedLM
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.multi_token import MultiTokenPrediction
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.ul2 import UL2
from jaxlm.piecewise import Piecewise

TEXT = zoo.text(100, np.random.default_rng(0), 0.05)


def corrupt(objective, seed, step=0, text=TEXT):
    return objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(seed), step=step)


def parts(objective, step=0, draws=4000):
    """Share of each part in `draws` examples of a short text."""
    drawn = [corrupt(objective, seed, step, TEXT[:4]).objective for seed in range(draws)]
    return np.bincount(drawn, minlength=len(objective.parts)) / draws


@pytest.mark.parametrize("member", [0, 1])
def test_a_lone_weight_gives_exactly_the_pure_objective(member):
    members = (SpanCorruption(), PrefixLM())
    mixture = Mixture(members=members, weights=tuple(float(k == member) for k in range(2)))
    for seed in range(20):
        mixed, pure = corrupt(mixture, seed), corrupt(members[member], seed)
        np.testing.assert_array_equal(mixed.inputs, pure.inputs)
        np.testing.assert_array_equal(mixed.targets, pure.targets)
        assert mixed.objective == member


def test_members_that_are_never_drawn_decide_nothing():
    """Neither how much text a row takes, nor which architectures, segments or ends of inputs there are."""
    lengths = {"inputs": 512, "targets": 114}
    for weights, whole in (((0.0, 1.0), False), ((Piecewise((0, 10), (0.0, 1.0)), 1.0), True)):
        mixture = Mixture(members=(FullLM(), SpanCorruption()), weights=weights)
        assert len(mixture.drawn) == 1 + whole
        fitted = mixture.fit(lengths, Architecture.PREFIX_DECODER)
        assert fitted.raw_length(lengths, Architecture.PREFIX_DECODER) == (626 if whole else 568)
        assert (mixture.refuses(Architecture.ENCODER_DECODER) is None) is not whole
        assert mixture.ends_inputs is not whole
    mixture = Mixture(members=(FullLM(), PrefixLM(mode_token="[S]")), weights=(1.0, 0.0))
    assert mixture.takes_segments and mixture.raw_length(lengths, Architecture.PREFIX_DECODER) == 626


def test_codegen2_at_rate_0_is_full_lm():
    for seed in range(20):
        np.testing.assert_array_equal(corrupt(CodeGen2(infill_rate=0.0), seed).targets, TEXT)


def test_weights_and_schedule():
    mixture = Mixture(
        members=(FullLM(), PrefixLM()),
        weights=(Piecewise((0, 100), (1.0, 0.0)), Piecewise((0, 100), (0.0, 3.0))),
    )
    assert parts(mixture, step=0, draws=50).tolist() == [1.0, 0.0]
    assert parts(mixture, step=100, draws=50).tolist() == [0.0, 1.0]
    assert parts(mixture, step=50) == pytest.approx([0.25, 0.75], abs=0.03)  # standard error 0.7%


def test_fitted_members_take_texts_of_their_own_length():
    """Unfitted, the shortest text serves all and nothing is dropped; fitted, each fills its row."""
    lengths, architecture = {"inputs": 512, "targets": 114}, Architecture.PREFIX_DECODER
    mixture = Mixture(members=(FullLM(), SpanCorruption()), weights=(1.0, 1.0))
    assert mixture.raw_length(lengths, architecture) == 568
    fitted = mixture.fit(lengths, architecture)
    assert fitted.raw_length(lengths, architecture) == 626
    text = np.arange(20, 20 + 626, dtype=np.int32)  # increasing, so that a stretch can be recognised
    starts = set()
    for seed in range(200):
        example = corrupt(fitted, seed, text=text)
        assert len(example.inputs) + len(example.targets) == 626
        restored = fitted.restore(example, zoo.VOCABULARY)
        assert len(restored) == (626, 568)[example.objective]
        np.testing.assert_array_equal(np.diff(restored), 1)
        if example.objective == 1:
            starts.add(int(restored[0]))
    assert min(starts) < 26 and max(starts) > 72  # stretches start anywhere in 20..78


def test_parts_are_named():
    mixture = Mixture(members=(SpanCorruption(), FullLM(), SpanCorruption(noise_density=0.5)), weights=(1.0, 1.0, 1.0))
    assert mixture.parts == ("span_corruption_0", "full_lm", "span_corruption_2")
    assert dataclasses.replace(mixture, names=("a", "b", "c")).parts == ("a", "b", "c")
    assert mixture.refuses(Architecture.ENCODER_DECODER).startswith("full_lm leaves the encoder")


@pytest.mark.parametrize(
    ("members", "weights", "message"),
    [
        ((MaskedLM(), FullLM()), (1.0, 1.0), "masked_lm is aligned and full_lm is sequence; train them in stages"),
        ((FullLM(), MultiTokenPrediction()), (1.0, 1.0), r"multi_token has the loss terms \['cross_entropy', 'future"),
        ((FullLM(), UL2()), (1.0, 1.0), "list the members of ul2"),
        ((FullLM(),), (1.0, 1.0), "one weight a member"),
        ((FullLM(), PrefixLM()), (0.0, 0.0), "nor all 0, got .* at step 0"),
        ((FullLM(), PrefixLM()), (Piecewise((0, 9), (1.0, -1.0)), 2.0), "not be negative .* at step 9"),
    ],
)
def test_bad_mixtures(members, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(members=members, weights=weights)


def test_ul2_denoisers():
    """Table 1 of arXiv 2205.05131: mean span length, noise density and mode of each of seven."""
    ul2 = UL2()
    settings = [(m.mean_span_length, m.noise_density, m.mode_token) for m in ul2.mixture.members if m is not ul2_s(ul2)]
    assert settings == [
        (3, 0.15, "[R]"),
        (8, 0.15, "[R]"),
        (3, 0.5, "[X]"),
        (8, 0.5, "[X]"),
        (64, 0.15, "[X]"),
        (64, 0.5, "[X]"),
    ]
    assert ul2_s(ul2) == PrefixLM(suffix_share=0.25, mode_token="[S]")
    assert ul2.parts == ("r_3_0.15", "r_8_0.15", "s_0.25", "x_3_0.5", "x_8_0.5", "x_64_0.15", "x_64_0.5")
    assert parts(ul2) == pytest.approx(1 / 7, abs=0.025)  # standard error 0.55%


def ul2_s(ul2):
    return ul2.mixture.members[2]


def test_ul2_announces_its_mode():
    ul2 = UL2()
    for seed in range(60):
        example = corrupt(ul2, seed)
        assert example.inputs[0] == zoo.NAMED[{"r": "[R]", "s": "[S]", "x": "[X]"}[ul2.parts[example.objective][0]]]
        if ul2.parts[example.objective] == "s_0.25":
            np.testing.assert_array_equal(example.targets, TEXT[-25:])
