"""What a run shows: the plan at the start, the progress line, samples, and the report at the end."""

import itertools

import jax
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.decoding.previews import Prompt, preview, prompts_of
from jaxlm.evaluation.ngram import ngram_baseline, xz_baselines
from jaxlm.layers.context import Context
from jaxlm.layers.stacking import StackLayout
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel import multihost
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.parallel.sharded_ops import ShardedOps
from jaxlm.run import Parts, RunConfig, open_loader
from jaxlm.training import machine
from jaxlm.training.callbacks import Callback
from jaxlm.training.parameters import flatten
from jaxlm.training.progress import Plan, ProgressLine, duration, human
from jaxlm.training.report import ReportContents, write_report
from jaxlm.training.run_folder import RunFolder
from jaxlm.training.state import TrainState, unsplit_dimensions
from jaxlm.training.writers import Writers


def make_plan(run: RunConfig, parts: Parts, parallel: Parallelism, step: int) -> Plan:
    """What is going to happen from `step` on. Times this machine's matrix products for a moment."""
    groups: dict[str, int] = {}
    for path, info in flatten(parts.infos).items():
        groups[path[0]] = groups.get(path[0], 0) + info.size
    # Later stages may have other rows and masks; the first phase's stand for them.
    rows = sum((phase.end - phase.start) * phase.batch_size for phase in run.phases)
    rows_left = sum(max(phase.end - max(phase.start, step), 0) * phase.batch_size for phase in run.phases)
    flops = parts.flops_per_token * parts.row_tokens  # a row
    # Devices of a CPU share its cores; accelerators do not.
    devices = 1 if jax.default_backend() == "cpu" else parallel.mesh.size
    speed = machine.matmul_flops_per_second() * devices * machine.EFFICIENCY
    loader = parts.loader
    facts = {
        "model": f"{parts.model.architecture.value}, trained by {loader.objective.name}",
        "data": f"{', '.join(loader.dataset_names[:5])}{', ...' if len(loader.dataset_names) > 5 else ''}; "
        f"{parts.phase.batch_size} rows of {parts.row_tokens} tokens a step",
        **{name: text for name, text in machine.facts().items() if name in ("devices", "processes", "XLA flags")},
        "folder": str(run.model_dir),
    }
    total = sum(groups.values())
    if parts.active_parameters < total:
        facts["experts"] = f"each token meets {parts.active_parameters:,} of the {total:,} parameters"
    if len(run.phases) > 1:
        facts["stages"] = "\n".join(_stages(run))
    if parallel.stages.count > 1:
        facts["pipeline"] = pipeline_line(parts.definition.layouts, parallel)
    rows_per_step = rows / run.train_steps
    tokens = round(rows_per_step * parts.row_tokens)
    if whole := unsplit_dimensions(parts.infos, parallel):
        facts["not split"] = "\n".join(whole)
    return Plan(groups, run.train_steps, tokens, rows_per_step * flops, flops * rows_left / speed, facts)


def pipeline_line(layouts: tuple[StackLayout, ...], parallel: Parallelism) -> str:
    """What a pipeline does, what of its time is idle, and which identity layers fill its stages."""
    stages, microbatches = parallel.stages, parallel.config.pipeline.microbatches
    rounds = f" in {stages.rounds} rounds" if stages.rounds > 1 else ""
    line = (
        f"{stages.count} stages{rounds}, {microbatches} microbatches; a stage is idle in {stages.count - 1} of "
        f"{stages.steps(microbatches)} steps ({stages.bubble(microbatches):.1%})"
    )
    for layout in layouts:
        if padding := stages.padding(layout.repeats):
            line += (
                f"; identity layers ({padding * layout.pattern}) fill up the {layout.repeats * layout.pattern} of "
                f"{'/'.join(layout.path)}, each at the cost of a layer"
            )
    return line


def _stages(run: RunConfig) -> list[str]:
    """A line for each phase."""
    return [
        f"{phase.start:,} to {phase.end:,}: {phase.stage.architecture.value}, {phase.stage.objective.name}, "
        f"{phase.batch_size} rows"
        for phase in run.phases
    ]


