"""Warm start: the right leaves from another run, under the right names, and an error that names the leaf otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError
from jaxlm.checkpoints.surgery import Drop, Fresh, Keep, PickLayers, Rename, Scale, Weights
from jaxlm.checkpoints.warm_start import Missing, OptimizerState, WarmStart, warm_start
from jaxlm.layers.stacking import StackLayout, stack


def make_params(seed, layers=4, vocab=16, stack_name="decoder"):
    """An unrolled model with an embedding and a norm."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {str(i): {"attention": {"query": normal(4, 6)}, "scale": normal(4)} for i in range(layers)}
    return {stack_name: {"embedding": normal(vocab, 4), "layers": blocks, "norm": normal(4)}}


def layouts(layers, stack_name="decoder"):
    return (StackLayout((stack_name,), pattern=2, repeats=layers // 2),)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint of a scanned decoder and its average, and the unrolled parameters."""
    folder = tmp_path_factory.mktemp("run")
    params, average = make_params(0), make_params(1)
    state = {"params": stack(params, layouts(4)), "ema_params": stack(average, layouts(4)), "step": jnp.int32(9)}
    with CheckpointManager(folder / "checkpoints", CheckpointConfig(), layouts(4)) as manager:
        manager.save(9, state)
    return folder, params, average


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/9"])
def test_everything_from_any_form_of_path(run, where):
    folder, params, _ = run
    started = warm_start(make_params(5), WarmStart(str(folder / where)))
    account = started.account
    assert_same(started.params, params)
    assert len(account.taken) == len(jax.tree.leaves(params)) and not account.new and not account.dropped


def test_average_into_a_scanned_model(run):
    folder, _, average = run
    fresh = stack(make_params(5), layouts(4))
    started = warm_start(fresh, WarmStart(str(folder), weights=Weights.AVERAGED), layouts(4))
    assert_same(started.params, stack(average, layouts(4)))


def test_rename_drop_and_new(run):
    """A decoder becomes an encoder, its norm starts afresh; the account says so of every leaf."""
    folder, params, _ = run
    fresh = make_params(5, stack_name="encoder")
    said = []
    rules = (Drop(".*/norm"), Rename("decoder/(.*)", r"encoder/\1"), Fresh("encoder/norm"))
    started = warm_start(fresh, WarmStart(str(folder), rules=rules), report=said.append)
    expected = {"encoder": {**params["decoder"], "norm": fresh["encoder"]["norm"]}}
    assert_same(started.params, expected)
    account = started.account
    assert account.new == ("encoder/norm",) and account.dropped == ("decoder/norm",)
    lines = [" ".join(line.split()) for line in said[0].splitlines()]
    assert "mapped encoder/embedding <- decoder/embedding" in lines
    assert "mapped encoder/layers/0-3/attention/query <- decoder/layers/0-3/attention/query (4 layers)" in lines
    assert "new encoder/norm" in lines and "dropped decoder/norm" in lines


def test_deeper_model_takes_some_layers_of_its_stacks(run):
    """Layers 0-3 from the checkpoint, 4 and 5 as initialised, though they share stacks."""
    folder, params, _ = run
    fresh = make_params(5, layers=6)
    config = WarmStart(str(folder), missing=Missing.INITIALISE)
    started = warm_start(stack(fresh, layouts(6)), config, layouts(6), report=lambda _: None)
    expected = {
        "decoder": {**params["decoder"], "layers": {**fresh["decoder"]["layers"], **params["decoder"]["layers"]}}
    }
    assert_same(started.params, stack(expected, layouts(6)))
    assert {name.split("/")[2] for name in started.account.new} == {"4", "5"}


def test_values_are_cast_to_the_models_type(run):
    folder, params, _ = run
    fresh = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(5))
    started = warm_start(fresh, WarmStart(str(folder)))
    assert_same(started.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({}, {"layers": 6}, "decoder/layers/4/.* without values; .* 'initialise'"),
        ({}, {"layers": 2}, "as decoder/layers/2/.*, which this model lacks; drop or rename it"),
        ({}, {"vocab": 24}, r"decoder/embedding .* \[16, 4\], .* \[24, 4\] .*vocabulary.*16 ids.*24.*; drop it"),
        ({"rules": (Rename(r"(decoder/layers)/\d+/(.*)", r"\1/0/\2"),)}, {}, "decoder/layers/0/.* two values"),
        ({"rules": (Rename("encoder/.*", "x"),)}, {}, r"Rename has the pattern 'encoder/.*', which matches none of"),
        ({"rules": (Rename("decoder/norm", r"\1"),)}, {}, r"Rename names '\\\\1', which does not fit the groups"),
        ({"rules": (Fresh("head/.*"),)}, {}, "Fresh has the pattern 'head/.*', which matches none of this model's"),
        ({"rules": (Keep(".*norm"),)}, {}, "leaves decoder/embedding, .* without values"),
        ({"rules": (PickLayers((0, 7)),)}, {}, "PickLayers asks for layer 7 of decoder/layers, .* layers 0 to 3"),
        ({"path": "nowhere"}, {}, "no checkpoint to start from in .*nowhere"),
        ({"step": 8}, {}, r"no checkpoint of step 8 \(it has: 9\)"),
    ],
)
def test_errors_name_the_leaf_and_the_remedy(run, config, model, message):
    folder, _, _ = run
    config = {**config, "path": str(folder / config.get("path", ""))}
    with pytest.raises(CheckpointError, match=message):
        warm_start(make_params(5, **model), WarmStart(**config))


