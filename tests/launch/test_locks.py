"""The lock files: exact pins alone, one set of versions, inside the ranges of setup.py."""

import pathlib
import re
import runpy
import sys
import types

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.lock.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines), "addresses, hashes or ranges"
    return dict(line.split("==") for line in lines)


def requirements(monkeypatch) -> dict:
    """The arguments that setup.py gives to `setup`."""
    given = {}
    fake = types.SimpleNamespace(setup=given.update, find_packages=lambda **_: [])
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


@pytest.mark.parametrize("lock", ["test", "tpu", "cuda"])
def test_base_is_a_part_of_every_other(lock):
    assert pins("base").items() <= pins(lock).items()


@pytest.mark.parametrize(
    ("lock", "extras"), [("base", []), ("test", ["seqio", "dev"]), ("tpu", ["tpu"]), ("cuda", ["cuda"])]
)
def test_locks_fit_the_ranges(monkeypatch, lock, extras):
    setup = requirements(monkeypatch)
    wanted = setup["install_requires"] + [r for extra in extras for r in setup["extras_require"][extra]]
    locked = pins(lock)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is in setup.py and not in the lock; run launch/lock.sh"
        assert requirement.specifier.contains(locked[name]), f"{requirement} and {name}=={locked[name]}"
