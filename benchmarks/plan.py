"""Plans of the presets for pods, and jaxlm's step as a TPU program beside a minimal one in pure JAX.

    python -m benchmarks.plan                       # everything; about 20 minutes of processor time
    python -m benchmarks.plan --only floor          # the 1.1B decoder on v5e:4x4 beside benchmarks/plan_floor.py
    python -m benchmarks.plan --only llama3_70b     # one preset; writes results/plans/llama3_70b.{json,md}

No accelerator is needed: libtpu compiles for pods that are not there. Each plan is a process of its own, whose wall
time, processor time and peak memory are recorded; on a shared machine only the last two say much. The tables in
docs/scaling.md are copies of results/plans/*/plan.md, brought up to date here.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from benchmarks.guides import fill

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset on a machine.

    Attributes:
      preset: a file of gin_configs/runs/pods.
      topology: as of jaxlm.plan.
      bindings: further --gin flags.
      targets: {"seconds", "peak_gb"} that planning should stay below on two cores.
    """

    preset: str
    topology: str
    bindings: tuple[str, ...] = ()
    targets: dict[str, float] = dataclasses.field(default_factory=dict)


CASES = {
    "llama3_8b": Case("llama3_8b", "v5p:4x4x4"),
    "llama3_8b_v6e": Case("llama3_8b", "v6e:8x8"),
    "llama3_70b": Case("llama3_70b", "v5p:4x4x4", targets={"seconds": 200, "peak_gb": 4}),
    "llama3_70b_v6e": Case("llama3_70b", "v6e:16x16", ("--gin.FSDP=256", "--gin.BATCH_SIZE=256")),
    "mixtral_8x7b": Case("mixtral_8x7b", "v5p:4x4x4"),
    "t5_xxl": Case("t5_xxl", "v5p:4x4x4"),
    "study_causal": Case("study_causal", "v5p:4x4x4"),
    "study_prefix": Case("study_prefix", "v5p:4x4x4"),
    "mt_nlg_530b": Case("mt_nlg_530b", "v5p:8x8x28", targets={"seconds": 300}),
}


def plan_preset(name: str) -> dict[str, Any]:
    """Runs `python -m jaxlm.plan` in a process of its own; what it saved, and what the process took."""
    case, folder = CASES[name], RESULTS / "plans" / name
    command = [sys.executable, "-m", "jaxlm.plan", f"--gin_file=gin_configs/runs/pods/{case.preset}.gin"]
    command += [*case.bindings, f"--topology={case.topology}", f"--save={folder}"]
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    _, status, usage = os.wait4(process.pid, 0)
    if (code := os.waitstatus_to_exitcode(status)) not in (0, 4):
        raise SystemExit(f"Planning {name} failed with exit status {code}.")
    took = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }
    found = json.loads((folder / "plan.json").read_text())
    found |= {"command": " ".join(["python", *command[1:-1]]), "process": took, "targets": case.targets}
    (folder / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name}: {took}; targets {case.targets}", flush=True)
    return found


def compare_with_floor() -> dict[str, Any]:
    """Both programs for 16 chips of v5e, compiled by the same compiler in this process."""
    import jax

    from benchmarks import plan_floor
    from jaxlm.configuration import resolve
    from jaxlm.planning import report
    from jaxlm.planning.advice import advice
    from jaxlm.planning.costs import costs
    from jaxlm.planning.program import compile_plan, prepare
    from jaxlm.planning.topology import topology
    from jaxlm.run import RunConfig
    from jaxlm.training import machine
    from pallas_kernels.ahead_of_time import writing_no_cache

    pod, shape = topology("v5e:4x4"), plan_floor.Shape()
    run = resolve(RunConfig, ["--gin_file=gin_configs/runs/pods/decoder_1b.gin"])
    prepared = prepare(run, pod)
    plan = compile_plan(prepared)
    report.save(RESULTS / "plans" / "decoder_1b", plan, advice(plan, prepared))
    mesh = run.parallel.on(pod.devices()).mesh
    arguments = plan_floor.abstract_arguments(shape, mesh)
    started, processor = time.monotonic(), time.process_time()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), writing_no_cache():
        compiled = plan_floor.make_step(shape, plan_floor.AdamW(), mesh).lower(*arguments).compile()
    took = time.monotonic() - started, time.process_time() - processor
    stats, floor = compiled.memory_analysis(), costs(compiled.as_text(), dict(mesh.shape))
    tokens = shape.batch * shape.length // mesh.size
    layer = 4 * shape.embed * shape.heads * shape.head_dim + 3 * shape.embed * shape.mlp
    # Forwards, backwards (twice) and again in the backward pass, but for a layer's last product, which nobody needs.
    analytic = (
        shape.layers * (8 * layer - 2 * shape.mlp * shape.embed) * tokens + 6 * shape.embed * shape.vocab * tokens
    )
    sides = {
        "jaxlm": (plan.memory.arguments, plan.memory.temporaries, plan.memory.peak, plan.costs),
        "floor": (
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.argument_size_in_bytes
            + stats.temp_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes,
            floor,
        ),
    }
    result: dict[str, Any] = {
        "shape": dataclasses.asdict(shape) | {"devices": mesh.size, "topology": pod.name},
        "analytic_matmul_flops": analytic,
        "compile": {
            "jaxlm": {"seconds": round(plan.compiled.seconds, 1), "cpu_seconds": round(plan.compiled.cpu_seconds, 1)},
            "floor": {"seconds": round(took[0], 1), "cpu_seconds": round(took[1], 1)},
        },
        "machine": machine.facts(),
    }
    for name, (given, temporaries, peak, found) in sides.items():
        result[name] = {
            "arguments": given,
            "temporaries": temporaries,
            "peak": peak,
            "bytes": found.bytes,
            "matmul_flops": found.matmul_flops,
            "matmul_flops_over_analytic": round(found.matmul_flops / analytic, 5),
            "collective_bytes": found.collective_bytes(),
            "collective_bytes_sent": round(sum(collective.sent for collective in found.collectives)),
            "kernels": dict(found.kernels),
        }
    ours, theirs = result["jaxlm"], result["floor"]
    result["ratios"] = {
        "peak": round(ours["peak"] / theirs["peak"], 4),
        "temporaries": round(ours["temporaries"] / theirs["temporaries"], 4),
        "bytes": round(ours["bytes"] / theirs["bytes"], 4),
        "matmul_flops": round(ours["matmul_flops"] / theirs["matmul_flops"], 5),
        "collective_bytes_sent": round(ours["collective_bytes_sent"] / theirs["collective_bytes_sent"], 4),
        "collective_bytes": {
            kind: round(size / max(theirs["collective_bytes"].get(kind, 0), 1), 4)
            for kind, size in ours["collective_bytes"].items()
        },
    }
    (RESULTS / "plan_floor.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratios"], indent=1))
    return result


def table(name: str) -> str:
    """A committed plan as Markdown, for docs/scaling.md."""
    return (RESULTS / "plans" / name / "plan.md").read_text()


def main() -> None:
    """Plans, compares, writes results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["floor", *CASES])
    args = parser.parse_args()
    for name in args.only or ["floor", *CASES]:
        if name == "floor":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
            compare_with_floor()
        else:
            plan_preset(name)
    fill("scaling.md", "plan", table)


if __name__ == "__main__":
    main()
