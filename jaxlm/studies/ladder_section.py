"""The ladder of a study's report: the fitted law, the frontier of the best use of FLOPs, and the next run."""

import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from jaxlm.studies.config import Ladder
from jaxlm.studies.jobs import size_of
from jaxlm.studies.ladder import Estimate, Fitted, LossSurface, Points, fit_power_law, fit_surface
from jaxlm.studies.page import figure_of, table
from jaxlm.studies.results import Run
from jaxlm.training.progress import human

_BEYOND = 10.0  # a next run of so many times the largest run's FLOPs, where no budget is given
_LEAST_EXPONENT = 0.01  # an interval that reaches below does not tell the exponent from 0
_ROWS = 6  # of the table of the frontier


def ladder_points(ladder: Ladder, runs: Sequence[Run]) -> dict[str, Points]:
    """{levels of `apart`, in words: points} of the finished runs; a run that cells share is there once."""
    found: dict[str, dict[tuple[str, int], tuple[float, ...]]] = {}
    for run in runs:
        loss = run.last(ladder.metric)
        if run.leg != ladder.leg or loss is None:
            continue
        # Of one that went on from a state, all from step 0.
        size = run.job.size if run.job.parent is None else size_of(run.job.run)
        levels = " · ".join(run.cell[factor] for factor in ladder.apart)
        point = (size.parameters, size.tokens, size.flops, loss)
        found.setdefault(levels, {})[run.job.address, run.seed] = point
    return {levels: Points(*np.array(list(points.values())).T) for levels, points in found.items()}


def ladder_section(ladder: Ladder, runs: Sequence[Run], figures: pathlib.Path) -> str:
    """The section; where runs are too few for a fit, what is missing."""
    head = [
        f"## Ladder: {ladder.metric} after {ladder.leg}",
        "",
        "L(N, D) = E + A / N^alpha + B / D^beta for N parameters and D tokens (arXiv 2203.15556, approach 3). "
        f"Intervals hold 95% of {ladder.resamples} fits to runs drawn with replacement; they know "
        "nothing of what the law itself leaves out, least of all far beyond the runs.",
    ]
    groups = ladder_points(ladder, runs)
    if not groups:
        return "\n".join([*head, "", "No run is finished yet."])
    for levels, points in groups.items():
        title = [f"### {levels}", ""] if levels else []
        try:
            lines = _group(ladder, levels, points, figures)
        except ValueError as error:
            lines = [f"Not fitted: {error}"]
        head += ["", *title, *lines]
    return "\n".join(head)


def _group(ladder: Ladder, levels: str, points: Points, figures: pathlib.Path) -> list[str]:
    fitted = fit_surface(points, resamples=ladder.resamples)
    cost = points.flops_per_parameter_and_token
    largest = float(points.flops.max())
    budget = _BEYOND * largest if ladder.budget is None else ladder.budget
    silent = [
        name
        for name, exponent in (("size", lambda law: law.alpha), ("tokens", lambda law: law.beta))
        if not fitted.estimate(exponent).low > _LEAST_EXPONENT
    ]
    picture = re.sub(r"\W+", "_", f"{ladder.leg}_ladder_{levels}").strip("_") + ".png"
    _draw(figures / picture, points, fitted.law, None if silent else budget, ladder.metric)
    if silent:
        advice = [
            f"How the loss falls with {' and '.join(silent)} cannot be told from these runs (the exponent may be 0), "
            f"so neither can a best use of FLOPs: run longer, more seeds, or sizes further apart."
        ]
    else:
        advice = [
            _next(fitted, budget, budget / largest, cost),
            "",
            *_budgets(fitted, np.geomspace(points.flops.min(), budget, _ROWS), cost),
        ]
    return [
        *_law(fitted, len(points)),
        "",
        *_held_out(points, largest),
        *_frontier(ladder, points),
        "",
        *advice,
        "",
        f"![losses and the fitted law](figures/{picture})",
    ]


def _law(fitted: Fitted[LossSurface], count: int) -> list[str]:
    numbers = {
        "E": lambda law: law.E,
        "A": lambda law: law.A,
        "alpha": lambda law: law.alpha,
        "B": lambda law: law.B,
        "beta": lambda law: law.beta,
        "a of N ~ C^a": lambda law: law.parameters_exponent,
    }
    rows = []
    for name, number in numbers.items():
        found = fitted.estimate(number)
        rows.append((name, f"{found.value:.4g}", _bounds(found)))
    lines = table(("number", "fit", "95% interval"), rows)
    return [*lines, "", f"Over {count} runs the law is off by {fitted.error:.2%} (root mean square)."]


