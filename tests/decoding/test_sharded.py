"""On a mesh the engine writes what it writes on one device."""

import json


def test_a_mesh_writes_what_one_device_writes(run_python):
    """Slots over fsdp and expert, heads over tensor, experts where they are; nothing compiles twice."""
    output = run_python(["tests/decoding/sharded_program.py"], devices=8, timeout=900).stdout
    found = json.loads(output.strip().splitlines()[-1])
    alone, rows, stages = found["previews"]
    sequence, stage = found["refusals"]
    assert found["same"] and found["compiles"] == []
    assert found["spec"] == "P(('fsdp', 'expert'), 'tensor')"
    assert rows == alone and "model: " in rows
    assert "stages" in stages
    assert "set MeshConfig.sequence to 1" in sequence and "set MeshConfig.stage to 1" in stage
