"""jaxlm's training step against the floor: the same model, arrays and batches, interleaved in one process.

    python -m benchmarks.step --steps 40        # both with and without rematerialisation; writes results/step.json

A step is charged with the processor time of all its threads. The two programs take turns, so that what else the machine
does falls on both; the ratio is of medians, with a bootstrap bound.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import step_floor
from benchmarks.step_floor import Shape
from jaxlm.architecture import Architecture
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig
from jaxlm.layers.positions import Rope
from jaxlm.layers.remat import Remat
from jaxlm.layers.stack import StackConfig
from jaxlm.models import LanguageModel
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.planning.costs import matmul_flops
from jaxlm.training import machine
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Constant
from jaxlm.training.state import TrainState, abstract_model, fresh_state, state_shardings
from jaxlm.training.step import StepConfig, make_train_step

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"ratio_upper_95": 1.05, "flops_ratio": 0.01, "loss_difference": 1e-5, "memory_gb": 0.3, "floor_remat": 4.8}


def model_config(shape: Shape, remat: bool) -> LanguageModelConfig:
    """The floor's model in jaxlm's terms."""
    norm = NormConfig(epsilon=shape.norm_epsilon)
    block = BlockConfig(
        # The floor's attention is dense; what skips hidden blocks would not do the same work.
        AttentionConfig(shape.heads, shape.head_dim, position=Rope(shape.rope_base), backend="xla"),
        FeedForwardConfig(shape.mlp),
        norm,
    )
    stack = StackConfig((block,), shape.layers, final_norm=norm, remat=Remat.FULL if remat else Remat.NONE)
    return LanguageModelConfig(
        Architecture.CAUSAL_DECODER,
        shape.vocab,
        shape.embed,
        EmbeddingConfig(),
        HeadConfig(tied=False),
        InitConfig(),
        decoder=stack,
    )


def params_like(abstract: dict, floor: dict[str, Any], shape: Shape) -> dict:
    """The floor's arrays in jaxlm's tree."""
    layers, qkv = floor["layers"], np.split(np.asarray(floor["layers"]["qkv"]), 3, axis=-1)
    gate, up = np.split(np.asarray(layers["gate_up"]), 2, axis=-1)
    values = {
        "attention/query": qkv[0],
        "attention/key": qkv[1],
        "attention/value": qkv[2],
        "attention/output": layers["out"],
        "attention_norms": layers["attention_norm"],
        "feed_forward_norms": layers["mlp_norm"],
        "feed_forward/gate": gate,
        "feed_forward/up": up,
        "feed_forward/down": layers["down"],
        "embedding": floor["embedding"],
        "decoder/norm": floor["norm"],
        "vocabulary_head": floor["head"],
    }
    used = []

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(entry.key) for entry in path)
        (key,) = [key for key in values if f"/{key}/" in f"/{name}/"]
        used.append(key)
        return jax.numpy.array(np.asarray(values[key]).reshape(leaf.shape))  # a copy: states are donated

    params = jax.tree_util.tree_map_with_path(value, abstract)
    if sorted(used) != sorted(values):
        raise ValueError(f"The two models have different parameters: {sorted(used)} and {sorted(values)}.")
    return params


def jaxlm_program(shape: Shape, adamw: step_floor.AdamW, remat: bool) -> tuple[Callable, TrainState]:
    """(step, state) of jaxlm, from the floor's arrays."""
    config = model_config(shape, remat)
    parallel = ParallelConfig(MeshConfig()).on()
    definition, abstract, infos = abstract_model(lambda key: LanguageModel(config, key=key))
    optimizer_config = OptimizerConfig(
        AdamW(adamw.b1, adamw.b2, adamw.epsilon),
        Constant(adamw.learning_rate),
        weight_decay=adamw.weight_decay,
        clip_global_norm=None,
    )
    optimizer = build_optimizer(optimizer_config, infos, total_steps=1000, parametrization=config.scaling)
    params = params_like(abstract, step_floor.init_params(jax.random.key(0), shape), shape)
    step = make_train_step(definition, FullLM(), optimizer, parallel, config=StepConfig(), loss=LossConfig())
    state = fresh_state(params, optimizer)
    # Laid out as the step lays it out, as `initializer` does, or the second step would compile again.
    return step, jax.device_put(state, state_shardings(state, infos, parallel))


def floor_program(shape: Shape, adamw: step_floor.AdamW, remat: bool) -> tuple[Callable, step_floor.State]:
    """(step, state) of the floor."""
    state = step_floor.init_state(step_floor.init_params(jax.random.key(0), shape))
    return step_floor.make_step(shape, adamw, remat), state


PROGRAMS = {"floor": floor_program, "jaxlm": jaxlm_program}


def make_batch(name: str, seed: int, shape: Shape) -> dict[str, np.ndarray]:
    """The floor's batch, for jaxlm with what its loader adds."""
    batch = step_floor.make_batch(seed, shape)
    if name == "floor":
        return batch
    zeros = np.zeros_like(batch["decoder_positions"])
    return batch | {"dataset_ids": zeros, "objective_ids": zeros}


