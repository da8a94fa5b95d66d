"""What a kernel will run on: the mesh decides, so that programs compile ahead of time for machines elsewhere."""

import dataclasses
import re
from typing import Any

import jax

# A JAX device's kind, in lower case -> the name used in tables of kernels. The first match counts.
_CHIPS = (
    (r"tpu v5 ?lite|tpu v5e", "v5e"),
    (r"tpu v5p?$", "v5p"),
    (r"tpu v6 ?lite|tpu v6e", "v6e"),
    (r"tpu ?7x", "tpu7x"),
    (r"\bh200\b", "h200"),
    (r"\bh100\b", "h100"),
)


@dataclasses.dataclass(frozen=True)
class Platform:
    """The kind of device that a program is traced for.

    Attributes:
      kind: "cpu", "gpu" or "tpu".
      chip: "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", or the device's own name in lower case.
    """

    kind: str
    chip: str


def current() -> Platform:
    """The platform of the mesh in use (`jax.sharding.use_abstract_mesh`, `jax.set_mesh`), or of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        default = jax.config.jax_default_device
        device = default if hasattr(default, "device_kind") else jax.devices(default)[0]
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return Platform(kind, chip_of(device.device_kind))


def chip_of(device_kind: str) -> str:
    """The chip's name in our tables, from a JAX device's `device_kind`."""
    name = device_kind.lower()
    return next((chip for pattern, chip in _CHIPS if re.search(pattern, name)), name)


def tpu_interpret() -> bool:
    """The `interpret` argument of a TPU kernel's `pallas_call`: the interpreter where the platform is a CPU.

    `pltpu.force_tpu_interpret_mode(...)`, jax's own, overrides it with the slower simulation that finds races.
    """
    return current().kind == "cpu"


def gpu_interpret() -> dict[str, Any]:
    """The `interpret` argument of a GPU kernel's `plgpu.kernel`, as keywords: its interpreter where there is a CPU.

    The interpreter blocks a thread of XLA's pool for each warpgroup that waits. On a machine of few cores set the
    environment variable NPROC=8 before jax starts, so that the pool has enough.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # slow to import, and needed by GPU kernels alone

    return {"interpret": plgpu.InterpretGPUParams()} if current().kind == "cpu" else {}
