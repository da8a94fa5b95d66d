"""Prints the goodput of a run, and where its time went: python -m jaxlm.goodput RUN_FOLDER."""

import pathlib
import sys

from jaxlm.exit_status import ExitStatus
from jaxlm.training.goodput import read_ledger
from jaxlm.training.run_folder import RunFolder


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return ExitStatus.CONFIGURATION
    folder = RunFolder(pathlib.Path(arguments[0]))
    try:
        print(read_ledger(folder.goodput).text())
    except FileNotFoundError:
        print(f"jaxlm.goodput: {folder.path} has no {folder.goodput.name}; give a run's folder.", file=sys.stderr)
        return ExitStatus.FAILED
    return ExitStatus.FINISHED


if __name__ == "__main__":
    sys.exit(main())
