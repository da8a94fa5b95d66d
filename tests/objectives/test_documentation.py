"""docs/objectives.md says what the code does: its table, its pictures and its files."""

import doctest
import importlib
import importlib.util
import pathlib
import re

import pytest

from jaxlm.configuration import resolve

MODULES = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "jaxlm" / "objectives").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_examples(name):
    """Every objective's docstring holds a worked example, and it is true."""
    failed, tried = doctest.testmod(importlib.import_module(f"jaxlm.objectives.{name}"))
    assert failed == 0
    assert tried > 0 or name in ("base", "losses", "distillation", "multi_token")  # the last is a table


@pytest.fixture(scope="module")
def drawing(repository):
    spec = importlib.util.spec_from_file_location("draw_objectives", repository / "tools" / "draw_objectives.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_refuses_says(drawing):
    document = drawing.DOCUMENT.read_text()
    assert drawing.with_table(document) == document, "run python -m tools.draw_objectives"


def test_every_objective_is_documented(drawing, repository):
    document = drawing.DOCUMENT.read_text()
    sections = set(re.findall(r"^## (\w+)$", document, re.M))
    assert set(MODULES) - {"base", "losses", "distillation"} == sections
    shown = set(re.findall(r"\(figures/objective_(\w+)\.png\)", document))
    assert shown == set(drawing.pictures()) == sections - {"mixture"}
    for link in re.findall(r"\]\(([^)h][^)]*)\)", document):
        assert (drawing.DOCUMENT.parent / link.partition("#")[0]).is_file(), link
    named = set(re.findall(r"gin_configs/objectives/(\w+)\.gin", document))
    assert named == {path.stem for path in (repository / "gin_configs" / "objectives").glob("*.gin")}


def test_the_command_line_shown_works(drawing):
    """The flags of the document's first example mean what it says."""
    flags = re.findall(r"--gin_?[\w.=/]+[\w.]", drawing.DOCUMENT.read_text())
    assert resolve("%OBJECTIVE", flags).noise_density == 0.5
