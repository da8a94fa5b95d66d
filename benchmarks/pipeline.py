"""Pipeline stages beside the same devices without them: memory and traffic ahead of time, processor time on a CPU.

    python -m benchmarks.pipeline            # writes results/pipeline.json after each figure

Compiled for eight v5e chips that need not be there: loss and gradients of a decoder on 2 stages x 2 ways of FSDP x 2 of
tensor parallelism. Traffic is what a device sends, loops multiplied out; the shares are over the mesh axis `stage`.

On the CPU two devices share the machine's cores, and a stage that computes on zeros costs as much as one that works: so
processor time over that of data parallelism shows the idle share. `expected` is that share alone, steps / (M * rounds);
embedding and head, which have none, are not in it.
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.context import Context
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import Rope
from jaxlm.layers.remat import Remat
from jaxlm.layers.stack import StackConfig
from jaxlm.models import ComputeType, HeadConfig, LanguageModel, LanguageModelConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.parallel.stages import Pipeline
from jaxlm.planning.costs import costs
from jaxlm.planning.topology import topology
from jaxlm.training import machine
from jaxlm.training.parameters import split_model
from jaxlm.training.state import abstract_model, state_shardings

RESULTS = pathlib.Path(__file__).parent / "results" / "pipeline.json"
TOPOLOGY = "v5e:2x4"
STAGED = MeshConfig(data=1, stage=2, fsdp=2, tensor=2)
COMPILED = {
    "no stages": (MeshConfig(data=1, fsdp=4, tensor=2), None, Remat.FULL),
    "gpipe, 4 microbatches": (STAGED, Pipeline(4), Remat.FULL),
    "gpipe, 16 microbatches": (STAGED, Pipeline(16), Remat.FULL),
    "gpipe, 16 microbatches, stage recomputed": (STAGED, Pipeline(16, 1, "stage"), Remat.NONE),
    "2 rounds, 16 microbatches, stage recomputed": (STAGED, Pipeline(16, 2, "stage"), Remat.NONE),
}
MEASURED = {
    "gpipe, 2 microbatches": (Pipeline(2), Remat.FULL),
    "gpipe, 8 microbatches": (Pipeline(8), Remat.FULL),
    "2 rounds, 2 microbatches, stage recomputed": (Pipeline(2, 2, "stage"), Remat.NONE),
}


def decoder(width: int, layers: int, heads: int, remat: Remat, compute: ComputeType) -> LanguageModelConfig:
    """A causal decoder with a small vocabulary."""
    block = BlockConfig(
        AttentionConfig(heads, width // heads, position=Rope(), backend="xla"),
        FeedForwardConfig(4 * width),
        NormConfig(),
    )
    stack = StackConfig((block,), layers, final_norm=NormConfig(), remat=remat)
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        1024,
        width,
        EmbeddingConfig(),
        HeadConfig(tied=False),
        InitConfig(),
        decoder=stack,
        compute=compute,
    )


def gradient_program(config: LanguageModelConfig, parallel: Parallelism, batch_size: int, length: int) -> Any:
    """The jitted loss and gradients, shapes of its arguments, and what makes parameters."""

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, key=key, stages=parallel.stages)

    definition, shapes, infos = abstract_model(make)
    shardings = state_shardings(shapes, infos, parallel)
    context = Context(ops=ShardedOps(parallel))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        model = definition.merge(params)
        batch = {
            "decoder_input_tokens": tokens,
            "decoder_segment_ids": jnp.ones_like(tokens),
            "decoder_positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        }
        hidden, _ = model.hidden_states(batch, context=context)
        weights = jnp.full(tokens.shape, 1 / tokens.size)
        return context.ops.cross_entropy(*model.output(hidden, context=context), tokens, weights)[0]

    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=parallel.batch_sharding(batch_size))
    initial = jax.jit(lambda: split_model(make(jax.random.key(0)))[1], out_shardings=shardings)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings)), (params, tokens), initial


def compiled(mesh: MeshConfig, pipeline: Pipeline | None, remat: Remat) -> dict[str, Any]:
    """Memory and traffic of a device."""
    parallel = ParallelConfig(mesh, pipeline=pipeline).on(topology(TOPOLOGY).devices())
    config = decoder(1024, 8, 8, remat, ComputeType.BFLOAT16)
    program, shapes, _ = gradient_program(config, parallel, 64, 512)
    with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
        done = program.lower(*shapes).compile()
    memory, found = done.memory_analysis(), costs(done.as_text(), dict(parallel.mesh.shape))
    over_stages = [c for c in found.collectives if "stage" in c.axes]
    traffic: dict[str, float] = {}
    for collective in over_stages:
        traffic[collective.kind] = traffic.get(collective.kind, 0.0) + collective.sent / 1e6
    answer = {
        "argument_mb": memory.argument_size_in_bytes / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "sent_mb": sum(c.sent for c in found.collectives) / 1e6,
        "sent_over_stages_mb": traffic,
        "product_tflop": found.flops / 1e12,
    }
    if pipeline is not None:
        answer["idle_share"] = parallel.stages.bubble(pipeline.microbatches)
    return answer


def processor_seconds(mesh: MeshConfig, pipeline: Pipeline | None, remat: Remat, steps: int = 6) -> float:
    """The least of several steps on two CPU devices."""
    parallel = ParallelConfig(mesh, pipeline=pipeline).on(jax.devices("cpu")[:2])
    program, _, initial = gradient_program(
        decoder(256, 8, 4, remat, ComputeType.FLOAT32), parallel, batch_size=16, length=128
    )
    tokens = np.random.default_rng(0).integers(1, 1024, (16, 128)).astype(np.int32)
    params, tokens = initial(), jax.device_put(tokens, parallel.batch_sharding(16))
    jax.block_until_ready(program(params, tokens))
    spent = []
    for _ in range(steps):
        begin = time.process_time()
        jax.block_until_ready(program(params, tokens))
        spent.append(time.process_time() - begin)
    return min(spent)


def measured() -> dict[str, Any]:
    """Processor time of pipelines over that of data parallelism, with the same rematerialisation of blocks."""
    alone = processor_seconds(MeshConfig(data=2), None, Remat.FULL)
    answer: dict[str, Any] = {"data_parallel_cpu_seconds": alone}
    for name, (pipeline, remat) in MEASURED.items():
        stages = ParallelConfig(MeshConfig(data=1, stage=2), pipeline=pipeline).on(jax.devices("cpu")[:2]).stages
        steps = stages.steps(pipeline.microbatches)
        answer[name] = {
            "ratio": processor_seconds(MeshConfig(data=1, stage=2), pipeline, remat) / alone,
            "expected": steps / (pipeline.microbatches * pipeline.rounds),
        }
    return answer


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["measured", "compiled"], help="measured, compiled")
    parts = parser.parse_args().parts
    if "measured" in parts:
        save("measured", measured())
    if "compiled" in parts:
        found = {}
        for name, (mesh, pipeline, remat) in COMPILED.items():
            found[name] = compiled(mesh, pipeline, remat)
            save("compiled", found)


def save(part: str, found: dict[str, Any]) -> None:
    """Writes and prints one part's figures; those of the other stay."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {"machine": machine.facts(), part: found}, indent=2) + "\n")
    print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
