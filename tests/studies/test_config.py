"""Cells, legs and settings: what a study's data means."""

import pytest

from jaxlm.studies.config import (
    Budget,
    Finding,
    Grid,
    Leg,
    Listed,
    Match,
    Range,
    Sample,
    Start,
    StudyConfig,
    Together,
    Tune,
)

FACTORS = {
    "architecture": {"causal": ("causal.gin",), "prefix": ("prefix.gin",)},
    "rate": Range("LEARNING_RATE", 1e-4, 1e-2, steps=3, log=True),
}


def study(**fields):
    fields = {"factors": FACTORS, "legs": (Leg("pretrain"),), "design": Grid()} | fields
    return StudyConfig("folder", ("base.gin",), **fields)


def test_a_grid_has_every_combination_but_those_left_out():
    cells = study(design=Grid(({"architecture": "prefix", "rate": "0.0001"},))).cells
    assert [tuple(cell.values()) for cell in cells] == [
        ("causal", "0.0001"),
        ("causal", "0.001"),
        ("causal", "0.01"),
        ("prefix", "0.001"),
        ("prefix", "0.01"),
    ]


@pytest.mark.parametrize("drawing", ["sobol", "random"])
def test_a_sample_is_the_same_each_time_and_covers_its_ranges(drawing):
    cells = study(design=Sample(16, drawing)).cells
    assert cells == study(design=Sample(16, drawing)).cells != study(design=Sample(16, drawing, seed=1)).cells
    rates = sorted(float(cell["rate"]) for cell in cells)
    assert len(cells) == 16 and 1e-4 <= rates[0] < 3e-4 and 3e-3 < rates[-1] <= 1e-2
    if drawing == "sobol":  # of 16 points 8 lie in each half of each axis
        assert sum(cell["architecture"] == "causal" for cell in cells) == 8
        assert sum(rate < 1e-3 for rate in rates) == 8


def test_settings_are_the_studys_then_the_levels_then_the_legs():
    leg = Leg("adapt", ("adapt.gin", "TRAIN_STEPS = 5"), factors=("rate",))
    cell = {"architecture": "causal", "rate": "0.001"}
    assert study().settings_of(cell, leg) == ("base.gin", "LEARNING_RATE = 0.001", "adapt.gin", "TRAIN_STEPS = 5")
    assert study().settings_of(cell, Leg("pretrain")) == ("base.gin", "causal.gin", "LEARNING_RATE = 0.001")


def test_combinations_have_settings_of_their_own():
    both = Together({"architecture": "prefix", "rate": "0.01"}, ("BATCH_SIZE = 4",))
    found = study(together=(both,))
    cell = {"architecture": "prefix", "rate": "0.01"}
    leg = Leg("pretrain", ("last.gin",))
    assert found.settings_of(cell, leg)[-3:] == ("LEARNING_RATE = 0.01", "BATCH_SIZE = 4", "last.gin")
    assert "BATCH_SIZE = 4" not in found.settings_of(cell | {"rate": "0.001"}, leg)
    assert "BATCH_SIZE = 4" not in found.settings_of(cell, Leg("adapt", factors=("rate",)))


def test_cells_branch_off_at_steps_of_their_own():
    steps = {"architecture": {"causal": 10, "prefix": 20}}
    branched = Leg("decay", after="trunk", start="state", step=steps)
    found = study(legs=(Leg("trunk"), branched))
    at = {cell["architecture"]: found.legs_of(cell)[1].step for cell in found.cells}
    assert at == {"causal": 10, "prefix": 20}
    some = study(legs=(Leg("trunk"), Leg("decay", after="trunk", start="state", step={"architecture": {"causal": 10}})))
    with pytest.raises(ValueError, match="'decay' has 0 steps to start from for the cell"):
        [some.legs_of(cell) for cell in some.cells]
    with pytest.raises(ValueError, match="'decay' names the factor 'architectures'"):
        study(legs=(Leg("trunk"), Leg("decay", after="trunk", start="state", step={"architectures": {"none": 10}})))


def test_a_cell_that_skips_a_leg_goes_on_from_the_one_before():
    legs = (
        Leg("pretrain"),
        Leg("adapt", after="pretrain", start="state", step=3, only={"architecture": ("prefix",)}),
        Leg("finetune", after="adapt"),
    )
    found = study(legs=legs)
    causal = found.legs_of({"architecture": "causal", "rate": "0.001"})
    prefix = found.legs_of({"architecture": "prefix", "rate": "0.001"})
    assert [(leg.name, leg.after) for leg in causal] == [("pretrain", None), ("finetune", "pretrain")]
    assert [(leg.name, leg.after) for leg in prefix] == [
        ("pretrain", None),
        ("adapt", "pretrain"),
        ("finetune", "adapt"),
    ]
    assert prefix[1].start is Start.STATE
    # Where there is nothing to start from, it starts afresh.
    first = (Leg("adapt", only={"architecture": ("prefix",)}), Leg("finetune", after="adapt", step=2))
    alone = study(legs=first).legs_of({"architecture": "causal", "rate": "0.001"})
    assert [(leg.after, leg.step) for leg in alone] == [(None, None)]


