"""`python -m jaxlm.train ARGUMENTS` under observation: python benchmarks/observed.py OUT ARGUMENTS.

OUT receives JSON: {"status": exit status, "compiled": names of what XLA compiled, "modules": all that were imported,
"batches": {step: digest of the batch it was trained on}}.
"""

import hashlib
import json
import pathlib
import runpy
import sys

import numpy as np

from jaxlm.training import loop
from jaxlm.training.compiles import CompileCounter
from jaxlm.training.prefetch import Prefetcher


class Observer:
    """Sees the batches that a loop trains on, as long as it is open."""

    def __init__(self):
        self.batches: dict[str, str] = {}

    def __enter__(self):
        observer = self

        class Observed(Prefetcher):
            def __next__(self):
                batch, state = super().__next__()
                data = b"".join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
                observer.batches[str(state["step"])] = hashlib.sha256(data).hexdigest()
                return batch, state

        loop.Prefetcher = Observed
        return self

    def __exit__(self, *_):
        loop.Prefetcher = Prefetcher


def main() -> None:
    """Runs the trainer, and writes what was seen."""
    out = pathlib.Path(sys.argv.pop(1))
    status = 0
    with Observer() as seen, CompileCounter() as compiles:
        try:
            runpy.run_module("jaxlm.train", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            status = ended.code
    found = {"status": status, "compiled": compiles.names, "modules": sorted(sys.modules), "batches": seen.batches}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
