"""Run with 8 devices by test_search_meshes.py: searches on a mesh, and on one device."""

import json

import jax
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.decoding.beam import BeamConfig, beam_search
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.drafts import NGramLookup
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.decoding.speculative import SpeculativeConfig, speculate
from jaxlm.layers.cache import CacheConfig
from jaxlm.layers.context import LOCAL, Context
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.parallel.sharded_ops import ShardedOps
from tests.decoding.test_speculative import PROMPTS, K, make_model

BEAMS = BeamConfig(6, width=4, num_return=2)
SAMPLING = SamplingConfig(8, temperature=0.7)


def found(model):
    beams = beam_search(model, PROMPTS, BEAMS, end_ids=(1,))
    requests = [Request(prompt, SAMPLING, seed=i) for i, prompt in enumerate(PROMPTS)]
    drawn = speculate(model, requests, SpeculativeConfig(K, NGramLookup()))
    return {
        "beams": [[text.tokens.tolist() for text in texts] for texts in beams],
        "scores": [[text.score for text in texts] for texts in beams],
        "drawn": [answer.tokens.tolist() for answer in drawn],
    }


def on_mesh(model, parallel):
    """The same model with its parameters spread over the mesh."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            value = variable.get_value()
            where = parallel.sharding(variable.get_metadata()["axes"], value.shape)
            variable.set_value(jax.device_put(value, where))
    return model


made = make_model(Architecture.CAUSAL_DECODER, layers=1)
caching = CacheConfig(extension=K + 1)
answers = {"one": found(CachedModel(made, start_id=0, caching=caching, context=LOCAL))}
parallel = ParallelConfig(MeshConfig(fsdp=2, tensor=2)).on()
spread = on_mesh(make_model(Architecture.CAUSAL_DECODER, layers=1), parallel)
answers["split"] = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(nnx.state(spread)))
answers["mesh"] = found(CachedModel(spread, start_id=0, caching=caching, context=Context(ops=ShardedOps(parallel))))
print(json.dumps(answers))
