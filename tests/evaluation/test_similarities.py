"""Texts that were written beside the right ones: values had by hand, and the sentence for a missing package."""

import sys

import pytest

from jaxlm.data.prompts import Question
from jaxlm.evaluation.measures import Generation, exact_match, f1

MAT = ("the cat sat on the mat", "the cat sat on a mat")


class Writes:
    """A model that writes these texts."""

    def __init__(self, *texts):
        self._texts = texts

    def generate(self, contexts, **options):
        return list(self._texts)


def judged(metric, text, *answers):
    (found,) = Generation(metric, (metric,)).judge(Writes(text), [Question(("?",), answers=answers)])
    return found.metrics[metric][0]


@pytest.mark.parametrize(
    ("text", "answer", "same", "overlap"),
    [
        ("The Beatles.", "beatles", 1.0, 1.0),  # articles and case
        ("An apple a day", "apple day", 1.0, 1.0),
        ("U.S.A.", "USA", 1.0, 1.0),  # punctuation is deleted, not made a space
        ("twenty-one", "twenty one", 0.0, 0.0),
        ("theatre", "atre", 0.0, 0.0),  # "the" inside a word is no article
        ("  two   words ", "two words", 1.0, 1.0),
        ("in the year 1815", "1815", 0.0, 0.5),  # 1 of 3 words, 1 of 1: 2 * 1/3 / (4/3)
        ("b b c", "b c c", 0.0, 2 / 3),  # words count as often as on the other side
        ("the", "a", 1.0, 1.0),  # nothing is left of either
        ("the", "cat", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_are_squads(text, answer, same, overlap):
    """Rajpurkar et al. 2016, arXiv 1606.05250, 6.1."""
    assert exact_match(text, answer) == same and exact_match(answer, text) == same
    assert f1(text, answer) == pytest.approx(overlap) == f1(answer, text)


def test_the_best_right_answer_counts():
    assert judged("f1", "red car", "blue", "a red car", "red") == 1.0
    assert judged("f1", "red car", "blue", "red") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("metric", "text", "answer", "value"),
    [
        # the, cat of three and of four words; stems of "sat" and "sitting" differ.
        ("rouge1", "the cat sat", "the cat was sitting", 4 / 7),
        ("rouge1", "cats running", "cat runs", 1.0),  # stems
        # One pair of words of two and of three.
        ("rouge2", "the cat sat", "the cat was sitting", 2 / 5),
        # The longest common subsequence: a c d of four and of four.
        ("rougeL", "alpha gamma delta beta", "alpha beta gamma delta", 3 / 4),
        ("rouge1", "alpha gamma delta beta", "alpha beta gamma delta", 1.0),
    ],
)
def test_rouge(metric, text, answer, value):
    pytest.importorskip("rouge_score", reason="the evaluation extra is not installed")
    assert judged(metric, text, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("metric", "text", "answer", "value"),
    [
        # 5 of 6 words ("the" once), 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; as long as the answer.
        ("bleu", *MAT, 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("bleu", MAT[0], MAT[0], 100.0),
        # All right, but 4 words for 8: exp(1 - 8 / 4).
        ("bleu", "a b c d", "a b c d e f g h", 100 * 2.718281828459045**-1),
        # 2 of 3 letters, 1 of 2 pairs, no triple; precision and recall are the same.
        ("chrf", "abc", "abd", 100 * (2 / 3 + 1 / 2 + 0) / 3),
        # Recall counts twice: precision 1 and 1, recall 1/2 and 1/3 of "ab" in "abcd" (orders 1 and 2).
        ("chrf", "ab", "abcd", 100 * 5 * (5 / 12) / (4 + 5 / 12)),
    ],
)
def test_bleu_and_chrf(metric, text, answer, value):
    """Of single sentences, out of 100."""
    pytest.importorskip("sacrebleu", reason="the evaluation extra is not installed")
    assert judged(metric, text, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("metric", "package", "module"), [("rougeL", "rouge-score", "rouge_score"), ("chrf", "sacrebleu", "sacrebleu")]
)
def test_a_missing_package_is_said_before_the_model_writes(metric, package, module, monkeypatch):
    for name in [*(n for n in sys.modules if n.startswith(f"{module}.")), module, f"{module}.rouge_scorer"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(ValueError, match=f"The metric {metric} needs the package {package}: python .*evaluation"):
        Generation(metric, (metric,)).judge(object(), [Question(("?",), answers=("x",))])
