"""What the sections of a report are made of: Markdown tables, and figures without a window."""

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def figure_of(width: float, height: float, panels: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """An empty figure, in inches, and its axes: one, or an array of those side by side and of several rows."""
    # Imported here: it costs a second. Without pyplot: that keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, panels)
