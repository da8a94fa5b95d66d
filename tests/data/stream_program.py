"""One host of a packed stream, run as a jax process by test_processes.py: prints batches and the gathered position."""

import json
import sys

import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.data.loader import DataConfig, Packing, build_loader, gather_state
from jaxlm.data.sources import InMemory
from jaxlm.data.tasks import pairs_task
from jaxlm.data.vocabularies import ByteVocabulary
from jaxlm.objectives.supervised import Supervised


def read(folder, host=0, hosts=1, state=None):
    """Five batches of a host, and the position of all hosts after them."""
    rng = np.random.default_rng(0)
    pairs = tuple({"inputs": "i" * int(n), "targets": str(k)} for k, n in enumerate(rng.integers(1, 20, 50)))
    config = DataConfig(
        pairs_task("pairs", InMemory(pairs), ByteVocabulary()),
        {"inputs": 40, "targets": 16},
        packing=Packing.FIRST_FIT,
        virtual_shards=4,
        look_ahead=8,
        cache_directory=folder,
    )
    loader = build_loader(
        config,
        objective=Supervised(),
        architecture=Architecture.CAUSAL_DECODER,
        batch_size=4,
        rows=range(host * 4 // hosts, (host + 1) * 4 // hosts),
    )
    if state:
        loader.restore(state)
    batches = [next(loader)["decoder_target_tokens"].tolist() for _ in range(5)]
    position = json.loads(json.dumps(gather_state(loader.state())))
    loader.close()
    return batches, position


if __name__ == "__main__":
    import jax

    index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    jax.distributed.initialize(f"localhost:{port}", count, index)
    print(json.dumps(read(folder, jax.process_index(), jax.process_count())))
