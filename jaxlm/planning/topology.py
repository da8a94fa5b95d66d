"""The machine that a plan is for, by its name: "v5p:8x8x8", "2x v5e:16x16", "h200:8", "cpu:8"."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.chips import CHIPS, Chip
from pallas_kernels import ahead_of_time

_NAME = re.compile(r"(?:(?P<slices>[1-9]\d*) ?x ?)?(?P<chip>[a-z]+\d*[a-z]*)(?::(?P<shape>[1-9]\d*(?:x[1-9]\d*)*))?")
_PLANNED = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
"""TPUs that the compiler takes, and the dimensions of their torus."""

_WRAPS = {"v5e": 16, "v6e": 16, "v5p": 4, "tpu7x": 4}
"""A torus's axis whose size is a multiple of this has a wire from its end to its beginning."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine that need not be there.

    Attributes:
      name: as given.
      kind: "tpu", "gpu" or "cpu".
      chip: its data sheet; None for a CPU.
      shape: chips of a slice along its axes; (n,) for n GPUs or CPU devices.
      slices: slices joined by the data-centre network.
    """

    name: str
    kind: str
    chip: Chip | None
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_devices(self) -> int:
        """jax devices; a TPU7x chip is two."""
        cores = 2 if self.chip is not None and self.chip.name == "tpu7x" else 1
        return self.slices * math.prod(self.shape) * cores

    def devices(self) -> list[Any]:
        """Devices to compile for.

        Raises:
          ValueError: the compiler knows no such machine.
          CannotCompile: the compiler is not installed; the message says what to install.
        """
        if self.kind == "cpu":
            found = jax.devices("cpu")
            if len(found) < self.num_devices:
                raise ValueError(
                    f"{self.name} needs {self.num_devices} CPU devices, and jax was started with {len(found)}; start a "
                    f"new process with XLA_FLAGS=--xla_force_host_platform_device_count={self.num_devices}."
                )
            return found[: self.num_devices]
        if self.kind == "gpu":
            return ahead_of_time.devices(f"{self.chip.name}:{self.num_devices}")
        return ahead_of_time.devices(f"{self.chip.name}:{'x'.join(map(str, self.shape))}", self.slices)

    def bandwidth(self, devices: Sequence[Any]) -> float | None:
        """Bytes a second that one of `devices`, a collective's group in the mesh's order, can send to the others.

        On a torus by the number of its axes that the group lies along, each with two wires where it wraps around and
        one where it does not; with a switch all there is. None where nothing is known.
        """
        if self.chip is None:
            return None
        if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
            return self.chip.network_bandwidth
        if self.kind == "gpu":
            nodes = {device.process_index for device in devices}
            return self.chip.network_bandwidth if len(nodes) > 1 else self.chip.link_bandwidth
        places = [tuple(device.coords) for device in devices]
        along = [axis for axis in range(len(self.shape)) if len({place[axis] for place in places}) > 1]
        if not along:  # cores of one chip
            return self.chip.link_bandwidth * self.chip.links
        wires = 0
        for axis in along:
            whole = len({place[axis] for place in places}) == self.shape[axis]
            wires += 2 if whole and self.shape[axis] % _WRAPS[self.chip.name] == 0 else 1
        return self.chip.link_bandwidth * wires


def topology(name: str) -> Topology:
    """The machine of that name.

    Raises:
      ValueError: there is none; the message says what there is.
    """
    found = _NAME.fullmatch(name.strip().lower())
    chip = found["chip"] if found else ""
    shape = tuple(int(n) for n in (found["shape"] or "1").split("x")) if found else ()
    slices = int(found["slices"] or 1) if found else 1
    by_name = {known.name: known for known in CHIPS}
    if chip in _PLANNED and len(shape) == _PLANNED[chip]:
        return Topology(name, "tpu", by_name[chip], shape, slices)
    if chip in ("h200", "cpu") and len(shape) == 1 and slices == 1:
        return Topology(name, "cpu" if chip == "cpu" else "gpu", by_name.get(chip), shape)
    examples = ", ".join(f"{tpu}:{'x'.join('4' * axes)}" for tpu, axes in _PLANNED.items())
    raise ValueError(
        f"There is no topology {name!r}; there are TPU slices by the size of their torus ({examples}, and several as "
        f"in 2x v5e:16x16), h200:8 for so many GPUs, and cpu:8."
    )


def ask_for_cpu_devices(count: int) -> None:
    """Makes jax, which has not started yet, give this process so many CPU devices. They cost nothing until used."""
    flag = "--xla_force_host_platform_device_count"
    flags = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(flag)]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{flag}={count}"])
