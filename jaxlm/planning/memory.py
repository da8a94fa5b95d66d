"""What a run takes of a device's memory: from shapes and shardings alone, and by the compiler's account."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

_GIB = 2**30
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_MUCH = (
    re.compile(rf"Used {_SIZE} of {_SIZE}"),
    re.compile(rf"the total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, batch: the step's arguments: parameters (with an average of them), the optimizer's state,
        one batch.
      arguments: the same by the compiler's account, with its padding.
      temporaries: activations, gradients and working space that live inside a step.
      outputs: new state and metrics that do not take the place of an argument.
      host: on the host, for what is offloaded there.
      program: the code.
    """

    parameters: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int
    outputs: int
    host: int
    program: int

    @property
    def peak(self) -> int:
        """Arguments, temporaries, and outputs that are no arguments."""
        return self.arguments + self.temporaries + self.outputs


def bytes_on_a_device(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct` with shardings, on the device that has most, without padding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(compiled: jax.stages.Compiled, state: Any, batch: Any) -> Memory:
    """A compiled step's memory.

    Args:
      compiled: (state, batch) -> ...
      state: a `jaxlm.training.state.TrainState` of shapes with shardings.
      batch: the same of a batch.
    """
    stats = compiled.memory_analysis()
    return Memory(
        parameters=bytes_on_a_device((state.params, state.ema_params)),
        optimizer=bytes_on_a_device(state.opt_state),
        batch=bytes_on_a_device(batch),
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes + stats.host_output_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )


def refused(error: Exception) -> tuple[int, int] | None:
    """(bytes wanted, bytes there are) of a compiler's refusal for want of memory; None for other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    for pattern in _TOO_MUCH:
        if found := pattern.search(text):
            wanted, unit, limit, limit_unit = found.groups()
            return _bytes(wanted, unit), _bytes(limit, limit_unit)
    return 0, 0


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def gib(size: float) -> str:
    """ "12.3 GiB", or in smaller units."""
    for unit, one in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= one or unit == "KiB":
            return f"{size / one:.2f} {unit}"
    raise AssertionError


def devices_along(mesh: Mesh, axes: tuple[str, ...]) -> list[Any]:
    """The devices of the first group along these axes of the mesh."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(mesh.devices[index].flat)
