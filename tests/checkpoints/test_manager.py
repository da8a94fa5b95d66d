"""Checkpoints: what is saved comes back bit for bit, and damage is never taken for a checkpoint."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.checkpoints import naming, stored
from jaxlm.checkpoints.manager import BestConfig, Better, CheckpointConfig, CheckpointManager, Writing
from jaxlm.checkpoints.manifest import CheckpointError, Verify
from jaxlm.layers.stacking import StackLayout

EVERY_STEP = CheckpointConfig(period=1, keep_last=100)


def make_params(seed=0, layers=4, vocab=32):
    """Unrolled parameters of a small decoder: mixed types, a scalar, layers of two kinds."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def layer(i):
        kind = {"attention": {"query": normal(8, 2, 4)}} if i % 2 == 0 else {"mlp": {"up": normal(8, 16)}}
        return {**kind, "norm": {"scale": normal(8, dtype=jnp.bfloat16)}}

    return {
        "decoder": {"embedding": normal(vocab, 8), "layers": {str(i): layer(i) for i in range(layers)}},
        "temperature": normal(),
    }


def stacked(params, pattern=2):
    """The same parameters as a scanned stack holds them."""
    layers = params["decoder"]["layers"]
    repeats = len(layers) // pattern
    groups = {
        str(p): jax.tree.map(lambda *xs: jnp.stack(xs), *[layers[str(r * pattern + p)] for r in range(repeats)])
        for p in range(pattern)
    }
    return {**params, "decoder": {**params["decoder"], "layers": groups}}


LAYOUTS = (StackLayout(path=("decoder",), pattern=2, repeats=2),)

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "chained": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.add_decayed_weights(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.apply_if_finite(optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 10)), 3),
        optax.ema(0.9),
    ),
    "grouped": optax.multi_transform(
        {"matrix": optax.adam(1e-2), "rest": optax.sgd(1e-2, momentum=0.9)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "rest", params),
    ),
}


def make_state(optimizer=OPTIMIZERS["adamw"], params=None, steps=2):
    """A state as training has it, after some updates so that no moment is zero."""
    params = make_params() if params is None else params
    opt_state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"step": jnp.int32(steps), "params": params, "opt_state": opt_state, "ema_params": None}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(found, expected):
    """The same pytree, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in naming.flatten(expected).items():
        other = naming.flatten(found)[path]
        assert other.dtype == leaf.dtype and other.shape == leaf.shape, path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip_is_exact(tmp_path, name):
    """Law 4: nothing of the state is lost or rounded, whatever the optimizer's pytree is made of."""
    state = make_state(OPTIMIZERS[name])
    data = {"position": [1, 2, 3], "epoch": 0}
    with CheckpointManager(tmp_path, EVERY_STEP) as manager:
        manager.save(2, state, data=data, callbacks={"guard": {"seen": 2}}, config="A.x = 1\n", metrics={"loss": 1.5})
        data["position"].append(4)  # the loader goes on; what was saved must not
    restored = CheckpointManager(tmp_path, EVERY_STEP).restore(abstract(state))
    assert_same(restored.state, state)
    checkpoint = restored.checkpoint
    assert (checkpoint.step, checkpoint.data) == (2, {"position": [1, 2, 3], "epoch": 0})
    assert (checkpoint.callbacks, checkpoint.config) == ({"guard": {"seen": 2}}, "A.x = 1\n")
    assert checkpoint.metrics == {"loss": 1.5}


def test_nothing_saved_is_none(tmp_path):
    assert CheckpointManager(tmp_path / "new", EVERY_STEP).restore(abstract(make_state())) is None


@pytest.mark.parametrize("saved_scanned", [True, False])
def test_scanned_and_unrolled_read_the_same_checkpoint(tmp_path, saved_scanned):
    """Layers are unstacked on disk, moments of the optimizer too."""
    unrolled = make_state()
    scanned = {
        "step": unrolled["step"],
        "params": stacked(unrolled["params"]),
        "opt_state": jax.tree.map(
            lambda node: stacked(node) if isinstance(node, dict) else node,
            unrolled["opt_state"],
            is_leaf=lambda node: isinstance(node, dict),
        ),
        "ema_params": None,
    }
    ways = {True: (scanned, LAYOUTS), False: (unrolled, ())}
    state, layouts = ways[saved_scanned]
    with CheckpointManager(tmp_path, EVERY_STEP, layouts) as manager:
        manager.save(1, state)
    on_disk = stored.open_checkpoint(tmp_path, 1).leaves
    assert on_disk[("params", "decoder", "layers", "3", "mlp", "up")].shape == (8, 16)
    assert on_disk[("opt_state", "0", "mu", "decoder", "layers", "2", "attention", "query")].shape == (8, 2, 4)
    for target, layouts in ways.values():
        assert_same(CheckpointManager(tmp_path, EVERY_STEP, layouts).restore(abstract(target)).state, target)


