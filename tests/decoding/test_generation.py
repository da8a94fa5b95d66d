"""Prompts are answered as the configuration says, whichever way tokens are chosen."""

import re

import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.decoding.beam import BeamConfig
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.constraints import RegularExpression
from jaxlm.decoding.drafts import NGramLookup
from jaxlm.decoding.forced import MinNewTokens
from jaxlm.decoding.generation import GenerationConfig, Generator
from jaxlm.decoding.processors import prompts_as_texts
from jaxlm.decoding.requests import Finish
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.decoding.speculative import SpeculativeConfig
from jaxlm.decoding.vocabulary_filters import OnlyCharacters, VocabularyFilter
from jaxlm.layers.cache import CacheConfig
from tests.decoding.test_speculative import make_model

VOCABULARY = ByteVocabulary(extra_ids=0)
PROMPTS = [VOCABULARY.encode("def f").tolist(), VOCABULARY.encode("x = ").tolist()]
SAMPLING = SamplingConfig(12, temperature=1.0)
LETTERS = (VocabularyFilter((OnlyCharacters("abcd"),)), MinNewTokens(10))
SPECULATIVE = SpeculativeConfig(2, lookup=NGramLookup())


@pytest.fixture(scope="module")
def model():
    made = make_model(Architecture.CAUSAL_DECODER, layers=1, vocab_size=264)
    return CachedModel(made, start_id=0, caching=CacheConfig(extension=3))


def generator(model, method=SAMPLING, **options):
    return Generator(model, VOCABULARY, GenerationConfig(method, **options), end_ids=(1,))


def test_processors_hold_in_every_method_and_samples_are_reproducible(model):
    drawn = generator(model, processors=LETTERS)
    found = drawn.generate(PROMPTS, seed=3, samples=2)
    assert [len(answers) for answers in found] == [2, 2]
    for answers in found:
        assert all(set(answer.text) <= set("abcd") for answer in answers)
        assert answers[0].text != answers[1].text
    alone = drawn.generate(PROMPTS[1:], seed=3)[0][0]
    assert alone.tokens.tolist() == found[1][0].tokens.tolist()
    assert len(alone.log_probabilities) == len(alone.tokens) and alone.score is None
    beams = generator(model, BeamConfig(6, width=2, num_return=2), processors=LETTERS).generate(PROMPTS)
    for answers in beams:
        assert answers[0].score >= answers[1].score and answers[0].log_probabilities is None
        assert all(set(answer.text) <= set("abcd") for answer in answers)
    greedy = SamplingConfig(12, temperature=0.0)
    wanted = generator(model, greedy, processors=LETTERS).generate(PROMPTS)
    drafted = generator(model, greedy, processors=LETTERS, speculative=SPECULATIVE).generate(PROMPTS)
    assert [a[0].text for a in drafted] == [a[0].text for a in wanted]
    assert all(a[0].acceptance_length >= 1 for a in drafted) and wanted[0][0].acceptance_length is None


def test_streams_are_the_texts_and_stop_strings_cut_them(model):
    whole = generator(model, processors=LETTERS).generate(PROMPTS)
    stop = whole[0][0].text[3:5]
    cut = generator(model, processors=LETTERS, stop=(stop,), steps=4)
    found = cut.generate(PROMPTS)
    for (answer,), (uncut,) in zip(found, whole, strict=True):
        assert answer.text == uncut.text.split(stop)[0]
        assert answer.finish is (Finish.STOP if stop in uncut.text else uncut.finish)
    assert found[0][0].finish is Finish.STOP
    assert found[0][0].tokens.tolist() == VOCABULARY.encode(found[0][0].text + stop).tolist()
    parts, ends = {0: "", 1: ""}, {}
    for i, text, answer in cut.stream(PROMPTS):
        parts[i] += text
        if answer is not None:
            ends[i] = answer
    assert [parts[i] for i in (0, 1)] == [answers[0].text for answers in found]
    assert [ends[i].text for i in (0, 1)] == [parts[0], parts[1]]
    drafted = generator(model, processors=LETTERS, stop=("b", "d"), speculative=SPECULATIVE).generate(PROMPTS)
    for (answer,) in drafted:
        assert not set(answer.text) & set("bd") and answer.finish is Finish.STOP


def test_streams_may_be_left_and_taken_in_turn(model):
    """One that is left gives its slots back; of several, and of `generate` meanwhile, each gets what is its own."""
    short = generator(model, processors=LETTERS, steps=2, slots=2)
    wanted = [answers[0].text for answers in short.generate(PROMPTS)]
    for _ in short.stream(PROMPTS):
        break
    assert "".join(text for _, text, _ in short.stream(PROMPTS[:1])) == wanted[0]
    first, second = (short.stream([prompt]) for prompt in PROMPTS)
    texts = [next(first)[1], next(second)[1], ""]
    assert [answers[0].text for answers in short.generate(PROMPTS[::-1])] == wanted[::-1]
    for one, other in zip(first, second, strict=False):
        texts[0] += one[1]
        texts[1] += other[1]
    texts[0] += "".join(text for _, text, _ in first)
    texts[1] += "".join(text for _, text, _ in second)
    assert texts[:2] == wanted


def test_a_constraint_gives_each_answer_its_form(model):
    pytest.importorskip("llguidance", reason="the extra `constraints` is not installed")
    pattern = r"[a-f]{2}-[0-9]{3}"
    found = generator(model, constraint=RegularExpression(pattern)).generate(PROMPTS, samples=2)
    for answers in found:
        for answer in answers:
            assert re.fullmatch(pattern, answer.text) and answer.finish in (Finish.COMPLETE, Finish.STOP)
    assert len({answer.text for answers in found for answer in answers}) > 1
    with pytest.raises(ValueError, match="cannot be satisfied in max_new_tokens=12"):
        generator(model, constraint=RegularExpression("abcdefghijklm")).generate(PROMPTS)


def test_what_does_not_go_together_is_refused(model):
    for options, message in (
        ({"method": BeamConfig(), "stop": ("a",)}, "stop goes with sampling, and method is a beam search"),
        ({"method": BeamConfig(), "speculative": SPECULATIVE}, "speculative goes with sampling"),
        ({"method": SAMPLING, "stop": ("",)}, "an empty string"),
        ({"method": SAMPLING, "slots": 0}, "slots is 0"),
        (
            {"method": SAMPLING, "speculative": SPECULATIVE, "constraint": RegularExpression("a")},
            "speculative decoding does not take; drop one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationConfig(**options)
    with pytest.raises(ValueError, match="can be streamed; use generate"):
        next(generator(model, BeamConfig()).stream(PROMPTS))


def test_files_choose_the_method(model):
    flags = ["--gin_file=gin_configs/decoding/lipogram.gin", "--gin.sampling.SamplingConfig.max_new_tokens=6"]
    config = resolve("@jaxlm.decoding.generation.GenerationConfig()", flags)
    found = Generator(model, VOCABULARY, config, end_ids=(1,)).generate(PROMPTS)
    assert not any(set(answers[0].text) & set("eE\ufffd") for answers in found)
    assert all(len(answers[0].tokens) <= 6 for answers in found)


def test_prompts_lie_in_texts():
    texts = prompts_as_texts([[5, 6], [7]], 3, 4)
    np.testing.assert_array_equal(texts.tokens, [[5, 6, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    assert texts.lengths.tolist() == texts.prompt_lengths.tolist() == [2, 1, 0]
