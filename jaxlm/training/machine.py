"""What a run ran on: versions and devices for its records, and a quick measure of how fast matrix products are."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp

from jaxlm.parallel import xla_flags

_PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

EFFICIENCY = 0.5
"""Share of the speed of large matrix products that a training step of a small model reaches, for expected times."""


def facts() -> dict[str, str]:
    """Versions and devices, for `run.json`, reports and benchmark results. Holds no name or path of the machine."""
    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    return {
        "devices": f"{jax.device_count()} x {kind}" + (f", {os.cpu_count()} cores" if device.platform == "cpu" else ""),
        "processes": str(jax.process_count()),
        **({"XLA flags": shown} if (shown := xla_flags.in_use()) else {}),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def versions() -> dict[str, str]:
    """{package: version} of what computes."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def process_began() -> float:
    """When this process began, seconds since 1970; now, where the system does not say (it is no Linux)."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        after_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), counted from behind the name
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


@functools.cache
def matmul_flops_per_second(size: int = 768, seconds: float = 0.15) -> float:
    """What one device does in float32 matrix products of `size`, FLOP/s, measured for about `seconds`, once a process.

    A training step reaches a part of it; good enough to say beforehand whether a run takes minutes or days.
    """
    product = jax.jit(lambda x: x @ x)
    x = product(jnp.ones((size, size), jnp.float32) / size).block_until_ready()  # compiled, and still all 1 / size
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        x = product(x).block_until_ready()
        count += 1
    return 2 * size**3 * count / elapsed
