"""Infilling and CodeGen2: layouts, rates, and that nothing crosses a document."""

import numpy as np
import objective_zoo as zoo
import pytest

from jaxlm.objectives.codegen2 import CodeGen2
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.infilling import Infilling
from jaxlm.objectives.mixture import Mixture

PRE, SUF, MID = (zoo.NAMED[f"<fim_{part}>"] for part in ("prefix", "suffix", "middle"))
SEP, EOM, EOS = zoo.NAMED["<sep>"], zoo.NAMED["<eom>"], zoo.VOCABULARY.eos_id
DOCUMENT = np.append(np.arange(30, 40), EOS).astype(np.int32)


def corrupt(objective, text, seed):
    return objective.corrupt({"targets": text}, zoo.VOCABULARY, zoo.generator(seed)).targets


def test_psm_and_spm():
    """PSM: <PRE> p <SUF> s <MID> m <EOT>; SPM: <PRE> <SUF> s <MID> p m <EOT>; cuts anywhere, ends included."""
    cuts = set()
    for seed in range(400):
        psm = corrupt(Infilling(fim_rate=1.0, spm_rate=0.0), DOCUMENT, seed).tolist()
        suf, mid = psm.index(SUF), psm.index(MID)
        p, s, m = psm[1:suf], psm[suf + 1 : mid], psm[mid + 1 : -1]
        assert psm[0] == PRE and psm[-1] == EOS and p + m + s == DOCUMENT[:-1].tolist()
        cuts.add((len(p), len(p + m)))
        spm = corrupt(Infilling(fim_rate=1.0, spm_rate=1.0), DOCUMENT, seed).tolist()
        assert spm[:2] == [PRE, SUF] and spm[-1] == EOS
        mid = spm.index(MID)
        assert spm[mid + 1 : -1] + spm[2:mid] == DOCUMENT[:-1].tolist()
    assert len(cuts) == 66  # all pairs of 11 places


@pytest.mark.parametrize(("fim_rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.25), (0.0, 0.5)])
def test_rates(fim_rate, spm_rate):
    objective = Infilling(fim_rate=fim_rate, spm_rate=spm_rate)
    rows = [corrupt(objective, DOCUMENT, seed) for seed in range(2000)]
    fim = [row for row in rows if row[0] == PRE]
    assert len(fim) / 2000 == pytest.approx(fim_rate, abs=0.04)  # standard error 1.1%
    if fim:
        # An empty prefix makes PSM look like SPM: 11 of 66 pairs of places, the 1 + 10 x 2 likeliest of 121 draws.
        looks = np.mean([row[1] == SUF for row in fim])
        assert looks == pytest.approx(spm_rate + (1 - spm_rate) * 21 / 121, abs=0.05)


@pytest.mark.parametrize("objective", [Infilling(fim_rate=1.0), CodeGen2(infill_rate=1.0, noise_density=0.5)])
def test_nothing_crosses_a_document(objective):
    """Three documents with tokens of their own: each stays a stretch of the row."""
    documents = [np.append(np.arange(lo, lo + 20), EOS) for lo in (100, 200, 300)]
    for seed in range(50):
        row = corrupt(objective, np.concatenate(documents).astype(np.int32), seed)
        owner = row[(row >= 100) & (row < 400)] // 100
        np.testing.assert_array_equal(owner, np.repeat([1, 2, 3], 20))
        assert (row != np.concatenate(documents)[0]).any()


def test_max_documents_bounds_the_growth():
    text = np.tile(DOCUMENT, 10)
    row = corrupt(Infilling(fim_rate=1.0, max_documents=2), text, 0)
    assert (row == PRE).sum() == 2 and len(row) == len(text) + 6


def test_infilling_closes_a_document_that_is_cut_off():
    objective = Infilling(fim_rate=1.0)
    example = objective.corrupt({"targets": DOCUMENT[:-1]}, zoo.VOCABULARY, zoo.generator(0))
    assert example.targets[-1] == EOS
    np.testing.assert_array_equal(objective.restore(example, zoo.VOCABULARY), DOCUMENT)


def test_codegen2_layout():
    """text with <mask_i> <eos> <sep>, then <mask_i> span <eom> for each."""
    objective = CodeGen2(infill_rate=1.0, noise_density=0.4, mean_span_length=2.0)
    seen_ends = set()
    for seed in range(100):
        row = corrupt(objective, DOCUMENT, seed).tolist()
        sep = row.index(SEP)
        visible, spans = row[:sep], row[sep + 1 :]
        masks = zoo.VOCABULARY.sentinel_ids[:2]  # round(10 * 0.4) = 4 tokens in 2 spans
        assert [t for t in visible if t in masks] == list(masks) and visible[-1] == EOS
        assert spans[0] == masks[0] and spans[-1] == EOM and spans.count(EOM) == 2
        assert spans.index(masks[1]) == spans.index(EOM) + 1
        seen_ends |= {visible[0] == masks[0], visible[-2] == masks[1]}
    assert seen_ends == {True, False}  # spans also stand at either end


def test_codegen2_without_an_end_of_document():
    """A document cut off by the row's end is told apart by its missing id, and restored without it."""
    objective = CodeGen2(infill_rate=1.0, noise_density=0.4)
    example = objective.corrupt({"targets": DOCUMENT[:-1]}, zoo.VOCABULARY, zoo.generator(1))
    assert EOS not in example.targets and SEP in example.targets
    np.testing.assert_array_equal(objective.restore(example, zoo.VOCABULARY), DOCUMENT[:-1])


def test_codegen2_rate():
    rows = [corrupt(CodeGen2(), np.tile(DOCUMENT[:-1], 5), seed) for seed in range(2000)]
    assert np.mean([SEP in row for row in rows]) == pytest.approx(0.5, abs=0.04)


def test_rates_of_0_and_1_are_the_pure_objectives():
    """codegen2 (ii): none infilled is language modelling; a mixture's weight of 0 leaves the other's examples."""
    text = np.tile(DOCUMENT, 3)
    always = CodeGen2(infill_rate=1.0, noise_density=0.4)
    for seed in range(20):
        assert corrupt(CodeGen2(infill_rate=0.0), text, seed).tolist() == corrupt(FullLM(), text, seed).tolist()
        for k, pure in enumerate((FullLM(), always)):
            mixture = Mixture((FullLM(), always), weights=tuple(float(i == k) for i in range(2)))
            assert corrupt(mixture, text, seed).tolist() == corrupt(pure, text, seed).tolist()
        assert (corrupt(always, text, seed) == SEP).sum() == 3


def test_bad_settings():
    with pytest.raises(ValueError, match="Infilling.fim_rate"):
        Infilling(fim_rate=1.5)
    with pytest.raises(ValueError, match="max_documents"):
        Infilling(max_documents=0)
    with pytest.raises(ValueError, match="CodeGen2.infill_rate"):
        CodeGen2(noise_density=1.0)
