"""The trainer's own state, of a real model, is one checkpoint, whether the model is scanned or unrolled."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.layers.attention import AttentionConfig
from jaxlm.layers.block import BlockConfig
from jaxlm.layers.embeddings import EmbeddingConfig
from jaxlm.layers.feed_forward import FeedForwardConfig
from jaxlm.layers.norms import NormConfig
from jaxlm.layers.parameters import InitConfig, Parametrization
from jaxlm.layers.stack import Layers, StackConfig
from jaxlm.layers.stacking import unstack
from jaxlm.models.config import HeadConfig, LanguageModelConfig
from jaxlm.models.language_model import LanguageModel
from jaxlm.training.moments import MomentStorage
from jaxlm.training.optimizers import Adafactor, AdamW, Muon, OptimizerConfig, build_optimizer
from jaxlm.training.parameters import split_model
from jaxlm.training.schedules import Constant
from jaxlm.training.state import fresh_state


def block(heads):
    return BlockConfig(
        attention=AttentionConfig(num_heads=heads, head_dim=8),
        feed_forward=FeedForwardConfig(hidden=32),
        norm=NormConfig(),
    )


def make_state(layers, algorithm, freeze=(), moments=None):
    """A state with random numbers in every leaf, the same ones scanned or unrolled, and the model's layouts.

    The model has two kinds of blocks that alternate, behind one that stands alone.
    """
    config = LanguageModelConfig(
        architecture=Architecture.CAUSAL_DECODER,
        vocab_size=64,
        width=16,
        embedding=EmbeddingConfig(),
        head=HeadConfig(),
        init=InitConfig(),
        decoder=StackConfig(
            blocks=(block(2), block(4)), num_layers=6, prologue=(block(1),), final_norm=NormConfig(), layers=layers
        ),
    )
    model = nnx.eval_shape(lambda: LanguageModel(config, key=jax.random.key(0)))
    _, params, infos = split_model(model)
    optimizer = build_optimizer(
        OptimizerConfig(algorithm, Constant(1e-3), ema_decay=0.99, freeze=freeze, moments=moments),
        infos,
        total_steps=10,
        parametrization=Parametrization(),
    )
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer), params)
    on_disk = naming.sources(state, model.layouts)
    parts = {}
    for i, path in enumerate(sorted(on_disk)):  # the names on disk give both forms the same numbers
        parts.setdefault(on_disk[path].path, []).append((on_disk[path].row, i))

    def fill(path, leaf):
        def numbers(i, shape):
            rng = np.random.default_rng(i)
            return rng.integers(100, size=shape) if leaf.dtype.kind in "iub" else rng.normal(size=shape)

        (first, *_) = found = sorted(parts[path])
        if first[0] is None:
            return np.asarray(numbers(first[1], leaf.shape), leaf.dtype)
        return np.stack([numbers(i, leaf.shape[1:]) for _, i in found]).astype(leaf.dtype)

    leaves = [jax.numpy.asarray(fill(path, leaf)) for path, leaf in naming.flatten(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), model.layouts


CASES = {
    "adamw": (AdamW(), (), MomentStorage()),
    "adafactor": (Adafactor(), ()),
    "muon": (Muon(), ()),
    # Every other layer: in the scanned state one block of the pattern has no moments at all.
    "frozen": (AdamW(), (r"decoder/layers/[024]/",)),
}


@pytest.mark.parametrize("case", CASES)
def test_scanned_and_unrolled_states_are_one_checkpoint(tmp_path, case):
    """Saved from each form, restored into each form: the same bits, moments of every optimizer included."""
    forms = [make_state(layers, *CASES[case]) for layers in (Layers.SCAN, Layers.UNROLL)]
    assert forms[0][1] and not forms[1][1], "one form has stacks, the other has none"
    for saved, layouts in forms:
        folder = tmp_path / ("scanned" if layouts else "unrolled")
        with CheckpointManager(folder, CheckpointConfig(), layouts) as manager:
            manager.save(1, saved)
        for wanted, layouts in forms:
            with CheckpointManager(folder, CheckpointConfig(), layouts) as manager:
                found = manager.restore(jax.eval_shape(lambda state: state, wanted)).state
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            for path, leaf in naming.flatten(wanted).items():
                assert np.asarray(naming.flatten(found)[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_names_on_disk_are_those_of_unstack():
    """Two ways to number layers, one law."""
    state, layouts = make_state(Layers.SCAN, AdamW())
    by_unstack = naming.flatten(unstack(state, layouts))
    assert set(naming.sources(state, layouts)) == set(by_unstack)
    for path, source in naming.sources(state, layouts).items():
        leaf = naming.flatten(state)[source.path]
        leaf = leaf if source.row is None else leaf[source.row]
        assert np.array_equal(leaf, by_unstack[path])
