"""Infilling: a prompt is what training shows before a span, and spans return to their places."""

import types

import numpy as np
import pytest

from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.decoding.infills import fill, span_end
from jaxlm.decoding.requests import Finish
from jaxlm.objectives.codegen2 import CodeGen2

VOCABULARY = ByteVocabulary(named_tokens=("<sep>", "<eom>"))


class Oracle:
    """Answers as a model does that knows the rows: with what follows the prompt in one of them, up to <eom>."""

    vocabulary = VOCABULARY

    def __init__(self, *rows, most=100):
        self.rows, self.most = rows, most

    def generate(self, prompts, *, seed=0, samples=1):
        return [[self._answer(prompt)] for prompt in prompts]

    def _answer(self, prompt):
        (row,) = [row for row in self.rows if row[: len(prompt)] == list(prompt)]
        rest = row[len(prompt) :]
        span = rest[: rest.index(span_end(VOCABULARY))]
        cut = len(span) > self.most
        return types.SimpleNamespace(
            tokens=np.array(span[: self.most], np.int32), finish=Finish.LENGTH if cut else Finish.STOP
        )


def training_row(text, seed):
    """A document as `CodeGen2` shows it, and the visible text as a user writes it."""
    ids = np.append(VOCABULARY.encode(text), 1).astype(np.int32)
    objective = CodeGen2(infill_rate=1.0, noise_density=0.3, mean_span_length=4.0)
    row = objective.corrupt({"targets": ids}, VOCABULARY.info(), np.random.default_rng(seed)).targets.tolist()
    return row, VOCABULARY.decode(row[: row.index(1)])


def test_prompts_are_those_of_training():
    """The oracle only answers where the prompt is a row's beginning, to the token; texts have 2 and 3 gaps."""
    texts = ["a quick brown fox jumps over it", "and a lazy dog sleeps under the old tree"]
    rows, visible = zip(*(training_row(text, seed) for seed, text in enumerate(texts)), strict=True)
    assert [text.count("<extra_id_") for text in visible] == [2, 3]
    answers = fill(Oracle(*rows), visible)
    assert [answer.text for answer in answers] == texts
    assert [len(answer.spans) for answer in answers] == [2, 3]
    assert all(answer.finish is Finish.STOP for answer in answers)


def test_a_span_that_does_not_end_is_said_to_be_cut():
    row, visible = training_row("abcdefgh", 0)
    (answer,) = fill(Oracle(row, most=1), [visible])
    assert answer.finish is Finish.LENGTH and len(answer.spans) == 1 and len(answer.text) == 7


@pytest.mark.parametrize("text", ["no gap at all", "a <extra_id_1> b", "a <extra_id_0> b <extra_id_0>"])
def test_gaps_that_are_not_in_order_are_refused(text):
    with pytest.raises(ValueError, match="must be marked by sentinels in their order, beginning with <extra_id_0>"):
        fill(Oracle(), [text])


def test_a_vocabulary_without_an_end_of_span_is_refused():
    with pytest.raises(ValueError, match="Infilling needs the special token '<eom>'"):
        span_end(ByteVocabulary())
