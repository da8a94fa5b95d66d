"""What each lever of memory and precision does to a training step, by the TPU compiler's account; no TPU is needed.

    python -m benchmarks.memory_levers                       # all, several minutes of processor time each
    python -m benchmarks.memory_levers --only full block     # these; others keep the results they have
    python -m benchmarks.memory_levers --only                # none: brings the table in docs/ up to date

A causal decoder of 1.1 billion parameters (22 layers, width 2048, 16 heads of 128, 4 key heads, SwiGLU 5632, vocabulary
32,000) in bfloat16, rows of 2,048 tokens, 4 rows a chip, AdamW, on 8 chips of v6e: the real step, compiled by libtpu.
One lever at a time is moved. Bytes are of one chip. Writes results/memory_levers.json.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.guides import fill
from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization
from jaxlm.layers.positions import Rope
from jaxlm.layers.remat import Remat, RematPolicy, SaveNamed
from jaxlm.layers.stack import StackConfig
from jaxlm.models import LanguageModel
from jaxlm.models.config import ComputeType, HeadConfig, LanguageModelConfig
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import Memory, ParallelConfig, Parallelism
from jaxlm.planning.costs import Costs, costs
from jaxlm.training import machine
from jaxlm.training.moments import MomentStorage
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, abstract_state
from jaxlm.training.step import StepConfig, make_train_step
from pallas_kernels import ahead_of_time

RESULTS = pathlib.Path(__file__).parent / "results" / "memory_levers.json"
TOPOLOGY, CHIPS = "v6e:2x4", 8
ROWS, LENGTH = 4, 2048
# Products that overlap with the transfer of their operands take loops in which bytes are hard to read.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Lever:
    """A training step; the defaults are what the others are compared with.

    Attributes:
      why: what is moved.
      parallel: mesh, rules of the state, memory of the moments.
      remat: what is computed again.
      compute: precision.
      moments: how moments are stored.
      microbatches: of a step; each has as many rows as the whole batch of the others.
    """

    why: str
    parallel: ParallelConfig = ParallelConfig(MeshConfig(fsdp=CHIPS))
    remat: RematPolicy = Remat.FULL
    compute: ComputeType = ComputeType.BFLOAT16
    moments: MomentStorage | None = None
    microbatches: int = 1


_DATA = ParallelConfig(MeshConfig(data=CHIPS))
_ZERO1 = ParallelConfig(MeshConfig(data=CHIPS), state_rules=(("embed", ("fsdp", "data")),))
LEVERS = {
    "full": Lever("FSDP 8, everything in a block computed again"),
    "block": Lever("attention's output and log-sum-exp kept", remat=Remat.BLOCK),
    "dots_no_batch": Lever("products with parameters kept", remat=Remat.DOTS_NO_BATCH),
    "dots": Lever("products and attention kept", remat=Remat.DOTS),
    "none": Lever("nothing computed again", remat=Remat.NONE),
    "offload": Lever("block's input and attention's output on the host", remat=Remat.OFFLOAD),
    "offload_input": Lever("block's input on the host", remat=SaveNamed(on_host=("block_input",))),
    "bfloat16_moments": Lever("both moments in bfloat16, rounded stochastically", moments=MomentStorage()),
    "host_moments": Lever("moments on the host", ParallelConfig(MeshConfig(fsdp=CHIPS), moments=Memory.HOST)),
    "microbatches": Lever("4 microbatches, 4 times the rows", microbatches=4),
    "data": Lever("data parallel 8 instead of FSDP", _DATA),
    "zero1": Lever("data parallel 8, state stored in eighths (ZeRO-1)", _ZERO1),
    "data_microbatches": Lever("data parallel 8, 4 microbatches", _DATA, microbatches=4),
    "zero1_microbatches": Lever("ZeRO-1, 4 microbatches", _ZERO1, microbatches=4),
    "int8": Lever("the stack's products in int8", compute=ComputeType.INT8),
}


def model_config(lever: Lever) -> LanguageModelConfig:
    """The decoder."""
    block = BlockConfig(AttentionConfig(16, 128, 4, position=Rope()), FeedForwardConfig(5632), NormConfig())
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        vocab_size=32_000,
        width=2048,
        embedding=EmbeddingConfig(),
        head=HeadConfig(tied=False),
        init=InitConfig(),
        decoder=StackConfig((block,), 22, final_norm=NormConfig(), remat=lever.remat),
        compute=lever.compute,
    )


def compiled_step(lever: Lever) -> tuple[jax.stages.Compiled, Parallelism]:
    """jaxlm's training step for the pod, without one."""
    parallel = lever.parallel.on(ahead_of_time.devices(TOPOLOGY))
    model = model_config(lever)
    definition, params, infos = abstract_model(lambda key: LanguageModel(model, key=key))
    optimizer = build_optimizer(
        OptimizerConfig(AdamW(), Constant(1e-3), moments=lever.moments),
        infos,
        total_steps=1,
        parametrization=Parametrization(),
    )
    config = StepConfig(microbatches=lever.microbatches)
    step = make_train_step(definition, FullLM(), optimizer, parallel, config=config, loss=LossConfig())
    rows = ROWS * CHIPS * lever.microbatches
    placed = parallel.batch_sharding(rows)
    types = {"input_tokens": "int32", "target_tokens": "int32", "loss_weights": "float32"}
    types |= {"segment_ids": "int32", "positions": "int32"}
    batch = {
        f"decoder_{name}": jax.ShapeDtypeStruct((rows, LENGTH), jnp.dtype(dtype), sharding=placed)
        for name, dtype in types.items()
    }
    with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh), ahead_of_time.writing_no_cache():
        return step.lower(abstract_state(params, optimizer, parallel), batch).compile(OPTIONS), parallel


