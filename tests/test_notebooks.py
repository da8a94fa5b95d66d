"""The notebooks run from top to bottom, at reduced size, and what is committed of their outputs is presentable."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))

# What replaces values of the cell tagged "parameters".
REDUCED = {
    "architecture_objective": {
        "TOKENS": 8000,
        "SEEDS": (0,),
        "ARCHITECTURES": ("causal", "prefix"),
        "OBJECTIVES": ("full LM", "span corruption"),
    },
    "objectives_gallery": {},
    "scaling_a_study": {"RESAMPLES": 5},
}


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> str:
    found = [output.get("text", "") for output in outputs(notebook)]
    found += [output["data"].get("text/plain", "") for output in outputs(notebook) if "data" in output]
    return "\n".join(found)


def test_every_notebook_has_its_reduced_size():
    assert {path.stem for path in NOTEBOOKS} == set(REDUCED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, repository, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    (i,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    reduced = REDUCED[path.stem] | {"STUDY_DIR": str(tmp_path)}
    names = set(re.findall(r"^(\w+) = ", notebook.cells[i].source, re.MULTILINE))
    assert set(REDUCED[path.stem]) <= names, "a reduced parameter is no longer one of the notebook's"
    lines = [f"{name} = {value!r}" for name, value in reduced.items() if name in names]
    notebook.cells.insert(i + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    # One thread of BLAS: where others compute too, those of small products do little but wait for one another.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert not re.search(r"(/home/|/root/|/tmp/|/work/|/Users/|Warning)", texts(notebook))
