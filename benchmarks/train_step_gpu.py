"""Training steps of 1B models on one H200: what fits, and on an H200 tokens a second, MFU, and a peer's beside them.

python -m benchmarks.train_step_gpu            # memory, by compiling for an H200 that need not be there
python -m benchmarks.train_step_gpu --device   # on an H200: times; --only decoder, transformers, fp8, encoder_decoder

A step is the run's own, of gin_configs/runs/pods/decoder_1b.gin or encoder_decoder_1b.gin: products in bfloat16,
parameters and AdamW's moments in float32, gradients clipped, rows of 4,096 random tokens, each one document. The peer
is the same decoder as transformers' Llama under torch.compile: autocast to bfloat16 over float32 parameters, fused
AdamW, clipped gradients, attention by FlashAttention-2 (its package where it is installed, and torch's own). Each side
is measured at batches that double until they do not fit, with and without rematerialisation, every measurement in a
process of its own; the best of a side counts. MFU is of 989 TFLOP/s, its FLOPs by jaxlm.models.accounting for both
sides: 6 a matrix entry and token, attention's visible half, nothing recomputed. The machine needs no TensorFlow, seqio
or grain; gin-config and tensorboardX can be carried as wheels.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.guides import fill
from jaxlm.chips import CHIPS

RESULTS = pathlib.Path(__file__).parent / "results" / "train_step_gpu.json"
LENGTH = 4096
(H200,) = (chip for chip in CHIPS if chip.name == "h200")
BATCHES = (4, 8, 16, 32, 64, 128)
TARGETS = {"MFU": 0.55, "tokens a second, decoder / transformers": 1.15}
WARM_UP, STEPS, ROUNDS = 3, 8, 3
NOT_YET = "not yet measured"
DOES_NOT_FIT = "does not fit"


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to train one model.

    Attributes:
      model: "decoder" or "encoder_decoder".
      remat: jaxlm's rematerialisation policies to try, from what computes least twice; of the peer "none" and "full".
      compute: "bfloat16" or "fp8".
      attention: the peer's, as transformers calls it; None: jaxlm trains.
    """

    model: str
    remat: tuple[str, ...] = ("none", "dots", "block", "full")
    compute: str = "bfloat16"
    attention: str | None = None


