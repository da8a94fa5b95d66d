"""Meshes by size and chip hold a model's state, and say where it cannot be."""

import math

import pytest

from jaxlm.chips import CHIPS
from jaxlm.configuration import resolve
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.presets import STATE_BYTES, STATE_SHARE, TENSOR, mesh_for


def test_every_chip_has_a_row_from_nothing_on():
    for chip in CHIPS:
        sizes = [row.parameters for row in TENSOR if chip.name in row.chips]
        assert sizes[0] == 0.0 and sizes == sorted(sizes)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("parameters", [1e8, 1e9, 8e9, 70e9, 500e9])
def test_the_state_fits_and_half_the_splitting_would_not_do(chip, parameters):
    devices = 4096
    mesh = mesh_for(parameters, chip.name, devices)
    assert math.prod(mesh.degrees(devices).values()) == devices
    parts, room = mesh.fsdp * mesh.tensor, STATE_SHARE * chip.memory
    assert STATE_BYTES * parameters / parts <= room
    assert mesh.fsdp == 1 or STATE_BYTES * parameters / (parts / 2) > room


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1e9, "v9", 8), "There is no chip 'v9'"),
        ((70e9, "v5e", 16), "at least"),
        ((70e9, "h200", 12), "8 ways by tensor"),
        ((1e9, "v5e", 9, 2), "in 2 slices"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mesh_for(*arguments)


def test_a_gin_line_takes_it(tmp_path):
    (tmp_path / "run.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxlm.parallel import parallelism\n"
        "from jaxlm.parallel import presets\n"
        "PARALLEL = @parallelism.ParallelConfig()\n"
        "parallelism.ParallelConfig.mesh = @presets.mesh_for()\n"
        "presets.mesh_for.parameters = 8e9\n"
        "presets.mesh_for.chip = 'v5p'\n"
        "presets.mesh_for.devices = 64\n"
    )
    found = resolve("%PARALLEL", [f"--gin_file={tmp_path / 'run.gin'}"])
    assert found.mesh == MeshConfig(fsdp=4)
