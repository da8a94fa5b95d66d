"""Machines by name, and the bandwidth between their devices."""

import types

import pytest

from jaxlm.chips import CHIPS, chip_of
from jaxlm.planning.topology import topology


@pytest.mark.parametrize(
    "name, kind, devices",
    [
        ("v5e:4x4", "tpu", 16),
        ("v5p:8x8x28", "tpu", 1792),
        ("tpu7x:2x2x1", "tpu", 8),
        ("2x v5e:16x16", "tpu", 512),
        ("2xv5e:4x4", "tpu", 32),
        ("h200:8", "gpu", 8),
        ("H200", "gpu", 1),
        ("cpu:8", "cpu", 8),
        ("cpu", "cpu", 1),
    ],
)
def test_names(name, kind, devices):
    machine = topology(name)
    assert (machine.kind, machine.num_devices) == (kind, devices)


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5p:4x4", "v9:2x2", "v4:2x2x2", "v5e:0x4", "2x h200:8", "", "v5e:4*4"]
)
def test_unknown_names_are_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match="There is no topology .*v5e:4x4.*v5p:4x4x4.*h200:8.*cpu:8"):
        topology(name)


def device(*coords, slice_index=0):
    return types.SimpleNamespace(coords=coords, slice_index=slice_index)


def test_a_torus_sends_over_as_many_wires_as_the_group_has_axes():
    link = topology("v5e:16x16").chip.link_bandwidth
    ring = [device(i, 0, 0) for i in range(16)]
    assert topology("v5e:16x16").bandwidth(ring) == 2 * link  # wraps around
    assert topology("v5e:16x16").bandwidth(ring[:4]) == link  # part of an axis
    assert topology("v5e:4x4").bandwidth(ring[:4]) == link  # too short to wrap
    plane = [device(i, j, 0) for i in range(16) for j in range(16)]
    assert topology("v5e:16x16").bandwidth(plane) == 4 * link
    cube = [device(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    assert topology("v5p:4x4x4").bandwidth(cube) == 6 * topology("v5p:4x4x4").chip.link_bandwidth


def test_slices_talk_over_the_data_centre_network():
    machine = topology("2x v5e:4x4")
    assert machine.bandwidth([device(0, 0, 0), device(0, 0, 0, slice_index=1)]) == machine.chip.network_bandwidth


def test_every_chip_says_where_its_figures_are_from():
    assert all(chip.source and chip.memory <= 1.01 * chip.hbm for chip in CHIPS)
    assert chip_of("TPU v5 lite").name == "v5e" and chip_of("TPU v5").name == "v5p"
    assert chip_of("NVIDIA H200 141GB HBM3e").name == "h200"
    assert chip_of("cpu") is None