def test_layouts_of_another_model_are_refused(tmp_path):
    with CheckpointManager(tmp_path, EVERY_STEP, (StackLayout(("decoder",), 2, repeats=3),)) as manager:
        with pytest.raises(ValueError, match="first axis must count 3 layers"):
            manager.save(1, {"params": stacked(make_params())})


def test_frozen_stacks_keep_their_names(tmp_path):
    """An optimizer without state for some layers of a stack does not change how the others are found."""
    params = stacked(make_params())
    frozen = optax.masked(
        optax.adam(1e-2), {"decoder": {"embedding": True, "layers": {"0": False, "1": True}}, "temperature": False}
    )
    state = {"params": params, "opt_state": frozen.init(params)}
    with CheckpointManager(tmp_path, EVERY_STEP, LAYOUTS) as manager:
        manager.save(1, state)
        assert_same(manager.restore(abstract(state)).state, state)
    names = {naming.show(path) for path in stored.open_checkpoint(tmp_path, 1).leaves}
    moments = {name for name in names if "/mu/decoder/layers/" in name}
    assert {name.split("/layers/")[1] for name in moments} == {
        f"{i}/{w}" for i in (1, 3) for w in ("mlp/up", "norm/scale")
    }


def test_restore_in_groups(tmp_path, monkeypatch):
    """Reading leaf by leaf, as large states do, gives the same state."""
    state = {"params": stacked(make_params())}
    with CheckpointManager(tmp_path, EVERY_STEP, LAYOUTS) as manager:
        manager.save(1, state)
        monkeypatch.setattr(stored, "GROUP_BYTES", 300)
        assert_same(manager.restore(abstract(state)).state, state)


