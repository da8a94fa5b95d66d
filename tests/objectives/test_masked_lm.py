"""Masked LM: counts, shares, words, spans and schedules are exact; special ids are never touched."""

import dataclasses

import numpy as np
import objective_zoo as zoo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.objectives.masked_lm import Alike, Count, MaskedLM, Unit, geometric_lengths
from jaxlm.piecewise import Piecewise

FORMS = {
    "token": MaskedLM(),
    "word": MaskedLM(unit=Unit.WORD),
    "token_spans": MaskedLM(span_lengths=geometric_lengths()),
    "whole_spans": MaskedLM(span_lengths=geometric_lengths(), alike=Alike.SPAN),
    "word_spans": MaskedLM(unit=Unit.WORD, span_lengths=(6 / 11, 3 / 11, 2 / 11)),
    "bernoulli": MaskedLM(count=Count.BERNOULLI),
    "bernoulli_words": MaskedLM(count=Count.BERNOULLI, unit=Unit.WORD),
}


def masked(objective, text, seed=0, step=0):
    return objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(seed), step=step)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rate=st.sampled_from([0.01, 0.15, 0.5, 1.0]),
    length=st.integers(1, 150),
    special=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_counts_and_specials(form, rate, length, special, seed):
    objective = dataclasses.replace(FORMS[form], mask_rate=rate)
    rng = zoo.generator(seed)
    text = zoo.text(length, rng)
    specials = rng.random(length) < special
    text[specials] = rng.choice(zoo.VOCABULARY.special_ids, specials.sum())
    example = masked(objective, text, seed)
    chosen = example.weights > 0
    assert not chosen[specials].any()
    np.testing.assert_array_equal(example.inputs[~chosen], text[~chosen])
    np.testing.assert_array_equal(example.targets, text)
    shown = example.inputs[chosen]
    assert not zoo.VOCABULARY.is_special[shown[shown != zoo.VOCABULARY.mask_id]].any()

    maskable = int((~specials).sum())
    budget = max(round(rate * maskable), 1) if maskable else 0
    if objective.count is Count.EXACT and objective.unit is Unit.TOKEN:
        assert chosen.sum() == budget
    if objective.unit is Unit.WORD:
        starts = specials | np.roll(specials, 1) | zoo.VOCABULARY.word_start[text]
        starts[0] = True
        word = np.cumsum(starts)
        sizes = np.array([(word == w).sum() for w in np.unique(word[~specials])])
        assert all(len(np.unique(chosen[word == w])) == 1 for w in np.unique(word)), "a word was split"
        if objective.count is Count.EXACT and maskable:
            # No unmasked word would still fit; a text whose words all exceed the budget gets one.
            left = budget - chosen.sum()
            hidden = np.array([chosen[word == w].any() for w in np.unique(word[~specials])])
            assert left >= 0 or hidden.sum() == 1
            assert left < 0 or hidden.all() or sizes[~hidden].min() > left


def test_bert_shares():
    """80% mask id, 10% random, 10% unchanged, over 30,000 masked tokens (standard error below 0.25%)."""
    text = zoo.text(200_000, np.random.default_rng(0))
    example = masked(MaskedLM(), text)
    chosen = example.weights > 0
    assert chosen.sum() == 30_000
    shown = example.inputs[chosen]
    kept = (shown == text[chosen]).mean()
    assert abs((shown == zoo.VOCABULARY.mask_id).mean() - 0.8) < 0.01
    assert abs(kept - 0.1 - 0.1 / len(zoo.ORDINARY)) < 0.01
    drawn = shown[(shown != zoo.VOCABULARY.mask_id) & (shown != text[chosen])]
    # Substitutes are uniform over the ids of text: about 4.4 each of 680; the commonest is drawn 16 times at most.
    assert set(drawn) <= set(zoo.ORDINARY.tolist()) and np.bincount(drawn).max() <= 16


def test_masks_cover_all_positions_evenly():
    text = zoo.text(40, np.random.default_rng(0))
    for form in ("token", "bernoulli"):
        hits = sum(masked(FORMS[form], text, seed).weights for seed in range(2000))
        # 0.15 * 2000 = 300 +- 16 (one standard deviation) at each of 40 positions.
        assert abs(hits - 300).max() < 64, form


def test_bernoulli_counts_vary_around_the_rate():
    counts = [masked(FORMS["bernoulli"], zoo.text(400, zoo.generator(s)), s).weights.sum() for s in range(200)]
    assert abs(np.mean(counts) - 60) < 3 and 5 < np.std(counts) < 9.5  # binomial: sd 7.1