def measured(lever: Lever) -> dict[str, Any]:
    """Figures of one step on one chip."""
    start = time.process_time()
    compiled, parallel = compiled_step(lever)
    stats = compiled.memory_analysis()
    text = compiled.as_text()
    found: Costs = costs(text, dict(parallel.mesh.shape))
    return {
        "why": lever.why,
        "arguments_mib": stats.argument_size_in_bytes / MIB,
        "temporaries_mib": stats.temp_size_in_bytes / MIB,
        "peak_mib": stats.peak_memory_in_bytes / MIB,
        "host_arguments_mib": stats.host_argument_size_in_bytes / MIB,
        "host_temporaries_mib": stats.host_temp_size_in_bytes / MIB,
        "tflops": found.flops / 1e12,
        "hbm_gib": found.bytes / 2**30,
        "collectives_mib": {kind: size / MIB for kind, size in found.collective_bytes().items()},
        "sent_mib": sum(collective.sent for collective in found.collectives) / MIB,
        "kernels": dict(found.kernels),
        "products": {
            kind: len([line for line in text.splitlines() if _multiplies(line) and f"{kind}[" in line])
            for kind in ("s8", "f8e4m3fn", "bf16")
        },
        "compile_cpu_seconds": time.process_time() - start,
    }


def _multiplies(line: str) -> bool:
    return " convolution(" in line or " dot(" in line


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table: MiB of one chip, TFLOP a step, runs of attention's forward kernel."""
    lines = [
        "| lever | what it is | arguments | temporaries | peak | on the host | TFLOP | attention | sent |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in LEVERS if name in results):
        row = results[name]
        if "refused" in row:
            lines.append(f"| `{name}` | {row['why']} | {row['refused']} | | | | | | |")
            continue
        host = row["host_arguments_mib"] + row["host_temporaries_mib"]
        forward = sum(runs for kernel, runs in row["kernels"].items() if "forward" in kernel)
        lines.append(
            f"| `{name}` | {row['why']} | {row['arguments_mib']:,.0f} | {row['temporaries_mib']:,.0f} | "
            f"{row['peak_mib']:,.0f} | {host:,.0f} | {row['tflops']:.1f} | {forward} | {row['sent_mib']:,.0f} |"
        )
    return "\n".join(lines)


def committed(_: str) -> str:
    """The table of the committed results, for docs/memory_and_precision.md."""
    return table(json.loads(RESULTS.read_text())["levers"])


def main() -> None:
    """Compiles, prints the table, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="LEVER", default=list(LEVERS), help=", ".join(LEVERS))
    chosen = parser.parse_args().only
    if unknown := set(chosen) - set(LEVERS):
        parser.error(f"there is no lever {unknown.pop()!r}; there are {', '.join(LEVERS)}")
    found = json.loads(RESULTS.read_text())["levers"] if RESULTS.exists() else {}
    for name in chosen:
        with contextlib.suppress(KeyError):
            del found[name]
        try:
            found[name] = measured(LEVERS[name])
        except jax.errors.JaxRuntimeError as error:  # what does not fit into a chip's memory
            found[name] = {"why": LEVERS[name].why, "refused": str(error).splitlines()[0][:200]}
        print(name, json.dumps(found[name]), flush=True)
        RESULTS.write_text(
            json.dumps(
                {
                    "topology": TOPOLOGY,
                    "rows_a_chip": ROWS,
                    "length": LENGTH,
                    "machine": machine.facts(),
                    "levers": {name: found[name] for name in LEVERS if name in found},
                },
                indent=1,
            )
            + "\n"
        )
    print(table(found))
    fill("memory_and_precision.md", "memory_levers", committed)


if __name__ == "__main__":
    main()
