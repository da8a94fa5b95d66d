"""What storage does to checkpoints: every file damaged in turn, no room left, nothing there any more."""

import contextlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints import stored
from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.checkpoints.manifest import CheckpointError

CONFIG = CheckpointConfig(period=1, keep_last=100)
# Orbax's notes of its commit: written after the manifest, never read.
UNREAD = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def make_state(seed):
    values = np.random.default_rng(seed).normal(size=(4, 64, 256)).astype(np.float32)  # does not compress
    return {"step": jnp.int32(seed), "params": {str(i): jnp.asarray(value) for i, value in enumerate(values)}}


def open_manager(folder, report=print):
    return CheckpointManager(folder, CONFIG, report=report)


def target():
    return jax.eval_shape(lambda: make_state(0))


def assert_newest(folder, step):
    """The newest step is this one, and every bit of it is right."""
    said = []
    with open_manager(folder, said.append) as manager:
        restored = manager.restore(target())
    assert restored.checkpoint.step == step and not said
    jax.tree.map(np.testing.assert_array_equal, restored.state, make_state(step))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("intact")
    with open_manager(folder) as manager:
        for step in (1, 2):
            manager.save(step, make_state(step))
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "delete"])
def test_every_file_in_turn(intact, tmp_path, damage):
    """Found, named, skipped, never loaded; and the step is saved again, with the damaged one set aside."""
    names = sorted(str(path.relative_to(intact / "2")) for path in (intact / "2").rglob("*") if path.is_file())
    assert len(names) > 6
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(intact, folder)
        damage(folder / "2" / name)
        said = []
        with open_manager(folder, said.append) as manager:
            restored = manager.restore(target())
            if name in UNREAD:
                assert restored.checkpoint.step == 2 and not said
                continue
            assert restored.checkpoint.step == 1, name
            jax.tree.map(np.testing.assert_array_equal, restored.state, make_state(1))
            (sentence,) = said
            assert sentence.startswith("Skipped a checkpoint. The checkpoint of step 2 in ")
            # A bit of the manifest may be one of another file's digest, which is then what seems altered.
            assert str(folder / "2" / name) in sentence or name == "manifest.json", sentence
            manager.save(2, make_state(2))
        assert_newest(folder, 2)
        assert (folder / "2.set_aside").is_dir()
        shutil.rmtree(folder)


@contextlib.contextmanager
def no_room():
    """No file of this process may grow beyond 50 kB: the system then refuses writes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(intact, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(intact, folder)
    with pytest.raises(
        CheckpointError, match=r"step 3 in .* failed .*; earlier checkpoints are intact; check free space"
    ):
        with no_room(), open_manager(folder) as manager:
            manager.save(3, make_state(3))
            manager.wait()
    assert stored.committed_steps(folder) == (1, 2)
    assert_newest(folder, 2)
    with open_manager(folder) as manager:  # there is room again
        manager.save(3, make_state(3))
    assert_newest(folder, 3)
    assert not [path.name for path in folder.iterdir() if "tmp" in path.name]


def test_storage_that_went_away_is_one_sentence(intact, tmp_path):
    """As when a mount is lost: what is at its place is no folder."""
    folder, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(intact, folder)
    manager = open_manager(folder)
    folder.rename(away)
    folder.write_text("")
    with pytest.raises(CheckpointError, match="step 3 in .* failed .*; earlier checkpoints are intact"):
        manager.save(3, make_state(3))
        manager.wait()
    folder.unlink()
    away.rename(folder)
    assert_newest(folder, 2)
    with open_manager(folder) as manager:
        manager.save(3, make_state(3))
    assert_newest(folder, 3)
