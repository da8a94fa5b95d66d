"""Tables in the documents are those of the committed results."""

import pytest

from benchmarks import architecture_objective, decontamination, memory_levers, plan, precision, train_step_gpu
from benchmarks.guides import DOCS, with_tables

COPIES = {
    "architecture_objective": (
        "studies.md",
        architecture_objective.committed,
        "python -m benchmarks.architecture_objective",
    ),
    "decontamination": ("data.md", decontamination.committed, "python -m benchmarks.decontamination"),
    "plan": ("scaling.md", plan.table, "python -m benchmarks.plan --only floor"),
    "memory_levers": ("memory_and_precision.md", memory_levers.committed, "python -m benchmarks.memory_levers --only"),
    "precision": ("memory_and_precision.md", precision.committed, "python -m benchmarks.precision"),
    "train_step_gpu": ("memory_and_precision.md", train_step_gpu.committed, "python -m benchmarks.train_step_gpu"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_documents_show_the_committed_results(kind):
    document, table, command = COPIES[kind]
    text = (DOCS / document).read_text()
    assert f"<!-- {kind}: " in text
    assert with_tables(text, kind, table) == text, f"docs/{document} is out of date; run {command}"


def test_a_copy_is_made_anew():
    text = "a\n<!-- plan: x -->\n\nold\n\n<!-- end -->\nb <!-- plan: y -->\n<!-- end -->"
    found = with_tables(text, "plan", lambda name: f"| {name} |\n")
    assert found == "a\n<!-- plan: x -->\n\n| x |\n\n<!-- end -->\nb <!-- plan: y -->\n\n| y |\n\n<!-- end -->"
    assert with_tables(text, "precision", lambda name: "") == text
