"""The report of a finished run: `report.md` and `loss.png`, from what its folder holds and what the caller knows."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.training.goodput import read_ledger
from jaxlm.training.run_folder import RunFolder

_MAX_POINTS = 1000  # of a drawn curve; more are averaged


@dataclasses.dataclass(frozen=True)
class ReportContents:
    """What the report says beside the metrics, the samples and the configuration found in the run's folder.

    Attributes:
      facts: the run in short, e.g. {"parameters": "8.39 M", "machine": "...", "versions": "...", "time": "5m 02s"}.
      baselines: bits per byte of other predictors on the same validation text, e.g. {"bigram": 3.2,
        "Kneser-Ney 5-gram": 2.4, "xz": 2.6}.
      datasets: accounting of the training data: {data set: {column: value}}, e.g. {"docstrings": {"tokens":
        81_000, "share": "41%"}}; all with the same columns.
      unit: what the loss is per, for the axis.
    """

    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    unit: str = "token"


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over training: `steps` int [N], increasing, and `values` float [N], finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


def write_report(folder: RunFolder, contents: ReportContents) -> pathlib.Path:
    """Writes `report.md`, `loss.png`, and `results.json` with the same numbers; returns the report's path.

    What is drawn are "cross_entropy" and "bits_per_byte" of "train" and of every other prefix ("validation"), there
    also by data set ("validation/cross_entropy/<data set>"). "train/tokens", tokens a step, gives the second axis.
    """
    curves = read_curves(folder.metrics)
    has_plot = any("/cross_entropy" in name for name in curves)
    if has_plot:
        plot_loss(folder.loss_plot, curves, contents.baselines, contents.unit)
    sections = [
        f"# Run {folder.path.name}",
        f"![Loss over training]({folder.loss_plot.name})" if has_plot else "No step was logged.",
        _results(curves, contents.baselines),
        _section("Run", _table(("", ""), list(contents.facts.items()))),
        _section("Data", _datasets(contents.datasets)),
        _section("Time", _goodput(folder)),
        _section("Samples", _samples(folder)),
        _section("Configuration", _configuration(folder)),
    ]
    last = {name: curve.last for name, curve in curves.items()}
    folder.results.write_text(json.dumps({"last": last, **dataclasses.asdict(contents)}, indent=1) + "\n")
    folder.report.write_text("\n\n".join(section for section in sections if section) + "\n")
    return folder.report


def read_curves(path: pathlib.Path) -> dict[str, Curve]:
    """{metric: curve} of a `metrics.jsonl`; values that are not numbers (NaN is null there) are left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and value is not None:
                points.setdefault(name, []).append((record["step"], value))
    return {name: Curve(*map(np.array, zip(*series, strict=True))) for name, series in points.items()}


def plot_loss(path: pathlib.Path, curves: Mapping[str, Curve], baselines: Mapping[str, float], unit: str) -> None:
    """Draws loss and, where known, bits per byte beside the baselines, over steps and tokens."""
    # Imported here: it costs a second, which no start of a run should pay. Without pyplot: that keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("cross_entropy", f"cross-entropy, nats per {unit}", {})]
    if any("/bits_per_byte" in name for name in curves):
        panels.append(("bits_per_byte", "bits per byte", baselines))
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (metric, label, lines) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _draw(axes, curves, metric, lines)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.set_xlim(0, 1.02 * max(int(curve.steps[-1]) for curve in curves.values()))
        if "train/tokens" in curves:
            _tokens_axis(axes, curves["train/tokens"])
    figure.savefig(path, dpi=120)


