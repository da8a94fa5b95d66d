"""Metrics: summed on the device as (sum, weight) pairs, read once an interval, and turned into named numbers.

Nothing here makes the host wait for the device before it asks for the numbers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.chips import chip_of
from jaxlm.training.step import Metrics

_NO_STEP = np.iinfo(np.int32).max


class Totals(NamedTuple):
    """Metrics of an interval of steps.

    Attributes:
      metrics: sums of the steps' (sum, weight) pairs.
      first_bad_step: the first step that "diverged", or the largest int32.
    """

    metrics: Metrics
    first_bad_step: jax.Array


@jax.jit
def add(totals: Totals, metrics: Metrics, step: jax.Array | int) -> Totals:
    """The totals with one more step; dispatched behind the step without waiting for it."""
    diverged = metrics.get("diverged", (0.0, 1.0))[0] > 0  # an evaluation has none
    bad = jnp.minimum(totals.first_bad_step, jnp.where(diverged, step, _NO_STEP))
    return Totals(jax.tree.map(jnp.add, totals.metrics, metrics), bad.astype(jnp.int32))


def zero(metrics: Metrics) -> Totals:
    """Totals of no steps, for metrics of these shapes; laid out as they are, so that `add` compiles once."""
    everywhere = jax.tree.leaves(metrics)[0].sharding

    def filled(value: int, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        # Not device_put, which makes several processes compare what they put there, array by array.
        return jax.make_array_from_callback(shape, everywhere, lambda _: np.full(shape, value, dtype))

    zeros = jax.tree.map(lambda x: filled(0, x.shape, x.dtype), metrics)
    return Totals(zeros, filled(_NO_STEP, (), np.dtype(np.int32)))


def bad_step(totals: Totals) -> int | None:
    """The first step of the interval that diverged, if one did. Waits for the device."""
    step = int(totals.first_bad_step)
    return None if step == _NO_STEP else step


def any_skipped(totals: Totals) -> bool:
    """Whether the spike guard, if there is one, skipped a step of the interval. Waits for the device."""
    return "skipped" in totals.metrics and float(totals.metrics["skipped"][0]) > 0


@dataclasses.dataclass(frozen=True)
class Names:
    """What the entries of vector metrics stand for.

    Attributes:
      datasets: of "<metric>_by_dataset", `loader.dataset_names`.
      objectives: of "<metric>_by_objective", `objective.parts`.
      layers: of "norms/<tree>/<group>", `jaxlm.training.step.layer_names`.
    """

    datasets: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    layers: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def read(metrics: Metrics, names: Names = Names()) -> dict[str, float]:
    """Named numbers of an interval: weighted means; metrics without weight (no token, not due) are left out.

    "cross_entropy" is nats per target token, "bits_per_byte" = cross-entropy / ln 2 / bytes of the targets' text.
    Vectors become "<metric>/<name>". Waits for the device.

    Args:
      metrics: from a step or `Totals`.
      names: of the entries of vectors.
    """
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))
    values: dict[str, float] = {}

    def put(name: str, total: np.ndarray, weight: np.ndarray) -> None:
        for entry, s, w in zip(_entry_names(name, total, names), total.ravel(), weight.ravel(), strict=True):
            if w > 0:
                values[entry] = float(s / w)

    for name, (total, weight) in host.items():
        if name != "diverged" and not name.startswith("bytes"):
            put(name, total, weight)
    for suffix in ("", "_by_dataset"):
        if f"bytes{suffix}" in host and f"cross_entropy{suffix}" in host:
            nats, length = host[f"cross_entropy{suffix}"][0], host[f"bytes{suffix}"][0]
            put(f"bits_per_byte{suffix}", nats / math.log(2.0), length)
    return values


def _entry_names(name: str, total: np.ndarray, names: Names) -> list[str]:
    if total.ndim == 0:
        return [name]
    if name.startswith("norms/"):
        _, tree, group = name.split("/", 2)
        return [f"norms/{tree}/{layer}" for layer in names.layers[group]]
    metric, _, kind = name.rpartition("_by_")
    return [f"{metric}/{entry}" for entry in {"dataset": names.datasets, "objective": names.objectives}[kind]]


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in bfloat16, FLOP/s (`jaxlm.chips`); None where it is not known, as of a CPU."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.bf16


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, device_kind: str, num_devices: int
) -> float | None:
    """MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the share of the peak that useful work takes.

    Args:
      tokens_per_second: of the whole job.
      flops_per_token: forward and backward, as the model counts them: 6 per parameter in a matrix, attention by what
        its mask shows (causal counted as half); recomputation in the backward pass is no useful work.
      device_kind: `jax.Device.device_kind`.
      num_devices: of the whole job.

    Returns:
      a share in [0, 1], or None where the peak is not known.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * num_devices)
