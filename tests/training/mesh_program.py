"""Run with 8 devices by test_meshes.py: loss and gradients of one step on several meshes, against one device."""

import json

from mesh_agreement import agreement
from small_models import decoder, packed_batch

from jaxlm.parallel.mesh import MeshConfig

MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "data x fsdp x tensor": MeshConfig(fsdp=2, tensor=2),
    "slices x fsdp x sequence": MeshConfig(slices=2, fsdp=2, sequence=2),
}
print(json.dumps(agreement(decoder(dropout=0.1), packed_batch(0), {name: (m, 8) for name, m in MESHES.items()})))
