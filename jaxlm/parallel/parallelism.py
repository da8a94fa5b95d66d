"""How a run is spread over devices: what a user says, and what that means on the devices there are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.rules import DEFAULT_RULES, Rules, mesh_axes, spec
from jaxlm.parallel.stages import ONE_STAGE, Pipeline, Stages


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices.

    Attributes:
      mesh: degrees of parallelism.
      rules: which mesh axes split which logical axis.
      pipeline: how microbatches go through the stages; of no account with one stage.
    """

    mesh: MeshConfig
    rules: Rules = DEFAULT_RULES
    pipeline: Pipeline | None = None

    def __post_init__(self):
        stages = self.mesh.stage
        if stages == 1:
            return
        if self.pipeline is None:
            raise ValueError(
                f"MeshConfig.stage is {stages}, but ParallelConfig.pipeline is None; set it to a Pipeline with a "
                f"multiple of {stages} microbatches."
            )
        if (microbatches := self.pipeline.microbatches) % stages:
            few, many = 2 * stages, 8 * stages
            idle = Stages(stages, self.pipeline.rounds).bubble
            raise ValueError(
                f"Pipeline.microbatches is {microbatches}, but must be a multiple of MeshConfig.stage = {stages}: with "
                f"{few} of them stages are idle for {idle(few):.0%} of the time, with {many} for {idle(many):.0%}."
            )

    def on(self, devices: Sequence[jax.Device] | None = None) -> "Parallelism":
        """The same on these devices (default: all).

        Raises:
          ValueError: the degrees do not fit the number of devices.
        """
        return Parallelism(self.mesh.make(devices), self)


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """A `ParallelConfig` on devices; whatever lays out arrays or splits work is given one.

    Attributes:
      mesh: the device mesh; abstract inside shard_map, see `inside`.
      config: what was asked for.
    """

    mesh: Mesh | AbstractMesh
    config: ParallelConfig

    @property
    def rules(self) -> Rules:
        """Which mesh axes split which logical axis."""
        return self.config.rules

    @property
    def stages(self) -> Stages:
        """To how many pipeline stages layers are dealt, and how; one stage where there is no pipeline."""
        count = self.mesh.shape["stage"]
        return Stages(count, self.config.pipeline.rounds) if count > 1 else ONE_STAGE

    @property
    def free_axes(self) -> frozenset[str]:
        """The mesh axes that arrays can be split over: all, but inside shard_map those that it has not taken.

        They are the `axis_names` of every shard_map over this mesh, since it may lie within another.
        """
        taken = (name for name, kind in zip(self.mesh.axis_names, self.mesh.axis_types) if kind is AxisType.Manual)
        return frozenset(self.mesh.axis_names) - frozenset(taken)

    def inside(self, axis: str) -> "Parallelism":
        """What a function sees of the mesh that runs inside shard_map over `axis`: no array is split over it."""
        rules = tuple((name, tuple(a for a in axes if a != axis)) for name, axes in self.rules)
        return Parallelism(jax.sharding.get_abstract_mesh(), dataclasses.replace(self.config, rules=rules))

    def degree(self, axes: Sequence[str]) -> int:
        """Into how many parts these mesh axes split together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def spec(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None, *, reasons: list[str] | None = None
    ) -> PartitionSpec:
        """How an array with these logical axes lies on the mesh; see `jaxlm.parallel.rules.spec`."""
        return spec(axes, self.rules, self.mesh, shape, reasons=reasons)

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, reasons: list[str] | None = None
    ) -> NamedSharding:
        """`spec` as a sharding of an array of this shape."""
        return NamedSharding(self.mesh, self.spec(axes, shape, reasons=reasons))

    def batch_sharding(self, batch_size: int) -> NamedSharding:
        """How every feature [B, ...] of a batch lies on the mesh: split over examples, whole rows.

        Raises:
          ValueError: the batch cannot be split evenly; an uneven batch would silently leave devices idle.
        """
        splitting = self.spec(("batch",))
        axes = mesh_axes(splitting)
        degree = self.degree(axes)
        if batch_size % degree:
            raise ValueError(
                f"A batch of {batch_size} examples cannot be split over {degree} devices ({' x '.join(axes)}); make "
                f"the batch size a multiple of {degree}."
            )
        if self.mesh.shape["stage"] > 1:
            microbatches = self.config.pipeline.microbatches
            each = self.degree([axis for axis in axes if axis != "stage"])
            if batch_size % (microbatches * each):
                raise ValueError(
                    f"A batch of {batch_size} examples cannot be cut into {microbatches} microbatches for the "
                    f"pipeline, each split over {each} devices; make the batch size a multiple of "
                    f"{microbatches * each}, or change Pipeline.microbatches."
                )
        return NamedSharding(self.mesh, splitting)
