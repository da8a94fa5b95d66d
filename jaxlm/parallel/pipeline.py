"""The layers of a scanned stack, one after the other: on every device alike, or in pipeline stages.

In stages, every device of the mesh axis `stage` runs the same program (`shard_map` over that axis alone, everything
else is left to GSPMD and to the layers' own operations, as without a pipeline): at each step it takes a microbatch from
the stage before it, runs one run of its layers, and hands the result on. What belongs to the microbatch's rows (masks,
rotations, an encoder's output) travels with it, so that nothing is held for more rows than there are.

    step      0    1    2    3    4    5    6    7    8      S = 2 stages, V = 2 rounds, M = 4 microbatches;
    stage 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1          m.v is microbatch m in round v
    stage 1       0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

The microbatches go in groups of S, each group through all its rounds before the next one: what leaves the last stage
is what the first one needs next, and nothing waits in between. Hidden states of all microbatches lie spread over the
stages, slot by slot; at each step that needs it a slot moves one stage on, which brings the first stage its next
microbatch and takes the last one's result away. So every transfer is one collective-permute of a microbatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.rules import mesh_axes
from jaxlm.parallel.stages import ONE_STAGE, Recompute, Stages

Layer = Callable[[Any, jax.Array, jax.Array, Any, Any, Any], tuple[jax.Array, Any]]
"""(operations, x [B, T, E], index of the repeat, its parameters, `rows`, `shared`) -> (x, side values)."""


@dataclasses.dataclass(frozen=True)
class StackedLayers:
    """The repeats of a scanned stack.

    Attributes:
      values: their parameters, a pytree of [N, ...].
      repeats: how many there are; N is larger where identity layers fill the stages.
      stages: how they are dealt to stages, which is the order they lie in.
    """

    values: Any
    repeats: int
    stages: Stages = ONE_STAGE


def run_in_sequence(
    layer: Layer, layers: StackedLayers, x: jax.Array, rows: Any, shared: Any, *, ops: Any
) -> tuple[jax.Array, Any]:
    """All repeats, one after the other, each on the whole batch. Arguments and result as of `run_in_stages`."""
    order, values = layers.stages.order(layers.repeats), layers.values
    if not np.array_equal(order, np.arange(layers.repeats)):
        place = np.argsort(order)[: layers.repeats]
        values = jax.tree.map(lambda leaf: leaf[place], values)

    def body(x: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        return layer(ops, x, *step, rows, shared)

    x, sides = jax.lax.scan(body, x, (jnp.arange(layers.repeats), values))
    return x, _summed(sides)


def run_in_stages(
    layer: Layer,
    layers: StackedLayers,
    x: jax.Array,
    rows: Any,
    shared: Any,
    *,
    parallel: Parallelism,
    ops: Callable[[Parallelism, jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """All repeats as a pipeline over the mesh axis `stage`: the same numbers as in sequence.

    Stages that have no microbatch compute on zeros, and what comes of it goes nowhere: not into results, side values
    or gradients.

    Args:
      layer: one repeat.
      layers: parameters of all, dealt to the stages of `parallel`.
      x: [B, T, E]. Rows are added where the microbatches do not divide them.
      rows: a pytree of arrays [B, ...] that belong to the rows of x. Integers, or floats with gradients.
      shared: a pytree of arrays that all rows share.
      parallel: the mesh, and `ParallelConfig.pipeline`.
      ops: makes a layer's operations, from the mesh as a stage sees it and int32 [rows of a microbatch], which rows of
        the batch these are.

    Returns:
      [B, T, E], and the sum of all repeats' and microbatches' side values.

    Raises:
      ValueError: the layers are dealt to other stages than the mesh has.
    """
    if layers.stages != parallel.stages:
        raise ValueError(
            f"The model's layers are dealt to {layers.stages}, but the mesh has {parallel.stages}; build the model "
            f"with stages=parallel.stages."
        )
    cut = _Cut.of(parallel, len(x))
    schedule = _Schedule(parallel.stages, parallel.config.pipeline.microbatches)
    stage = functools.partial(_run_stage, layer, layers, schedule, parallel, ops)
    microbatches = cut.apply((x, (rows, jnp.arange(cut.padded, dtype=jnp.int32))))
    # An array that were the same on all stages would have its gradient added up over them at every step.
    everywhere = jax.tree.map(lambda a: jnp.broadcast_to(a, (parallel.stages.count, *jnp.shape(a))), shared)
    split = PartitionSpec("stage")
    x, sides = jax.shard_map(
        stage,
        mesh=parallel.mesh,
        in_specs=split,
        out_specs=split,
        axis_names={"stage"},
        check_vma=False,  # what a kernel gives does not say over which axes it varies
    )(layers.values, microbatches, everywhere)
    return cut.join(x), _summed(sides)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Who does what at which step; see the head of this file. Steps may be traced."""

    stages: Stages
    microbatches: int

    @property
    def slots(self) -> int:
        """Microbatches that lie on each stage."""
        return self.microbatches // self.stages.count

    @property
    def steps(self) -> int:
        return self.stages.steps(self.microbatches)

    def work(self, step: jax.Array, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(whether the stage has a microbatch, in which round that is)."""
        count, rounds = self.stages.count, self.stages.rounds
        since = step - stage
        return (since >= 0) & (since < self.microbatches * rounds), since % (count * rounds) // count

    def slot(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(slot from which the first stage takes a microbatch in its first round, whether the slot then moves on).

        The last stage finishes microbatch m of a group at the step in which the first takes m + S - 1 from the slot,
        or holds it: so the result can take the place that becomes free.
        """
        count, rounds = self.stages.count, self.stages.rounds
        phase = step % (count * rounds)
        taken = step // (count * rounds) * count + jnp.minimum(phase, count - 1)
        return taken % self.slots, (phase < count - 1) | (phase == count * rounds - 1)


def _run_stage(
    layer: Layer,
    layers: StackedLayers,
    schedule: _Schedule,
    parallel: Parallelism,
    make_ops: Callable[[Parallelism, jax.Array], Any],
    values: Any,
    microbatches: Any,
    shared: Any,
) -> tuple[jax.Array, Any]:
    """One stage inside shard_map, with its part of `values` [rounds * K, ...] and `microbatches` [slots, ...]."""
    stages, repeats = schedule.stages, layers.repeats
    me, length = jax.lax.axis_index("stage"), stages.run_length(repeats)
    inside = parallel.inside("stage")
    shared = jax.tree.map(lambda a: a[0], shared)
    forward = [(s, (s + 1) % stages.count) for s in range(stages.count)]
    backward = [(t, s) for s, t in forward]

    def run(values: Any, shared: Any, microbatch: Any, round_: jax.Array) -> tuple[jax.Array, Any]:
        """One run of layers."""
        x, (rows, numbers) = microbatch
        if stages.rounds > 1:
            values = jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, round_ * length, length), values)
        indices = (round_ * stages.count + me) * length + jnp.arange(length)

        def repeat(x: jax.Array, step: Any) -> tuple[jax.Array, Any]:
            (index, values), ops = step, make_ops(inside, numbers)
            if not stages.padding(repeats):
                return layer(ops, x, index, values, rows, shared)
            exists = index < repeats
            inner = _with_gradient_if(exists, (values, rows, shared))
            y, side = layer(ops, _where(exists, x), index, *inner)
            return jnp.where(exists, y, x), _where(exists, side)

        x, sides = jax.lax.scan(repeat, x, (indices, values))
        return x, _summed(sides)

    if parallel.config.pipeline.recompute is Recompute.STAGE:
        run = jax.checkpoint(run, prevent_cse=False)

    def step(carry: Any, time: jax.Array) -> Any:
        arriving, (results, travellers) = carry
        busy, round_ = schedule.work(time, me)
        slot, moves = schedule.slot(time)
        waiting = jax.tree.map(lambda a: a[slot], (results, travellers))
        x, others = _select((me == 0) & (round_ == 0), waiting, arriving)
        inputs = _with_gradient_if(busy, (values, shared, (_where(busy, x), others)))
        y, side = _where(busy, run(*inputs, round_))

        following = _permute(waiting, backward)
        following = jnp.where(me == stages.count - 1, y, following[0]), following[1]
        lying = jax.tree.map(
            lambda a, new, old: a.at[slot].set(jnp.where(moves, new, old)), (results, travellers), following, waiting
        )
        return (_permute((y, others), forward), lying), side

    nothing = jax.tree.map(lambda a: jnp.zeros_like(a[0]), microbatches)
    (_, (results, _)), sides = jax.lax.scan(step, (nothing, microbatches), jnp.arange(schedule.steps))
    # The result of slot r lies S - 1 slots further on, as long as it was on its way.
    results = jnp.roll(results, 1 - stages.count, axis=0)
    return results, jax.tree.map(lambda a: a[None], _summed(sides))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the rows of a batch become microbatches, so that no row changes its device.

    Mesh axes split the batch in an order, `stage` among them. A device's rows are cut into `slots` runs of neighbours.

    Attributes:
      parallel: the mesh.
      batch: rows of the batch.
      before, after: the mesh axes that split rows, before and after `stage`; () if a microbatch's rows do not divide.
      rows: of a microbatch.
    """

    parallel: Parallelism
    batch: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    rows: int

    @classmethod
    def of(cls, parallel: Parallelism, batch: int) -> "_Cut":
        rows = -(-batch // parallel.config.pipeline.microbatches)
        axes = mesh_axes(parallel.spec(("batch",)))
        place = axes.index("stage") if "stage" in axes else 0
        before, after = axes[:place], tuple(axis for axis in axes[place:] if axis != "stage")
        if rows % parallel.degree(before + after):
            before = after = ()
        return cls(parallel, batch, before, after, rows)

    @property
    def padded(self) -> int:
        """Rows with those added."""
        return self.rows * self.parallel.config.pipeline.microbatches

    @property
    def _shape(self) -> tuple[int, ...]:
        """[before, stages, after, slots, rows of a device]."""
        stages, microbatches = self.parallel.stages.count, self.parallel.config.pipeline.microbatches
        before, after = self.parallel.degree(self.before), self.parallel.degree(self.after)
        return before, stages, after, microbatches // stages, self.rows // (before * after)

    def apply(self, tree: Any) -> Any:
        """[B, ...] -> [M, rows, ...], M split over the stages."""

        def cut(x: jax.Array) -> jax.Array:
            rest = x.shape[1:]
            if self.padded > self.batch and len(x) == self.batch:
                x = jnp.pad(x, [(0, self.padded - self.batch)] + [(0, 0)] * len(rest))
            x = jnp.moveaxis(x.reshape(*self._shape, *rest), (1, 3), (0, 1))
            return self._place(x.reshape(-1, self.rows, *rest), "stage", self.before + self.after)

        return jax.tree.map(cut, tree)

    def join(self, x: jax.Array) -> jax.Array:
        """The reverse, of one array."""
        before, stages, after, slots, rows = self._shape
        x = jnp.moveaxis(x.reshape(stages, slots, before, after, rows, *x.shape[2:]), (0, 1), (1, 3))
        x = x.reshape(self.padded, *x.shape[5:])
        return self._place(x, (*self.before, "stage", *self.after))[: self.batch]

    def _place(self, x: jax.Array, *axes: Any) -> jax.Array:
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(axes))
        spec = PartitionSpec(*(entry or None for entry in axes), *free)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.parallel.mesh, spec))


def _permute(tree: Any, pairs: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "stage", pairs), tree)


def _select(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _where(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros."""
    return jax.tree.map(lambda a: jnp.where(condition, a, jnp.zeros_like(a)), tree)


def _with_gradient_if(condition: jax.Array, tree: Any) -> Any:
    """The tree, whose gradient is 0 unless `condition`: not 0 times what was computed, which may be NaN."""
    return jax.tree.map(lambda a: _gated(condition, a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@jax.custom_vjp
def _gated(condition: jax.Array, x: jax.Array) -> jax.Array:
    # Not jnp.where(condition, x, stop_gradient(x)): of a new array the backward pass would keep one for each step.
    return x


_gated.defvjp(
    lambda condition, x: (x, condition),
    lambda condition, g: (np.zeros((), jax.dtypes.float0), jnp.where(condition, g, 0)),
)


def _summed(sides: Any) -> Any:
    return jax.tree.map(lambda value: value.sum(0), sides)
