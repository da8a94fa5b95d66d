"""A plan as a reader sees it: a table for the terminal, Markdown, JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
from rich.table import Table

from jaxlm.planning.memory import gib
from jaxlm.planning.program import Plan
from jaxlm.training.progress import human

Row = tuple[str, str, str]
Search = tuple[Sequence[tuple[str, Plan]], str]


def rows(plan: Plan) -> Iterator[Row]:
    """(what, how much, remark) in the order to show."""
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in plan.mesh.items()) or "one device"
    yield "machine", plan.topology, f"{plan.devices} devices ({plan.chip}); {mesh}"
    yield "model", human(plan.parameters).strip(), f"{plan.parameters:,} parameters, {plan.model}"
    yield (
        "step",
        f"{human(plan.tokens).strip()}",
        f"{plan.batch_size} rows of {plan.row_tokens} tokens in {plan.microbatches} microbatch(es); "
        f"rematerialisation {plan.remat}",
    )
    for sentence in plan.replicated:
        yield "not split", "", sentence
    yield from _memory_rows(plan)
    if plan.costs is not None:
        yield from _cost_rows(plan)
    if plan.estimate is not None:
        yield from _estimate_rows(plan)
    took = plan.compiled
    yield (
        "compiled in",
        f"{took.seconds:.0f} s",
        f"{took.cpu_seconds:.0f} processor seconds; this process has had {gib(took.peak_bytes)}",
    )


def _memory_rows(plan: Plan) -> Iterator[Row]:
    of_limit = "" if plan.limit is None else f"of {gib(plan.limit)}"
    if plan.memory is None:
        yield "memory, a device", gib(plan.wanted), f"{of_limit}: the compiler refuses; it does not fit"
        state = plan.expected
        yield "parameters and optimizer", gib(state.state), "by their shapes"
        yield "gradients, activations", gib(state.total - state.state), "by their shapes, roughly"
        return
    found = plan.memory
    verdict = "" if plan.limit is None else f"{of_limit}: " + ("it fits" if plan.fits else "it does not fit")
    yield "memory, a device", gib(found.peak), verdict
    yield "parameters", gib(found.parameters), ""
    yield "optimizer", gib(found.optimizer), ""
    yield "arguments", gib(found.arguments), f"the above, a batch of {gib(found.batch)}, and padding"
    yield "temporaries", gib(found.temporaries), "activations, gradients, working space"
    if found.outputs > 2**20:
        yield "outputs", gib(found.outputs), "that do not take an argument's place"
    if found.host:
        yield "host memory", gib(found.host), "offloaded"


def _cost_rows(plan: Plan) -> Iterator[Row]:
    found = plan.costs
    share = (
        f"; {plan.model_flops / plan.devices / found.flops:.0%} of it is the model's own work" if found.flops else ""
    )
    yield "compute, a device", f"{human(found.flops)}FLOP", f"loops multiplied out{share}"
    yield "memory traffic", f"{human(found.bytes)}B", "of main memory, loops multiplied out"
    for collective in found.collectives:
        if collective.sent < 1e-3 * sum(other.sent for other in found.collectives):
            continue
        axes = " x ".join(axis for axis in collective.axes if axis in plan.mesh) or "?"
        yield (
            f"{collective.kind}, {axes}",
            f"{human(collective.bytes)}B",
            f"{collective.count:,} of them among {collective.group}; a device sends {human(collective.sent)}B",
        )
    for note in found.not_counted:
        yield "not counted", "", note


def _estimate_rows(plan: Plan) -> Iterator[Row]:
    guess = plan.estimate
    axes = ", ".join(f"{axis} {_time(seconds)}" for axis, seconds in guess.by_axis.items())
    yield "compute alone", _time(guess.compute), "at the data sheet's bfloat16 peak"
    yield "memory alone", _time(guess.memory), "at the data sheet's bandwidth"
    yield "network alone", _time(guess.network), axes
    yield (
        "step, estimated",
        _time(guess.step),
        f"the longest of the three ({guess.bound}): a bound from below, if all overlap",
    )
    yield (
        "MFU, estimated",
        f"{guess.mfu:.1%}",
        f"at most; {human(guess.tokens_per_second).strip()} tokens a second and device",
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def table(plan: Plan, advice: Sequence[str] = ()) -> Table:
    """For a console."""
    made = Table(title="Plan", box=rich.box.SIMPLE_HEAD, show_header=False, title_justify="left")
    made.add_column(style="bold")
    made.add_column(justify="right")
    made.add_column(overflow="fold")
    for row in rows(plan):
        made.add_row(*row)
    for sentence in advice:
        made.add_row("advice", "", sentence)
    return made


def markdown(plan: Plan, advice: Sequence[str] = ()) -> str:
    """For a document."""
    lines = ["| | | |", "|---|---:|---|"]
    lines += [f"| {what} | {much} | {remark} |" for what, much, remark in rows(plan)]
    lines += [f"| advice | | {sentence} |" for sentence in advice]
    return "\n".join(lines) + "\n"


def as_json(plan: Plan, advice: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, as JSON has it."""
    made = dataclasses.asdict(plan)
    made["peak"], made["fits"], made["advice"] = plan.peak, plan.fits, list(advice)
    if plan.estimate is not None:
        made["estimate"] |= {"step": plan.estimate.step, "bound": plan.estimate.bound}
    if plan.costs is not None:
        made["costs"]["flops"] = plan.costs.flops
        for collective, kind in zip(made["costs"]["collectives"], plan.costs.collectives):
            collective["sent"] = kind.sent
    return json.loads(json.dumps(made))


