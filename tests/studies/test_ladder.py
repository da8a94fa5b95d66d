"""Scaling laws: known ones are recovered from synthetic runs, and what cannot be fitted is said."""

import dataclasses

import numpy as np
import pytest

from jaxlm.configuration import resolve
from jaxlm.studies.config import Ladder, Leg, Listed, StudyConfig
from jaxlm.studies.jobs import expand
from jaxlm.studies.ladder import LossSurface, Points, PowerLaw, fit_power_law, fit_surface
from jaxlm.studies.ladder_section import ladder_section
from jaxlm.studies.results import Run
from jaxlm.studies.store import Store
from jaxlm.training.report import Curve

METRIC = "validation/cross_entropy"
CHINCHILLA = LossSurface(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # arXiv 2203.15556, equation 10
SIZES, TOKENS = (1e7, 3e7, 1e8, 3e8), (2e8, 8e8, 3.2e9, 1.28e10)


def ladder(noise=0.0, sizes=SIZES, tokens=TOKENS, law=CHINCHILLA):
    """Runs of every size and number of tokens, their losses off by `noise` of themselves (standard deviation)."""
    N, D = (x.ravel() for x in np.meshgrid(sizes, tokens))
    off = np.exp(noise * np.random.default_rng(3).standard_normal(len(N)))
    return Points(N, D, 6 * N * D, law(N, D) * off)


def test_a_law_without_noise_is_found_exactly():
    found = fit_surface(ladder(), resamples=2).law
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-5), name


def test_with_noise_the_true_numbers_are_within_the_intervals_and_these_are_narrow():
    fitted = fit_surface(ladder(noise=1e-3), resamples=100)
    for name in ("E", "alpha", "beta", "parameters_exponent"):
        found, true = fitted.estimate(lambda law, name=name: getattr(law, name)), getattr(CHINCHILLA, name)
        assert found.low < true < found.high and found.high - found.low < 0.2 * true, (name, found)
    best, true = fitted.estimate(lambda law: law.optimum(1e21).parameters), CHINCHILLA.optimum(1e21).parameters
    assert best.low < true < best.high < 1.5 * best.low
    assert 5e-4 < fitted.error < 1.5e-3  # that of the noise, less the five numbers fitted


def test_one_spoiled_run_hardly_matters():
    points = ladder(noise=1e-4)
    spoiled = points.loss.copy()
    spoiled[5] *= 1.05
    found = fit_surface(Points(points.parameters, points.tokens, points.flops, spoiled), resamples=2).law
    # Least squares of the logarithms would be off by some 4% in either exponent.
    assert found.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.01)
    assert found.beta == pytest.approx(CHINCHILLA.beta, rel=0.01)