def _held_out(points: Points, largest: float) -> list[str]:
    """How well the law of the other runs says the loss of the largest one."""
    out = points.flops == largest
    try:
        law = fit_surface(points[~out], resamples=2).law
    except ValueError as error:
        return [f"Whether it extrapolates cannot be seen from so few runs. {error}", ""]
    said = float(law(points.parameters[out][0], points.tokens[out][0]))
    seen = float(points.loss[out].mean())
    return [
        f"Fitted without the run of most FLOPs, it says {said:.4f} for that run, where {seen:.4f} was measured "
        f"({said / seen - 1:+.2%}).",
        "",
    ]


def _frontier(ladder: Ladder, points: Points) -> list[str]:
    """A law in FLOPs alone, of the runs that no cheaper one undercuts."""
    best = points.efficient
    try:
        fitted = fit_power_law(best.flops, best.loss, what="runs of the frontier", resamples=ladder.resamples)
    except ValueError:
        return []
    alpha = fitted.estimate(lambda law: law.alpha)
    return [
        f"Of the {len(best)} runs that no cheaper one undercuts: loss = {fitted.law.E:.4g} + {fitted.law.A:.4g} / "
        f"C^{alpha.value:.3f} ({_bounds(alpha)}), off by {fitted.error:.2%}."
    ]


def _next(fitted: Fitted[LossSurface], budget: float, times: float, cost: float) -> str:
    best = fitted.law.optimum(budget, cost)
    loss = fitted.estimate(lambda law: law.optimum(budget, cost).loss)
    return (
        f"**Next.** {human(budget)}FLOPs, {times:.3g} times the largest run's, go best to "
        f"{human(best.parameters).strip()} parameters and {human(best.tokens).strip()} tokens; "
        f"expected loss {best.loss:.4f} ({_bounds(loss)})."
    )


def _budgets(fitted: Fitted[LossSurface], budgets: np.ndarray, cost: float) -> list[str]:
    rows = []
    for budget in budgets.tolist():
        best = fitted.law.optimum(budget, cost)
        sizes = fitted.estimate(lambda law: law.optimum(budget, cost).parameters)  # noqa: B023
        rows.append(
            (
                human(budget).strip(),
                human(best.parameters).strip(),
                "" if math.isnan(sizes.low) else f"{human(sizes.low).strip()} to {human(sizes.high).strip()}",
                human(best.tokens).strip(),
                f"{best.tokens / best.parameters:.3g}",
                f"{best.loss:.4f}",
            )
        )
    return table(("FLOPs", "parameters", "95% interval", "tokens", "tokens a parameter", "loss"), rows)


def _bounds(found: Estimate) -> str:
    return "not bounded" if math.isnan(found.low) else f"{found.low:.4g} to {found.high:.4g}"


def _draw(path: pathlib.Path, points: Points, law: LossSurface, budget: float | None, metric: str) -> None:
    """Left: loss over tokens, a curve a size. Right: loss over FLOPs, and the frontier up to the next run, if known."""
    figure, (by_tokens, by_flops) = figure_of(10.5, 4.4, panels=2)
    for i, size in enumerate(np.unique(points.parameters)):
        of = points[points.parameters == size]
        tokens = np.geomspace(of.tokens.min(), of.tokens.max(), 50)
        colour, label = f"C{i % 10}", f"{human(size).strip()} parameters"
        by_tokens.plot(of.tokens, of.loss, "o", color=colour, label=label)
        by_tokens.plot(tokens, law(size, tokens), color=colour, linewidth=1)
        by_flops.plot(of.flops, of.loss, "o", color=colour, label=label)
    if budget is not None:
        budgets = np.geomspace(points.flops.min(), budget, 50)
        best = [law.optimum(c, points.flops_per_parameter_and_token) for c in budgets]
        by_flops.plot(budgets, [of.loss for of in best], "k--", linewidth=1, label="best use of FLOPs")
        by_flops.plot([budget], [best[-1].loss], "k*", markersize=11, label="next")
    by_tokens.set(xscale="log", yscale="log", xlabel="tokens", ylabel=metric)
    by_flops.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel=metric)
    for axes in (by_tokens, by_flops):
        axes.grid(alpha=0.3, which="both")
    by_flops.legend(fontsize=8)
    figure.savefig(path, dpi=120)
