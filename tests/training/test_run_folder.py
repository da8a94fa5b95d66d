"""Law 8 for run folders: nothing of another run is overwritten, and a run knows whether it continues."""

import json
import subprocess
import sys

import pytest

from jaxlm.training.run_folder import RunFolder, RunFolderError, Status

IDENTITY = {"model": "layers = 2\nwidth = 64\n", "data": "fingerprint 1"}


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def opened(path, steps=10, **changes):
    folder = RunFolder(path)
    status = folder.open(IDENTITY | changes, total_steps=steps, config="A.x = 1\n", config_diff="x: 0 -> 1\n")
    folder.release()
    return folder, status


def test_new_continues_finished(tmp_path):
    folder, status = opened(tmp_path / "run")
    assert status is Status.NEW
    assert folder.config.read_text() == "A.x = 1\n" and folder.config_diff.read_text() == "x: 0 -> 1\n"
    run_id = folder.id
    assert opened(tmp_path / "run")[1] is Status.CONTINUES
    folder.finish(10)
    before = contents(folder.path)
    assert opened(tmp_path / "run")[1] is Status.FINISHED
    assert contents(folder.path) == before
    assert opened(tmp_path / "run", steps=20)[1] is Status.CONTINUES, "more steps were asked for"
    assert folder.id == run_id and len(folder.read()["starts"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "layers = 2\nwidth = 128\n"}, "its model differs .there 'width = 64', here 'width = 128'"),
        ({"data": "fingerprint 2"}, "its data differs"),
        ({"objective": "span_corruption"}, "its objective differs .one of the two has none"),
        ({"model": "", "data": ""}, "its data and model differ "),
    ],
)
def test_another_runs_folder_is_refused_untouched(tmp_path, changes, message):
    opened(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=f"belongs to another run: {message}.*another folder"):
        opened(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_a_field_that_is_none_may_be_new(tmp_path):
    """A later version has one more, and without it nothing is different."""
    opened(tmp_path)
    newer = IDENTITY["model"] + "window = None\n"
    assert opened(tmp_path, model=newer)[1] is Status.CONTINUES
    with pytest.raises(RunFolderError, match="here 'window = 4'"):
        opened(tmp_path, model=IDENTITY["model"] + "window = 4\n")


def test_a_folder_with_other_files_is_refused_untouched(tmp_path):
    (tmp_path / "config.gin").write_text("mine")
    with pytest.raises(RunFolderError, match="no run's folder; choose a new"):
        opened(tmp_path)
    assert contents(tmp_path) == {"config.gin": b"mine"}
    with pytest.raises(RunFolderError, match="is a file"):
        opened(tmp_path / "config.gin")
    with pytest.raises(RunFolderError, match="mount it"):
        RunFolder("gs://bucket/run")


def test_an_interrupted_first_start_is_not_a_stranger(tmp_path):
    """Killed between the lock and run.json."""
    (tmp_path / "run.lock").touch()
    assert opened(tmp_path)[1] is Status.NEW


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    opened(tmp_path)
    program = (
        "import sys, time; from jaxlm.training.run_folder import RunFolder\n"
        f"RunFolder(sys.argv[1]).open({IDENTITY!r}, total_steps=10); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match="Another process is training"):
            opened(tmp_path)
        other.kill()
    assert opened(tmp_path)[1] is Status.CONTINUES, "the lock must not survive its process"


def test_rewind_leaves_one_line_a_step(tmp_path):
    folder, _ = opened(tmp_path)
    assert folder.rewind(0) == 0
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 8)]
    folder.metrics.write_text("".join(lines) + '{"step": 8, "lo')  # killed while writing step 8
    assert folder.rewind(5) == 3
    assert folder.metrics.read_text() == "".join(lines[:5])


def test_changed_configuration_keeps_the_old_one(tmp_path):
    folder, _ = opened(tmp_path)
    folder.open(IDENTITY, total_steps=10, config="A.x = 2\n")
    folder.release()
    assert folder.config.read_text() == "A.x = 2\n"
    assert (tmp_path / "config.1.gin").read_text() == "A.x = 1\n"


def test_another_hosts_folder_of_the_same_name_is_not_this_one(tmp_path):
    """Hosts whose MODEL_DIR is not shared would each keep a part of the checkpoints."""
    folder = RunFolder(tmp_path / "run")
    folder.open({"model": "m"}, total_steps=1)
    folder.await_claim(folder.id)
    for other in (RunFolder(tmp_path / "elsewhere"), folder):
        with pytest.raises(
            RunFolderError, match="is not the folder that the job's first process claimed; MODEL_DIR must"
        ):
            other.await_claim("another", seconds=0.0)
