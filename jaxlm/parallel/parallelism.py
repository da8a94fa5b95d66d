"""How a run is spread over devices: what a user says, and what that means on the devices there are."""

import dataclasses
import enum
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.row_order import RowOrder
from jaxlm.parallel.rules import DEFAULT_RULES, Rules, degree, mesh_axes, spec
from jaxlm.parallel.stages import ONE_STAGE, Pipeline, Stages


class KeysMove(enum.Enum):
    """How queries meet the keys of other devices, where rows are split along their length.

    RING: keys and values go from device to device while each attends to those it has (Ring Attention, arXiv
      2310.01889): memory for one device's share, the way hidden behind the work, and a window goes no further than it
      reaches.
    ALL_GATHER: every device gets all keys and values of its rows first (Llama 3, arXiv 2407.21783, 3.3.2): one call of
      a kernel, and the memory for them.
    AUTO: ALL_GATHER where all keys and values are no more than a device's own queries and results, as with few key
      heads; else RING.
    """

    RING = "ring"
    ALL_GATHER = "all_gather"
    AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class SequenceParallel:
    """Rows split along their length, over the mesh axis `sequence` (context parallelism).

    Attributes:
      keys: see `KeysMove`.
      balanced: each device has one run from the front of a row and one from its end, see
        `jaxlm.parallel.row_order.RowOrder`; for causal masks. Otherwise one run.
    """

    keys: KeysMove = KeysMove.AUTO
    balanced: bool = True

    def __post_init__(self):
        object.__setattr__(self, "keys", KeysMove(self.keys))


