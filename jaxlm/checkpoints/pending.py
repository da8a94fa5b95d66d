"""Arrays that are made when their turn to be written has come, so that a model is never in memory whole."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class Pending:
    """An array to be written.

    Attributes:
      shape, dtype: known before it is made.
      make: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def made(self, name: str) -> np.ndarray:
        """The array.

        Args:
          name: for the message.

        Raises:
          ValueError: it is not what was announced.
        """
        value = self.make()
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"{name} came as {value.dtype} {value.shape}, not {self.dtype} {self.shape}.")
        return value


class _Ours(np.ndarray):
    """An array that nobody else changes: Orbax copies what it is given, lest it change while it is written."""

    def __deepcopy__(self, memo: dict) -> "_Ours":
        return self


class _PendingHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax write pending arrays as it does numpy's, but one after the other."""

    async def serialize(
        self,
        values: Sequence[Pending],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        """See `ocp.type_handlers.TypeHandler`."""
        args = args or [ocp.SaveArgs()] * len(values)
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(values, infos, args), name="pending")]

    async def _write(
        self,
        values: Sequence[Pending],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs],
    ) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.made(info.name).view(_Ours)], [info], [arg]):
                written.result()


def handler() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of `Pending` and arrays, for `CheckpointManager`; what it wrote is read like any other checkpoint.

    Uncompressed: float32 weights lose some 7% of their size to zstd, which takes as long as all else.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (Pending, _PendingHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
