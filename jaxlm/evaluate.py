"""Evaluates a trained model on tasks, and prints a table: questions, finetuning sweeps, linear probes.

python -m jaxlm.evaluate --model=runs/mine --gin_file=gin_configs/evaluation/zero_shot.gin --gin.EVALUATION_DATA=eval
python -m jaxlm.evaluate --model=hf/llama --gin_file=... --tasks=hellaswag,piqa --output=results/llama
python -m jaxlm.evaluate --model=runs/encoder --gin_file=gin_configs/evaluation/encoders.gin --gin.EVALUATION_DATA=data

--model=PATH              a run's folder, one of its steps, or a Hugging Face folder
--output=FOLDER           gets results.json and examples.jsonl (default: evaluations/<model's name>)
--tasks=A,B               only these of the gin file's tasks
--step=N                  of a run's folder; the newest by default
--averaged                the moving average of the parameters
--compute=TYPE            float32 or bfloat16; default: as the model was trained
--gin_file, --gin.NAME    of `jaxlm.evaluation.suite.EvaluationConfig`; --gin.LIMIT=100 takes 100 rows a task

Exits with status 1 where a task could not be evaluated; the others are.
"""

import os
import pathlib
import sys

from jaxlm.configuration import take_flags
from jaxlm.exit_status import ExitStatus


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return ExitStatus.FINISHED
    flags, rest = take_flags(arguments, ("model", "output", "tasks", "step", "compute"), switches=("averaged",))
    if not flags.get("model"):
        print("jaxlm.evaluate: which model? Give --model=PATH (see --help).", file=sys.stderr)
        return ExitStatus.CONFIGURATION
    from jaxlm.configuration import resolve_or_exit
    from jaxlm.evaluation.suite import EvaluationConfig

    config = resolve_or_exit(EvaluationConfig, rest)
    try:
        return _evaluate(config, flags)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.evaluate: {error}", file=sys.stderr)
        return ExitStatus.FAILED


def _evaluate(config, flags: dict[str, str]) -> int:
    from jaxlm.checkpoints import pretrained
    from jaxlm.evaluation.suite import evaluate
    from jaxlm.training.progress import make_console

    console = make_console()
    if "tasks" in flags:
        config = config.only(flags["tasks"].split(","))
    model = pretrained.load(
        flags["model"],
        step=int(flags["step"]) if "step" in flags else None,
        averaged="averaged" in flags,
        compute=flags.get("compute"),
        parallel=config.parallel.on() if config.parallel else None,
    )
    folder = pathlib.Path(flags.get("output") or pathlib.Path("evaluations") / pathlib.Path(flags["model"]).name)
    result = evaluate(config, model, folder=folder, report=lambda line: console.print(line, highlight=False))
    for table in (result.table(), *result.grids()):
        console.print(table)
    console.print(f"Saved in {folder}.")
    return ExitStatus.FAILED if result.failures else ExitStatus.FINISHED


if __name__ == "__main__":
    sys.exit(main())