def test_a_side_of_a_claim_may_be_runs_that_cells_share():
    """And the cells that go through its leg alone are asked."""
    alike = {"kind": {"a": ("x.gin",), "b": ("x.gin",), "c": ("y.gin",)}}
    legs = (Leg("pretrain"), Leg("adapt", ("y.gin",), factors=(), after="pretrain", only={"kind": ("c",)}))
    claim = Finding("f", {"leg": "pretrain", "kind": "a"}, {"leg": "adapt"})
    assert study(factors=alike, legs=legs, findings=(claim,)).findings == (claim,)
    shared = {"kind": {"a": ("x.gin",), "b": ("x.gin",)}}
    both = Finding("f", {"leg": "pretrain"}, {"leg": "pretrain"})
    assert study(factors=shared, legs=legs[:1], findings=(both,)).findings == (both,)
    with pytest.raises(ValueError, match="are the runs of 2 cells; name a level of 'kind'"):
        study(factors=alike, legs=legs, findings=(both,))


def test_what_names_levels_that_were_left_out_is_ignored_and_said():
    """A factor can be narrowed alone; a factor that does not exist is a mistake all the same."""
    legs = (
        Leg("pretrain"),
        Leg("adapt", after="pretrain", factors=(), only={"architecture": ("encoder",)}),
        Leg("decay", after="pretrain", start="state", step={"architecture": {"causal": 1, "prefix": 2, "encoder": 3}}),
    )
    claims = {
        "kept": ({"leg": "pretrain", "rate": "0.01"}, {"leg": "pretrain", "rate": "0.001"}),
        "of a level": ({"leg": "pretrain", "rate": "0.01"}, {"leg": "pretrain", "architecture": "encoder"}),
        "of a leg": ({"leg": "pretrain", "rate": "0.01"}, {"leg": "adapt"}),
    }
    found = study(
        factors=FACTORS | {"architecture": {"causal": ("causal.gin",)}},
        legs=legs,
        design=Grid(({"architecture": "prefix", "rate": "0.0001"},)),
        together=(Together({"architecture": "encoder", "rate": "0.01"}, ("BATCH_SIZE = 4",)),),
        findings=tuple(Finding(name, *sides) for name, sides in claims.items()),
        matches=(Match("m", *claims["of a leg"]),),
    )
    assert [leg.name for leg in found.legs_of(found.cells[0])] == ["pretrain", "decay"] and len(found.cells) == 3
    assert [claim.name for claim in found.findings if found.has_runs_of(claim.less, claim.more)] == ["kept"]
    assert found.left_out == (
        "Left out, as the study has no such levels or runs: leg 'adapt' (architecture 'encoder'); leg 'decay' "
        "(architecture 'prefix', architecture 'encoder'); Together.when (architecture 'encoder'); Grid.exclude "
        "(architecture 'prefix'); match 'm' (no cell has such runs); finding 'of a level' (architecture 'encoder'); "
        "finding 'of a leg' (no cell has such runs)."
    )
    assert study().left_out == ""
    misspelt = study(design=Grid(({"rate": "1e-2"},)), legs=(Leg("t", only={"rate": ("1e-2",)}),))
    assert "leg 't' (rate '1e-2'); Grid.exclude (rate '1e-2')" in misspelt.left_out  # it is '0.01'
    assert study(design=Grid(({"rate": "0.01"},))).left_out == ""


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: study(legs=(Leg("a", after="b"), Leg("b"))), "starts from 'b', which is no leg before it"),
        (lambda: study(legs=(Leg("a", factors=("objective",)),)), "names the factor 'objective'"),
        (lambda: study(legs=(Leg("a", only={"objective": ("full_lm",)}),)), "names the factor 'objective'"),
        (lambda: study(design=Grid(({"archtecture": "causal"},))), "Grid.exclude names the factor 'archtecture'"),
        (lambda: study(design=Grid(({"architecture": "causal"}, {"architecture": "prefix"}))), "has no cell"),
        (lambda: study(design=Listed(({"architecture": "causal"},))), "each needs a level of"),
        (lambda: study(design=Listed(({"architecture": "x", "rate": "1"},))), "The design names the level 'x'"),
        (lambda: study(together=(Together({"archtecture": "x"}, ()),)), "Together.when names the factor 'archtecture'"),
        (lambda: study(matches=(Match("m", {"leg": "b"}, {"leg": "pretrain"}),)), "needs a 'leg' among"),
        (
            lambda: study(findings=(Finding("f", {"leg": "pretrain", "architecture": "causal"}, {"leg": "pretrain"}),)),
            "'architecture': 'causal'} are the runs of 3 cells; name a level of 'rate'",
        ),
        (lambda: Budget(), "one of tokens, flops and steps"),
        (lambda: Budget(tokens=1, steps=1), "one of tokens, flops and steps"),
        (lambda: Tune("X", ()), "Tune.values of X are empty"),
        (lambda: Leg("a", step=3), "starts from no other leg"),
        (lambda: Range("X", 0.0, 1.0, log=True), "low > 0"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
