"""Deduplication: what is alike is found as often as the formulas say, the first stays, and nothing is left to find."""

import numpy as np
import pytest

from jaxlm.data.deduplication import NearDuplicates, exact_key
from jaxlm.data.ngrams import Words

NEAR = NearDuplicates()


def changed(words, count, mark):
    """The words with `count` of them, far from each other, changed."""
    words = list(words)
    for i in range(count):
        words[(2 * i + 1) * len(words) // (2 * count)] = f"{mark}{i}"
    return words


def pairs(ngrams, changes, count=100):
    """Signatures of so many texts, and of the same with words changed, each of which is in five N-grams."""
    texts = [[f"t{t}w{i}" for i in range(ngrams + 4)] for t in range(count)]
    texts += [changed(text, changes, f"t{t}x") for t, text in enumerate(texts)]
    return np.stack([NEAR.signature(Words.of(" ".join(text))) for text in texts])


def test_exact_keys_are_of_the_text_without_case_and_white_space():
    assert exact_key("A café,\n\n too ") == exact_key("a cafe\u0301, TOO")
    assert len({exact_key(text) for text in ("a b", "ab", "a, b", "a b c", "", "\ud83d")}) == 6


def test_a_signature_is_that_of_a_set():
    """Each number is the least over the N-grams: a union has the lesser of two, whatever case and order."""

    def signature(words):
        return NEAR.signature(Words.of(", ".join(words)))

    words = [f"w{i}" for i in range(9000)]  # more N-grams than are hashed at a time
    whole = signature(words)
    assert whole.shape == (256,) and whole.dtype == np.uint32 and len(set(whole.tolist())) == 256
    first, second = signature(words[:5000]), signature([word.upper() for word in words[4996:]])
    np.testing.assert_array_equal(np.minimum(first, second), whole)
    assert (first != second).all()
    assert NEAR.signature(Words.of("four words are few")) is None


@pytest.mark.parametrize(
    ("ngrams", "changes", "similarity", "least", "most"),
    [(360, 8, 0.8, 0.95, 1.0), (350, 10, 0.75, 0.35, 0.65), (340, 12, 0.7, 0.0, 0.12), (360, 24, 0.5, 0.0, 0.0)],
)
def test_pairs_are_found_by_how_alike_they_are(ngrams, changes, similarity, least, most):
    """As often as the class says: nearly all of 0.8, half of 0.75, few of 0.7; what is not found stays."""
    assert (ngrams - 5 * changes) / (ngrams + 5 * changes) == pytest.approx(similarity, abs=1e-3)
    signatures = pairs(ngrams, changes)
    count = len(signatures) // 2
    assert (signatures[:count] == signatures[count:]).mean() == pytest.approx(similarity, abs=0.01)
    firsts = NEAR.firsts(signatures)
    np.testing.assert_array_equal(firsts[:count], np.arange(count))
    found = firsts[count:] == np.arange(count)
    assert least <= found.mean() <= most
    np.testing.assert_array_equal(firsts[count:][~found], np.arange(count, 2 * count)[~found])


def test_of_what_hangs_together_the_first_stays():
    """b is like a, and c like b, but not like a."""
    near = NearDuplicates(bands=2, rows=2, similarity=0.5)
    a, b, c, other = [1, 1, 5, 6], [1, 1, 2, 2], [7, 8, 2, 2], [9, 9, 9, 9]
    assert near.firsts(np.array([other, c, b, a], np.uint32)).tolist() == [0, 1, 1, 1]
    assert near.firsts(np.array([c, a], np.uint32)).tolist() == [0, 1]
    assert near.firsts(np.zeros((0, 4), np.uint32)).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_among_the_first_nothing_more_is_found(seed):
    """Law: a second time nothing goes, also where many texts have a band in common and little else."""
    near = NearDuplicates(bands=4, rows=2, similarity=0.5)
    signatures = np.random.default_rng(seed).integers(0, 12, (400, 8), np.uint32)
    firsts = near.firsts(signatures)
    kept = np.unique(firsts)
    assert 1 < len(kept) < 400 and (firsts <= np.arange(400)).all() and (firsts[kept] == kept).all()
    np.testing.assert_array_equal(near.firsts(signatures[kept]), np.arange(len(kept)))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="NearDuplicates needs n, bands and rows of 1 or more"):
        NearDuplicates(bands=0)
    with pytest.raises(ValueError, match="a similarity above 0 and up to 1"):
        NearDuplicates(similarity=0.0)