def test_bad_pattern_is_named():
    with pytest.raises(ValueError, match=r"Drop has the pattern '\(', which is no regular"):
        Drop("(")


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    """A run's folder with an optimizer's state: two moments a parameter, and a counter."""
    folder = tmp_path_factory.mktemp("optimized")
    params, mu, nu = (make_params(seed) for seed in (0, 1, 2))
    opt_state = {"0": {"mu": stack(mu, layouts(4)), "nu": stack(nu, layouts(4)), "count": jnp.int32(9)}}
    opt_state["guard"] = {"losses": jnp.ones(4)}
    state = {"params": stack(params, layouts(4)), "opt_state": opt_state, "step": jnp.int32(9)}
    with CheckpointManager(folder / "checkpoints", CheckpointConfig(), layouts(4)) as manager:
        manager.save(9, state)
    return folder, mu, nu


def first_state(params):
    """An optimizer's state before its first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"0": {"mu": zeros, "nu": zeros, "count": jnp.int32(0)}}


def test_the_optimizer_starts_afresh_unless_asked(optimized):
    params = stack(make_params(5), layouts(4))
    started = warm_start(params, WarmStart(str(optimized[0])), layouts(4), report=lambda _: None)
    fresh = first_state(params)
    assert started.optimizer_state(fresh, layouts(4), print) is fresh


def test_moments_follow_parameters_that_are_taken_as_they_are(optimized):
    """Under new names and in other layers; what was changed or is new has none."""
    folder, mu, nu = optimized
    fresh = make_params(5, layers=6, stack_name="encoder")
    rules = (
        PickLayers(((0, 4), (0, 2))),
        Rename("decoder/(.*)", r"encoder/\1"),
        Scale("encoder/norm", 0.5),
        Fresh("encoder/layers/5/scale"),
    )
    config = WarmStart(str(folder), rules=rules, optimizer=OptimizerState.KEEP)
    params, said = stack(fresh, layouts(6, "encoder")), []
    started = warm_start(params, config, layouts(6, "encoder"), report=lambda _: None)
    found = started.optimizer_state(first_state(params), layouts(6, "encoder"), said.append)["0"]
    assert found["count"] == 9
    for name, moments in (("mu", mu), ("nu", nu)):
        old = moments["decoder"]
        layers = {str(i): old["layers"][str(i % 4)] for i in range(6)}
        layers["5"] = {**layers["5"], "scale": jnp.zeros(4)}
        expected = {"encoder": {"embedding": old["embedding"], "layers": layers, "norm": jnp.zeros(4)}}
        assert_same(found[name], stack(expected, layouts(6, "encoder")))
    assert said == ["The optimizer keeps 25 of 29 arrays of its state; the others start from zero."]


def test_the_guard_watches_from_the_beginning(optimized):
    params, guard = stack(make_params(5), layouts(4)), {"losses": jnp.zeros(4)}
    started = warm_start(params, WarmStart(str(optimized[0]), optimizer="keep"), layouts(4), report=lambda _: None)
    found = started.optimizer_state(first_state(params) | {"guard": guard}, layouts(4), lambda _: None)
    assert found["0"]["count"] == 9
    np.testing.assert_array_equal(found["guard"]["losses"], 0.0)


def test_moments_of_another_algorithm_are_refused(optimized, run):
    params = stack(make_params(5), layouts(4))
    for folder in (optimized[0], run[0]):
        config = WarmStart(str(folder), optimizer="keep")
        started = warm_start(params, config, layouts(4), report=lambda _: None)
        with pytest.raises(CheckpointError, match="no optimizer state of this algorithm; use the algorithm"):
            started.optimizer_state({"trace": params}, layouts(4), print)