def test_the_optimum_is_the_lowest_loss_of_its_budget():
    best = CHINCHILLA.optimum(6e20, 6.0)
    sizes = np.geomspace(best.parameters / 10, best.parameters * 10, 2001)
    losses = CHINCHILLA(sizes, 1e20 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(best.parameters, rel=2e-3)
    assert best.loss == pytest.approx(losses.min()) and best.parameters * best.tokens == pytest.approx(1e20)
    steeper = CHINCHILLA.optimum(6e22).parameters / best.parameters
    assert steeper == pytest.approx(100**CHINCHILLA.parameters_exponent)


def test_a_power_law_in_one_variable_is_found():
    law, x = PowerLaw(E=1.2, A=30.0, alpha=0.2), np.geomspace(1e12, 1e18, 8)
    fitted = fit_power_law(x, law(x), resamples=20)
    assert (fitted.law.E, fitted.law.alpha) == pytest.approx((1.2, 0.2), rel=1e-4)


def test_efficient_runs_are_those_that_no_cheaper_one_undercuts():
    points = Points([1, 1, 2, 4, 4], [1, 1, 1, 1, 2], [1, 1, 2, 4, 8], [3.0, 4.0, 3.2, 3.6, 2.0])
    found = points.efficient
    assert found.flops.tolist() == [1, 2, 8] and found.loss.tolist() == [3.5, 3.2, 2.0]  # two seeds are one mean


@pytest.mark.parametrize(
    "points, message",
    [
        (lambda: ladder(sizes=SIZES[:1]), "3 different sizes or more, not at 1"),
        (lambda: ladder(tokens=TOKENS[:2]), "3 different numbers of tokens or more, not at 2"),
        (lambda: ladder()[np.array([0, 5, 10, 15])], "needs 6 runs that differ in sizes or numbers of tokens, not 4"),
        (lambda: Points([1e6], [1e8], [6e14], [np.nan]), "loss must be finite and above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(points, message):
    with pytest.raises(ValueError, match=message):
        fit_surface(points(), resamples=2)


def test_losses_that_do_not_fall_with_size_have_no_best_size():
    flat = LossSurface(E=2.0, A=0.0, alpha=0.5, B=400.0, beta=0.3)
    found = fit_surface(ladder(law=flat), resamples=2).law
    assert found.beta == pytest.approx(0.3, rel=0.05)
    assert found.alpha < 1e-3 or found.A / SIZES[0] ** found.alpha < 1e-3


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped ladder, and runs of it whose losses follow a known law."""
    folder = tmp_path_factory.mktemp("ladder")
    study = resolve(StudyConfig, ["--gin_file=gin_configs/studies/ladder.gin", f"--gin.STUDY_DIR='{folder}'"])
    law = LossSurface(E=1.0, A=30.0, alpha=0.35, B=60.0, beta=0.3)
    runs = []
    for cell, leg, job in expand(study, Store(folder)).of_cells:
        loss = law(job.size.parameters, job.size.tokens)
        curves = {METRIC: Curve(np.array([job.size.steps]), np.array([loss]))}
        runs.append(Run(cell, leg.name, job, 0, curves))
    return study, runs, law


def test_the_report_has_the_law_the_frontier_and_the_next_run(shipped, tmp_path):
    study, runs, law = shipped
    text = ladder_section(study.ladder, runs, tmp_path)
    assert "| alpha | 0.35 |" in text and "| beta | 0.3 |" in text and "16 runs" in text
    cost = max((run.job.size for run in runs), key=lambda size: size.flops)
    factor = cost.flops / cost.parameters / cost.tokens
    best = law.optimum(10 * cost.flops, factor)
    assert f"expected loss {best.loss:.4f}" in text and "10 times the largest run's" in text
    assert "Fitted without the run of most FLOPs" in text and "+0.00%" in text.replace("-0.00%", "+0.00%")
    assert (tmp_path / "pretrain_ladder.png").stat().st_size > 5000


def test_losses_that_size_does_not_change_give_no_next_size(shipped, tmp_path):
    study, runs, _ = shipped
    law = LossSurface(E=1.0, A=1e-9, alpha=0.3, B=60.0, beta=0.3)
    runs = [
        dataclasses.replace(run, curves={METRIC: Curve(np.array([1]), np.array([law(1.0, run.job.size.tokens)]))})
        for run in runs
    ]
    text = ladder_section(study.ladder, runs, tmp_path)
    assert "How the loss falls with size cannot be told from these runs" in text and "**Next.**" not in text


def test_fits_of_their_own_and_too_few_runs(shipped, tmp_path):
    study, runs, _ = shipped
    text = ladder_section(Ladder("pretrain", apart=("size",)), runs, tmp_path)
    assert text.count("Not fitted: A fit needs runs at 3 different sizes or more, not at 1") == 4 and "### 107k" in text
    assert "No run is finished yet." in ladder_section(study.ladder, [], tmp_path)


def test_a_ladder_names_a_leg_and_factors_of_its_study():
    def study(ladder, *legs):
        cells = Listed(({"size": "s"},))
        return StudyConfig("folder", (), {"size": {"s": ()}}, legs or (Leg("pretrain"),), cells, ladder=ladder)

    with pytest.raises(ValueError, match="Ladder.leg is 'train', which is none"):
        study(Ladder("train"))
    with pytest.raises(ValueError, match="Ladder.apart names the factor 'width'"):
        study(Ladder("pretrain", apart=("width",)))
    with pytest.raises(ValueError, match="its own tokens do not tell its loss"):
        study(Ladder("adapt"), Leg("pretrain"), Leg("adapt", after="pretrain"))
    study(Ladder("decay"), Leg("pretrain"), Leg("decay", after="pretrain", start="state", step=3))
