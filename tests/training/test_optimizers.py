"""Optimizers: equal to their papers, blind to whether layers are scanned, and to the letter of their settings."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.layers.parameters import Parametrization, Scaling
from jaxlm.layers.stacking import StackLayout, stack, unstack
from jaxlm.training import optimizers
from jaxlm.training.adafactor import scale_by_adafactor
from jaxlm.training.guard import Skip, SpikeGuard
from jaxlm.training.moments import MomentStorage
from jaxlm.training.optimizers import SGD, Adafactor, AdamW, Lion, Muon, OptimizerConfig, ParameterGroup, ScheduleFree
from jaxlm.training.parameters import ParameterInfo, flatten
from jaxlm.training.parameters import update as put
from jaxlm.training.schedules import Constant, Linear
from jaxlm.training.state import abstract_model

STANDARD = Parametrization()


def build(config, infos, **options):
    return optimizers.build_optimizer(config, infos, total_steps=100, parametrization=STANDARD, **options)


def run(optimizer, params, gradients, loss=1.0):
    """Parameters after a few updates, and the optimizer's state."""
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads, step):
        trained, _ = optimizer.split(params)
        updates, state, scalars = optimizer.update(grads, state, trained, step=step, loss=jnp.float32(loss))
        return put(params, optax.apply_updates(trained, updates)), state, scalars

    for step, grads in enumerate(gradients):
        params, state, scalars = update(params, state, optimizer.split(grads)[0], step)
    return params, state, scalars


