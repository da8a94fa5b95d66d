"""How a run is spread over devices: what a user says, and what that means on the devices there are."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.rules import DEFAULT_RULES, Rules, degree, mesh_axes, spec


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices.

    Attributes:
      mesh: degrees of parallelism.
      rules: which mesh axes split which logical axis.
    """

    mesh: MeshConfig
    rules: Rules = DEFAULT_RULES

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
      mesh: the device mesh.
      config: what was asked for.
    """

    mesh: Mesh
    config: ParallelConfig

    @property
    def rules(self) -> Rules:
        """Which mesh axes split which logical axis."""
        return self.config.rules

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
        if batch_size % self.batch_parts:
            raise ValueError(
                f"A batch of {batch_size} examples cannot be split over {self.batch_parts} devices "
                f"({' x '.join(mesh_axes(splitting))}); make the batch size a multiple of {self.batch_parts}."
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
