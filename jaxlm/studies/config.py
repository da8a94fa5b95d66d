"""A study: factors and their levels, the legs that each cell goes through, seeds and budgets. All of it is data.

A *setting* is a gin file ("gin_configs/models/tiny/causal_decoder.gin") or a binding ("LEARNING_RATE = 3e-3"). A run
has those of the study, then those of its cell's levels, then the leg's. Files are read first, in this order, then the
bindings; where two bind the same name the later one holds.
"""

import dataclasses
import enum
import itertools
import math
import random
from collections.abc import Collection, Iterable, Mapping

Settings = tuple[str, ...]
Cell = Mapping[str, str]
"""{factor: level}."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A factor with numbers for levels.

    Attributes:
      binding: what is bound, e.g. "LEARNING_RATE".
      low, high: both included.
      steps: how many levels a `Grid` gives it.
      log: evenly spaced by ratio instead of difference.
    """

    binding: str
    low: float
    high: float
    steps: int = 5
    log: bool = False

    def __post_init__(self):
        if not self.low < self.high or self.steps < 2 or (self.log and self.low <= 0):
            raise ValueError(
                f"Range of {self.binding} needs low < high, at least 2 steps and, if log, low > 0; got {self.low}, "
                f"{self.high}, {self.steps}."
            )

    def at(self, share: float) -> str:
        """The level at `share` of the way from low to high, 0 to 1, to four digits."""
        if self.log:
            return f"{math.exp(math.log(self.low) + share * math.log(self.high / self.low)):.4g}"
        return f"{self.low + share * (self.high - self.low):.4g}"

    def levels(self) -> tuple[str, ...]:
        """Those of a grid."""
        return tuple(self.at(i / (self.steps - 1)) for i in range(self.steps))


Factor = Mapping[str, Settings] | Range
"""{level: settings}, or a range of numbers."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of levels.

    Attributes:
      exclude: combinations to leave out, e.g. ({'architecture': 'encoder', 'objective': 'full_lm'},); one that names
        some factors leaves out all cells that agree in those. Levels that the study does not have are ignored.
    """

    exclude: tuple[Mapping[str, str], ...] = ()

    def cells(self, factors: Mapping[str, Factor]) -> list[Cell]:
        """All cells, the last factor changing fastest."""
        levels = [f.levels() if isinstance(f, Range) else tuple(f) for f in factors.values()]
        found = [dict(zip(factors, combination)) for combination in itertools.product(*levels)]
        return [cell for cell in found if not any(entry.items() <= cell.items() for entry in self.exclude)]


@dataclasses.dataclass(frozen=True)
class Listed:
    """These combinations.

    Attributes:
      listed: one {factor: level} a cell, with a level for every factor.
    """

    listed: tuple[Mapping[str, str], ...]

    def cells(self, factors: Mapping[str, Factor]) -> list[Cell]:
        """The cells as listed."""
        for cell in self.listed:
            if set(cell) != set(factors):
                raise ValueError(f"Listed has the cell {dict(cell)}, but each needs a level of {sorted(factors)}.")
        return [dict(cell) for cell in self.listed]