class Samples(Callback):
    """Now and then the model's answers to a few held-out examples: shown, saved in the run's folder, in TensorBoard."""

    def __init__(self, run: RunConfig, folder: RunFolder, line: ProgressLine, writers: Writers):
        self._run, self._folder, self._line, self._writer = run, folder, line, writers
        self._parts: Parts | None = None
        self._prompts: list[Prompt] = []

    def enter(self, parts: Parts, parallel: Parallelism) -> None:
        """A phase of the run begins."""
        self._parts = parts
        self._context = Context(ops=ShardedOps(parallel))
        split = self._run.evaluation.split if self._run.evaluation else "validation"
        loader = open_loader(self._run, parts.phase, split=split, one_pass=True)
        self._prompts = prompts_of(next(loader), parts.model.architecture, self._run.samples)
        loader.close()

    def is_due(self, step: int) -> bool:
        return step % self._run.samples.period == 0 or step == self._run.train_steps

    def on_pause(self, step: int, state: TrainState) -> None:
        parts = self._parts
        params = state.ema_params
        if params is None:
            params = parts.optimizer.evaluation_params(state.params, state.opt_state)
        model = parts.definition.merge(params)
        text = preview(model, self._prompts, parts.loader.vocabulary, self._run.samples, context=self._context)
        if multihost.is_first():
            self._folder.write_samples(step, text + "\n")
        self._writer.write_text(step, "samples", text)
        self._line.print(f"step {step:,} samples:\n{text}\n")


def report(run: RunConfig, parts: Parts, folder: RunFolder, *, seconds: float) -> None:
    """Writes `report.md` and `loss.png`.

    Args:
      parts: of the last phase.
      seconds: how long this process has been at it.
    """
    total = sum(info.size for info in flatten(parts.infos).values())
    seen = parts.loader.seen()
    tokens = sum(entry.tokens for entry in seen.values())
    datasets = {
        name: {
            "tokens read": entry.tokens,
            "share": f"{entry.tokens / max(tokens, 1):.1%}",
            "epochs": f"{entry.epochs:.2f}",
        }
        for name, entry in seen.items()
    }
    facts = {
        "model": parts.model.architecture.value,
        "objective": parts.loader.objective.name,
        "parameters": f"{total:,} ({human(total).strip()})",
        "steps": f"{run.train_steps:,}",
        **({"stages": "; ".join(_stages(run))} if len(run.phases) > 1 else {}),
        "time of the last start": duration(seconds),
        **machine.facts(),
    }
    # Bits per byte of another objective are of a part of the text, given the rest.
    comparable = run.baselines and isinstance(parts.loader.objective, FullLM)
    baselines = text_baselines(run, parts, tokens) if comparable else {}
    write_report(folder, ReportContents(facts=facts, baselines=baselines, datasets=datasets))


def text_baselines(run: RunConfig, parts: Parts, tokens: int) -> dict[str, float]:
    """Bits per byte of n-gram models and xz on the run's validation text.

    The n-gram models get the first `tokens` tokens that the run read for training, in its order and vocabulary; they
    and the run are scored on the same validation rows.

    Args:
      parts: of the last phase.
      tokens: how many training tokens the run read.
    """
    loader, vocabulary = parts.loader, parts.loader.vocabulary
    lengths = np.asarray(vocabulary.byte_lengths())
    # As plain text, whatever the objective: one long row of the run's own data.
    reading = {"objective": FullLM(), "architecture": Architecture.CAUSAL_DECODER}
    first = run.phases[0]
    train = _text(open_loader(run, first, **reading), tokens)
    data = run.evaluation.data or run.data_of(parts.phase)
    held_out = open_loader(run, parts.phase, config=data, split=run.evaluation.split, one_pass=True, **reading)
    rows = run.evaluation.max_batches
    validation = _text(itertools.islice(held_out, rows) if rows else held_out)
    num_bytes = int(lengths[validation].sum())
    found = [
        ngram_baseline(train, validation, order=order, vocab_size=vocabulary.size, num_bytes=num_bytes)
        for order in (2, 5)
    ]
    found += xz_baselines(b"", vocabulary.decode(validation).encode())[:1]
    loader.close()
    return {baseline.name: baseline.bits_per_byte for baseline in found}


def _text(batches, limit: int | None = None) -> np.ndarray:
    """The target tokens of batches, one after the other, up to `limit`."""
    parts, count = [], 0
    for batch in batches:
        parts.append(batch["decoder_target_tokens"][batch["decoder_segment_ids"] > 0])
        count += len(parts[-1])
        if limit is not None and count >= limit:
            break
    return np.concatenate(parts)[:limit]
