"""Texts that were written beside the right ones: values had by hand, and the sentence for a missing package."""

import functools
import sys

import numpy as np
import pytest

from jaxlm.data.prompts import Question
from jaxlm.evaluation.intervals import estimate, resampled
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
        ("sentence_bleu", *MAT, 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("sentence_bleu", MAT[0], MAT[0], 100.0),
        # All right, but 4 words for 8: exp(1 - 8 / 4).
        ("sentence_bleu", "a b c d", "a b c d e f g h", 100 * 2.718281828459045**-1),
        # 2 of 3 letters, 1 of 2 pairs, no triple; precision and recall are the same.
        ("chrf", "abc", "abd", 100 * (2 / 3 + 1 / 2 + 0) / 3),
        # Recall counts twice: precision 1 and 1, recall 1/2 and 1/3 of "ab" in "abcd" (orders 1 and 2).
        ("chrf", "ab", "abcd", 100 * 5 * (5 / 12) / (4 + 5 / 12)),
    ],
)
def test_bleu_and_chrf_of_sentences(metric, text, answer, value):
    """Of single sentences, out of 100."""
    pytest.importorskip("sacrebleu", reason="the evaluation extra is not installed")
    assert judged(metric, text, answer) == pytest.approx(value)


# What a model wrote, and the right answers of each text.
WRITTEN = ("the cat sat on the mat", "a b c d", "it rained all day", "no", "")
RIGHT = (
    ("the cat sat on a mat",),
    ("a b c d e f g h", "x b c d e"),
    ("it rained", "all day it rained"),
    ("yes",),
    ("two words",),
)


def counts():
    measure = Generation("corpus_bleu", ("corpus_bleu", "sentence_bleu"))
    questions = [Question(("?",), answers=answers) for answers in RIGHT]
    return measure, [judged.metrics for judged in measure.judge(Writes(*WRITTEN), questions)]


def by_package(rows):
    """Of whole texts; a missing answer is None to sacrebleu."""
    import sacrebleu

    answers = [[(*RIGHT[row], None)[k] for row in rows] for k in range(2)]
    return sacrebleu.corpus_bleu([WRITTEN[row] for row in rows], answers).score


def test_the_bleu_of_a_corpus_is_sacrebleus_and_no_mean_of_sentences():
    pytest.importorskip("sacrebleu", reason="the evaluation extra is not installed")
    measure, found = counts()
    statistics = np.array([row["corpus_bleu"] for row in found]).T
    value = float(measure.value("corpus_bleu", statistics.sum(-1)))
    assert value == pytest.approx(by_package(range(5)), rel=1e-12)
    assert abs(value - np.mean([row["sentence_bleu"][0] for row in found])) > 5
    assert np.isnan(measure.value("corpus_bleu", np.zeros((10, 2)))).all()


def test_a_corpus_metrics_interval_is_that_of_recomputing_it_on_resampled_rows():
    pytest.importorskip("sacrebleu", reason="the evaluation extra is not installed")
    measure, found = counts()
    statistics = np.array([row["corpus_bleu"] for row in found]).T[:, None]  # one prompt
    value = functools.partial(measure.value, "corpus_bleu")
    drawn = resampled(statistics, samples=20, seed=3, value=value)
    counted = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), size=20)
    assert drawn == pytest.approx([by_package(np.repeat(np.arange(5), of)) for of in counted], rel=1e-12)
    said = estimate(statistics, samples=20, seed=3, value=value)
    assert (said.low, said.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))
    assert said.value == pytest.approx(by_package(range(5))) and said.low < said.value < said.high


def test_a_bleu_that_does_not_say_of_what_is_refused():
    with pytest.raises(ValueError, match="write corpus_bleu .* or sentence_bleu"):
        Generation("bleu", ("bleu",))


@pytest.mark.parametrize(
    ("metric", "package", "module"),
    [
        ("rougeL", "rouge-score", "rouge_score"),
        ("chrf", "sacrebleu", "sacrebleu"),
        ("corpus_bleu", "sacrebleu", "sacrebleu"),
    ],
)
def test_a_missing_package_is_said_before_the_model_writes(metric, package, module, monkeypatch):
    for name in [*(n for n in sys.modules if n.startswith(f"{module}.")), module, f"{module}.rouge_scorer"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(ValueError, match=f"The metric {metric} needs the package {package}: python .*evaluation"):
        Generation(metric, (metric,)).judge(object(), [Question(("?",), answers=("x",))])
