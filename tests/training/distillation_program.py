"""Run with 8 devices by test_meshes.py: a step that learns from a larger teacher, on a mesh and on one device."""

import dataclasses
import json

from mesh_agreement import agreement
from small_models import decoder, packed_batch

from jaxlm.layers.stack import Layers
from jaxlm.parallel.mesh import MeshConfig

student = decoder()
stack = dataclasses.replace(student.decoder, num_layers=1, layers=Layers.UNROLL)
teacher = dataclasses.replace(student, decoder=stack, width=2 * student.width)
meshes = {"data x fsdp x tensor": (MeshConfig(fsdp=2, tensor=2), 8)}
print(json.dumps(agreement(student, packed_batch(0), meshes, teacher)))
