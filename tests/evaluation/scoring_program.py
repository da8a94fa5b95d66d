"""Run with 8 devices by test_scoring.py: scores on a mesh beside those of one device."""

import json

import jax
import numpy as np
from flax import nnx
from models import ROPE, T5_TABLE, make_model

from jaxlm.architecture import Architecture
from jaxlm.evaluation.scoring import Request, Scorer, ScoringConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig

CONFIG = ScoringConfig(row_length=32, batch_tokens=128)


def on_mesh(model, parallel):
    graph, state = nnx.split(model)

    def placed(variable):
        value = variable.get_value()
        return variable.replace(jax.device_put(value, parallel.sharding(variable.get_metadata()["axes"], value.shape)))

    return nnx.merge(graph, jax.tree.map(placed, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


chance = np.random.default_rng(0)
requests = [
    Request(chance.integers(3, 39, n), [chance.integers(3, 39, m) for m in (3, 1, 6)]) for n in (5, 9, 2, 14, 7)
]
parallel = ParallelConfig(mesh=MeshConfig(fsdp=2, tensor=2)).on()
differences = {}
for architecture, position in ((Architecture.PREFIX_DECODER, T5_TABLE), (Architecture.ENCODER_DECODER, ROPE)):
    model = make_model(architecture, position=position)
    one = Scorer(model, start_id=0, config=CONFIG).score(requests)
    many = Scorer(on_mesh(model, parallel), start_id=0, config=CONFIG, parallel=parallel).score(requests)
    pairs = [(a, b) for x, y in zip(one, many, strict=True) for a, b in zip(x, y, strict=True)]
    differences[architecture.value] = max(
        float(np.abs(a.log_probabilities - b.log_probabilities).max()) for a, b in pairs
    )
refusal = ""
try:
    Scorer(model, start_id=0, parallel=ParallelConfig(mesh=MeshConfig(sequence=2)).on())
except ValueError as error:
    refusal = str(error)
print(json.dumps({"differences": differences, "refusal": refusal}))
