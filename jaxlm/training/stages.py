"""Stages of a run: what changes at which step, as data; and what the optimizer carries from one to the next.

    stages = (
        Stage(steps=10_000, objective=SpanCorruption(), batch_size=128),
        Stage(steps=2_000, objective=PrefixLM(), architecture=Architecture.PREFIX_DECODER),  # the same weights
        Stage(steps=1_000, learning_rate=Linear(1e-4, 0.0), carry=Carry.RESET),
    )

A field that is None keeps what the stage before had, or the run's own setting. A stage's learning rate is a schedule
over that stage; without one, the run's schedule goes on over the whole run.
"""

import dataclasses
import enum
from typing import Any

import jax

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.naming import GUARD
from jaxlm.objectives.base import Objective
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.piecewise import Piecewise
from jaxlm.training.optimizers import Optimizer
from jaxlm.training.parameters import Tree
from jaxlm.training.schedules import Schedule
from jaxlm.training.state import TrainState, state_shardings


class Carry(enum.Enum):
    """What a stage does with the optimizer's state.

    KEEP: moments go on, for every parameter that was trained before. The spike guard starts afresh.
    RESET: starts from zeros.
    """

    KEEP = "keep"
    RESET = "reset"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run. None in a field: as before.

    Attributes:
      steps: number of training steps; None, of one stage, takes what the others leave of the run.
      objective: what is trained.
      architecture: which tokens see which; among the three single-stack architectures the weights stay the same.
      data: data configuration or the name of a mixture, as the run's own `data` field takes it.
      lengths: tokens of a row, (("inputs", 512), ("targets", 114)); None beside a data configuration takes that one's.
      batch_size: examples a step, over all hosts; a `Piecewise` over the stage's own steps (linear=False) is a ramp.
        Each size compiles the step once.
      learning_rate: a schedule over this stage.
      freeze: patterns of parameters that stay as they are, in place of the optimizer's; () frees all.
      carry: what happens to the optimizer's state at the beginning.
    """

    steps: int | None
    objective: Objective | None = None
    architecture: Architecture | None = None
    data: Any = None
    lengths: tuple[tuple[str, int], ...] | None = None
    batch_size: int | Piecewise | None = None
    learning_rate: Schedule | None = None
    freeze: tuple[str, ...] | None = None
    carry: Carry = Carry.KEEP

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Stage.steps is {self.steps}; a stage has at least one step.")
        if isinstance(self.batch_size, Piecewise) and self.batch_size.linear:
            raise ValueError("A batch-size ramp needs Piecewise(linear=False): every size compiles the step anew.")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A range of steps within which nothing changes but the learning rate, so that one compiled step serves it.

    Attributes:
      start, end: global steps; the phase makes steps start + 1 ... end.
      stage_index: which stage it belongs to.
      stage_start, stage_end: global steps of that stage, the span of its learning-rate schedule.
      stage: the stage's fields with None filled in from the stages before.
      batch_size: examples a step.
    """

    start: int
    end: int
    stage_index: int
    stage_start: int
    stage_end: int
    stage: Stage
    batch_size: int


def with_steps(stages: tuple[Stage, ...], train_steps: int) -> tuple[Stage, ...]:
    """The stages of a run of `train_steps`, the one without a number of its own given the rest.

    Raises:
      ValueError: they do not add up to the run.
    """
    given = sum(stage.steps for stage in stages if stage.steps is not None)
    rest, open_ended = train_steps - given, sum(stage.steps is None for stage in stages)
    if open_ended > 1 or (rest < 1 if open_ended else rest):
        shown = " + ".join("the rest" if stage.steps is None else str(stage.steps) for stage in stages)
        raise ValueError(f"The stages have {shown} steps, which do not add up to train_steps = {train_steps}.")
    return tuple(dataclasses.replace(stage, steps=rest) if stage.steps is None else stage for stage in stages)


def phases(stages: tuple[Stage, ...], *, batch_size: int) -> tuple[Phase, ...]:
    """The stages of a run, cut where the batch size changes.

    Args:
      stages: in order.
      batch_size: the run's own, until a stage says otherwise.
    """
    found: list[Phase] = []
    start = 0
    inherited = Stage(steps=1, batch_size=batch_size)
    for index, stage in enumerate(stages):
        stage = _filled_in(stage, inherited)
        end = start + stage.steps
        ramp = stage.batch_size
        if not isinstance(ramp, Piecewise):
            ramp = Piecewise((0,), (ramp,), linear=False)
        # What lies beyond the stage's end never comes; the next stage inherits the size this one reached.
        changes = [(start + step, int(size)) for step, size in zip(ramp.steps, ramp.values) if step < stage.steps]
        for (first, size), (last, _) in zip(changes, [*changes[1:], (end, 0)]):
            found.append(Phase(first, last, index, start, end, stage, size))
        inherited = dataclasses.replace(stage, batch_size=changes[-1][1])
        start = end
    return tuple(found)


def phase_at(plan: tuple[Phase, ...], step: int) -> Phase | None:
    """The phase that makes the step after `step` steps done; None when the run is over."""
    return next((phase for phase in plan if phase.start <= step < phase.end), None)


def carry_over(state: TrainState, old: Optimizer, new: Optimizer, carry: Carry, *, parallel: Parallelism) -> TrainState:
    """The state with which a stage begins, where the stage before trained with another optimizer.

    With `Carry.KEEP` every part of the optimizer's state that both have, by path and shape, goes on; parameters that
    are trained for the first time start with zero moments (their first updates are then larger than they would be in
    a fresh run, because the step count goes on: warm the learning rate up again). Another algorithm starts afresh, and
    so does the spike guard, since the next stage's loss may be another. An average of the parameters goes on where both
    stages have one.

    Args:
      state: of the stage before, on its mesh. Its arrays are shared with the result.
      old, new: the optimizers of the two stages, for the same parameters.
      carry: what goes on.
      parallel: by which what is new is laid out as the step expects it.
    """
    kept: dict[str, jax.Array] = {}
    if old.config.algorithm.name == new.config.algorithm.name and carry is Carry.KEEP:
        going_on = {name: part for name, part in state.opt_state.items() if name != GUARD}
        kept = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(going_on)}
    abstract = jax.eval_shape(new.init, state.params)
    shardings = state_shardings(abstract, new.infos, parallel)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)

    def carried(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
        found = kept.get(jax.tree_util.keystr(path))
        same = found is not None and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        return found if same else None

    opt_leaves = [carried(path, leaf) for path, leaf in leaves]
    missing = [i for i, leaf in enumerate(opt_leaves) if leaf is None]
    layout = jax.tree.leaves(shardings)

    def initial(params: Tree) -> list[jax.Array]:
        made = jax.tree.leaves(new.init(params))
        return [made[i] for i in missing]

    for i, leaf in zip(missing, jax.jit(initial, out_shardings=[layout[i] for i in missing])(state.params)):
        opt_leaves[i] = leaf
    ema_params = None
    if new.config.ema_decay is not None:
        ema_params = state.ema_params or jax.tree.map(lambda x: x.copy(), state.params)
    return dataclasses.replace(state, opt_state=jax.tree.unflatten(treedef, opt_leaves), ema_params=ema_params)


def _filled_in(stage: Stage, before: Stage) -> Stage:
    fields = {field.name: getattr(stage, field.name) for field in dataclasses.fields(Stage)}
    inherit = {name for name, value in fields.items() if value is None} - {"learning_rate"}
    if stage.data is not None and not isinstance(stage.data, str):
        inherit -= {"lengths"}  # it has its own
    return dataclasses.replace(stage, **{name: getattr(before, name) for name in inherit})