def test_donation_after_save(tmp_path):
    """The next step overwrites the state's buffers while the save goes on in the background."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}, "step": jnp.int32(0)}
    with CheckpointManager(tmp_path, EVERY_STEP) as manager:
        copies = {}
        for number in range(1, 6):
            copies[number] = jax.tree.map(np.array, state)
            manager.save(number, state)
            for _ in range(4):
                state = step(state)
        for number, copy in copies.items():
            assert_same(manager.restore(abstract(state), number).state, copy)


def saved_twice(folder):
    """Two checkpoints, of steps 1 and 2, and their states."""
    states = {step: make_state(steps=step) for step in (1, 2)}
    with CheckpointManager(folder, EVERY_STEP) as manager:
        for step, state in states.items():
            manager.save(step, state, data={"batch": step})
    return states


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_seen(tmp_path):
    """Whichever file is hit, either the step is skipped, or nothing that is read depended on it."""
    states = saved_twice(tmp_path)
    unread = []
    for path in files_of(tmp_path / "2"):
        for where in (0, 0.5, 1):
            original = path.read_bytes()
            flip_bit(path, where)
            said = []
            restored = CheckpointManager(tmp_path, EVERY_STEP, report=said.append).restore(abstract(states[1]))
            if restored.checkpoint.step == 2:
                unread.append(path.name)
                assert_same(restored.state, states[2])
                assert restored.checkpoint.data == {"batch": 2}
            else:
                assert_same(restored.state, states[1])
                assert restored.checkpoint.data == {"batch": 1}
                assert len(said) == 1 and "Skipped a checkpoint." in said[0] and "step 2" in said[0]
                with pytest.raises(CheckpointError, match="step 2 .* is damaged"):
                    CheckpointManager(tmp_path, EVERY_STEP).restore(abstract(states[1]), 2)
            path.write_bytes(original)
    # Only Orbax's two notes of the commit (written after the manifest, read by nobody) and the manifest's own spaces.
    assert set(unread) <= {"_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json"}
    assert any(path.parent.name == "d" for path in files_of(tmp_path / "2")), "no array data was among the files"


@pytest.mark.parametrize("verify", Verify)
def test_truncated_and_missing_files_are_seen(tmp_path, verify):
    states = saved_twice(tmp_path)
    config = CheckpointConfig(period=1, verify=verify)
    for path in files_of(tmp_path / "2"):
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt") and path.parent.name == "2":
            continue
        original = path.read_bytes()
        for damage in (lambda path=path, content=original: path.write_bytes(content[:-1]), path.unlink):
            damage()
            restored = CheckpointManager(tmp_path, config, report=lambda _: None).restore(abstract(states[1]))
            assert restored.checkpoint.step == 1, path
            path.write_bytes(original)
    assert CheckpointManager(tmp_path, config).restore(abstract(states[1])).checkpoint.step == 2


def test_all_damaged_is_an_error(tmp_path):
    """A run never starts from the beginning by itself where it had a past."""
    states = saved_twice(tmp_path)
    for step in states:
        flip_bit(tmp_path / str(step) / "meta" / "metadata", 0.5)
    with pytest.raises(CheckpointError, match="All checkpoints in .* are damaged"):
        CheckpointManager(tmp_path, EVERY_STEP, report=lambda _: None).restore(abstract(states[1]))


def test_unfinished_step_is_ignored(tmp_path):
    states = saved_twice(tmp_path)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")  # as a killed save leaves it
    (tmp_path / "7").mkdir()  # a folder that was never filled
    said = []
    restored = CheckpointManager(tmp_path, EVERY_STEP, report=said.append).restore(abstract(states[1]))
    assert restored.checkpoint.step == 1
    assert len(said) == 1 and "step 7" in said[0]
    with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
        CheckpointManager(tmp_path, EVERY_STEP).restore(abstract(states[1]), 2)


def test_saving_after_going_back_sets_later_steps_aside(tmp_path):
    """A damaged step 2 neither blocks the new step 2 nor is lost, and saving it is not silently skipped."""
    states = saved_twice(tmp_path)
    flip_bit(tmp_path / "2" / "meta" / "metadata", 0.5)
    new = make_state(OPTIMIZERS["adamw"], make_params(seed=5))
    with CheckpointManager(tmp_path, EVERY_STEP, report=lambda _: None) as manager:
        assert manager.restore(abstract(states[1])).checkpoint.step == 1
        manager.save(2, new)
        assert_same(manager.restore(abstract(new)).state, new)
    assert (tmp_path / "2.set_aside" / "state").is_dir()
    assert stored.committed_steps(tmp_path) == (1, 2)


def test_what_is_kept(tmp_path):
    """The last two, every fifth, and the best by a metric; a step without the metric or with NaN is not the best."""
    state = {"w": jnp.zeros(4)}
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 4.0, 5: 3.0, 6: None, 7: 2.0, 8: 6.0}
    config = CheckpointConfig(period=1, keep_last=2, keep_every=5, best=BestConfig("loss"), writing=Writing.SYNCHRONOUS)
    for step, loss in losses.items():  # each time as a new process, so that the metrics are read back
        with CheckpointManager(tmp_path, config) as manager:
            manager.save(step, state, metrics={} if loss is None else {"loss": loss})
    assert stored.committed_steps(tmp_path) == (2, 5, 7, 8)


def test_best_can_be_the_highest(tmp_path):
    config = CheckpointConfig(period=1, keep_last=2, best=BestConfig("accuracy", better=Better.HIGHER))
    with CheckpointManager(tmp_path, config) as manager:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.2, 0.5], 1):
            manager.save(step, {"w": jnp.zeros(4)}, metrics={"accuracy": accuracy})
    assert stored.committed_steps(tmp_path) == (2, 4, 5)


def test_when_to_save(tmp_path):
    with CheckpointManager(tmp_path, CheckpointConfig(period=10)) as manager:
        assert [step for step in range(31) if manager.should_save(step)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: make_params(vocab=48), r"params/decoder/embedding of shape \[32, 8\].*48.*same tokenizer"),
        (lambda p: {**p, "extra": {"w": jnp.zeros(3)}}, "lacks params/extra/w, which this model"),
        (lambda p: {"decoder": p["decoder"]}, "has params/temperature, which this model and optimizer lack"),
        (lambda p: {**p, "temperature": jnp.zeros((2,))}, r"params/temperature of shape \[\], but .* \[2\]; use the"),
        (lambda p: {**p, "temperature": jnp.zeros((), jnp.bfloat16)}, "temperature as float32, .* wants bfloat16"),
        (lambda p: make_params(layers=6), r"lacks params/decoder/layers/4/.*, .*layers/5/"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_leaf(tmp_path, change, message):
    state = {"params": make_params()}
    with CheckpointManager(tmp_path, EVERY_STEP) as manager:
        manager.save(1, state)
        with pytest.raises(CheckpointError, match=message):
            manager.restore(abstract({"params": change(state["params"])}))


def test_failed_save_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    """A write error in the background surfaces at the next question, and the folder still restores."""
    states = saved_twice(tmp_path)
    manager = CheckpointManager(tmp_path, EVERY_STEP)

    def no_space(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.checkpoints.manager.write_manifest", no_space)
    manager.save(3, states[2])
    with pytest.raises(CheckpointError, match="step 3 .* failed .*No space left on device.*earlier checkpoints are"):
        manager.wait()
    monkeypatch.undo()
    restored = CheckpointManager(tmp_path, EVERY_STEP).restore(abstract(states[2]))
    assert restored.checkpoint.step == 2


def test_manifest_lists_every_file(tmp_path):
    saved_twice(tmp_path)
    listed = set(json.loads((tmp_path / "1" / "manifest.json").read_text())["files"])
    found = {str(path.relative_to(tmp_path / "1")) for path in files_of(tmp_path / "1")}
    assert found - listed == {"_CHECKPOINT_METADATA", "manifest.json", "commit_success.txt"}


def test_manifests_of_older_checkpoints(tmp_path):
    """Their digests are still checked; one that no version made is refused by name."""
    saved_twice(tmp_path)
    path = tmp_path / "2" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry["digest"] = hashlib.blake2b((tmp_path / "2" / name).read_bytes(), digest_size=16).hexdigest()
    path.write_text(json.dumps({**manifest, "algorithm": "blake2b-128"}))
    assert stored.open_checkpoint(tmp_path, 2).step == 2
    flip_bit(tmp_path / "2" / "state" / "_METADATA", 0.5)
    with pytest.raises(CheckpointError, match="_METADATA was altered"):
        stored.open_checkpoint(tmp_path, 2)
    path.write_text(json.dumps({**manifest, "algorithm": "md5"}))
    with pytest.raises(CheckpointError, match="uses digests 'md5', this version knows crc32, blake2b-128"):
        stored.open_checkpoint(tmp_path, 2)


def test_when_to_save_by_time(tmp_path, monkeypatch):
    """Seconds since the last save, beside or in place of steps."""
    now = [100.0]
    monkeypatch.setattr("jaxlm.checkpoints.manager.time.monotonic", lambda: now[0])
    with CheckpointManager(tmp_path, CheckpointConfig(period=None, seconds=60.0)) as manager:
        assert not manager.should_save(1000)
        now[0] = 160.0
        assert manager.should_save(1001) and not manager.should_save(0)
        manager.save(1001, {"w": jnp.zeros(1)})
        assert not manager.should_save(1002)
        now[0] = 219.0
        assert not manager.should_save(1003)
    with CheckpointManager(tmp_path, CheckpointConfig(period=10, seconds=60.0)) as manager:
        assert manager.should_save(2000) and not manager.should_save(2001)
        now[0] = 300.0
        assert manager.should_save(2001)


def test_several_differences_are_named_together(tmp_path):
    """A few leaves of each kind, then a count."""
    params = {str(i): jnp.zeros((i + 1,)) for i in range(9)}
    other = {**{str(i): jnp.zeros((i + 2,)) for i in range(6)}, "6": jnp.zeros((7,), jnp.bfloat16), "new": jnp.zeros(1)}
    with CheckpointManager(tmp_path, EVERY_STEP) as manager:
        manager.save(1, params)
        with pytest.raises(CheckpointError) as refused:
            manager.restore(abstract(other))
    assert str(refused.value).endswith(
        "lacks new, which this model and optimizer have; it has 7, 8, which this model and optimizer lack; it has "
        "0 of shape [1], but this model wants [2]; 1 of shape [2], but this model wants [3]; "
        "2 of shape [3], but this model wants [4]; 3 of shape [4], but this model wants [5] and 2 more; it has "
        "6 as float32, but this run wants bfloat16, which would change its values; "
        "use the configuration saved with it, or start a new run with a warm start from it."
    )


def test_config_is_checked():
    with pytest.raises(ValueError, match="neither period nor seconds"):
        CheckpointConfig(period=None)
    with pytest.raises(ValueError, match="keep_last must be at least 2"):
        CheckpointConfig(keep_last=1)
    with pytest.raises(ValueError, match="period"):
        CheckpointConfig(period=0)