def tree_of(model_infos, seed, scale=0.1):
    """Random arrays in the form of a model's parameters, of an unrolled model."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda info: jnp.asarray(scale * rng.standard_normal(info.shape), jnp.float32),
        model_infos,
        is_leaf=lambda node: hasattr(node, "axes"),
    )


ALGORITHMS = {
    "adamw": (AdamW(), {}),
    "adamw_bfloat16": (AdamW(), {"moments": MomentStorage()}),
    "adafactor": (Adafactor(min_dim_size_to_factor=8), {}),
    "adafactor_whole": (Adafactor(multiply_by_parameter_scale=False), {}),
    "lion": (Lion(), {}),
    "muon": (Muon(), {}),
    "muon_width": (Muon(consistent_rms=None), {}),
    "sgd": (SGD(momentum=0.9, nesterov=True), {}),
    "schedule_free": (AdamW(b1=0.0), {"schedule_free": ScheduleFree()}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_scanned_layers_are_updated_as_unrolled_ones(name, tiny):
    """Each layer of a stacked array is a parameter of its own: factors, norms, clipping, orthogonalisation."""
    algorithm, options = ALGORITHMS[name]
    layouts = (StackLayout(("decoder",), 2, 2),)
    config = OptimizerConfig(
        algorithm, Linear(0.1, 0.0), weight_decay=0.1, clip_global_norm=None, freeze=("scale",), **options
    )
    _, _, unrolled = abstract_model(lambda key: tiny.Model(key))
    _, _, scanned = abstract_model(lambda key: tiny.Model(key, scan=True))
    # Layers on different scales: anything taken over the whole stack would show.
    params = {i: tree_of(unrolled, i) for i in range(4)}
    for tree in params.values():
        for i, layer in tree["decoder"]["layers"].items():
            tree["decoder"]["layers"][i] = jax.tree.map(lambda x, i=i: x * 10.0 ** int(i), layer)
    stacked = {i: stack(tree, layouts) for i, tree in params.items()}
    one, one_state, _ = run(build(config, unrolled), params[0], [params[i] for i in (1, 2, 3)])
    other, other_state, _ = run(build(config, scanned), stacked[0], [stacked[i] for i in (1, 2, 3)])
    # Muon's batched products round differently; everything else is the same arithmetic.
    tolerance = {"rtol": 2e-3, "atol": 2e-5} if name.startswith("muon") else {"rtol": 1e-5, "atol": 1e-7}
    for left, right in ((one, unstack(other, layouts)), (one_state, unstack(other_state, layouts))):
        assert jax.tree.structure(left) == jax.tree.structure(right)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance), left, right)


def reference_adafactor(param, grads, learning_rate, factored):
    """Algorithms 4 and 5 of arXiv 1804.04235 in float64 for one matrix [N, M], or a vector."""
    row = col = v = 0.0
    for t, g in enumerate(grads, start=1):
        g = np.float64(g)
        beta = 1.0 - t**-0.8
        square = g**2 + 1e-30
        if factored:
            row = beta * row + (1 - beta) * square.mean(1)  # the paper's sums differ by a factor that cancels
            col = beta * col + (1 - beta) * square.mean(0)
            v_hat = np.outer(row, col) / row.mean()
        else:
            v = beta * v + (1 - beta) * square
            v_hat = v
        u = g / np.sqrt(v_hat)
        u /= max(1.0, np.sqrt((u**2).mean()) / 1.0)
        param = param - learning_rate * max(1e-3, np.sqrt((param**2).mean())) * u
    return param


def test_adafactor_is_the_papers(tiny):
    """Also for attention kernels, which are factored as matrices, and for each layer of a scanned stack."""
    _, _, infos = abstract_model(lambda key: tiny.Model(key, scan=True))
    params, *grads = (tree_of(infos, seed) for seed in range(4))
    config = OptimizerConfig(Adafactor(min_dim_size_to_factor=16), Constant(0.01), clip_global_norm=None)
    got = flatten(run(build(config, infos), params, grads)[0])
    flat_grads = [flatten(g) for g in grads]
    for path, info in flatten(infos).items():
        matrix = info.matrix_dims is not None
        layers = range(info.shape[0]) if info.stacked else [...]
        for layer in layers:
            old, new = np.float64(flatten(params)[path][layer]), got[path][layer]
            shape = old.shape
            if matrix:
                inputs, _ = info.matrix_dims
                rows = int(np.prod([info.shape[i] for i in inputs]))
                old = old.reshape(rows, -1)
            expected = reference_adafactor(old, [np.asarray(g[path][layer]).reshape(old.shape) for g in flat_grads],
                                           0.01, factored=matrix)  # fmt: skip
            np.testing.assert_allclose(new, expected.reshape(shape), rtol=1e-5, atol=1e-7, err_msg="/".join(path))


def test_adafactor_agrees_with_optax_on_matrices():
    """And is thereby T5X's, whose algorithm optax took over; vectors and small matrices keep whole moments."""
    shapes = {"large": (24, 40), "small": (4, 40), "vector": (40,)}
    axes = {"large": ("embed", "mlp"), "small": ("embed", "mlp"), "vector": ("mlp",)}
    infos = {
        n: ParameterInfo((n,), s, jnp.float32, axes[n], "vector" if n == "vector" else "hidden", (n,))
        for n, s in shapes.items()
    }
    ours = scale_by_adafactor(infos, min_dim_size_to_factor=16)
    theirs = optax.adafactor(1.0, min_dim_size_to_factor=16)
    params = tree_of(infos, 0)
    one, two = ours.init(params), theirs.init(params)
    assert set(one.v) == {"small", "vector"} and set(one.v_row) == {"large"}
    for seed in range(1, 4):
        grads = tree_of(infos, seed)
        a, one = ours.update(grads, one, params)
        b, two = theirs.update(grads, two, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -y, rtol=2e-5, atol=1e-7), a, b)


def test_adamw_is_optax_adamw(tiny):
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    params, *grads = (tree_of(infos, seed) for seed in range(4))
    config = OptimizerConfig(AdamW(), Linear(0.1, 0.0), weight_decay=0.1, clip_global_norm=1.0)
    mine = run(build(config, infos), params, grads)[0]
    decays = jax.tree.map(lambda i: i.role in ("hidden", "output"), infos, is_leaf=lambda n: hasattr(n, "axes"))
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda n: 0.1 * (1 - n / 100), b2=0.95, weight_decay=0.1, mask=decays),
    )
    state, expected = theirs.init(params), params
    for g in grads:
        updates, state = theirs.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mine, expected)