def run(step: Callable, state: Any, batch: dict) -> tuple[Any, float, float]:
    """(state, loss, processor seconds) of one step."""
    start = time.process_time()
    state, out = step(state, batch)
    jax.block_until_ready((state, out))
    seconds = time.process_time() - start
    loss = out["loss"][0] if isinstance(out, dict) else out
    return state, float(loss), seconds


def upper_bound(ours: np.ndarray, floor: np.ndarray, draws: int = 10_000) -> float:
    """Upper 95% bound of median(ours) / median(floor), by bootstrap over pairs of steps."""
    pick = np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))
    return float(np.quantile(np.median(ours[pick], axis=1) / np.median(floor[pick], axis=1), 0.95))


def compare(shape: Shape, remat: bool, steps: int) -> dict[str, Any]:
    """Runs both programs in turn."""
    adamw = step_floor.AdamW()
    programs, states, flops, memory = {}, {}, {}, {}
    for name, make in PROGRAMS.items():
        step, states[name] = make(shape, adamw, remat)
        compiled = step.lower(states[name], make_batch(name, 0, shape)).compile()
        flops[name] = matmul_flops(compiled.as_text())
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 1e9
        programs[name] = step
    seconds, losses = {name: [] for name in PROGRAMS}, {name: [] for name in PROGRAMS}
    for i in range(steps + 2):
        for name in PROGRAMS if i % 2 else reversed(PROGRAMS):  # neither always goes first
            states[name], loss, spent = run(programs[name], states[name], make_batch(name, i, shape))
            losses[name].append(loss)
            if i >= 2:  # compilation, and the caches of a first run
                seconds[name].append(spent)
    ours, floor = (np.array(seconds[name]) for name in ("jaxlm", "floor"))
    return {
        "rematerialisation": remat,
        "steps": steps,
        "cpu_seconds": {name: round(float(np.median(seconds[name])), 4) for name in PROGRAMS},
        "ratio": round(float(np.median(ours) / np.median(floor)), 4),
        "ratio_upper_95": round(upper_bound(ours, floor), 4),
        "matmul_gflops": {name: round(flops[name] / 1e9, 3) for name in PROGRAMS},
        "largest_loss_difference": float(np.max(np.abs(np.subtract(losses["jaxlm"], losses["floor"])))),
        "losses": [round(losses["floor"][0], 5), round(losses["floor"][-1], 5)],
        "temporary_gb": {name: round(memory[name], 3) for name in PROGRAMS},
        "compiles": programs["jaxlm"].compiles,
    }


def alone(name: str, remat: bool, steps: int) -> None:
    """Runs one program and prints its processor time to the end of the first step, and its peak memory."""
    shape = Shape()
    step, state = PROGRAMS[name](shape, step_floor.AdamW(), remat)
    first = 0.0
    for i in range(steps):
        state, _, _ = run(step, state, make_batch(name, i, shape))
        first = first or time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"first_step_cpu_seconds": round(first, 2), "peak_gb": round(peak, 3)}))


def measure_alone(name: str, remat: bool, steps: int, cache: str | None = None) -> dict[str, float]:
    """`alone` in a process of its own, without a compilation cache unless a folder is given."""
    command = [sys.executable, "-m", "benchmarks.step", "--alone", name, "--steps", str(steps)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    done = subprocess.run(
        [*command, *(["--remat"] if remat else [])], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints a table, writes results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--alone", choices=PROGRAMS, help="run this program only, and print its start-up and memory")
    parser.add_argument("--remat", action="store_true", help="with --alone: recompute blocks in the backward pass")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    if args.alone:
        alone(args.alone, args.remat, args.steps)
        return
    shape, rows = Shape(), []
    for remat in (True, False):
        row = compare(shape, remat, args.steps)
        row["peak_gb"] = {name: measure_alone(name, remat, 3)["peak_gb"] for name in PROGRAMS}
        rows.append(row)
        print(
            f"remat {'on ' if remat else 'off'}  CPU-s a step: floor {row['cpu_seconds']['floor']:.3f}, jaxlm "
            f"{row['cpu_seconds']['jaxlm']:.3f}, ratio {row['ratio']:.3f} (95% bound {row['ratio_upper_95']:.3f}); "
            f"GFLOP {row['matmul_gflops']['floor']:.1f} and {row['matmul_gflops']['jaxlm']:.1f}; losses differ by "
            f"{row['largest_loss_difference']:.1e}; peak GB {row['peak_gb']['floor']:.2f} and "
            f"{row['peak_gb']['jaxlm']:.2f}; compiled {row['compiles']} time(s)"
        )
    result = {"shape": dataclasses.asdict(shape), "rows": rows, "targets": TARGETS, "machine": machine.facts()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