class Memory(enum.Enum):
    """Where an array waits: in the DEVICE's main memory, or page-locked in its HOST's, where devices can fetch it."""

    DEVICE = "device"
    HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices.

    Attributes:
      mesh: degrees of parallelism.
      rules: which mesh axes split which logical axis of parameters and activations while a model computes.
      state_rules: rules that take the place of those of the same name for what is stored between steps: parameters in
        full precision, moments, averages. A step then begins with gathering the parameters, in the type the model
        uses, and ends its backward pass with scattering their gradients. (("embed", ("fsdp", "data")),) is stage 1
        (ZeRO-1, Rajbhandari et al. 2020, arXiv 1910.02054, 5.1) on top of what `rules` do. () stores as `rules` say.
      moments: where the optimizer's moments lie between steps.
      sequence: what is done where rows are split along their length; None is its defaults.
      pipeline: how microbatches go through the stages; of no account with one stage.
    """

    mesh: MeshConfig
    rules: Rules = DEFAULT_RULES
    state_rules: Rules = ()
    moments: Memory = Memory.DEVICE
    sequence: SequenceParallel | None = None
    pipeline: Pipeline | None = None

    def __post_init__(self):
        object.__setattr__(self, "moments", Memory(self.moments))
        if unknown := [name for name, _ in self.state_rules if name not in dict(self.rules)]:
            raise ValueError(
                f"ParallelConfig.state_rules has rules for {unknown}, which are not among those it replaces; "
                f"ParallelConfig.rules has {[name for name, _ in self.rules]}."
            )
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
          ValueError: the degrees do not fit the number of devices, or these have no memory of their host.
        """
        mesh = self.mesh.make(devices)
        if self.moments is Memory.HOST:
            check_host_memory(mesh, "ParallelConfig.moments = 'pinned_host'")
        return Parallelism(mesh, self)


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

    @property
    def state_rules(self) -> Rules:
        """Which mesh axes split which logical axis of what is stored between steps."""
        return tuple((name, dict(self.config.state_rules).get(name, axes)) for name, axes in self.rules)

    @property
    def gathers(self) -> bool:
        """Whether parameters are stored in other pieces than they are used in."""
        return self.state_rules != self.rules

    @property
    def sequence(self) -> SequenceParallel:
        """What is done where rows are split along their length."""
        return self.config.sequence or SequenceParallel()

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

    def stored(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, reasons: list[str] | None = None
    ) -> NamedSharding:
        """How an array of the training state with these logical axes lies on the mesh between steps."""
        return NamedSharding(self.mesh, spec(axes, self.state_rules, self.mesh, shape, reasons=reasons))

    def batch_sharding(self, batch_size: int) -> NamedSharding:
        """How every feature [B, ...] of a batch lies on the mesh: split over examples, whole rows.

        Raises:
          ValueError: the batch cannot be split evenly; an uneven batch would silently leave devices idle.
        """
        splitting = self.spec(("batch",))
        if batch_size % self.batch_parts:
            raise ValueError(
                f"A batch of {batch_size} examples cannot be split over {self.batch_parts} devices "
                f"({' x '.join(mesh_axes(splitting))}); make the batch size a multiple of {self.batch_parts}."
            )
        if self.mesh.shape["stage"] > 1:
            microbatches = self.config.pipeline.microbatches
            each = self.degree([axis for axis in mesh_axes(splitting) if axis != "stage"])
            if batch_size % (microbatches * each):
                raise ValueError(
                    f"A batch of {batch_size} examples cannot be cut into {microbatches} microbatches for the "
                    f"pipeline, each split over {each} devices; make the batch size a multiple of "
                    f"{microbatches * each}, or change Pipeline.microbatches."
                )
        return NamedSharding(self.mesh, splitting)

    @property
    def batch_parts(self) -> int:
        """How many equal parts a batch is cut into."""
        return degree(self.mesh, self.spec(("batch",)), 0)

    def host_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a batch that this process's devices hold: what its loader has to read, int [rows], ascending.

        Each row is one process's, unless a group of devices that share rows (tensor, sequence, stage) spans several
        processes: these then all read them.

        Raises:
          ValueError: as `batch_sharding`.
        """
        held = self.batch_sharding(batch_size).devices_indices_map((batch_size,))
        rows = np.arange(batch_size)
        own = [rows[index] for device, index in held.items() if device.process_index == jax.process_index()]
        return np.unique(np.concatenate(own))

    def row_order(self, length: int) -> RowOrder | None:
        """How rows of so many tokens lie on the mesh; None if a row is whole on a device.

        Rows that cannot be cut evenly are whole, as any dimension that does not divide; `check_row` refuses them.
        """
        devices = degree(self.mesh, self.spec(("length",), (length,)), 0)
        if devices == 1:
            return None
        return RowOrder(length, devices, self.sequence.balanced and length % (2 * devices) == 0)

    def check_experts(self, counts: set[int]) -> None:
        """Refuses layers of so many experts each if the mesh axis for experts has no use for them.

        Raises:
          ValueError: there are none, or the degree of `expert` does not divide them.
        """
        devices = degree(self.mesh, self.spec(("experts",)), 0)
        if devices > 1 and not counts:
            raise ValueError(
                f"MeshConfig.expert splits experts over {devices} devices, but the model has none; use data or fsdp, "
                f"or a model with MixtureOfExpertsConfig."
            )
        for count in counts:
            if count % devices:
                raise ValueError(
                    f"The {count} experts of a layer cannot be split over {devices} devices (MeshConfig.expert); make "
                    f"MixtureOfExpertsConfig.num_experts a multiple of {devices}."
                )

    def check_row(self, length: int) -> None:
        """Refuses rows to train on that the mesh does not cut evenly.

        Raises:
          ValueError: the degree of `sequence`, doubled for balanced rows, does not divide the length.
        """
        devices = degree(self.mesh, self.spec(("length",)), 0)
        if length % devices:
            raise ValueError(
                f"Rows of {length} tokens cannot be split over {devices} devices (MeshConfig.sequence); make their "
                f"length a multiple of {devices}."
            )
        if self.sequence.balanced and devices > 1 and length % (2 * devices):
            raise ValueError(
                f"Rows of {length} tokens cannot be split over {devices} devices in balanced order, which takes two "
                f"runs of each; make their length a multiple of {2 * devices}, or set SequenceParallel.balanced = "
                f"False."
            )


def check_host_memory(mesh: Mesh, what: str) -> None:
    """Refuses, for the configuration `what`, a mesh whose devices cannot fetch from their host's memory.

    Raises:
      ValueError: there is a device that cannot.
    """
    device = mesh.devices.flat[0]
    if Memory.HOST.value not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise ValueError(
            f"{what} needs devices that reach page-locked memory of their host, but a {device.device_kind} has only "
            f"{', '.join(kinds)}; keep it on the device."
        )
