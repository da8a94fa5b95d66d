"""Claims about a study's runs, put to the test: a difference by seed, with its interval, and what follows from it."""

import dataclasses
import enum
import math
from collections.abc import Sequence

from jaxlm.studies.config import Finding
from jaxlm.studies.page import table
from jaxlm.studies.results import Interval, Run, interval, runs_of


class Verdict(enum.Enum):
    """What a difference says of a claim."""

    HOLDS = "holds"
    OPPOSITE = "the opposite holds"
    UNDECIDED = "not decided"
    ONE_SEED = "one seed"
    NOT_FINITE = "not finite"
    NO_METRIC = "no such metric"
    MISSING = "runs are missing"
    FAILED = "a task failed"


@dataclasses.dataclass(frozen=True)
class Decision:
    """The outcome of a `Finding`.

    Attributes:
      finding: the claim.
      seeds: of which both kinds of runs are there, and were asked.
      difference: `more` less `less`, over these seeds; above 0 the claim is right. None where there is no seed, or a
        run has no such metric.
      failed: seeds that are left out since a task could not be asked.
    """

    finding: Finding
    seeds: tuple[int, ...]
    difference: Interval | None
    failed: tuple[int, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """By whether the interval has 0 in it."""
        if self.difference is None:
            return Verdict.NO_METRIC if self.seeds else Verdict.FAILED if self.failed else Verdict.MISSING
        if not math.isfinite(self.difference.mean):
            return Verdict.NOT_FINITE
        if len(self.seeds) == 1:
            return Verdict.ONE_SEED
        if self.difference.low > 0:
            return Verdict.HOLDS
        return Verdict.OPPOSITE if self.difference.high < 0 else Verdict.UNDECIDED


def decide(finding: Finding, runs: Sequence[Run]) -> Decision:
    """Compares the two kinds of runs seed by seed, which takes out what a seed's data and start do to both."""
    less, more = (runs_of(side, runs) for side in (finding.less, finding.more))
    both = less.keys() & more.keys()
    failed = {seed for seed in both if any(_failed(finding.metric, side[seed]) for side in (less, more))}
    seeds = tuple(sorted(both - failed))
    values = {seed: (_value(finding.metric, more[seed]), _value(finding.metric, less[seed])) for seed in seeds}
    means_of = {_tasks(finding.metric, side[seed]) for side in (less, more) for seed in seeds}
    comparable = len(means_of) == 1 and not any(None in pair for pair in values.values())
    difference = interval([high - low for high, low in values.values()]) if comparable else None
    return Decision(finding, seeds, difference, tuple(sorted(failed)))


def _failed(metric: str, run: Run) -> bool:
    """Whether a task could not be asked that the metric is of."""
    evaluation, *rest = metric.split("/")
    tasks = run.failures.get(evaluation, {})
    return rest[0] in tasks if len(rest) > 1 else bool(tasks)


def _value(metric: str, run: Run) -> float | None:
    evaluation = metric.split("/")[0]
    if evaluation not in run.scores:
        return run.last(metric)
    *task, name = metric.split("/")[1:]
    return run.score(evaluation, name, task[0] if task else None)


def _tasks(metric: str, run: Run) -> tuple[str, ...]:
    """What a mean over an evaluation is of; nothing where a metric is none."""
    parts = metric.split("/")
    return run.tasks_with(*parts) if len(parts) == 2 else ()


def findings_section(found: Sequence[Decision], seeds: int) -> str:
    """Of a report whose study has so many seeds; empty for no claims."""
    if not found:
        return ""
    rows = [
        (
            one.finding.name,
            one.verdict.value,
            "" if one.difference is None else _shown(one.difference),
            f"{len(one.seeds)} of {seeds}",
            one.finding.metric,
        )
        for one in found
    ]
    return "\n".join(
        [
            "## Findings",
            "",
            "A claim holds where the 95% interval of the difference, taken seed by seed, lies above 0. Each is tested "
            f"alone: of {len(rows)} claims with nothing in them, {0.05 * len(rows):.1f} would be decided by chance.",
            "",
            *table(("claim", "verdict", "difference (95% interval)", "seeds", "of"), rows),
        ]
    )


def _shown(difference: Interval) -> str:
    bounds = "" if math.isnan(difference.low) else f" ({difference.low:.4f} to {difference.high:.4f})"
    return f"{difference.mean:.4f}{bounds}"
