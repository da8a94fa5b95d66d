"""The loader: from tasks and an objective to batches, the same ones on any number of hosts.

    loader = build_loader(config, objective=..., architecture=..., batch_size=256, host_index=0, host_count=4)
    batch = next(loader)                  # this host's 64 rows
    state = gather_state(loader.state())  # a small JSON-able dict for the checkpoint
    loader.restore(state)                 # here, or in another run with another number of hosts

There are two ways of reading. *Indexed* (`Packing.CONCAT_AND_SPLIT`, `PLAN`, `NONE`): the rows of a data set are known
beforehand, so that batch k is a function of (seed, k, data), made without looking at any other batch; the position is a
number. *Packed stream* (`Packing.FIRST_FIT`): rows are packed while reading, which needs no plan and copes with
examples of random length. The examples are dealt to V virtual shards, V fixed for the run, and each packs its own; the
position is a pair of numbers a shard, and any number of hosts that divides V shares them out.

Every random choice is keyed by what it is for (seed, task, example, epoch), never by a host or by what came before.
Grain runs it all: its threads make batches ahead of the training step.
"""

from __future__ import annotations

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
    host_index: int = 0,
    host_count: int = 1,
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
      host_index, host_count: which slice of the batch is this host's.
      start_step: training step of the first batch, for rates and corruption that change over training. All of one pass
        is corrupted as at this step.
      one_pass: every example once, in order, the last batch filled with empty rows (weight 0). Default: all splits but
        "train". FIRST_FIT is then a plan in the order of reading.

    Raises:
      ValueError: data, objective, architecture and lengths do not go together; the message says which and what to do.
    """
    if batch_size < 1 or batch_size % host_count or not 0 <= host_index < host_count:
        raise ValueError(
            f"A batch of {batch_size} rows cannot be divided among {host_count} hosts (this is host {host_index}); "
            f"choose a batch size that is a multiple of the hosts."
        )
    one_pass = split != "train" if one_pass is None else one_pass
    data = DataSets(config, objective, architecture, split, one_pass, start_step)
    if config.packing is Packing.FIRST_FIT and not one_pass:
        return StreamLoader(data, batch_size, host_index, host_count, start_step)
    return IndexedLoader(data, batch_size, host_index, host_count, start_step)