def test_span_lengths():
    """SpanBERT: spans have 3.8 tokens on average where they do not meet (a rate of 2%)."""
    assert sum(n * p for n, p in enumerate(geometric_lengths(), 1)) == pytest.approx(3.797, abs=1e-3)
    objective = MaskedLM(mask_rate=0.02, span_lengths=geometric_lengths())
    runs = []
    for seed in range(60):
        weights = masked(objective, zoo.text(1000, zoo.generator(seed)), seed).weights
        runs.append(np.diff(weights, prepend=0).clip(0).sum())
    assert 20 / np.mean(runs) == pytest.approx(3.6, abs=0.35)  # the last span of each text is cut to the budget


def spans_of(objective, text, seed):
    """Start and end of each chosen span in an example, and the example; spans that meet are told apart by the draw."""
    numbers = objective.draw_spans(text, zoo.VOCABULARY, zoo.generator(seed), 0)
    found = [np.flatnonzero(numbers == k) for k in range(1, numbers.max() + 1)]
    assert all(len(span) and span[-1] - span[0] == len(span) - 1 for span in found)
    return [(span[0], span[-1] + 1) for span in found], masked(objective, text, seed)


@pytest.mark.parametrize("unit", Unit)
def test_spans_are_shown_as_one(unit):
    """SpanBERT: a span is all mask id, all random ids or all as it was, in shares 80/10/10 over the spans."""
    objective = MaskedLM(unit=unit, span_lengths=geometric_lengths(), alike=Alike.SPAN)
    roles = []
    for seed in range(60):
        text = zoo.text(2000, zoo.generator(seed))
        spans, example = spans_of(objective, text, seed)
        np.testing.assert_array_equal(
            np.flatnonzero(example.weights), np.concatenate([np.arange(*span) for span in sorted(spans)])
        )
        for start, end in spans:
            shown = example.inputs[start:end]
            is_mask, kept = shown == zoo.VOCABULARY.mask_id, shown == text[start:end]
            # A random id is the original once in 680 draws, hence now and then one of a span.
            roles.append("mask" if is_mask.all() else "kept" if kept.all() else "random")
            assert is_mask.all() or not is_mask.any() and (kept.all() or kept.sum() <= 1)
    assert len(roles) > 3000
    shares = [roles.count(role) / len(roles) for role in ("mask", "random", "kept")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.025)  # standard error 0.7% at most


def test_spans_drawn_by_token_differ_inside():
    """Without that setting each token of a span has a role of its own, as in BERT."""
    spans, example = spans_of(FORMS["token_spans"], zoo.text(4000, zoo.generator(0)), 0)
    is_mask = [example.inputs[start:end] == zoo.VOCABULARY.mask_id for start, end in spans if end - start > 3]
    assert sum(0 < shown.sum() < len(shown) for shown in is_mask) > 0.4 * len(is_mask)


def test_spans_of_one_unit_are_words_or_tokens():
    """Of what is masked one by one, a word is shown alike, and a token on its own as in BERT."""
    text = zoo.text(500, zoo.generator(1))
    for count in Count:
        for unit in Unit:
            objective = MaskedLM(unit=unit, count=count, alike=Alike.SPAN)
            spans, example = spans_of(objective, text, 1)
            for start, end in spans:
                is_mask = example.inputs[start:end] == zoo.VOCABULARY.mask_id
                assert is_mask.all() or not is_mask.any()
            if unit is Unit.TOKEN:
                assert all(end - start == 1 for start, end in spans)


def test_all_masks_for_forty_percent():
    example = masked(MaskedLM(mask_rate=0.4, mask_share=1.0, random_share=0.0), zoo.text(100, zoo.generator(0)))
    assert (example.inputs == zoo.VOCABULARY.mask_id).sum() == example.weights.sum() == 40


def test_schedule():
    objective = MaskedLM(mask_rate=Piecewise(steps=(0, 100), values=(0.3, 0.1)))
    text = zoo.text(100, zoo.generator(0))
    assert [masked(objective, text, step=step).weights.sum() for step in (0, 50, 1000)] == [30, 20, 10]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mask_rate": 0.0}, "mask_rate"),
        ({"mask_rate": Piecewise((0, 1), (0.1, 1.5))}, "mask_rate"),
        ({"mask_share": 0.8, "random_share": 0.3}, "shares"),
        ({"span_lengths": (0.5,)}, "sum to 1"),
        ({"count": Count.BERNOULLI, "span_lengths": (0.5, 0.5)}, "EXACT"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        MaskedLM(**bad)
