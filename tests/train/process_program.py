"""`python -m jaxlm.train ARGUMENTS` as one process of a job, observed: python process_program.py OUT ARGUMENTS.

OUT receives JSON: {"status": exit status, "rows": {step: {row of the batch: digest of its tokens}}, of the rows that
this process's devices hold, "values": {step: all metrics, as this process reads them}}. With SIGTERM_AT=N in the
environment the process sends itself SIGTERM after N steps.
"""

import hashlib
import json
import os
import pathlib
import runpy
import signal
import sys

import numpy as np

from jaxlm.training import loop
from jaxlm.training.prefetch import Prefetcher


class Observed(Prefetcher):
    """Notes the rows of batches on their way to the step."""

    rows: dict[int, dict[int, str]] = {}

    def __next__(self):
        batch, state = super().__next__()
        seen = self.rows.setdefault(int(state["step"]), {})
        for shard in batch["decoder_target_tokens"].addressable_shards:
            first = shard.index[0].indices(batch["decoder_target_tokens"].shape[0])[0]
            for row, tokens in enumerate(np.asarray(shard.data), first):
                digest = hashlib.sha256(tokens.tobytes()).hexdigest()
                assert seen.setdefault(row, digest) == digest, f"two devices hold different rows {row}"
        if str(state["step"]) == os.environ.get("SIGTERM_AT"):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch, state


def main() -> None:
    out, values, status = pathlib.Path(sys.argv.pop(1)), {}, 0
    write = loop.Loop._write

    def note(self, step, found):
        values.setdefault(step, {}).update(found)
        write(self, step, found)

    loop.Prefetcher, loop.Loop._write = Observed, note
    try:
        runpy.run_module("jaxlm.train", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    out.write_text(json.dumps({"status": status, "rows": Observed.rows, "values": values}))
    sys.exit(status)


if __name__ == "__main__":
    main()