def _draw(axes: Any, curves: Mapping[str, Curve], metric: str, baselines: Mapping[str, float]) -> None:
    """One panel: training faint as measured and full as smoothed, validation with markers, baselines dashed."""
    drawn = []
    if (train := curves.get(f"train/{metric}")) is not None:
        curve = _thinned(train)
        axes.plot(curve.steps, curve.values, color="C0", alpha=0.25, linewidth=1)
        smooth = Curve(curve.steps, _smoothed(curve.values))
        axes.plot(smooth.steps, smooth.values, color="C0", linewidth=1.6, label=f"training ({train.last:.3f})")
        drawn.append(smooth)
    for i, (label, curve) in enumerate(_evaluations(curves, metric).items()):
        # From C3 on: the colour of training (C0) stays its own. Single data sets are thin.
        whole = "/" not in label
        style = {"color": f"C{3 + i}", "marker": "o" if whole else ".", "markersize": 3.5 if whole else 2.5}
        axes.plot(
            curve.steps, curve.values, label=f"{label} ({curve.last:.3f})", linewidth=1.4 if whole else 0.9, **style
        )
        drawn.append(curve)
    for i, (name, value) in enumerate(sorted(baselines.items(), key=lambda item: -item[1])):
        axes.axhline(
            value, color="0.35", linewidth=1, linestyle=("--", ":", "-.")[i % 3], label=f"{name} ({value:.3f})"
        )
    if drawn:
        # The first steps are far above the rest and would flatten it: show from where a tenth of the steps is done.
        late = np.concatenate([curve.values[len(curve.values) // 20 :] for curve in drawn])
        visible = np.concatenate([late, np.array(list(baselines.values()), float)])
        margin = 0.08 * max(np.ptp(visible), 1e-3)
        axes.set_ylim(visible.min() - margin, visible.max() + margin)
    axes.grid(alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _tokens_axis(axes: Any, tokens: Curve) -> None:
    """A second axis above, in tokens, from the mean number of tokens a step since the last log."""
    from matplotlib.ticker import EngFormatter

    # Extended at its last rate, so that every step on the axis has a number of tokens.
    steps = np.concatenate([[0], tokens.steps, [2 * tokens.steps[-1] + 1]])
    counts = np.concatenate([[0], np.cumsum(np.diff(steps) * np.append(tokens.values, tokens.last))])
    above = axes.secondary_xaxis(
        "top",
        functions=(lambda step: np.interp(step, steps, counts), lambda count: np.interp(count, counts, steps)),
    )
    above.set_xlabel("tokens")
    above.xaxis.set_major_formatter(EngFormatter())


def _thinned(curve: Curve) -> Curve:
    """The curve with at most `_MAX_POINTS` points, each the mean of its neighbours."""
    if len(curve.steps) <= _MAX_POINTS:
        return curve
    bins = np.array_split(np.arange(len(curve.steps)), _MAX_POINTS)
    return Curve(
        np.array([curve.steps[part].mean() for part in bins]), np.array([curve.values[part].mean() for part in bins])
    )


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about 3% of the curve."""
    half = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # The window shrinks at both ends and stays centred, so that it neither lags nor bends there.
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _results(curves: Mapping[str, Curve], baselines: Mapping[str, float]) -> str:
    """Final losses, and bits per byte beside the baselines, the best first."""
    losses, bits = [], []
    for metric, found in (("cross_entropy", losses), ("bits_per_byte", bits)):
        train = {"train": curves[f"train/{metric}"]} if f"train/{metric}" in curves else {}
        found += (train | _evaluations(curves, metric)).items()
    losses = [(name, f"{curve.last:.4f}", f"{int(curve.steps[-1]):,}") for name, curve in losses]
    # What was trained on does not compete with the baselines, which were given the validation text.
    rows = [(f"**this run, {name}**", curve.last) for name, curve in bits if name != "train"]
    rows = sorted([*rows, *baselines.items()], key=lambda row: row[1])
    tables = []
    if losses:
        tables.append(_table(("last cross-entropy of", "nats", "at step"), losses))
    if rows:
        tables.append(_table(("bits per byte of", "value"), [(name, f"{value:.4f}") for name, value in rows]))
    return _section("Results", "\n\n".join(tables))


def _evaluations(curves: Mapping[str, Curve], metric: str) -> dict[str, Curve]:
    """Curves of one metric but training's: {"validation": ..., "validation/<data set>": ...}, the whole ones first."""
    found = {}
    for name, curve in curves.items():
        if (match := re.fullmatch(rf"(?!train/)([^/]+)/{metric}(/.+)?", name)) is not None:
            found[match[1] + (match[2] or "")] = curve
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def _datasets(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    if not datasets:
        return ""
    columns = list(next(iter(datasets.values())))
    return _table(("data set", *columns), [(name, *(_cell(row[c]) for c in columns)) for name, row in datasets.items()])


def _samples(folder: RunFolder) -> str:
    """The newest samples; older ones by reference."""
    files = sorted(folder.samples.glob("*.txt")) if folder.samples.is_dir() else []
    if not files:
        return ""
    newest = files[-1]
    return f"From `{folder.samples.name}/{newest.name}` (of {len(files)}):\n\n{_code(newest.read_text())}"


def _goodput(folder: RunFolder) -> str:
    """Where the time of all starts went."""
    if not folder.goodput.exists():
        return ""
    found = read_ledger(folder.goodput)
    rows = [(name, f"{seconds:,.1f}", f"{share:.1%}") for name, seconds, share in found.rows()]
    starts = f"{found.starts} start{'s' if found.starts > 1 else ''}"
    return f"Goodput {found.goodput:.1%}, over {starts}.\n\n" + _table(("spent on", "seconds", "share"), rows)


def _configuration(folder: RunFolder) -> str:
    if not folder.config_diff.exists():
        return ""
    diff = folder.config_diff.read_text().strip()
    return f"What differs from the defaults (the whole is in `{folder.config.name}`):\n\n{_code(diff or '(nothing)')}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or "" without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _code(text: str) -> str:
    """A block that shows the text as it is, whatever backticks are in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