class Drawing(enum.Enum):
    """RANDOM: independent draws. SOBOL: scrambled Sobol points, which leave no large gap."""

    RANDOM = "random"
    SOBOL = "sobol"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample of the combinations.

    Attributes:
      count: cells.
      drawing: see `Drawing`.
      seed: of the draws.
    """

    count: int
    drawing: Drawing = Drawing.SOBOL
    seed: int = 0

    def cells(self, factors: Mapping[str, Factor]) -> list[Cell]:
        """The cells in the order they were drawn; one drawn twice is there once."""
        if Drawing(self.drawing) is Drawing.SOBOL:
            from scipy.stats import qmc  # takes a second to import

            sampler = qmc.Sobol(len(factors), rng=self.seed)
            points = sampler.random_base2(max(self.count - 1, 1).bit_length())[: self.count].tolist()
        else:
            rng = random.Random(self.seed)
            points = [[rng.random() for _ in factors] for _ in range(self.count)]

        def level(factor: Factor, share: float) -> str:
            if isinstance(factor, Range):
                return factor.at(share)
            return list(factor)[min(int(share * len(factor)), len(factor) - 1)]

        drawn = [{name: level(f, x) for (name, f), x in zip(factors.items(), point)} for point in points]
        return list({tuple(cell.items()): cell for cell in drawn}.values())


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each run of a leg may spend: exactly one of the three.

    Attributes:
      tokens: positions of rows seen, of all stacks (inputs count as targets do).
      flops: by `jaxlm.models.accounting`, forward and backward.
      steps: training steps.
    """

    tokens: float | None = None
    flops: float | None = None
    steps: int | None = None

    def __post_init__(self):
        given = [value for value in (self.tokens, self.flops, self.steps) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError(f"Budget needs one of tokens, flops and steps, above 0; got {self}.")


@dataclasses.dataclass(frozen=True)
class Tune:
    """A number chosen for each cell by runs of its own, with the first seed, before the leg's runs.

    Attributes:
      binding: what is tried, e.g. "LEARNING_RATE".
      values: the same for every cell; a single one is bound without trials.
      metric: of the last evaluation; the lowest wins.
      settings: of the trials alone, after all others (fewer steps, say).
      budget: of a trial; None is the leg's.
    """

    binding: str
    values: tuple[float, ...]
    metric: str = "validation/cross_entropy"
    settings: Settings = ()
    budget: Budget | None = None

    def __post_init__(self):
        if not self.values:
            raise ValueError(f"Tune.values of {self.binding} are empty; give the values to be tried, or a single one.")


class Start(enum.Enum):
    """What a leg takes from the one before.

    PARAMETERS: begins at step 0 with its parameters (`WarmStart`).
    STATE: goes on with its whole state, counting its steps (`Branch`).
    """

    PARAMETERS = "parameters"
    STATE = "state"


@dataclasses.dataclass(frozen=True)
class Leg:
    """One stage that cells go through, a run of its own for every seed.

    Cells that agree in all that a leg depends on share its runs: runs are known by their resolved configuration.

    Attributes:
      name: short, without spaces.
      settings: after those of the levels.
      factors: factors whose levels' settings it has, in this order; None has those of all.
      after: the leg it starts from; None starts afresh.
      start: what it takes from there.
      step: of that leg's checkpoint; None is its last. {factor: {level: step}} where it depends on the cell: several
        branches of one trunk.
      beside: {binding: leg}, names that are bound to the folder of another leg's run of the same cell and seed, say
        {"TEACHER": "pretrain"}. In cells that skip that leg they are not bound.
      only: {factor: levels} that go through it; others skip it, and what comes after starts from the leg before it.
      budget: None leaves TRAIN_STEPS to the settings.
      tune: chooses a number for each cell; None binds nothing.
      evaluations: {name: settings of a `jaxlm.evaluation.suite.EvaluationConfig`}, which each run's model is asked when
        it is trained (not those of trials), e.g. {'zero-shot': ('gin_configs/evaluation/zero_shot.gin', ...)}.
    """

    name: str
    settings: Settings = ()
    factors: tuple[str, ...] | None = None
    after: str | None = None
    start: Start = Start.PARAMETERS
    step: int | Mapping[str, Mapping[str, int]] | None = None
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    budget: Budget | None = None
    tune: Tune | None = None
    evaluations: Mapping[str, Settings] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "start", Start(self.start))
        if self.after is None and (self.step is not None or self.start is Start.STATE):
            raise ValueError(f"Leg {self.name!r} starts from no other leg; give `after`, or neither step nor start.")

    def step_of(self, cell: Cell) -> int | None:
        """The step of the other leg's checkpoint that a cell starts from.

        Raises:
          ValueError: the cell's levels have none.
        """
        if not isinstance(self.step, Mapping):
            return self.step
        found = [steps[cell[factor]] for factor, steps in self.step.items() if cell[factor] in steps]
        if len(found) != 1:
            raise ValueError(
                f"Leg {self.name!r} has {len(found)} steps to start from for the cell {dict(cell)}; give one."
            )
        return found[0]

    def takes(self, cell: Cell) -> bool:
        """Whether a cell goes through it."""
        return all(cell[factor] in levels for factor, levels in self.only.items())


