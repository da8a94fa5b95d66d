"""Run by test_processes.py: the loop on 4 devices of as many processes as asked for; prints the losses.

python process_program.py <process index> <process count> <port>
"""

import json
import sys

import jax
from conftest import TinyModel, TinyObjective, make_batch

from jaxlm.layers.parameters import Parametrization
from jaxlm.objectives.base import LossConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.loop import Loop, LoopConfig
from jaxlm.training.metrics import Names
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, init_state
from jaxlm.training.step import StepConfig, layer_names, make_train_step

index, count, port = map(int, sys.argv[1:])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)


class Loader:
    """This process's rows of batch k."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        batch = make_batch(self.position)
        self.position += 1
        return {name: x[index * 8 // count : (index + 1) * 8 // count] for name, x in batch.items()}

    def state(self):
        return {"position": self.position}


class Lines:
    """Keeps the losses."""

    losses = []

    def write(self, step, values):
        self.losses.append(values["train/loss"])


def make(key):
    return TinyModel(key, dropout=0.1)


parallel = ParallelConfig(MeshConfig(fsdp=2)).on()
assert parallel.mesh.size == 4
definition, _, infos = abstract_model(make)
optimizer = build_optimizer(
    OptimizerConfig(AdamW(), Constant(0.01)), infos, total_steps=10, parametrization=Parametrization()
)
config = StepConfig(microbatches=2, layer_norm_period=1)
step = make_train_step(definition, TinyObjective(), optimizer, parallel, config=config, loss=LossConfig())
state = init_state(make, optimizer, parallel, seed=0)
loop = Loop(step, parallel, config=LoopConfig(log_period=1), names=Names(layers=layer_names(infos)), writer=Lines())
loop.run(state, Loader(), until=3)
print(json.dumps(Lines.losses))