def test_groups_reach_single_layers_of_a_scanned_stack(tiny):
    _, params, infos = abstract_model(lambda key: tiny.Model(key, scan=True))
    groups = (ParameterGroup(r"layers/[03]/wi", 0.5, weight_decay=0.0), ParameterGroup("bias", weight_decay=2.0))
    config = OptimizerConfig(SGD(), Constant(1.0), weight_decay=0.1, groups=groups, clip_global_norm=None)
    rates = build(config, infos).rates
    layers = rates["decoder"]["layers"]
    # Positions 0 and 1 of the pattern hold layers (0, 2) and (1, 3).
    np.testing.assert_allclose(layers["0"]["wi"].learning_rate.ravel(), [0.5, 1.0])
    np.testing.assert_allclose(layers["1"]["wi"].weight_decay.ravel(), [0.1, 0.0])
    assert layers["0"]["bias"].weight_decay == 2.0 and layers["0"]["wo"].weight_decay == 0.1
    assert rates["embedding"].weight_decay == 0.0 and rates["scale"].weight_decay == 0.0
    assert rates["output"].weight_decay == 0.1


def test_frozen_parameters_stay_and_have_no_state(tiny):
    _, _, infos = abstract_model(lambda key: tiny.Model(key, scan=True))
    params, *grads = (tree_of(infos, seed) for seed in range(3))
    config = OptimizerConfig(AdamW(), Constant(0.1), weight_decay=0.1, freeze=("embedding", r"layers/[01]/"))
    optimizer = build(config, infos)
    new, state, scalars = run(optimizer, params, grads)
    np.testing.assert_array_equal(new["embedding"], params["embedding"])
    assert "embedding" not in state["adamw"][0].mu and "output" in state["adamw"][0].mu
    for position in ("0", "1"):  # the first repeat is layers 0 and 1, the second 2 and 3
        for name, leaf in new["decoder"]["layers"][position].items():
            old = params["decoder"]["layers"][position][name]
            np.testing.assert_array_equal(leaf[0], old[0])
            assert np.all(leaf[1] != old[1])
    # The norm that clips is that of the trained gradients alone.
    trained = [leaf[1] for position in ("0", "1") for leaf in grads[-1]["decoder"]["layers"][position].values()]
    trained += [grads[-1]["scale"], grads[-1]["output"]]
    np.testing.assert_allclose(
        scalars["grad_norm"], np.sqrt(sum((np.float64(g) ** 2).sum() for g in trained)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("decoderr",)}, "'decoderr' matches none of the model's 15 parameters"),
        ({"groups": (ParameterGroup("nothing"),)}, "'nothing' matches none"),
        ({"freeze": ("",)}, "match every parameter; nothing is left to train"),
        ({"freeze": ("(",)}, "is no regular expression"),
        ({"schedule_free": ScheduleFree()}, r"use AdamW\(b1=0.0\)"),
    ],
)
def test_wrong_settings_are_one_sentence(changes, message, tiny):
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(OptimizerConfig(AdamW(), Constant(0.1)), **changes), infos)


