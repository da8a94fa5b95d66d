"""A roofline: how long a step takes at least, by arithmetic, memory and network (Williams et al. 2009).

An estimate, not a measurement: peaks of data sheets are never reached, and how far the three overlap is the compiler's
and the machine's business. Good for comparing meshes, and for knowing which of the three is in the way.
"""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from jaxlm.planning.costs import Costs
from jaxlm.planning.memory import devices_along
from jaxlm.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, were each the only limit.

    Attributes:
      compute: products and kernels at the chip's bfloat16 peak.
      memory: traffic of main memory at its bandwidth.
      network: collectives one after the other, each at the bandwidth along its axes.
      by_axis: the last by mesh axes, {"fsdp": seconds}.
      mfu: model FLOPs utilisation if a step takes `step` seconds, in [0, 1].
      tokens_per_second: of a device, likewise.
    """

    compute: float
    memory: float
    network: float
    by_axis: Mapping[str, float]
    mfu: float
    tokens_per_second: float

    @property
    def step(self) -> float:
        """The longest of the three: all overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        """Which of them that is."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def estimate(costs: Costs, machine: Topology, mesh: Mesh, *, model_flops: float, tokens: int) -> Estimate | None:
    """The roofline of a step; None where nothing is known of the chip (a CPU).

    Args:
      costs: of one step, on one device.
      machine: what it runs on.
      mesh: the devices.
      model_flops: of one step on all devices, as the model counts them (`jaxlm.models.accounting`).
      tokens: of one step on all devices.
    """
    if (chip := machine.chip) is None:
        return None
    by_axis: dict[str, float] = {}
    for collective in costs.collectives:
        axes = collective.axes or tuple(mesh.axis_names)
        bandwidth = machine.bandwidth(devices_along(mesh, axes))
        if bandwidth is not None:
            name = " x ".join(axis for axis in axes if mesh.shape[axis] > 1)
            by_axis[name] = by_axis.get(name, 0.0) + collective.sent / bandwidth
    # What the model counts must be done, also by kernels that declare no cost.
    flops = max(costs.flops, model_flops / mesh.size)
    compute, memory, network = flops / chip.bf16, costs.bytes / chip.hbm_bandwidth, sum(by_axis.values())
    step = max(compute, memory, network)
    return Estimate(
        compute=compute,
        memory=memory,
        network=network,
        by_axis=by_axis,
        mfu=model_flops / (step * mesh.size * chip.bf16),
        tokens_per_second=tokens / (step * mesh.size),
    )
