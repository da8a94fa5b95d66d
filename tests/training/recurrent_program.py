"""Run with 8 devices by test_meshes.py: Mamba, Mamba-2 and linear attention on a mesh, against one device."""

import dataclasses
import json

from mesh_agreement import agreement
from small_models import decoder, packed_batch

from jaxlm.layers import HeadDecay, LinearAttentionConfig, Mamba2Config, MambaBlockConfig, MambaConfig, NormConfig
from jaxlm.layers.remat import Remat
from jaxlm.parallel.mesh import MeshConfig

model = decoder(remat=Remat.NONE)
linear = LinearAttentionConfig(4, 8, decay=HeadDecay(), gate="silu", output_norm=NormConfig())
blocks = (
    MambaBlockConfig(MambaConfig(48, 2, state=4), NormConfig(), dropout=0.1),
    MambaBlockConfig(Mamba2Config(4, 8, state=8, groups=2), NormConfig()),
    dataclasses.replace(model.decoder.blocks[0], attention=linear),
)
model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, blocks=blocks, num_layers=3))
answer = agreement(model, packed_batch(0), {"data x fsdp x tensor": (MeshConfig(fsdp=2, tensor=2), 8)})
try:
    agreement(model, packed_batch(0), {"sequence": (MeshConfig(sequence=2), 8)})
except ValueError as error:
    answer["sequence"] = str(error)
print(json.dumps(answer))
