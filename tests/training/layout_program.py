"""Run with 4 devices by test_meshes.py: how often the step compiles, from each way a state comes to be."""

import json

import jax
from conftest import TinyModel, TinyObjective, make_batch

from jaxlm.layers.parameters import Parametrization
from jaxlm.objectives.base import LossConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.compiles import CompileCounter
from jaxlm.training.optimizers import Adafactor, OptimizerConfig, build_optimizer
from jaxlm.training.prefetch import to_devices
from jaxlm.training.schedules import Constant
from jaxlm.training.stages import Carry, carry_over
from jaxlm.training.state import abstract_model, initializer, starter
from jaxlm.training.step import StepConfig, make_train_step

parallel = ParallelConfig(MeshConfig(fsdp=2, tensor=2)).on()
definition, _, infos = abstract_model(TinyModel)


def optimizer(**options):
    config = OptimizerConfig(Adafactor(min_dim_size_to_factor=16), Constant(0.01), **options)
    return build_optimizer(config, infos, total_steps=10, parametrization=Parametrization())


batch = to_devices(make_batch(0), parallel)
jax.block_until_ready(batch)
first, second = optimizer(freeze=("embedding",)), optimizer(freeze=("output",), ema_decay=0.9)
answer = {}


def compiles(name, state, of):
    step = make_train_step(definition, TinyObjective(), of, parallel, config=StepConfig(), loss=LossConfig())
    with CompileCounter() as counter:
        for _ in range(3):
            state, _ = step(state, batch)
    answer[name] = counter.count
    return state


state = compiles("fresh", initializer(TinyModel, first, parallel)(0), first)
state = compiles("next stage", carry_over(state, first, second, Carry.KEEP, parallel=parallel), second)
compiles("warm start", starter(state.params, first, parallel)(state.params), first)
print(json.dumps(answer))
