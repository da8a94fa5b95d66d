"""Objectives draw from the distributions of the reference implementations.

`benchmarks/objective_distributions.py` asks t5 itself. Here its noise (Raffel et al. 2020, arXiv 1910.10683, 3.1.4) is
written a second time, by shuffled marks instead of drawn places, and the test is shown to see what a wrong one does.
Seeds are fixed, so that nothing here is a matter of luck.
"""

import numpy as np
import objective_zoo as zoo
import pytest

from benchmarks import objective_distributions as measured
from jaxlm.objectives.infilling import Infilling
from jaxlm.objectives.prefix_lm import PrefixLM
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.ul2 import UL2

COUNT = 600
LEAST = 0.001  # p-values are uniform where nothing differs; of 1,000 swaps the lowest is 1 in 1,001
INFO = zoo.VOCABULARY
EOS = np.array([INFO.eos_id], np.int32)


@pytest.fixture(scope="module")
def texts():
    """Of 2 to 200 tokens."""
    rng = np.random.default_rng(0)
    return [zoo.text(int(n), rng) for n in rng.integers(2, 200, COUNT)]


def parts(total, number, rng):
    """A partition of `total` things in a row: which of them begin a part is a shuffle."""
    begins = np.concatenate([[True], rng.permutation(np.arange(total - 1) < number - 1)])
    return np.bincount(np.cumsum(begins) - 1)


def noise_of(length, density, mean, rng):
    """T5's mask."""
    noise = min(max(int(np.round(np.float32(length) * np.float32(density))), 1), length - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean))), 1)
    runs = np.stack([parts(length - noise, spans, rng), parts(noise, spans, rng)], axis=1).ravel()
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def hidden(text, mask):
    """(inputs, targets) of T5 for a mask, token by token."""
    inputs, targets, span = [], [], -1
    for i, token in enumerate(text.tolist()):
        begins = mask[i] and not (i and mask[i - 1])
        span += bool(begins)
        if begins:
            inputs.append(INFO.sentinel_ids[span])
            targets.append(INFO.sentinel_ids[span])
        (targets if mask[i] else inputs).append(token)
    return np.array([*inputs, INFO.eos_id]), np.array([*targets, INFO.eos_id])


def corrupted(objective, texts, seed):
    examples = [objective.corrupt({"targets": t}, INFO, zoo.generator(seed, i)) for i, t in enumerate(texts)]
    return [(example.inputs, example.targets) for example in examples]


def compared(ours, theirs):
    return {name: measured.compare(ours[name], theirs[name], swaps=1000) for name in ours}


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.5, 8.0)])
def test_span_corruption_is_t5s_in_distribution(texts, density, mean):
    objective = SpanCorruption(noise_density=density, mean_span_length=mean)
    rng = np.random.default_rng(1)
    theirs = [hidden(text, noise_of(len(text), density, mean, rng)) for text in texts]
    found = compared(
        measured.spans(corrupted(objective, texts, 1), texts, INFO.sentinels),
        measured.spans(theirs, texts, INFO.sentinels),
    )
    # What follows from a text's length alone is equal; the rest is a matter of sampling.
    assert {name for name, c in found.items() if c.equal} == {"tail", "noise density", "span count"}
    assert all(c.p > LEAST for c in found.values()), found


def test_the_comparison_sees_other_noise(texts):
    """Rolled masks, geometric span lengths and another density are told apart, each by its histogram."""
    objective = SpanCorruption()
    ours = measured.spans(corrupted(objective, texts, 2), texts, INFO.sentinels)
    rng = np.random.default_rng(2)

    def of(draw):
        found = measured.spans([hidden(text, draw(len(text))) for text in texts], texts, INFO.sentinels)
        return {name: c.p for name, c in compared(ours, found).items()}

    rolled = of(lambda n: np.roll(noise_of(n, 0.15, 3.0, rng), rng.integers(n)))
    assert rolled["place of noise"] < LEAST
    assert of(lambda n: noise_of(n, 0.2, 3.0, rng))["noise density"] < LEAST
    assert of(lambda n: noise_of(n, 0.15, 2.0, rng))["noise span lengths"] < LEAST


def test_the_same_mask_gives_the_same_ids(texts):
    from jaxlm.objectives.span_corruption import draw_spans, noise_counts

    for i, text in enumerate(texts[:200]):
        mask = draw_spans(len(text), *noise_counts(len(text), 0.15, 3.0), zoo.generator(3, i))[0]
        ((inputs, targets),) = [hidden(text, mask)]
        example = SpanCorruption().corrupt({"targets": text}, INFO, zoo.generator(3, i))
        np.testing.assert_array_equal(example.inputs, inputs)
        np.testing.assert_array_equal(example.targets, targets)


def test_prefix_splits_are_t5s_in_distribution(texts):
    rng = np.random.default_rng(4)
    cuts = [int(rng.integers(1, len(text))) for text in texts]
    theirs = [(np.append(t[:cut], EOS), np.append(t[cut:], EOS)) for t, cut in zip(texts, cuts)]
    ours = [(np.append(i, EOS), np.append(t, EOS)) for i, t in corrupted(PrefixLM(), texts, 4)]
    (found,) = compared(measured.splits(ours), measured.splits(theirs)).values()
    assert found.p > LEAST
    halves = [(np.append(t[: len(t) // 2], EOS), np.append(t[len(t) // 2 :], EOS)) for t in texts]
    (found,) = compared(measured.splits(ours), measured.splits(halves)).values()
    assert found.p < LEAST


def test_infilling_is_the_papers_in_distribution(texts):
    marks = tuple(zoo.NAMED[f"<fim_{part}>"] for part in ("prefix", "suffix", "middle"))
    documents = [np.append(text, EOS) for text in texts]
    rng = np.random.default_rng(5)
    theirs = [measured.transcribed_fim(document, marks, INFO.eos_id, rng) for document in documents]

    def fills(objective):
        return measured.fills([targets for _, targets in corrupted(objective, documents, 5)], marks)

    theirs = measured.fills(theirs, marks)
    assert all(c.p > LEAST for c in compared(fills(Infilling()), theirs).values())
    assert compared(fills(Infilling(spm_rate=0.7)), theirs)["form"].p < LEAST


def test_ul2_draws_its_denoisers_uniformly(texts):
    ul2 = UL2()
    drawn = [ul2.corrupt({"targets": texts[0]}, INFO, zoo.generator(6, i)).objective for i in range(7000)]
    assert measured.expected(np.bincount(drawn, minlength=7), np.full(7, 1 / 7)) > LEAST
    assert measured.expected(np.array([1150, 1000, 1000, 1000, 1000, 1000, 850]), np.full(7, 1 / 7)) < LEAST