@dataclasses.dataclass(frozen=True)
class Together:
    """Settings of a combination of levels, for what neither of them wants alone.

    Attributes:
      when: {factor: level}; it holds for the cells that agree in all of these, in legs that have all of the factors.
      settings: after those of the levels.
    """

    when: Mapping[str, str]
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Match:
    """How many tokens one kind of run needs to reach the loss of another: T_scratch / T_adapted at equal loss.

    Attributes:
      name: in the report.
      adapted: {"leg": name, factor: level, ...} of the runs whose tokens are counted.
      scratch: the same, of the runs whose last loss is to be reached.
      metric: falls with training.
    """

    name: str
    adapted: Mapping[str, str]
    scratch: Mapping[str, str]
    metric: str = "validation/cross_entropy"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about two kinds of runs, put to the test: those of `less` have less of a metric than those of `more`.

    Attributes:
      name: the claim in words.
      less, more: {"leg": name, factor: level, ...}, as of `Match`.
      metric: of the last evaluation while training, or "evaluation/metric" or "evaluation/task/metric" with the name
        of one of `Leg.evaluations`: the mean over its tasks, or one task's.
    """

    name: str
    less: Mapping[str, str]
    more: Mapping[str, str]
    metric: str = "validation/cross_entropy"


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Fits a scaling law to the runs of a leg, over their sizes and tokens, and says what to train next.

    See `jaxlm.studies.ladder` for the law and its source.

    Attributes:
      leg: whose runs are fitted. One that goes on from another's state counts what came before.
      budget: FLOPs of the run to plan; None is ten times the largest run's.
      apart: factors whose levels have a fit of their own, say ('objective',).
      metric: of the last evaluation.
      resamples: of the bootstrap over runs.
    """

    leg: str
    budget: float | None = None
    apart: tuple[str, ...] = ()
    metric: str = "validation/cross_entropy"
    resamples: int = 200

    def __post_init__(self):
        if (self.budget is not None and self.budget <= 0) or self.resamples < 2:
            raise ValueError(
                f"Ladder needs a budget above 0 and at least 2 resamples; got {self.budget}, {self.resamples}."
            )


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A study, from an empty folder to its report.

    What names a level that its factor does not have is ignored, so that factors can be narrowed alone: an exclusion, a
    combination, a leg's level, a match or finding of such runs. `left_out` says what is. Other factors than the
    study's are errors.

    Attributes:
      study_dir: its folder.
      settings: of every run.
      factors: by name, see `Factor`; the order is that of the report.
      legs: in an order in which each comes after the one it starts from.
      design: which combinations are run.
      together: settings of some combinations.
      seeds: one run each: a seed is both the run's (`RunConfig.seed`) and the data's (`DataConfig.seed`).
      measures: metrics of the last evaluation while training that the report compares; lower is better.
      incomparable: factors whose levels change what the measures mean, such as the vocabulary, so that runs are
        compared within a level alone by the legs that have their settings. Runs whose losses are of different
        objectives never compare.
      matches: comparisons of learning curves by tokens.
      findings: claims that the report says to hold, not to hold, or not to be decided.
      ladder: a scaling law over the runs' sizes and tokens; None fits none.
    """

    study_dir: str
    settings: Settings
    factors: Mapping[str, Factor]
    legs: tuple[Leg, ...]
    design: Grid | Listed | Sample
    together: tuple[Together, ...] = ()
    seeds: tuple[int, ...] = (0,)
    measures: tuple[str, ...] = ("validation/cross_entropy",)
    incomparable: tuple[str, ...] = ()
    matches: tuple[Match, ...] = ()
    findings: tuple[Finding, ...] = ()
    ladder: Ladder | None = None

    def __post_init__(self):
        names = [leg.name for leg in self.legs]
        if not names or len(set(names)) < len(names) or not self.seeds:
            raise ValueError(f"A study needs legs with names of their own, and seeds; got {names}, {self.seeds}.")
        for i, leg in enumerate(self.legs):
            if leg.after is not None and leg.after not in names[:i]:
                raise ValueError(f"Leg {leg.name!r} starts from {leg.after!r}, which is no leg before it in {names}.")
            for binding, other in leg.beside.items():
                if other not in names[:i]:
                    raise ValueError(
                        f"Leg {leg.name!r} binds {binding} to {other!r}, which is no leg before it in {names}."
                    )
            for factor in leg.factors or ():
                self._check_factor(factor, f"Leg {leg.name!r}")
            steps = leg.step if isinstance(leg.step, Mapping) else {}
            for factor in (*leg.only, *steps):
                self._check_factor(factor, f"Leg {leg.name!r}")
        for factor in (factor for entry in self.together for factor in entry.when):
            self._check_factor(factor, "Together.when")
        for factor in (factor for entry in self._excluded for factor in entry):
            self._check_factor(factor, "Grid.exclude")
        for factor in self.incomparable:
            self._check_factor(factor, "StudyConfig.incomparable")
        for match in self.matches:
            self._check_sides(f"Match {match.name!r}", match.adapted, match.scratch)
        for finding in self.findings:
            self._check_sides(f"Finding {finding.name!r}", finding.less, finding.more)
        if self.ladder is not None:
            self._check_ladder(self.ladder)
        for cell in self.cells:
            for factor, level in cell.items():
                known = self.factors[factor]
                if not isinstance(known, Range) and level not in known:
                    raise ValueError(f"The design names the level {level!r} of {factor!r}, which has {list(known)}.")
        if not self.cells:
            raise ValueError("The study has no cell: its design leaves out every combination of levels.")

    def _check_sides(self, who: str, *sides: Mapping[str, str]) -> None:
        names = [leg.name for leg in self.legs]
        for side in sides:
            if side.get("leg") not in names:
                raise ValueError(f"{who} needs a 'leg' among {names}, not {side.get('leg')!r}.")
            for factor in _levels(side):
                self._check_factor(factor, who)
            ways = self._ways(side)
            if len(ways) > 1:
                free = [factor for factor in self.factors if len({cell[factor] for cell in ways.values()}) > 1]
                raise ValueError(
                    f"{who} compares one kind of runs with another, but {dict(side)} are the runs of {len(ways)} "
                    f"cells; name a level of {' and of '.join(map(repr, free))}."
                )

    def has_runs_of(self, *sides: Mapping[str, str]) -> bool:
        """Whether cells of the study go through all these: sides of a `Match` or `Finding`."""
        return all(map(self._ways, sides))

    def _ways(self, side: Mapping[str, str]) -> dict[tuple, Cell]:
        """{way: a cell that goes it} of the cells that a side describes."""
        fitting = [cell for cell in self.cells if _levels(side).items() <= cell.items()]
        return {way: cell for cell in fitting if (way := self._way_to(cell, side["leg"])) is not None}

    def _way_to(self, cell: Cell, leg: str) -> tuple | None:
        """The settings of all legs that a cell goes through to a leg; None where it does not."""
        taken = {of.name: of for of in self.legs_of(cell)}
        if leg not in taken:
            return None
        way, name = [], leg
        while name is not None:
            way.append((name, taken[name].step, self.settings_of(cell, taken[name])))
            name = taken[name].after
        return tuple(way)

    def _check_ladder(self, ladder: Ladder) -> None:
        legs = {leg.name: leg for leg in self.legs}
        if ladder.leg not in legs:
            raise ValueError(f"Ladder.leg is {ladder.leg!r}, which is none of the study's legs {list(legs)}.")
        if legs[ladder.leg].after is not None and legs[ladder.leg].start is Start.PARAMETERS:
            raise ValueError(
                f"Ladder.leg {ladder.leg!r} starts from another leg's parameters, so that its own tokens do not "
                f"tell its loss; name a leg that starts afresh or goes on from a state."
            )
        for factor in ladder.apart:
            self._check_factor(factor, "Ladder.apart")

    def _check_factor(self, factor: str, who: str) -> None:
        if factor not in self.factors:
            raise ValueError(f"{who} names the factor {factor!r}; the study has {list(self.factors)}.")

    def _unknown(self, *named: Mapping[str, Iterable[str]]) -> str:
        """Of {factor: levels}, those that the factor does not have, in words."""
        found = []
        for factor, levels in (item for each in named for item in each.items()):
            known = self._levels_of(factor)
            found += [f"{factor} {level!r}" for level in levels if level not in known]
        return ", ".join(dict.fromkeys(found))

    def _levels_of(self, factor: str) -> Collection[str]:
        known = self.factors[factor]
        if not isinstance(known, Range):
            return known
        return known.levels() if isinstance(self.design, Grid) else {cell[factor] for cell in self.cells}

    @property
    def _excluded(self) -> tuple[Mapping[str, str], ...]:
        return self.design.exclude if isinstance(self.design, Grid) else ()

    @property
    def left_out(self) -> str:
        """What is ignored because the study lacks the levels that it names, or has no such runs; "" if nothing is."""
        named: list[tuple[str, list[Mapping[str, Iterable[str]]]]] = []
        for leg in self.legs:
            named.append((f"leg {leg.name!r}", [leg.only, *([leg.step] if isinstance(leg.step, Mapping) else [])]))
        combinations = [("Together.when", entry.when) for entry in self.together]
        combinations += [("Grid.exclude", entry) for entry in self._excluded]
        named += [(who, [{factor: (level,) for factor, level in when.items()}]) for who, when in combinations]
        found = [f"{who} ({unknown})" for who, levels in named if (unknown := self._unknown(*levels))]
        claims = [(f"match {match.name!r}", match.adapted, match.scratch) for match in self.matches]
        claims += [(f"finding {finding.name!r}", finding.less, finding.more) for finding in self.findings]
        for who, *sides in claims:
            if not self.has_runs_of(*sides):
                levels = [{factor: (level,) for factor, level in _levels(side).items()} for side in sides]
                found.append(f"{who} ({self._unknown(*levels) or 'no cell has such runs'})")
        return f"Left out, as the study has no such levels or runs: {'; '.join(found)}." if found else ""

    @property
    def cells(self) -> list[Cell]:
        """The combinations that are run."""
        return self.design.cells(self.factors)

    def legs_of(self, cell: Cell) -> tuple[Leg, ...]:
        """The legs that a cell goes through, each `after` the one that it really starts from."""
        by_name = {leg.name: leg for leg in self.legs}

        def taken_before(leg: Leg) -> str | None:
            name = leg.after
            while name is not None and not by_name[name].takes(cell):
                name = by_name[name].after
            return name

        return tuple(_starting(leg, taken_before(leg), cell) for leg in self.legs if leg.takes(cell))

    def settings_of(self, cell: Cell, leg: Leg) -> Settings:
        """The settings of a cell's run of a leg, in order."""
        found = list(self.settings)
        names = tuple(self.factors) if leg.factors is None else leg.factors
        for name in names:
            factor, level = self.factors[name], cell[name]
            found += [f"{factor.binding} = {level}"] if isinstance(factor, Range) else factor[level]
        for entry in self.together:
            if set(entry.when) <= set(names) and entry.when.items() <= cell.items():
                found += entry.settings
        return (*found, *leg.settings)


def _levels(side: Mapping[str, str]) -> Cell:
    """Those of a side of a `Match` or `Finding`."""
    return {factor: level for factor, level in side.items() if factor != "leg"}


def _starting(leg: Leg, name: str | None, cell: Cell) -> Leg:
    """A leg of a cell that starts from `name`; from nothing it starts afresh."""
    if name is None:
        return dataclasses.replace(leg, after=None, step=None, start=Start.PARAMETERS)
    return dataclasses.replace(leg, after=name, step=leg.step_of(cell))
