"""Meshes to begin with, by the size of the model and the chip: data, and the arithmetic that makes a mesh of it.

In a gin file, in place of a `MeshConfig` of one's own:

    parallelism.ParallelConfig.mesh = @presets.mesh_for()
    presets.mesh_for.parameters = 8e9
    presets.mesh_for.chip = 'v5p'
    presets.mesh_for.devices = 64

`python -m jaxlm.plan --search` finds better ones for a run.
"""

import dataclasses
import math

from jaxlm.chips import CHIPS
from jaxlm.parallel.mesh import MeshConfig

STATE_BYTES = 16
"""A parameter's: float32 itself, AdamW's two moments, and the gradient."""

STATE_SHARE = 0.5
"""Of a device's memory that these may take; the rest is for activations."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      chips: names of `jaxlm.chips`.
      parameters: it holds from this size on.
      tensor: degree of tensor parallelism.
      why: a reason.
    """

    chips: tuple[str, ...]
    parameters: float
    tensor: int
    why: str


_TORUS_2D, _TORUS_3D = ("v5e", "v6e"), ("v4", "v5p", "tpu7x")
_NODES = ("a100", "h100", "h200", "b200", "gb200")

TENSOR: tuple[Row, ...] = (
    Row(_TORUS_2D + _TORUS_3D + _NODES, 0.0, 1, "FSDP alone: its gathers hide behind a layer's products."),
    Row(
        _TORUS_2D,
        50e9,
        4,
        "Rows of 256 chips are few tokens a chip; four neighbours of a 2D torus share a row's heads.",
    ),
    Row(_TORUS_3D, 200e9, 8, "Thousands of chips have fewer rows than devices; an axis of the cube shares heads."),
    Row(_NODES, 50e9, 8, "NVLink joins the eight of a node; FSDP goes over the slower network between nodes."),
)
"""Of rows for a chip the last whose size is reached counts."""


def mesh_for(parameters: float, chip: str, devices: int, slices: int = 1) -> MeshConfig:
    """A mesh whose state fits, with as little splitting as that allows.

    Args:
      parameters: of the model, all of them.
      chip: a name of `jaxlm.chips`, "v5p".
      devices: of the whole machine.
      slices: groups of them that the data-centre network joins; the model is whole in each.

    Raises:
      ValueError: the chip is unknown, the state has no room on so many, or the degrees do not divide them.
    """
    known = {entry.name: entry for entry in CHIPS}
    if chip not in known:
        raise ValueError(f"There is no chip {chip!r} in jaxlm.chips; there are {', '.join(known)}.")
    tensor = [row for row in TENSOR if chip in row.chips and parameters >= row.parameters][-1].tensor
    inside = devices // slices
    if devices % slices or inside % tensor:
        raise ValueError(
            f"{devices} devices in {slices} slices cannot be split {tensor} ways by tensor parallelism, as a model of "
            f"{parameters:.2g} parameters on {chip} wants; give MeshConfig yourself, or other devices."
        )
    room = STATE_SHARE * known[chip].memory
    parts = STATE_BYTES * parameters / room
    ways = [n for n in range(1, inside // tensor + 1) if inside // tensor % n == 0 and n * tensor >= parts]
    if not ways:
        raise ValueError(
            f"A model of {parameters:.2g} parameters needs its state in at least {math.ceil(parts)} parts on {chip}, "
            f"and a slice has {inside} devices; use more of them, or a chip with more memory."
        )
    return MeshConfig(fsdp=ways[0], tensor=tensor, slices=slices)
