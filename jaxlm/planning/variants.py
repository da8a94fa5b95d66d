"""A run with other levers: mesh, rematerialisation, microbatches. What the search tries and advice is made of."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jaxlm.layers.remat import Remat, RematPolicy
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.planning.memory import gib
from jaxlm.planning.program import Prepared, policy_name, prepare, whole_models, with_remat
from jaxlm.planning.topology import Topology
from jaxlm.run import RunConfig

_MOST_TENSOR = 8  # beyond, its collectives outweigh a layer's products on every network in `jaxlm.chips`
_HOPELESS = 1.5
"""How far above the memory there is the expectation from shapes may be, before a candidate is not even compiled."""

# What is recomputed in the backward pass, as a share of the forward pass, for the order of trying.
_RECOMPUTED = {Remat.NONE: 0.0, Remat.DOTS: 0.05, Remat.DOTS_NO_BATCH: 0.1, Remat.BLOCK: 0.3}


@dataclasses.dataclass(frozen=True)
class Levers:
    """What a search may change.

    Attributes:
      mesh: degrees of parallelism.
      remat: of all stacks.
      microbatches: of a step.
    """

    mesh: MeshConfig
    remat: RematPolicy
    microbatches: int

    @property
    def name(self) -> str:
        """The gin bindings that set it, shortened: "fsdp 16, tensor 2, remat full, microbatches 2"."""
        axes = ("slices", "stage", "data", "fsdp", "expert", "sequence", "tensor")
        degrees = {axis: getattr(self.mesh, axis) for axis in axes}
        parts = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1] or ["one device"]
        return ", ".join([*parts, f"remat {policy_name(self.remat)}", f"microbatches {self.microbatches}"])

    def on(self, run: RunConfig) -> RunConfig:
        """`run` with these.

        Raises:
          ValueError: its batch cannot be cut so.
        """
        parallel = dataclasses.replace(run.parallel, mesh=self.mesh)
        step = dataclasses.replace(run.step, microbatches=self.microbatches)
        return dataclasses.replace(with_remat(run, self.remat), parallel=parallel, step=step)


def levers_of(run: RunConfig, devices: int) -> Levers:
    """A run's own; the first stack's rematerialisation stands for all."""
    stack = next(iter(whole_models(run.model)[0].stacks.values()))
    mesh = dataclasses.replace(run.parallel.mesh, data=run.parallel.mesh.degrees(devices)["data"])
    return Levers(mesh, stack.remat, run.step.microbatches)


def candidates(run: RunConfig, machine: Topology) -> Iterator[Levers]:
    """All that a search considers: what the run has beside data, FSDP and tensor parallelism stays as it is."""
    own = levers_of(run, machine.num_devices)
    fixed = own.mesh.slices * own.mesh.stage * own.mesh.expert * own.mesh.sequence
    free = machine.num_devices // fixed
    for tensor in _divisors(min(free, _MOST_TENSOR), free):
        for fsdp in _divisors(free // tensor, free // tensor):
            mesh = dataclasses.replace(own.mesh, data=free // (tensor * fsdp), fsdp=fsdp, tensor=tensor)
            for remat, microbatches in itertools.product(_policies(own.remat), (1, 2, 4, 8)):
                yield Levers(mesh, remat, microbatches)


def _policies(own: RematPolicy) -> list[RematPolicy]:
    return list(dict.fromkeys((own, Remat.FULL, Remat.BLOCK, Remat.DOTS_NO_BATCH, Remat.NONE)))


def _divisors(most: int, of: int) -> list[int]:
    return [n for n in range(1, most + 1) if of % n == 0]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A candidate that is not compiled.

    Attributes:
      levers: which.
      reason: a sentence.
    """

    levers: Levers
    reason: str


def why_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason, with how many candidates it is of, the most frequent first."""
    found = collections.Counter(entry.reason for entry in left_out)
    return [f"{count}: {reason}" for reason, count in found.most_common()]


def worth_trying(run: RunConfig, machine: Topology) -> tuple[list[tuple[Levers, Prepared]], list[LeftOut]]:
    """The candidates that may fit, the most promising first, and those that cannot work, with reasons."""
    limit = machine.chip.memory if machine.chip is not None else None
    good, bad = [], []
    for levers in candidates(run, machine):
        try:
            prepared = prepare(levers.on(run), machine)
        except ValueError as error:
            bad.append(LeftOut(levers, str(error)))
            continue
        expected = prepared.expected
        if limit is not None and expected.state > limit:
            bad.append(LeftOut(levers, f"Its state alone takes more than a device's {gib(limit)}."))
        elif limit is not None and expected.total > _HOPELESS * limit:
            much = f"more than {_HOPELESS} times a device's {gib(limit)}"
            bad.append(LeftOut(levers, f"By its shapes, state, gradients and activations take {much}."))
        else:
            good.append((levers, prepared))
    good.sort(key=lambda entry: _promise(*entry, limit))
    return good, bad


def _promise(levers: Levers, prepared: Prepared, limit: int | None) -> tuple:
    """Smaller is better: what surely fits, what the mesh splits whole, the least recomputation and communication."""
    fits = limit is None or prepared.expected.total < 0.9 * limit
    # Odd vocabularies and key heads too few for the mesh work, but devices then do some of each other's work.
    repeats = levers.mesh.tensor > 1 and bool(prepared.replicated)
    recomputed = _RECOMPUTED.get(levers.remat, 1 / 3)
    # A microbatch gathers all parameters again; tensor parallelism moves activations in every layer.
    moved = levers.microbatches * (levers.mesh.fsdp > 1) + 2 * (levers.mesh.tensor - 1)
    return not fits, repeats, recomputed + 0.05 * moved, levers.microbatches, levers.mesh.tensor, -levers.mesh.fsdp
