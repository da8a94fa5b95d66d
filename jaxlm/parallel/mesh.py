"""The device mesh: one dataclass owns every parallel degree and makes the `jax.sharding.Mesh`."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("slices", "stage", "data", "fsdp", "expert", "sequence", "tensor")
"""Names of the mesh's axes, from the slowest network to the fastest: neighbours on `tensor` talk in every layer."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Degrees of parallelism. Their product is the number of devices.

    Attributes:
      data: copies of the model, each with its share of the batch; -1 takes all devices the others leave.
      fsdp: parameters and batch are both split this many ways (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).
      tensor: heads, feed-forward and vocabulary are split (Shoeybi et al. 2019, arXiv 1909.08053).
      sequence: the tokens of a row are split.
      expert: experts of a mixture-of-experts layer are split.
      stage: layers are split (pipeline).
      slices: groups of devices joined by the data-centre network only; the batch is split over them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1
    slices: int = 1

    def __post_init__(self):
        for axis in MESH_AXES:
            degree = getattr(self, axis)
            if degree < 1 and not (axis == "data" and degree == -1):
                allowed = "-1 (all remaining devices) or at least 1" if axis == "data" else "at least 1"
                raise ValueError(f"MeshConfig.{axis} is {degree}; it must be {allowed}.")

    def degrees(self, num_devices: int) -> dict[str, int]:
        """Degree of each axis on `num_devices` devices, with `data` filled in.

        Raises:
          ValueError: the degrees do not multiply to the number of devices.
        """
        degrees = {axis: getattr(self, axis) for axis in MESH_AXES}
        named = {axis: degree for axis, degree in degrees.items() if degree > 1}
        others = math.prod(degree for axis, degree in degrees.items() if axis != "data")
        if self.data == -1:
            if num_devices % others:
                raise ValueError(
                    f"The mesh degrees {named} multiply to {others}, which does not divide the {num_devices} devices; "
                    f"choose degrees whose product does."
                )
            degrees["data"] = num_devices // others
        elif self.data * others != num_devices:
            raise ValueError(
                f"The mesh degrees {named} multiply to {self.data * others}, but there are {num_devices} devices; "
                f"set MeshConfig.data = -1 to use what the others leave."
            )
        return degrees

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all), with automatic (GSPMD) axes.

        `jax.make_mesh` would make explicit axes, under which plain indexing such as `table[ids]` is an error; so
        this is the one place in the code that makes a mesh.
        """
        devices = list(jax.devices() if devices is None else devices)
        degrees = self.degrees(len(devices))
        shape = tuple(degrees.values())
        if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
            inner = tuple(1 if axis == "slices" else degree for axis, degree in degrees.items())
            outer = tuple(degree if axis == "slices" else 1 for axis, degree in degrees.items())
            grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        else:  # an axis may need a part of a torus's axis: 7 x 32 x 8 on 8 x 8 x 28
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
