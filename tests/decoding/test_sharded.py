"""On a mesh the engine writes what it writes on one device."""

import json


def test_meshes_write_what_one_device_writes(run_python):
    """Caches lie with slots over data and fsdp, heads over tensor; experts where they are; nothing compiles twice."""
    output = run_python(["tests/decoding/sharded_program.py"], devices=8, timeout=900).stdout
    found = json.loads(output.strip().splitlines()[-1])
    alone, rows, stages = found.pop("previews")
    sequence, stage = found.pop("refusals")
    assert len(found) == 2
    for name, answer in found.items():
        assert answer["same"] and answer["compiles"] == [], (name, answer)
    assert found["data x fsdp x tensor"]["spec"] == "P(('data', 'fsdp'), 'tensor')"
    assert rows == alone and "model: " in rows
    assert "stages" in stages
    assert "set MeshConfig.sequence to 1" in sequence and "set MeshConfig.stage to 1" in stage
