"""The coordinate check of muP (Yang et al. 2022, arXiv 2203.03466, appendix D.1): training moves activations as far at
every width; under the standard parametrisation it moves them further in wider models."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.context import Context
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.parameters import InitConfig, InitScheme, Parametrization, Scaling
from jaxlm.layers.remat import Remat
from jaxlm.models.config import HeadConfig
from jaxlm.models.language_model import LanguageModel
from jaxlm.objectives.base import LossConfig
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.optimizers import Adafactor, AdamW, Muon, OptimizerConfig, build_optimizer
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, initializer
from jaxlm.training.step import StepConfig, make_train_step

_spec = importlib.util.spec_from_file_location("small_models", pathlib.Path(__file__).parent / "small_models.py")
small_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small_models)

BASE, WIDE = 32, 512


def movement(width, kind, algorithm, rate, **changed):
    """Root mean square of how far 3 steps move the hidden states and the logits of a batch."""
    parametrization = Parametrization(kind=kind, base_width=BASE, base_depth=2, base_head_dim=8)
    config = small_models.decoder(
        width,
        heads=width // 8,
        kv_heads=width // 8,
        remat=Remat.NONE,
        parametrization=parametrization,
        init=InitConfig(scheme=InitScheme.FAN_IN),
    )
    config = dataclasses.replace(config, **changed)

    def make(key):
        return LanguageModel(config, key=key)

    parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
    definition, _, infos = abstract_model(make)
    optimizer = build_optimizer(
        OptimizerConfig(algorithm, Constant(rate), clip_global_norm=None),
        infos,
        total_steps=10,
        parametrization=parametrization,
    )
    state = initializer(make, optimizer, parallel)(0)
    batch = {name: jnp.asarray(x) for name, x in small_models.packed_batch(0, size=4).items()}

    @jax.jit
    def activations(params):
        model = definition.merge(params)
        hidden, _ = model.hidden_states(batch, context=Context())
        return hidden, model.head(hidden)

    step = make_train_step(definition, FullLM(), optimizer, parallel, config=StepConfig(), loss=LossConfig())
    before = jax.device_get(activations(state.params))
    for _ in range(3):
        state, _ = step(state, batch)
    after = activations(state.params)
    return [float(np.sqrt(np.mean((np.asarray(a) - b) ** 2))) for a, b in zip(after, before)]


@pytest.mark.parametrize(
    ("algorithm", "rate"),
    [(AdamW(), 2**-8), pytest.param(Muon(), 2**-7, marks=pytest.mark.full),
     pytest.param(Adafactor(min_dim_size_to_factor=8), 2**-5, marks=pytest.mark.full)],
    ids=["adamw", "muon", "adafactor"],
)  # fmt: skip
def test_training_moves_activations_as_far_at_16_times_the_width(algorithm, rate):
    narrow = movement(BASE, Scaling.MUP, algorithm, rate)
    wide = movement(WIDE, Scaling.MUP, algorithm, rate)
    standard = movement(WIDE, Scaling.STANDARD, algorithm, rate)
    print(narrow, wide, standard)
    for n, w in zip(narrow, wide):
        assert 1 / 1.5 < w / n < 1.5, (narrow, wide)
    assert standard[1] / narrow[1] > 2.5, (narrow, standard)


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_embeddings_and_head_that_the_width_scales_move_as_far(tied):
    """By the base's width, to either root: the model's own would make logits and embeddings follow it a second time."""
    changed = {"embedding": EmbeddingConfig(scale_by_width=True), "head": HeadConfig(tied=tied, scale_by_width=True)}
    narrow, wide = (movement(width, Scaling.MUP, AdamW(), 2**-8, **changed) for width in (BASE, WIDE))
    print(narrow, wide)
    for n, w in zip(narrow, wide):
        assert 1 / 1.5 < w / n < 1.5, (narrow, wide)
