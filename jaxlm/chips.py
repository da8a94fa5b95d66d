"""What accelerators can do by their makers' data sheets: arithmetic, memory, networks. Imports nothing of jaxlm.

The unit is a jax device. A TPU7x chip is two devices; on all others, as jax presents them, a device is a chip.
"""

import dataclasses

_CLOUD = "docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device.

    Attributes:
      name: as in a topology's name, "v5p".
      kinds: beginnings of `jax.Device.device_kind`.
      bf16: dense FLOP/s of matrix products in bfloat16.
      hbm: bytes of main memory by the data sheet.
      hbm_bandwidth: bytes a second, reading and writing together.
      usable: bytes of main memory that programs can have; None is `hbm`.
      fp8, int8: operations a second in these types; None where products in them are no faster than in bfloat16.
      links: wires to neighbours; 0 where there are none, or a switch connects all.
      link_bandwidth: bytes a second in one direction of one link; with a switch, of all.
      network_bandwidth: bytes a second in one direction to devices beyond the slice or the node.
      source: where the figures are from.
    """

    name: str
    kinds: tuple[str, ...]
    bf16: float
    hbm: int
    hbm_bandwidth: float
    usable: int | None = None
    fp8: float | None = None
    int8: float | None = None
    links: int = 0
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    source: str = ""

    @property
    def memory(self) -> int:
        """Bytes that a program can have."""
        return self.hbm if self.usable is None else self.usable


_GIB = 2**30

CHIPS = (
    Chip(
        "v4",
        ("TPU v4",),
        bf16=275e12,
        hbm=32 * _GIB,
        hbm_bandwidth=1228e9,
        int8=None,
        links=6,
        link_bandwidth=50e9,
        source=f"{_CLOUD}/v4",
    ),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        bf16=197e12,
        hbm=16 * _GIB,
        hbm_bandwidth=819e9,
        usable=int(15.75 * _GIB),
        int8=393e12,
        links=4,
        link_bandwidth=50e9,
        network_bandwidth=3.125e9,
        source=f"{_CLOUD}/v5e: 400 GB/s both ways on 4 ports, 6.4 Tb/s for a pod of 256",
    ),
    Chip(
        "v5p",
        ("TPU v5p", "TPU v5"),
        bf16=459e12,
        hbm=95 * _GIB,
        hbm_bandwidth=2765e9,
        usable=int(95.73 * _GIB),
        int8=918e12,
        links=6,
        link_bandwidth=100e9,
        network_bandwidth=6.25e9,
        source=f"{_CLOUD}/v5p, {_CLOUD}/tpu7x: 1,200 GB/s both ways on 6 ports, 50 Gb/s to the data centre",
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        bf16=918e12,
        hbm=32 * _GIB,
        hbm_bandwidth=1638e9,
        usable=int(31.24 * _GIB),
        int8=1836e12,
        links=4,
        link_bandwidth=100e9,
        network_bandwidth=12.5e9,
        source=f"{_CLOUD}/v6e: 800 GB/s both ways on 4 ports; {_CLOUD}/tpu7x: 100 Gb/s to the data centre",
    ),
    Chip(
        "tpu7x",
        ("TPU7x",),
        bf16=1153.5e12,
        hbm=96 * _GIB,
        hbm_bandwidth=3690e9,
        usable=int(94.75 * _GIB),
        fp8=2307e12,
        links=6,
        link_bandwidth=50e9,
        network_bandwidth=6.25e9,
        source=f"{_CLOUD}/tpu7x, half a chip: 2,307 TFLOP/s, 192 GiB, 7,380 GB/s, 1,200 GB/s both ways on 6 ports",
    ),
    Chip(
        "a100",
        ("NVIDIA A100",),
        bf16=312e12,
        hbm=80 * _GIB,
        hbm_bandwidth=2039e9,
        int8=624e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        source="NVIDIA A100 80GB SXM data sheet; network: 200 Gb/s a GPU, as in DGX",
    ),
    Chip(
        "h100",
        ("NVIDIA H100",),
        bf16=989e12,
        hbm=80 * _GIB,
        hbm_bandwidth=3350e9,
        fp8=1979e12,
        int8=1979e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source="NVIDIA H100 SXM data sheet, without sparsity; network: 400 Gb/s a GPU, as in DGX",
    ),
    Chip(
        "h200",
        ("NVIDIA H200",),
        bf16=989e12,
        hbm=141 * 10**9,
        hbm_bandwidth=4800e9,
        fp8=1979e12,
        int8=1979e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source="NVIDIA H200 SXM data sheet, without sparsity; network: 400 Gb/s a GPU, as in DGX",
    ),
    Chip(
        "b200",
        ("NVIDIA B200",),
        bf16=2250e12,
        hbm=180 * 10**9,
        hbm_bandwidth=8000e9,
        fp8=4500e12,
        int8=4500e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        source="NVIDIA DGX B200 data sheet, without sparsity",
    ),
    Chip(
        "gb200",
        ("NVIDIA GB200",),
        bf16=2500e12,
        hbm=186 * 10**9,
        hbm_bandwidth=8000e9,
        fp8=5000e12,
        int8=5000e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        source="NVIDIA GB200 NVL72 data sheet, without sparsity",
    ),
)
"""All that are known. `usable` of TPUs is what libtpu 0.0.51's compiler gives a program."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where it is not known (a CPU), rather than a guess."""
    matches = [(len(kind), chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(matches, key=lambda match: match[0])[1] if matches else None
