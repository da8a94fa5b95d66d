"""Every legal pair of architecture and objective overfits a packed batch to its irreducible entropy + 0.01 nats.

Four pairs that have most of the machinery between them run always, all with --full.
"""

import pytest

from benchmarks.overfit import FORMS, MARGIN, SLACK, Pair, all_objectives, all_pairs, overfit
from jaxlm.architecture import Architecture
from jaxlm.configuration import resolve

PAIRS = {str(pair): pair for pair in all_pairs()}
ALWAYS = (
    "causal_decoder/multi_token",
    "prefix_decoder/span_corruption",
    "encoder/replaced_token_detection",
    "encoder_decoder/ul2",
)
RECURRENT = ("hybrid", "linear_attention", "mamba", "mamba2")


def test_pairs_are_of_all_objectives():
    """The list makes itself: every objective is in it, in every form, with every architecture it does not refuse."""
    assert {pair.objective_name for pair in PAIRS.values()} == set(all_objectives())
    assert all(name in all_objectives() for forms in FORMS.values() for name in forms)
    assert {pair.architecture for pair in PAIRS.values()} == set(Architecture)
    assert set(ALWAYS) <= set(PAIRS)


def test_a_mixture_of_experts_overfits_with_its_router_losses():
    """Routed token by token, it sees no more than the tokens before."""
    model = resolve("%MODEL", ["--gin_file=gin_configs/models/tiny/mixture_of_experts.gin"])
    found = overfit(Pair(Architecture.CAUSAL_DECODER, "full_lm"), model=model)
    assert found.gap <= MARGIN and found.below <= SLACK, found


@pytest.mark.parametrize(
    "name", [name if name == "hybrid" else pytest.param(name, marks=pytest.mark.full) for name in RECURRENT]
)
def test_recurrent_models_overfit(name):
    """A state that carried anything from one packed text to the next would bring the loss below its entropy."""
    model = resolve("%MODEL", [f"--gin_file=gin_configs/models/tiny/{name}.gin"])
    found = overfit(Pair(Architecture.CAUSAL_DECODER, "full_lm"), model=model)
    assert found.gap <= MARGIN and found.below <= SLACK, found


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in PAIRS]
)
def test_overfits_to_its_irreducible_entropy(name):
    found = overfit(PAIRS[name])
    assert found.gap <= MARGIN, found
    # Below it, it would see what it must not; float32 explains some millionths.
    assert found.below <= SLACK, found