SIDES = {
    "decoder": Side("decoder"),
    "fp8": Side("decoder", compute="fp8"),
    "encoder_decoder": Side("encoder_decoder"),
    "transformers": Side("decoder", ("none", "full"), attention="sdpa"),
    "transformers, flash_attention_2": Side("decoder", ("none", "full"), attention="flash_attention_2"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures: a side, its batch and its rematerialisation."""

    side: str
    batch: int
    remat: str


def arguments(case: Case) -> list[str]:
    """Of `jaxlm.train` or `jaxlm.plan`, for one GPU."""
    side = SIDES[case.side]
    lengths = {"targets": LENGTH} if side.model == "decoder" else {"inputs": LENGTH, "targets": LENGTH}
    return [
        f"--gin_file=gin_configs/runs/pods/{side.model}_1b.gin",
        "--gin.FSDP=1",
        f"--gin.BATCH_SIZE={case.batch}",
        f"--gin.TASK_FEATURE_LENGTHS={lengths}",
        f"--gin.REMAT='{case.remat}'",
        f"--gin.COMPUTE='{side.compute}'",
    ]


def compile_case(case: Case) -> dict[str, Any]:
    """The step as compiled for one H200 that need not be there, by the planner."""
    from jaxlm.configuration import resolve
    from jaxlm.planning.program import plan
    from jaxlm.planning.topology import topology
    from jaxlm.run import RunConfig

    found = plan(resolve(RunConfig, arguments(case)), topology("h200:1"))
    if not found.fits:
        return {DOES_NOT_FIT: found.peak}
    return {
        "parameters": found.parameters,
        "peak_bytes": found.memory.peak,
        "temporary_bytes": found.memory.temporaries,
        "model_flops": found.model_flops,
        "compile_cpu_seconds": round(found.compiled.cpu_seconds, 1),
    }


def random_batch(features: dict[str, Any], vocabulary: int) -> dict[str, np.ndarray]:
    """Rows of one document each, every token of the loss; `features` are shapes and types by name."""
    rng = np.random.default_rng(0)
    made = {}
    for name, (shape, dtype) in features.items():
        values = np.zeros(shape, dtype)
        if name.endswith("_tokens"):
            values = rng.integers(3, vocabulary, shape)
        elif name.endswith(("_segment_ids", "_loss_weights")):
            values = np.ones(shape)
        elif name.endswith("_positions"):
            values = np.broadcast_to(np.arange(shape[1]), shape)
        made[name] = values.astype(dtype)
    return made


def run_jaxlm(case: Case) -> dict[str, Any]:
    """Seconds a step and memory of jaxlm on this machine's GPU."""
    import jax

    from jaxlm.configuration import resolve
    from jaxlm.planning.memory import memory, refused
    from jaxlm.run import RunConfig, expected_layout, make_model, make_program
    from jaxlm.training.state import initializer

    run = resolve(RunConfig, arguments(case))
    (phase,) = run.phases
    parallel = run.parallel.on(jax.devices()[:1])
    layout = expected_layout(run, phase)
    program = make_program(run, phase, parallel, layout)
    try:
        state = initializer(make_model(program.model, parallel), program.optimizer, parallel)(0)
        batch = jax.device_put(
            random_batch(dict(layout.features), run.model.vocab_size), parallel.batch_sharding(case.batch)
        )
        started = time.monotonic()
        with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh):
            compiled = program.step.lower(state, batch).compile()
        compile_seconds = time.monotonic() - started
        taken = memory(compiled, state, batch)
        rest = program.step.seed, program.step.taught_by

        def step():
            nonlocal state
            state, metrics = compiled(state, batch, *rest)
            return metrics["loss"][0]

        seconds, losses = time_steps(step, lambda: jax.block_until_ready(state))
    except jax.errors.JaxRuntimeError as error:
        if (wanted := refused(error)) is None:
            raise
        return {DOES_NOT_FIT: wanted[0]}
    return {
        "seconds": seconds,
        "tokens": program.row_tokens * case.batch,
        "model_flops": program.flops_per_token * program.row_tokens * case.batch,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_peak_bytes": taken.peak,
        "compile_seconds": round(compile_seconds, 1),
        "losses": losses,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def time_steps(step: Callable[[], Any], wait: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """(seconds a step in each round, the first and the last loss).

    Args:
      step: does one and returns its loss, perhaps not computed yet; steps of a round are waited for together.
      wait: for all that was asked for.
    """
    losses = [float(step()) for _ in range(WARM_UP)]
    wait()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(STEPS):
            loss = step()
        wait()
        seconds.append((time.perf_counter() - started) / STEPS)
    return seconds, [losses[0], float(loss)]


def run_transformers(case: Case) -> dict[str, Any]:
    """Seconds a step and memory of the same decoder in transformers under torch.compile."""
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from jaxlm.configuration import resolve
    from jaxlm.models.accounting import flops_per_token
    from jaxlm.run import RunConfig

    model_config = resolve(RunConfig, arguments(dataclasses.replace(case, remat="none"))).model
    block = model_config.decoder.blocks[0]
    config = transformers.LlamaConfig(
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.width,
        intermediate_size=block.feed_forward.hidden,
        num_hidden_layers=model_config.decoder.num_layers,
        num_attention_heads=block.attention.num_heads,
        num_key_value_heads=block.attention.num_kv_heads,
        max_position_embeddings=LENGTH,
        rms_norm_eps=block.norm.epsilon,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.set_float32_matmul_precision("high")
    ids = torch.tensor(np.random.default_rng(0).integers(3, config.vocab_size, (case.batch, LENGTH)), device="cuda")
    try:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=SIDES[case.side].attention, dtype=torch.float32
            )
        model.train()
        if case.remat == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        compiled = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)

        def step():
            with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        started = time.monotonic()
        step()
        torch.cuda.synchronize()
        compile_seconds = time.monotonic() - started
        seconds, losses = time_steps(step, torch.cuda.synchronize)
    except torch.cuda.OutOfMemoryError:
        return {DOES_NOT_FIT: torch.cuda.max_memory_allocated()}
    return {
        "seconds": seconds,
        "tokens": case.batch * LENGTH,
        "model_flops": flops_per_token(model_config, LENGTH) * case.batch * LENGTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "compile_seconds": round(compile_seconds, 1),
        "losses": losses,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(case: Case, how: str, limit: float = 300) -> dict[str, Any]:
    """One case in a process of its own; a failure is a result, with its last line."""
    command = [sys.executable, "-m", "benchmarks.train_step_gpu", "--case", json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if how == "compile":
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        limit = 3600
    try:
        done = subprocess.run([*command, "--how", how], capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def with_rates(found: dict[str, Any]) -> dict[str, Any]:
    """A measurement with its median step, tokens a second and MFU."""
    if "seconds" not in found:
        return found
    median = float(np.median(found["seconds"]))
    return found | {
        "seconds": [round(s, 5) for s in found["seconds"]],
        "tokens_per_second": round(found["tokens"] / median),
        "MFU": round(found["model_flops"] / median / H200.bf16, 4),
    }


def sweep(name: str, how: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Every rematerialisation at batches that double until one does not fit; printed as they come.

    What computes more twice begins at the first batch that did not fit with less: below it, it can only be slower.
    """
    rows, start = [], 0
    for remat in SIDES[name].remat:
        for i in range(start, len(batches)):
            case = Case(name, batches[i], remat)
            rows.append(row := {"batch": case.batch, "remat": remat} | with_rates(measure(case, how)))
            print(name, json.dumps(row), flush=True)
            if "failed" in row:
                return rows
            if DOES_NOT_FIT in row:
                start = i
                break
        else:
            break
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The measurement with most tokens a second; None if there is none."""
    return max((row for row in rows if "MFU" in row), key=lambda row: row["tokens_per_second"], default=None)


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """Of every side its best, and the decoder's tokens a second over the better of the peer's two."""
    found = {}
    for name in SIDES:
        rows = results["device"].get(name)
        found[name] = best(rows) if isinstance(rows, list) else None
    peers = [row["tokens_per_second"] for name, row in found.items() if row and SIDES[name].attention]
    ratio = found["decoder"]["tokens_per_second"] / max(peers) if peers and found["decoder"] else NOT_YET
    return {"best": {name: row or NOT_YET for name, row in found.items()}, "decoder / transformers": ratio}


def committed(which: str) -> str:
    """A table of the committed results, for docs/memory_and_precision.md: "compiled" or "device"."""
    results = json.loads(RESULTS.read_text())
    if which == "compiled":
        lines = ["| model | rematerialisation | batch | GiB at the peak |", "|---|---|---:|---:|"]
        for name, rows in results["compiled"].items():
            for row in rows:
                if "peak_bytes" in row:
                    peak = f"{row['peak_bytes'] / 2**30:.1f}"
                else:
                    peak = f"{DOES_NOT_FIT}: {row[DOES_NOT_FIT] / 2**30:.0f}" if DOES_NOT_FIT in row else "failed"
                lines.append(f"| {name} | {row['remat']} | {row['batch']} | {peak} |")
        return "\n".join(lines)
    lines = ["| | batch, rematerialisation | tokens/s | MFU | GiB at the peak |", "|---|---|---:|---:|---:|"]
    for name, row in results["compared"]["best"].items():
        if row == NOT_YET:
            lines.append(f"| {name} | {NOT_YET} | | | |")
        else:
            lines.append(
                f"| {name} | {row['batch']}, {row['remat']} | {row['tokens_per_second']:,} | {row['MFU']:.1%} | "
                f"{row['peak_bytes'] / 2**30:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and replaces the measured parts of results/train_step_gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="store_true", help="on an H200: times")
    parser.add_argument("--only", nargs="+", choices=SIDES, help="these sides alone")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--case", help="one measurement, as JSON; printed")
    parser.add_argument("--how", choices=("compile", "run"), help="with --case")
    args = parser.parse_args()
    if args.case:
        case = Case(**json.loads(args.case))
        run = run_transformers if SIDES[case.side].attention else run_jaxlm
        print(json.dumps((compile_case if args.how == "compile" else run)(case)))
        return
    from jaxlm.training import machine

    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results = {"targets": TARGETS, "length": LENGTH, "compiled": {}, "device": {}} | results
    for name in args.only or SIDES:
        if args.device:
            results["device"][name] = sweep(name, "run", tuple(args.batches))
        elif SIDES[name].attention is None:
            results["compiled"][name] = sweep(name, "compile", tuple(args.batches))
        results["device machine" if args.device else "machine"] = machine.facts()
        results["compared"] = compared(results)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    fill("memory_and_precision.md", "train_step_gpu", committed)


if __name__ == "__main__":
    main()
