"""Batches on their way to the devices while the step before them runs."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.parallel.parallelism import Parallelism

_END = object()


def to_devices(batch: Mapping[str, np.ndarray], parallel: Parallelism) -> dict[str, jax.Array]:
    """This host's rows of a batch (`Parallelism.host_rows`) as global arrays, split over examples."""
    count = len(next(iter(batch.values())))
    if jax.process_count() == 1:
        size, rows = count, np.arange(count)
    else:
        parts = parallel.batch_parts  # the share that a host has is the same for any number of rows
        size = count * parts // len(parallel.host_rows(parts))
        rows = parallel.host_rows(size)
    sharding = parallel.batch_sharding(size)

    def place(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start][:, *index[1:]]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return {name: place(x) for name, x in batch.items()}


class Prefetcher:
    """Reads a loader in a thread, `depth` batches ahead; yields (batch on the devices, the loader's state after it).

    The state travels with its batch: at a checkpoint the loader itself is ahead of what was trained on.

    Args:
      loader: an iterator of batches with `state()`.
      parallel: where batches go.
      depth: batches held on the devices beyond the one in use.
    """

    def __init__(self, loader: Any, parallel: Parallelism, *, depth: int = 2):
        self._loader, self._parallel = loader, parallel
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[dict[str, jax.Array], Any]]:
        return self

    def __next__(self) -> tuple[dict[str, jax.Array], Any]:
        item = self._queue.get()
        if item is _END or isinstance(item, BaseException):
            self._queue.put(item)  # the next call ends in the same way
            raise StopIteration if item is _END else item
        return item

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the thread. The loader stays where it is, up to `depth` + 1 batches ahead."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # the thread may be waiting for room
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _read(self) -> None:
        try:
            while not self._closed.is_set():
                batch = next(self._loader)
                self._queue.put((to_devices(batch, self._parallel), self._loader.state()))
        except StopIteration:
            self._queue.put(_END)
        except BaseException as error:  # handed to the training loop, which raises it
            self._queue.put(error)
