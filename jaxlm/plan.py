"""Plans a run: compiles its training step for a machine that need not be there, and says what each device will need.

python -m jaxlm.plan --gin_file=gin_configs/runs/pods/llama3_8b.gin --topology=v5p:4x4x4
python -m jaxlm.plan --gin_file=... --topology=v5e:16x16 --search     # also tries other meshes, remat, microbatches
python -m jaxlm.plan --gin_file=... --topology=cpu:8 --save=plans/mine

--topology=NAME           v5e:4x4, v6e:16x16, v5p:8x8x8, tpu7x:4x4x4, 2x v5e:16x16 (slices), h200:8, cpu:8
--search[=N]              compiles up to N candidates (8) and prints them, the best first
--save=FOLDER             also writes plan.json and plan.md there
--xla_preset=NAME         compiles with these compiler flags, as jaxlm.train does
--gin_file, --gin.NAME    as of jaxlm.train; the run's data need not exist

TPUs need the package libtpu; an H200 needs what pallas_kernels/ahead_of_time.py says. Exits with status 5 where the
plan does not fit.
"""

import os
import pathlib
import sys

from jaxlm.configuration import take_flags
from jaxlm.exit_status import ExitStatus
from jaxlm.parallel import xla_flags

_CANDIDATES = 8


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return ExitStatus.FINISHED
    flags, rest = take_flags(arguments, ("topology", "save", "xla_preset"), optional=("search",))
    # Programs are compiled for the machine planned; what runs here is a CPU, whatever else there is.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxlm.planning.topology import ask_for_cpu_devices, topology

    try:
        if "topology" not in flags:
            raise ValueError("For which machine? Give --topology, such as --topology=v5e:4x4 (see --help).")
        machine = topology(flags["topology"])
        xla_flags.use(flags.get("xla_preset"))
        tries = flags.get("search") or str(_CANDIDATES)
        if not tries.isdecimal() or tries == "0":
            raise ValueError(f"--search={tries} is not a number of candidates; write --search or --search=8.")
    except ValueError as error:
        print(f"jaxlm.plan: {error}", file=sys.stderr)
        return ExitStatus.CONFIGURATION
    if machine.kind == "cpu":
        ask_for_cpu_devices(machine.num_devices)

    from jaxlm.configuration import resolve_or_exit
    from jaxlm.run import RunConfig
    from pallas_kernels.ahead_of_time import CannotCompile

    run = resolve_or_exit(RunConfig, rest)
    folder = pathlib.Path(flags["save"]) if "save" in flags else None
    try:
        return _plan(run, machine, int(tries) if "search" in flags else 0, folder)
    except (ValueError, CannotCompile, OSError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.plan: {error}", file=sys.stderr)
        return ExitStatus.FAILED


def _plan(run, machine, tries: int, folder: pathlib.Path | None) -> int:
    from jaxlm.planning import report
    from jaxlm.planning.advice import advice
    from jaxlm.planning.program import compile_plan, prepare
    from jaxlm.planning.variants import levers_of, why_left_out, worth_trying
    from jaxlm.training.progress import make_console

    console = make_console()
    prepared = prepare(run, machine)
    plan = compile_plan(prepared)
    advised = advice(plan, prepared)
    console.print(report.table(plan, advised))
    search = None
    if tries:
        own = levers_of(run, machine.num_devices)
        plans = [(own.name, plan)]
        good, left_out = worth_trying(run, machine)
        good = [(levers, candidate) for levers, candidate in good if levers != own]
        for levers, candidate in good[:tries]:
            console.print(f"compiling: {levers.name}")
            plans.append((levers.name, compile_plan(candidate)))
        rest = f"{len(good[tries:])} further candidates were not compiled (--search=N); {len(left_out)} cannot work."
        rest = "\n- ".join([rest, *why_left_out(left_out)])
        search = plans, rest
        console.print(report.ranking_table(plans))
        console.print(rest)
    if folder is not None:
        report.save(folder, plan, advised, search)
        console.print(f"Saved in {folder}.")
    return ExitStatus.FINISHED if plan.fits else ExitStatus.DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
