"""The loader: from tasks and an objective to batches, the same ones on any number of hosts.

    loader = build_loader(config, objective=..., architecture=..., batch_size=256, rows=range(64))
    batch = next(loader)                  # this host's 64 rows
    state = gather_state(loader.state())  # a small JSON-able dict for the checkpoint
    loader.restore(state)                 # here, or in another run with another number of hosts

There are two ways of reading. *Indexed* (`Packing.CONCAT_AND_SPLIT`, `PLAN`, `NONE`): the rows of a data set are known
beforehand, so that batch k is a function of (seed, k, data), made without looking at any other batch; the position is a
number. *Packed stream* (`Packing.FIRST_FIT`): rows are packed while reading, which needs no plan and copes with
examples of random length. The examples are dealt to V virtual shards, V fixed for the run, and each packs its own; the
position is a pair of numbers a shard, and the hosts share the shards out.

Every random choice is keyed by what it is for (seed, task, example, epoch), never by a host or by what came before.
Grain runs it all: its threads make batches ahead of the training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.data.config import DataConfig, Packing
from jaxlm.data.datasets import DataSets
from jaxlm.data.indexed import IndexedLoader
from jaxlm.data.loader_base import ExampleId, Loader, Seen
from jaxlm.data.packed_stream import StreamLoader, gather_state, merge_states
from jaxlm.objectives.base import Objective

__all__ = ["DataConfig", "ExampleId", "Loader", "Packing", "Seen", "build_loader", "gather_state", "merge_states"]


def build_loader(
    config: DataConfig,
    *,
    objective: Objective,
    architecture: Architecture,
    split: str = "train",
    batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    one_pass: bool | None = None,
) -> Loader:
    """Opens the data sets (building their caches at first use) and returns a loader at its beginning.

    Args:
      config: what is read.
      objective: hides and predicts; its `corrupt` is called here, on the host.
      architecture: lays examples out in rows.
      split: of the tasks. "train" is endless and shuffled as the config says.
      batch_size: rows in a batch, of all hosts together.
      rows: which rows of the batch to make, ascending: those that this host's devices hold. None makes all.
      start_step: training step of the first batch, for rates and corruption that change over training. All of one pass
        is corrupted as at this step.
      one_pass: every example once, in order, the last batch filled with empty rows (weight 0). Default: all splits but
        "train". FIRST_FIT is then a plan in the order of reading.

    Raises:
      ValueError: data, objective, architecture and lengths do not go together; the message says which and what to do.
    """
    own_rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(own_rows) or own_rows[0] < 0 or own_rows[-1] >= batch_size or (np.diff(own_rows) < 1).any():
        raise ValueError(f"Rows {own_rows.tolist()} of a batch of {batch_size} were asked for; name some, ascending.")
    one_pass = split != "train" if one_pass is None else one_pass
    data = DataSets(config, objective, architecture, split, one_pass, start_step)
    if config.packing is Packing.FIRST_FIT and not one_pass:
        return StreamLoader(data, batch_size, own_rows, start_step)
    return IndexedLoader(data, batch_size, own_rows, start_step)
