"""The step: accumulation changes nothing, one compile, and what it counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.parameters import Parametrization
from jaxlm.objectives.base import LossConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training import metrics
from jaxlm.training.compiles import CompileCounter
from jaxlm.training.evaluation import make_eval_step
from jaxlm.training.guard import SpikeGuard
from jaxlm.training.optimizers import SGD, AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.parameters import flatten
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, initializer
from jaxlm.training.step import StepConfig, layer_names, make_train_step

GRADIENT = OptimizerConfig(SGD(), Constant(1.0), clip_global_norm=None)  # parameters - new ones = the gradient


class Setup:
    """Everything a step needs, on one device."""

    def __init__(self, tiny, optimizer=GRADIENT, config=None, loss=None, **model):
        config, loss = config or StepConfig(), loss or LossConfig()
        self.parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
        self.make = lambda key: tiny.Model(key, **model)
        self.definition, _, self.infos = abstract_model(self.make)
        self.optimizer = build_optimizer(optimizer, self.infos, total_steps=100, parametrization=Parametrization())
        arguments = (self.definition, tiny.Objective(), self.optimizer, self.parallel)
        self.step = make_train_step(*arguments, config=config, loss=loss)
        self.eval_step = make_eval_step(*arguments, config=config, loss=loss)

    def state(self, seed=0):
        return initializer(self.make, self.optimizer, self.parallel)(seed)


@pytest.mark.parametrize("scan", [False, True])
def test_accumulation_equals_the_whole_batch(tiny, scan):
    """Rows have between 1 and 8 targets: a mean of the microbatches' means would be off by far more."""
    batch = tiny.batch(3)
    whole, cut = (Setup(tiny, config=StepConfig(microbatches=n), scan=scan) for n in (1, 4))
    before = flatten(jax.device_get(whole.state().params))
    one, one_metrics = whole.step(whole.state(), batch)
    other, other_metrics = cut.step(cut.state(), batch)
    for path, leaf in flatten(one.params).items():
        g, h = before[path] - np.asarray(leaf), before[path] - np.asarray(flatten(other.params)[path])
        assert np.linalg.norm(g - h) <= 1e-5 * np.linalg.norm(g), path
    for name in ("loss", "nats", "grad_norm", "loss/size"):
        np.testing.assert_allclose(one_metrics[name], other_metrics[name], rtol=1e-5)
    # The layers' own loss is a mean over tokens that are not padding, and part of the whole.
    cross_entropy, size, loss = (float(one_metrics[f"loss{name}"][0]) for name in ("/cross_entropy", "/size", ""))
    assert size > 1e-3 and abs(loss - cross_entropy - size) < 1e-5
    assert one_metrics["largest"][1] == 1 and other_metrics["largest"][1] == 4
    assert float(one_metrics["nats"][1]) == batch["decoder_loss_weights"].sum()


def test_microbatches_draw_dropout_of_their_own_and_steps_too(tiny):
    setup = Setup(tiny, config=StepConfig(microbatches=2), dropout=0.5)
    row = {name: x[:1] for name, x in tiny.batch(0).items()}
    batch = {name: np.repeat(x, 4, 0) for name, x in row.items()}  # equal rows: only dropout tells them apart
    losses = []
    for _ in range(2):
        state, found = setup.step(setup.state(), batch)
        losses.append(float(found["loss"][0]))
    assert losses[0] == losses[1], "the same seed and step draw the same masks"
    state = dataclasses.replace(setup.state(), step=jnp.int32(1))
    assert float(setup.step(state, batch)[1]["loss"][0]) != losses[0]
    # If both microbatches drew alike, the loss would be that of a batch of half the size.
    half = Setup(tiny, dropout=0.5)
    assert float(half.step(half.state(), {n: x[:2] for n, x in batch.items()})[1]["loss"][0]) != losses[0]


def test_one_compile_over_many_steps_evaluations_and_norms(tiny):
    """Law 7, with the norms due on some steps and not on others, and a restored state."""
    setup = Setup(
        tiny,
        optimizer=OptimizerConfig(AdamW(), Constant(0.01), guard=SpikeGuard(), ema_decay=0.9),
        config=StepConfig(layer_norm_period=2),
    )
    state, batch = setup.state(), {name: jnp.asarray(x) for name, x in tiny.batch(0).items()}
    jax.block_until_ready(batch)
    with CompileCounter() as compiles:
        for i in range(6):
            state, found = setup.step(state, batch)
            if i % 2:
                setup.eval_step(state, batch)
    assert compiles.count == 2, "one for the step, one for the evaluation"
    host = jax.device_get(state)
    restored = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), host, state)
    with CompileCounter() as compiles:
        setup.step(restored, batch)
    assert compiles.count == 0
    assert int(host.step) == 6 and found["loss"][0] < 4.0


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_narrow_integers_are_the_same_batch(tiny, dtype):
    setup = Setup(tiny)
    wide, narrow = tiny.batch(1), tiny.batch(1, dtype=dtype)
    one, two = setup.step(setup.state(), wide)[1], setup.step(setup.state(), narrow)[1]
    assert float(one["loss"][0]) == float(two["loss"][0])


