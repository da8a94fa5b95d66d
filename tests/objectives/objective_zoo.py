"""What the tests of objectives share: vocabularies, every objective, and tiny models."""

import numpy as np

from jaxlm.objectives.base import VocabularyInfo
from jaxlm.objectives.codegen2 import CodeGen2
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.infilling import Infilling
from jaxlm.objectives.masked_lm import Alike, Count, MaskedLM, Unit, geometric_lengths
from jaxlm.objectives.mixture import Mixture
from jaxlm.objectives.multi_token import MultiTokenPrediction
from jaxlm.objectives.prefix_lm import Pairing, PrefixLM
from jaxlm.objectives.replaced_token_detection import Generator, ReplacedTokenDetection
from jaxlm.objectives.span_corruption import SpanCorruption
from jaxlm.objectives.supervised import Supervised
from jaxlm.objectives.ul2 import UL2

SIZE = 1000
NAMED = {"[R]": 10, "[S]": 11, "[X]": 12, "<fim_prefix>": 13, "<fim_suffix>": 14, "<fim_middle>": 15}
NAMED |= {"<sep>": 16, "<eom>": 17}
FIRST_ORDINARY = 20

VOCABULARY = VocabularyInfo(
    size=SIZE,
    unk_id=2,
    mask_id=4,
    sentinel_ids=tuple(range(SIZE - 1, SIZE - 301, -1)),
    named_ids=NAMED | {f"filler_{i}": i for i in (3, *range(5, 10), 18, 19)},
    word_start=np.arange(SIZE) % 3 > 0,  # two of three ids start a word
)
ORDINARY = VOCABULARY.ordinary_ids
assert ORDINARY[0] == FIRST_ORDINARY and len(ORDINARY) == SIZE - 300 - FIRST_ORDINARY

# Every objective that corrupts text, in its main forms.
TEXT_OBJECTIVES = {
    "full_lm": FullLM(),
    "prefix_lm": PrefixLM(),
    "prefix_lm_quarter": PrefixLM(suffix_share=0.25, mode_token="[S]"),
    "prefix_lm_pairs": PrefixLM(pairing=Pairing.COMPLEMENTARY),
    "prefix_lm_mode_pairs": PrefixLM(pairing=Pairing.COMPLEMENTARY, mode_token="[S]"),
    "span_corruption": SpanCorruption(),
    "span_corruption_extreme": SpanCorruption(noise_density=0.5, mean_span_length=1.5, mode_token="[X]"),
    "span_corruption_dense": SpanCorruption(noise_density=0.9, mean_span_length=2.0),
    "masked_lm": MaskedLM(),
    "masked_lm_words": MaskedLM(unit=Unit.WORD),
    "masked_lm_spans": MaskedLM(unit=Unit.WORD, span_lengths=geometric_lengths()),
    "masked_lm_spanbert": MaskedLM(unit=Unit.WORD, span_lengths=geometric_lengths(), alike=Alike.SPAN),
    "masked_lm_bernoulli": MaskedLM(count=Count.BERNOULLI, mask_rate=0.4),
    "ul2": UL2(),
    "infilling": Infilling(),
    "codegen2": CodeGen2(),
    "codegen2_always": CodeGen2(infill_rate=1.0, noise_density=0.5, mean_span_length=1.5),
    "rtd": ReplacedTokenDetection(),
    "rtd_uniform": ReplacedTokenDetection(generator=Generator.UNIFORM, disallow_correct=True),
    "multi_token": MultiTokenPrediction(),
    "mixture": Mixture(members=(FullLM(), PrefixLM(), Infilling()), weights=(1.0, 2.0, 1.0)),
}
OBJECTIVES = TEXT_OBJECTIVES | {"supervised": Supervised()}


def text(length: int, rng: np.random.Generator, documents: float = 0.0) -> np.ndarray:
    """Random ordinary tokens, a share `documents` of them replaced by the end-of-document id."""
    tokens = rng.choice(ORDINARY, length)
    tokens[rng.random(length) < documents] = VOCABULARY.eos_id
    return tokens.astype(np.int32)


def generator(*key: int) -> np.random.Generator:
    """A generator keyed as the loader keys it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