def save(folder: pathlib.Path, plan: Plan, advice: Sequence[str] = (), search: Search | None = None) -> None:
    """Writes `plan.md` and `plan.json`.

    Args:
      folder: made if it is not there.
      plan, advice: what is saved.
      search: (name, plan) of all that a search compiled, and what is to be said of the rest; None where there was none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document, data = markdown(plan, advice), {"plan": as_json(plan, advice)}
    if search is not None:
        plans, rest = search
        document += f"\n{ranking_markdown(plans)}\n{rest}\n"
        data["search"] = [{"levers": name, **as_json(found)} for name, found in plans]
    (folder / "plan.md").write_text(document)
    (folder / "plan.json").write_text(json.dumps(data, indent=1) + "\n")


def ranking(plans: Sequence[tuple[str, Plan]]) -> list[tuple[str, ...]]:
    """Rows of a search, the best first, under `RANKING_HEAD`; where no time is estimated, the smallest."""

    def worth(plan: Plan) -> tuple[bool, float, float]:
        return not plan.fits, plan.estimate.step if plan.estimate else 0.0, plan.peak

    order = sorted(plans, key=lambda entry: worth(entry[1]))
    found = []
    for number, (name, plan) in enumerate(order, 1):
        guess = plan.estimate
        times = ("",) * 5
        if guess is not None:
            times = (
                _time(guess.step),
                f"{guess.mfu:.1%}",
                _time(guess.compute),
                _time(guess.memory),
                _time(guess.network),
            )
        found.append((str(number), name, gib(plan.peak), "yes" if plan.fits else "no", *times))
    return found


RANKING_HEAD = ("", "change", "peak", "fits", "step*", "MFU*", "compute", "memory", "network")
RANKING_NOTE = "* estimated by a roofline: the longest of compute, memory and network."


def ranking_table(plans: Sequence[tuple[str, Plan]]) -> Table:
    """For a console."""
    made = Table(title="Search", box=rich.box.SIMPLE_HEAD, title_justify="left", caption=RANKING_NOTE)
    for head in RANKING_HEAD:
        made.add_column(head, justify="left" if head == "change" else "right", overflow="fold")
    for row in ranking(plans):
        made.add_row(*row)
    return made


def ranking_markdown(plans: Sequence[tuple[str, Plan]]) -> str:
    """For a document."""
    lines = ["| " + " | ".join(RANKING_HEAD) + " |", "|" + "---|" * len(RANKING_HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in ranking(plans)]
    return "\n".join(lines) + f"\n\n{RANKING_NOTE}\n"
