"""The launch scripts on machines that are not ours: which Python they find, what they install, what they say."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ["bash", "basename", "cat", "chmod", "cksum", "cp", "dirname", "env", "grep", "mkdir", "rm", "sh"]

# Answers as a Python would to what the scripts ask of it; notes what it was asked to run.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "--version "*) echo "Python 3.12.99" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m "*) echo "$*" >> "$CALLS"; exit "${MODULE_STATUS:-0}" ;;
  "-c import ensurepip"*) exit "${ENSUREPIP_STATUS:-0}" ;;
esac
"""


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Machine:
    """A clone, a home and a PATH of its own, under a temporary folder."""

    def __init__(self, folder: pathlib.Path):
        self.clone, self.bin, self.home = folder / "clone", folder / "bin", folder / "home"
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        shutil.copy(ROOT / ".python-version", self.clone)
        self.bin.mkdir()
        self.home.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.lock = self.clone / "requirements" / "base.lock.txt"
        self.lock.parent.mkdir()
        self.lock.write_text("numpy==2.4.6\n")
        (self.lock.parent / "test.lock.txt").write_text("numpy==2.4.6\n")
        self.calls = folder / "calls"

    def run(self, command: str, **env: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls), **env}
        return subprocess.run([str(self.bin / "bash"), "-c", command], env=env, capture_output=True, text=True)

    def source(self, command: str, **env: str) -> subprocess.CompletedProcess:
        return self.run(f"set -euo pipefail; source {self.clone}/launch/common.sh; {command}", **env)

    def ran(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


SUITABLE = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
PYTHON_3_12 = '#!/bin/sh\ncase "$2" in *3.12*) exit 0 ;; esac\nexit 1\n'
PYTHON_3_13 = PYTHON_3_12.replace("3.12", "3.13")
UNSUITABLE = "#!/bin/sh\nexit 1\n"


@pytest.mark.parametrize(
    "place",
    [
        "bin/python3.12",
        "bin/python3",
        "home/.pyenv/versions/3.12.1/bin/python",
        "home/.pyenv/versions/3.13.0/bin/python",
        "home/.local/share/uv/python/cpython-3.13.2-linux-x86_64-gnu/bin/python3",
    ],
)
def test_a_suitable_python_is_found(machine, tmp_path, place):
    """Also where the default `python3` is too old and another version only lies in pyenv's or uv's folder."""
    if place != "bin/python3":
        executable(tmp_path / "bin" / "python3", UNSUITABLE)
    executable(tmp_path / "home/.pyenv/versions/3.11.7/bin/python", UNSUITABLE)
    python = executable(tmp_path / place, SUITABLE)
    found = machine.source("find_python")
    assert (found.returncode, found.stdout.strip()) == (0, str(python))


def test_the_version_of_the_repository_comes_first(machine, tmp_path):
    """The lock files are resolved for it; another supported one serves where it is missing."""
    other = executable(tmp_path / "bin/python3.13", PYTHON_3_13)
    assert machine.source("find_python").stdout.strip() == str(other)
    wanted = executable(tmp_path / "home/.pyenv/versions/3.12.9/bin/python", PYTHON_3_12)
    assert machine.source("find_python").stdout.strip() == str(wanted)


def test_without_a_suitable_python_one_sentence_says_how_to_get_one(machine):
    executable(machine.bin / "python3", UNSUITABLE)
    result = machine.run(f"{machine.clone}/launch/local.sh")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "'pyenv install 3.12' or 'uv python install 3.12'" in result.stderr
    assert not (machine.clone / ".venv").exists()


def test_python_without_ensurepip(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    result = machine.run(f"{machine.clone}/launch/local.sh", ENSUREPIP_STATUS="1")
    assert result.returncode == 1 and "apt-get install python3-venv" in result.stderr


def test_local_installs_once_then_trains_at_once(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    train = "-m jaxlm.train --gin_file=gin_configs/runs/quickstart.gin --gin.TRAIN_STEPS=3"
    for _ in range(2):
        result = machine.run(f"{machine.clone}/launch/local.sh --gin.TRAIN_STEPS=3")
        assert result.returncode == 0, result.stderr
    install, *trained = machine.ran()
    assert install.startswith("-m pip install") and install.endswith("requirements/base.lock.txt")
    assert trained == [train, train]
    machine.lock.write_text("numpy==2.4.7\n")
    machine.run(f"{machine.clone}/launch/local.sh")
    assert machine.ran()[3].startswith("-m pip install")


def test_uv_is_used_where_it_is(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    fake_uv = '#!/bin/sh\necho "uv $*" >> "$CALLS"\n[ "$1" = pip ] || { mkdir -p "$6/bin"; cp "$5" "$6/bin/python"; }\n'
    executable(machine.bin / "uv", fake_uv)
    assert machine.source('ensure_environment "$root/requirements/base.lock.txt"').returncode == 0
    assert [call.split()[:3] for call in machine.ran()] == [["uv", "venv", "--quiet"], ["uv", "pip", "install"]]


def test_a_failed_installation_is_not_taken_for_done(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    install = 'ensure_environment "$root/requirements/base.lock.txt"'
    failed = machine.source(install, MODULE_STATUS="1")
    assert failed.returncode == 1 and "check the network and run this again" in failed.stderr.splitlines()[-1]
    assert machine.source(install).returncode == 0
    assert len(machine.ran()) == 2


def test_what_another_lock_file_changed_is_installed_again(machine):
    """And only that: a larger set with the same pins leaves a smaller one as it was."""
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    base, test = (f'ensure_environment "$root/requirements/{name}.lock.txt"' for name in ("base", "test"))
    larger = machine.lock.with_name("test.lock.txt")
    larger.write_text("jax==0.12.0\n" + machine.lock.read_text())
    for install in (base, test, base):
        assert machine.source(install).returncode == 0
    assert len(machine.ran()) == 2
    larger.write_text("numpy==2.4.5\n")
    for install in (test, base, base):
        assert machine.source(install).returncode == 0
    assert [call.rpartition("/")[2] for call in machine.ran()[2:]] == ["test.lock.txt", "base.lock.txt"]


def test_an_environment_of_another_python_is_left_alone(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    executable(machine.clone / ".venv/bin/python", UNSUITABLE)
    result = machine.source('ensure_environment "$root/requirements/base.lock.txt"')
    assert result.returncode == 1 and "remove that folder and run this again" in result.stderr
    assert not machine.ran()


@pytest.mark.parametrize(("arguments", "limit"), [("tests/data", "45m"), ("--full", "0")])
def test_tests_have_a_time_limit(machine, arguments, limit):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    executable(machine.bin / "timeout", '#!/bin/sh\necho "timeout $*" >> "$CALLS"\nexit 124\n')
    result = machine.run(f"{machine.clone}/launch/test.sh {arguments}")
    assert result.returncode == 1 and "the tests took longer than" in result.stderr
    _, check, form, guarded = machine.ran()
    assert (check, form) == ("-m ruff check .", "-m ruff format --check .")
    assert f" {limit} " in guarded and guarded.endswith(f"--durations=20 {arguments}")


def test_tests_fail_when_the_linter_does(machine):
    executable(machine.bin / "python3.12", FAKE_PYTHON)
    machine.source('ensure_environment "$root/requirements/test.lock.txt"')
    assert machine.run(f"{machine.clone}/launch/test.sh", MODULE_STATUS="1").returncode == 1
    assert machine.ran()[-1] == "-m ruff check ."


def test_scripts_are_executable():
    scripts = [ROOT / "launch" / name for name in ("local.sh", "test.sh", "lock.sh")] + [ROOT / ".ci" / "run"]
    assert all(os.access(script, os.X_OK) for script in scripts)