def test_layer_norms_are_those_of_the_layers_scanned_or_not(tiny):
    """Under the names of unrolled layers, when due; without weight, and so unseen, otherwise."""
    found = {}
    for scan in (False, True):
        setup = Setup(tiny, config=StepConfig(layer_norm_period=3), scan=scan)
        state = setup.state()
        names = metrics.Names(layers=layer_names(setup.infos))
        params = flatten(jax.device_get(state.params))
        state, due = setup.step(state, tiny.batch(0))
        found[scan] = {k: v for k, v in metrics.read(due, names).items() if k.startswith("norms/")}
        _, not_due = setup.step(state, tiny.batch(1))
        assert not any(k.startswith("norms/") for k in metrics.read(not_due, names))
        if not scan:
            layer = [params["decoder", "layers", "2", n] for n in ("wi", "wo", "bias")]
            expected = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in layer))
            assert found[scan]["norms/parameters/decoder/layers/2"] == pytest.approx(expected, rel=1e-5)
    assert found[False].keys() == found[True].keys() and len(found[True]) == 3 * (4 + 3)
    for name, value in found[True].items():
        assert value == pytest.approx(found[False][name], rel=1e-4), name


def test_ema_and_evaluation_use_the_average(tiny):
    setup = Setup(tiny, optimizer=dataclasses.replace(GRADIENT, ema_decay=0.75))
    state = setup.state()
    old = np.asarray(state.params["output"])
    state, _ = setup.step(state, tiny.batch(0))
    expected = 0.75 * old + 0.25 * np.asarray(state.params["output"])
    np.testing.assert_allclose(state.ema_params["output"], expected, rtol=1e-6)
    plain = Setup(tiny)
    average = dataclasses.replace(plain.state(), params=state.ema_params)
    np.testing.assert_allclose(
        setup.eval_step(state, tiny.batch(1))["nats"][0], plain.eval_step(average, tiny.batch(1))["nats"][0], rtol=1e-6
    )


def test_a_batch_of_padding_changes_nothing(tiny):
    setup = Setup(tiny)
    batch = tiny.batch(0)
    for name in ("decoder_loss_weights", "decoder_segment_ids"):
        batch[name] = np.zeros_like(batch[name])
    before = jax.device_get(setup.state().params)
    state, found = setup.step(setup.state(), batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    assert "nats" not in metrics.read(found) and float(found["diverged"][0]) == 0


def test_a_skipped_step_does_not_count(tiny):
    setup = Setup(tiny, optimizer=dataclasses.replace(GRADIENT, guard=SpikeGuard()))
    batch = tiny.batch(0)
    state, found = setup.step(setup.state(), batch)
    totals = metrics.add(metrics.zero(found), found, 1)
    expected = metrics.read(found)["nats"]
    batch["decoder_loss_weights"] = batch["decoder_loss_weights"] * np.nan
    state, found = setup.step(state, batch)
    totals = metrics.add(totals, found, 2)
    values = metrics.read(totals.metrics)
    assert values["nats"] == pytest.approx(expected, rel=1e-6) and values["skipped"] == 0.5
    assert metrics.bad_step(totals) is None


def test_bits_per_byte_and_tokens(tiny):
    lengths = np.arange(tiny.vocabulary, dtype=np.int32) % 3
    batch = tiny.batch(0)
    rng = np.random.default_rng(0)
    batch["decoder_segment_ids"] = rng.integers(0, 2, batch["decoder_input_tokens"].shape).astype(np.int32)
    batch["dataset_ids"] = rng.integers(0, 2, batch["decoder_input_tokens"].shape).astype(np.int32)
    setup = Setup(tiny, config=StepConfig(byte_lengths=lengths), loss=LossConfig(num_datasets=2))
    _, found = setup.step(setup.state(), batch)
    found["cross_entropy"] = found.pop("nats")
    found["cross_entropy_by_dataset"] = (jnp.array([3.0, 8.0]), jnp.array([2.0, 4.0]))
    values = metrics.read(found, metrics.Names(datasets=("a", "b")))
    counted = lengths[batch["decoder_target_tokens"]] * (batch["decoder_loss_weights"] > 0)
    nats = float(found["cross_entropy"][0])
    assert values["bits_per_byte"] == pytest.approx(nats / np.log(2) / counted.sum(), rel=1e-5)
    of_b = counted[batch["dataset_ids"] == 1].sum()
    assert values["bits_per_byte/b"] == pytest.approx(8.0 / np.log(2) / of_b, rel=1e-5)
    assert values["cross_entropy/a"] == 1.5
    assert values["tokens"] == (batch["decoder_segment_ids"] > 0).sum()


def test_uneven_microbatches_are_refused(tiny):
    setup = Setup(tiny, config=StepConfig(microbatches=3))
    with pytest.raises(ValueError, match="8 examples cannot be cut into 3 equal microbatches"):
        setup.step(setup.state(), tiny.batch(0))