def test_schedule_free_evaluates_the_average(tiny):
    """Evaluation takes x, training stands at y = (1 - b1) z + b1 x (arXiv 2405.15682, equations 1 to 3)."""
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    params, *grads = (tree_of(infos, seed) for seed in range(4))
    config = OptimizerConfig(
        SGD(), Constant(0.1), clip_global_norm=None, schedule_free=ScheduleFree(0.9), freeze=("scale",)
    )
    optimizer = build(config, infos)
    new, state, _ = run(optimizer, params, grads)
    x = z = np.float64(params["output"])
    for t, g in enumerate(grads, start=1):
        z = z - 0.1 * np.float64(g["output"])
        x = (1 - 1 / t) * x + z / t
    averaged = optimizer.evaluation_params(new, state)
    np.testing.assert_allclose(averaged["output"], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["output"], 0.1 * z + 0.9 * x, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(averaged["scale"], params["scale"])


def test_muon_orthogonalises_attention_kernels_as_matrices(tiny):
    """An update's singular values are near one another, whatever the gradient's were."""
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    params, grads = tree_of(infos, 0), tree_of(infos, 1)
    new = run(build(OptimizerConfig(Muon(consistent_rms=None), Constant(1.0)), infos), params, [grads])[0]
    block, old = new["decoder"]["layers"]["0"], params["decoder"]["layers"]["0"]
    for name, shape, gain in (("wi", (16, 32), 2**0.5), ("wo", (32, 16), 1.0)):
        update = np.reshape(block[name] - old[name], shape) / gain
        values = np.linalg.svd(update, compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.3, values


@pytest.mark.parametrize("algorithm", [Muon(), Adafactor(min_dim_size_to_factor=16)])
def test_experts_in_one_array_are_separate_parameters(algorithm):
    """Each is orthogonalised, factored and clipped by itself, in a scanned stack too."""
    shape, axes = (16, 24), ("embed", "mlp")
    stacked = ParameterInfo(
        ("experts",), (2, 3, *shape), jnp.float32, ("layers", "experts", *axes), "hidden", ("0/experts", "1/experts")
    )
    apart = {f"{i}{j}": ParameterInfo((f"{i}{j}",), shape, jnp.float32, axes, "hidden", (f"{i}{j}",))
             for i in range(2) for j in range(3)}  # fmt: skip
    config = OptimizerConfig(algorithm, Constant(0.1), clip_global_norm=None)
    values = [np.random.default_rng(seed).normal(size=stacked.shape) for seed in range(3)]
    values[1][1, 2] *= 100.0  # one expert's gradient is large
    together = [{"experts": jnp.asarray(v, jnp.float32)} for v in values]
    one_by_one = [{name: tree["experts"][int(name[0]), int(name[1])] for name in apart} for tree in together]
    found = run(build(config, {"experts": stacked}), together[0], together[1:])[0]["experts"]
    expected = run(build(config, apart), one_by_one[0], one_by_one[1:])[0]
    for name, value in expected.items():
        np.testing.assert_allclose(found[int(name[0]), int(name[1])], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", [AdamW(), Lion(), Muon(), Adafactor(), SGD()])
def test_mup_multipliers(algorithm, tiny):
    """Table 8 of muP and table 1 of CompleteP at four times the width of the tuned model."""
    mup = Parametrization(kind=Scaling.MUP, base_width=4)
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    config = OptimizerConfig(algorithm, Constant(1.0), weight_decay=0.1)
    rates = optimizers.build_optimizer(config, infos, total_steps=1, parametrization=mup).rates
    hidden = rates["decoder"]["layers"]["0"]["wi"]
    expected = {"AdamW": 1 / 4, "Lion": 1 / 4, "Muon": 1 / 4, "Adafactor": 1 / 2, "SGD": 1.0}[type(algorithm).__name__]
    others = 4.0 if isinstance(algorithm, SGD) else 1.0
    assert hidden.learning_rate == pytest.approx(expected)
    assert rates["embedding"].learning_rate == rates["output"].learning_rate == pytest.approx(others)
    if isinstance(algorithm, AdamW):
        # rate x decay stays what it was at the base width
        assert hidden.learning_rate * hidden.weight_decay == pytest.approx(0.1)


def test_adam_epsilon_follows_the_gradients(tiny):
    """Where gradients are far below eps, the update tells it: update = m / eps."""
    mup = Parametrization(kind=Scaling.MUP, base_width=4)
    _, _, infos = abstract_model(lambda key: tiny.Model(key))
    config = OptimizerConfig(AdamW(eps=1.0), Constant(1.0), clip_global_norm=None)
    optimizer = optimizers.build_optimizer(config, infos, total_steps=1, parametrization=mup)
    params, grads = tree_of(infos, 0), jax.tree.map(lambda g: 1e-6 * jnp.ones_like(g), tree_of(infos, 1))
    trained, _ = optimizer.split(params)
    updates, _, _ = optimizer.update(grads, optimizer.init(params), trained, step=jnp.int32(0), loss=jnp.float32(1))
    # eps is 1/4 for a hidden matrix at four times the width, and its rate is 1/4.
    np.testing.assert_allclose(updates["decoder"]["layers"]["0"]["wi"], -1e-6, rtol=1e-3)


class TestGuard:
    """Spikes, and steps that are not finite, leave parameters and moments as they were."""

    def state_after(self, guard, losses):
        state, skips = guard.init(), []
        judge = jax.jit(guard.judge)
        for loss in losses:
            skip, state = judge(state, jnp.float32(loss), jnp.float32(1.0 + 0.01 * (len(skips) % 3)))
            skips.append(bool(skip))
        return skips, state

    def test_an_outlier_is_skipped_and_a_new_level_is_accepted_after_a_while(self):
        usual = [2.0 + 0.1 * (i % 5) for i in range(16)]
        skips, _ = self.state_after(SpikeGuard(window=16), [*usual, 5.0, *usual])
        assert skips == [False] * 16 + [True] + [False] * 16
        skips, state = self.state_after(SpikeGuard(window=16), usual + [5.0] * 32)
        assert skips[16] and not skips[-1] and int(state.in_a_row) == 0
        assert int(state.skipped) == sum(skips)

    def test_it_only_watches_at_first_but_skips_what_is_not_finite(self):
        skips, state = self.state_after(SpikeGuard(window=16), [1.0, 1.01, 50.0, np.nan, np.inf])
        assert skips == [False, False, False, True, True]
        assert int(state.in_a_row) == 2 and int(state.count) == 3 and np.isfinite(state.losses).all()

    def test_a_fall_is_no_spike(self):
        skips, _ = self.state_after(SpikeGuard(window=8), [5.0, 5.1] * 4 + [0.1])
        assert not any(skips)

    def test_a_skipped_step_changes_nothing(self, tiny):
        _, _, infos = abstract_model(lambda key: tiny.Model(key))
        params, grads = tree_of(infos, 0), tree_of(infos, 1)
        config = OptimizerConfig(AdamW(), Constant(0.1), weight_decay=0.1, guard=SpikeGuard(policy=Skip(patience=2)))
        optimizer = build(config, infos)
        bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
        new, state, scalars = run(optimizer, params, [bad])
        assert scalars["skipped"] == 1 and scalars["diverged"] == 0
        jax.tree.map(np.testing.assert_array_equal, new, params)
        jax.tree.map(np.testing.assert_array_equal, state["adamw"], optimizer.init(params)["adamw"])
        assert run(optimizer, params, [bad, bad])[2]["diverged"] == 1

    def test_without_a_guard_a_bad_step_is_reported(self, tiny):
        _, _, infos = abstract_model(lambda key: tiny.Model(key))
        optimizer = build(OptimizerConfig(SGD(), Constant(0.1)), infos)
        params, grads = tree_of(infos, 0), tree_of(infos, 1)
        assert run(optimizer, params, [grads])[2]["diverged"] == 0
        assert run(optimizer, params, [grads], loss=np.nan)[2]["diverged"] == 1


def test_paths_in_messages_are_those_of_unrolled_layers(tiny):
    _, _, infos = abstract_model(lambda key: tiny.Model(key, scan=True))
    names = [name for info in flatten(infos).values() for name in info.names]
    _, _, unrolled = abstract_model(lambda key: tiny.Model(key))
    assert sorted(names) == sorted(info.names[0] for info in flatten(unrolled).values())
    assert all(not re.search(r"layers/\d+$", name) for name in names)
