"""The platform that kernels are traced for is the mesh's, not the machine's."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import platforms


@pytest.mark.parametrize(
    "kind, chip",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100", "nvidia a100"),
    ],
)
def test_chips(kind, chip):
    assert platforms.chip_of(kind) == chip


def test_the_mesh_decides():
    assert platforms.current().kind == "cpu" and platforms.tpu_interpret()
    for platform, device_kind, expected in [("tpu", "TPU v6 lite", "v6e"), ("gpu", "NVIDIA H200", "h200")]:
        device = AbstractDevice(device_kind=device_kind, num_cores=None, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            assert platforms.current() == platforms.Platform(platform, expected)
            assert not platforms.tpu_interpret() and not platforms.gpu_interpret()
    assert "InterpretGPUParams" in repr(platforms.gpu_interpret()["interpret"])
