"""A run: its configuration, and the parts that are built from it. Shared by the entry points."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.architecture import Architecture
from jaxlm.checkpoints.branch import Branch
from jaxlm.checkpoints.manager import CheckpointConfig
from jaxlm.checkpoints.warm_start import WarmStart
from jaxlm.configuration import resolved_text
from jaxlm.data.converters import feature_converter
from jaxlm.data.loader import DataConfig, Loader, build_loader
from jaxlm.data.tasks import Mixture, resolve
from jaxlm.decoding.previews import SampleConfig
from jaxlm.layers.positions import LearnedPositions
from jaxlm.models import ModelConfig, ReplacedTokenDetectorConfig, build_model
from jaxlm.models.accounting import count_parameters, flops_per_token
from jaxlm.objectives.base import Distillation, LossConfig, Objective
from jaxlm.objectives.full_lm import FullLM
from jaxlm.parallel.parallelism import ParallelConfig, Parallelism
from jaxlm.training import metrics
from jaxlm.training.evaluation import Evaluator, make_eval_step
from jaxlm.training.loop import LoopConfig
from jaxlm.training.optimizers import Optimizer, OptimizerConfig, build_optimizer
from jaxlm.training.parameters import ModelDefinition, Tree, flatten
from jaxlm.training.profile import ProfileConfig
from jaxlm.training.schedules import Constant, Join
from jaxlm.training.stages import Phase, Stage, phases, with_steps
from jaxlm.training.state import TrainState, abstract_model
from jaxlm.training.step import StepConfig, TrainStep, layer_names, make_train_step
from jaxlm.training.teacher import check_teacher, find_teacher
from jaxlm.training.watchdog import WatchdogConfig
from jaxlm.training.writers import WandbConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation in the loop; how often is `LoopConfig.evaluation_period`.

    Attributes:
      split: of the data.
      data: another data configuration (a validation mixture, say); None takes the run's own.
      objective: what is predicted; None is what is trained. Another one lets runs with different objectives compare.
      max_batches: stop after this many; None takes the whole split.
    """

    split: str = "validation"
    data: DataConfig | None = None
    objective: Objective | None = None
    max_batches: int | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A pretraining run, from an empty folder to its report.

    Attributes:
      model_dir: the run's folder (T5X: MODEL_DIR).
      model: architecture and sizes.
      objective: what is hidden and predicted.
      data: what is read and how it is laid out in rows.
      optimizer: algorithm, schedule and their exceptions.
      train_steps: steps of the whole run, counted from 0 (T5X: TRAIN_STEPS).
      batch_size: rows a step, over all hosts.
      loss: z-loss, label smoothing, chunking.
      step: microbatches and norms.
      loop: periods of logging and evaluation.
      checkpoints: when they are saved and which are kept.
      parallel: how all this is spread over devices.
      evaluation: on held-out data; None evaluates nothing.
      samples: texts the model writes now and then; None writes none.
      stages: what changes on the way, see `jaxlm.training.stages`; () is one stage of train_steps. Their steps add up
        to train_steps; one that gives none has the rest.
      warm_start: parameters to begin with; None initialises afresh.
      branch: another run's whole state to go on from, counting its steps; None begins at step 0.
      wandb: also log to Weights & Biases.
      watchdog: when a run counts as hung; None never.
      profile: steps to record with jax's profiler; None records nothing.
      baselines: also score n-gram models and xz on the text of `evaluation` at the end, for the report. Of full
        language modelling only: what other objectives predict is not the whole text.
      seed: of initialisation, dropout and sampling inside the loss. (The data has its own.)
    """

    model_dir: str
    model: ModelConfig
    objective: Objective
    data: DataConfig
    optimizer: OptimizerConfig
    train_steps: int
    batch_size: int
    loss: LossConfig
    step: StepConfig
    loop: LoopConfig
    checkpoints: CheckpointConfig
    parallel: ParallelConfig
    evaluation: EvaluationConfig | None = None
    samples: SampleConfig | None = None
    stages: tuple[Stage, ...] = ()
    warm_start: WarmStart | None = None
    branch: Branch | None = None
    wandb: WandbConfig | None = None
    watchdog: WatchdogConfig | None = None
    profile: ProfileConfig | None = None
    baselines: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("train_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.warm_start is not None and self.branch is not None:
            raise ValueError("RunConfig.warm_start and branch are two ways to begin; set one of them to None.")
        for phase in self.phases:
            model = self.model_of(phase)
            for objective in filter(None, (phase.stage.objective, self.evaluation and self.evaluation.objective)):
                if refusal := objective.refuses(model.architecture) or objective.refuses_model(model):
                    raise ValueError(refusal)
            if phase.batch_size % self.step.microbatches:
                raise ValueError(
                    f"A batch of {phase.batch_size} rows cannot be cut into {self.step.microbatches} equal "
                    f"microbatches; choose a multiple."
                )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The run in pieces within which nothing but the learning rate changes."""
        own = Stage(self.train_steps, self.objective, self.model.architecture, self.data, batch_size=self.batch_size)
        if not self.stages:
            return phases((own,), batch_size=self.batch_size)
        stages = with_steps(self.stages, self.train_steps)
        first = {
            field: getattr(own, field)
            for field in ("objective", "architecture", "data", "batch_size")
            if getattr(stages[0], field) is None
        }
        stages = (dataclasses.replace(stages[0], **first), *stages[1:])
        return phases(stages, batch_size=self.batch_size)

    def model_of(self, phase: Phase) -> ModelConfig:
        """The model as a phase uses it: the same weights, perhaps with another attention mask."""
        return with_architecture(self.model, phase.stage.architecture)

    def data_of(self, phase: Phase) -> DataConfig:
        """What a phase reads."""
        data, lengths = phase.stage.data, phase.stage.lengths
        if isinstance(data, str):
            data = dataclasses.replace(self.data, mixture=data)
        return data if lengths is None else dataclasses.replace(data, feature_lengths=dict(lengths))

    @property
    def identity(self) -> dict[str, str]:
        """What makes another run a part of this one, so that it may continue in the same folder."""
        parts = {"model": self.model, "objective": self.objective, "data": self.data}
        return {name: resolved_text(part) for name, part in parts.items()} | {"seed": str(self.seed)}


def with_architecture(model: ModelConfig, architecture: Architecture) -> ModelConfig:
    """The same weights under another attention mask.

    Raises:
      ValueError: the weights cannot be used so (two stacks as one, or a detector as a decoder).
    """
    if architecture is model.architecture:
        return model
    if isinstance(model, ReplacedTokenDetectorConfig):
        raise ValueError(f"A replaced-token detector is an encoder and cannot become a {architecture.value}.")
    return dataclasses.replace(model, architecture=architecture)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """What a training step must know of the data: all but the data.

    Attributes:
      objective: fitted to the rows.
      features: {name: (shape, type)} of a whole batch, of all hosts together.
      datasets: names of the data sets.
      byte_lengths: bytes that each id stands for, [V].
      vocabulary: its fingerprint; None where the data is not open.
    """

    objective: Objective
    features: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    datasets: tuple[str, ...]
    byte_lengths: np.ndarray
    vocabulary: str | None = None

    def row_lengths(self, architecture: Architecture) -> tuple[int, int]:
        """Columns of the row that the loss is on, and of the encoder's in an encoder-decoder."""
        found = {name: self.features.get(f"{name}_segment_ids") for name in ("decoder", "encoder")}
        columns = {name: feature[0][1] for name, feature in found.items() if feature is not None}
        if architecture is Architecture.ENCODER_DECODER:
            return columns["decoder"], columns["encoder"]
        return next(iter(columns.values())), 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What the devices run in one phase of a run.

    Attributes:
      model: the model's configuration in this phase.
      definition, infos: the model's structure, and what is known of each parameter.
      abstract: shapes of the parameters.
      optimizer: for this model.
      config: of the step.
      step: the training step; of a teacher it knows the shapes.
      flops_per_token: forward and backward, and a teacher's forward, see `jaxlm.models.accounting`.
      row_tokens: columns of a row, of all stacks together.
      active_parameters: those that a token meets, see `jaxlm.models.accounting`.
    """

    model: ModelConfig
    definition: ModelDefinition
    infos: Tree
    abstract: Tree
    optimizer: Optimizer
    config: StepConfig
    step: TrainStep
    flops_per_token: float
    row_tokens: int
    active_parameters: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """What trains one phase of a run.

    Attributes:
      phase: the steps it is for.
      model: the model's configuration in this phase.
      definition, infos: the model's structure, and what is known of each parameter.
      abstract: shapes of the parameters.
      optimizer: for this model.
      loader: this host's batches.
      step: the training step.
      evaluate: state -> validation metrics, or None.
      names: of data sets, objectives and layers in metrics.
      flops_per_token: forward and backward, see `jaxlm.models.accounting`.
      row_tokens: columns of a row, of all stacks together.
      active_parameters: those that a token meets, see `jaxlm.models.accounting`.
    """

    phase: Phase
    model: ModelConfig
    definition: ModelDefinition
    infos: Tree
    abstract: Tree
    optimizer: Optimizer
    loader: Loader
    step: TrainStep
    evaluate: Callable[[TrainState], dict[str, float]] | None
    names: metrics.Names
    flops_per_token: float
    row_tokens: int
    active_parameters: int


class Programs:
    """The programs of one configuration after another: runs that differ in their seeds alone trace and compile once."""

    def __init__(self):
        self._run: RunConfig | None = None
        self._key: str | None = None
        self._made: dict[str, Any] = {}
        self._teacher: tuple[Distillation | None, Tree] = None, {}

    def shared[T](self, run: RunConfig, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, or gave for the last run if that was another seed of this one; `name` says of what."""
        if run is not self._run:
            self._turn_to(run)
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _turn_to(self, run: RunConfig) -> None:
        """Forgets what was made, unless it was for another seed of this run."""
        seedless = dataclasses.replace(
            run, model_dir="", seed=0, warm_start=None, branch=None, data=dataclasses.replace(run.data, seed=0)
        )
        if (distillation := run.loss.distillation) is not None:  # teachers may differ in their parameters
            config = resolved_text(find_teacher(distillation, run.parallel.on()).config)
            distillation = dataclasses.replace(distillation, teacher=config, step=None)
            seedless = dataclasses.replace(seedless, loss=dataclasses.replace(run.loss, distillation=distillation))
        key = resolved_text(seedless)
        if key != self._key:
            self._key, self._made = key, {}
        self._run = run

    def teacher(self, distillation: Distillation, parallel: Parallelism) -> Tree:
        """A teacher's parameters, read once for all phases of a run."""
        known, params = self._teacher
        if known != distillation:
            self._teacher = None, {}  # before another one takes its place
            params = find_teacher(distillation, parallel).params(distillation, parallel)
            self._teacher = distillation, params
        return params


def make_model(config: ModelConfig, parallel: Parallelism) -> Callable[[jax.Array], nnx.Module]:
    """key -> model, as it is stored on `parallel`."""
    return lambda key: build_model(config, key=key, stages=parallel.stages)


def open_loader(run: RunConfig, phase: Phase, **overrides) -> Loader:
    """The loader of a phase, of whole batches unless `rows` are given; `overrides` are `build_loader`'s arguments."""
    arguments = {
        "objective": phase.stage.objective,
        "architecture": run.model_of(phase).architecture,
        "batch_size": phase.batch_size,
        "start_step": phase.start,
    }
    return build_loader(overrides.pop("config", run.data_of(phase)), **arguments | overrides)


def open_checked(run: RunConfig, phase: Phase, parallel: Parallelism) -> Loader:
    """The loader that a phase trains on: this host's rows.

    Raises:
      ValueError: data, objective, architecture, lengths and model do not go together; the message says what to do.
    """
    loader = open_loader(run, phase, rows=parallel.host_rows(phase.batch_size))
    model = run.model_of(phase)
    whole = model.discriminator if isinstance(model, ReplacedTokenDetectorConfig) else model
    if whole.vocab_size < (size := loader.vocabulary.size):
        raise ValueError(
            f"The vocabulary has {size} ids, but the model only {whole.vocab_size}; set the model's vocab_size to at "
            f"least {size} (VOCAB_SIZE = {-(-size // 128) * 128} would be a multiple of 128)."
        )
    _check_positions(model, layout_of(loader))
    return loader


def open_evaluation(run: RunConfig, phase: Phase, parallel: Parallelism) -> Loader:
    """The loader that a phase of a run with `evaluation` is evaluated on, once through: this host's rows."""
    config = run.evaluation
    return open_loader(
        run,
        phase,
        config=config.data or run.data_of(phase),
        objective=config.objective or phase.stage.objective,
        split=config.split,
        one_pass=True,
        rows=parallel.host_rows(phase.batch_size),
    )


def _check_positions(model: ModelConfig, layout: BatchLayout) -> None:
    whole = model.discriminator if isinstance(model, ReplacedTokenDetectorConfig) else model
    longest = max(layout.row_lengths(model.architecture))
    for embedding in filter(None, (whole.embedding, whole.encoder_embedding)):
        positions = embedding.positions
        if isinstance(positions, LearnedPositions) and longest > positions.max_length:
            raise ValueError(
                f"Rows have {longest} tokens, but the model has learned positions for {positions.max_length}; shorten "
                f"TASK_FEATURE_LENGTHS, or raise LearnedPositions.max_length."
            )


def layout_of(loader: Loader) -> BatchLayout:
    """The layout of a loader's batches."""
    features = {name: ((loader.batch_size, *shape[1:]), dtype) for name, (shape, dtype) in loader.features.items()}
    lengths = np.asarray(loader.vocabulary.byte_lengths())
    return BatchLayout(loader.objective, features, loader.dataset_names, lengths, loader.vocabulary.fingerprint())


def expected_layout(run: RunConfig, phase: Phase) -> BatchLayout:
    """The layout of a phase's batches, without opening any data: its files need not exist.

    The vocabulary is taken to be the model's, a mixture that is not registered here to be one data set.

    Raises:
      ValueError: objective, architecture, lengths and model do not go together; the message says what to do.
    """
    model, data = run.model_of(phase), run.data_of(phase)
    whole = model.discriminator if isinstance(model, ReplacedTokenDetectorConfig) else model
    lengths = dict(data.feature_lengths)
    converter = feature_converter(model.architecture, lengths)
    phase.stage.objective.raw_length(lengths, model.architecture)  # raises where the objective cannot fill the row
    layout = BatchLayout(
        objective=phase.stage.objective.fit(lengths, model.architecture),
        features={name: ((phase.batch_size, *shape), dtype) for name, (shape, dtype) in converter.features.items()},
        datasets=_dataset_names(data),
        byte_lengths=np.zeros(whole.vocab_size, np.int32),
    )
    _check_positions(model, layout)
    return layout


def _dataset_names(data: DataConfig) -> tuple[str, ...]:
    try:
        mixture = resolve(data.mixture)
    except ValueError:  # registered elsewhere
        return (str(data.mixture),)
    return tuple(task.name for task in mixture.tasks()) if isinstance(mixture, Mixture) else (mixture.name,)


def make_program(run: RunConfig, phase: Phase, parallel: Parallelism, layout: BatchLayout) -> Program:
    """What the devices run in a phase; nothing is compiled or put on a device yet.

    Raises:
      ValueError: the mesh does not cut rows or experts evenly.
    """
    model = run.model_of(phase)
    definition, abstract, infos = abstract_model(make_model(model, parallel))
    with_experts = [info for info in flatten(infos).values() if "experts" in info.axes]
    parallel.check_experts({info.shape[info.axes.index("experts")] for info in with_experts})
    optimizer = _optimizer(run, phase, model, infos)
    config = dataclasses.replace(run.step, seed=run.seed, byte_lengths=layout.byte_lengths)
    loss = dataclasses.replace(run.loss, num_datasets=len(layout.datasets))
    lengths = layout.row_lengths(model.architecture)
    for length in lengths:
        parallel.check_row(length)
    teacher, flops = None, flops_per_token(model, *lengths)
    if loss.distillation is not None:
        teacher = find_teacher(loss.distillation, parallel)
        alike = teacher.config.architecture is Architecture.ENCODER_DECODER
        read = lengths if alike else (sum(lengths), 0)  # of an encoder-decoder's row a decoder makes one text
        check_teacher(teacher, model, layout.objective, parallel, vocabulary=layout.vocabulary, row_length=max(read))
        flops += flops_per_token(teacher.config, *read) / 3  # forward alone
    return Program(
        model=model,
        definition=definition,
        infos=infos,
        abstract=abstract,
        optimizer=optimizer,
        config=config,
        step=make_train_step(
            definition, layout.objective, optimizer, parallel, config=config, loss=loss, teacher=teacher
        ),
        flops_per_token=flops,
        row_tokens=sum(lengths),
        active_parameters=count_parameters(model, active=True),
    )


def check_phases(run: RunConfig, parallel: Parallelism, programs: Programs) -> None:
    """Tries what every phase needs, so that a mistake in the last one is found before the first step: data, mesh, and
    of a stage also optimizer, teacher and evaluation. Those of the first phase are for `assemble` to try.

    What is wrong with the run as a whole, but does not keep its folder from being read, is said here too.

    Args:
      programs: as for `assemble`, which will find there what is made here.

    Raises:
      ValueError: as `assemble`, or a batch leaves devices idle, or the report could not be written, or a seed would
        have no effect.
    """
    if run.baselines and run.evaluation is None and isinstance(run.phases[-1].stage.objective, FullLM):
        raise ValueError(
            "RunConfig.baselines are scored on the text that the run is evaluated on, but evaluation is None; give it "
            "an EvaluationConfig, or set baselines to False."
        )
    if run.step.seed not in (0, run.seed):
        raise ValueError(
            f"StepConfig.seed is {run.step.seed}, but a run draws by RunConfig.seed, {run.seed}; set that one instead."
        )
    for phase in run.phases:
        parallel.batch_sharding(phase.batch_size // run.step.microbatches)
        if phase == run.phases[0]:
            continue
        loader = open_checked(run, phase, parallel)
        if phase.start == phase.stage_start:
            _program(run, phase, parallel, loader, programs)
            if run.evaluation is not None:
                open_evaluation(run, phase, parallel).close()
        loader.close()


def assemble(run: RunConfig, phase: Phase, parallel: Parallelism, programs: Programs) -> Parts:
    """Builds what a phase needs; nothing is compiled or put on a device yet.

    Args:
      programs: those of the process.

    Raises:
      ValueError: the parts do not fit together; the message says which and what to do.
    """
    loader = open_checked(run, phase, parallel)
    program = _program(run, phase, parallel, loader, programs)
    names = metrics.Names(loader.dataset_names, loader.objective.parts, layer_names(program.infos))
    return Parts(
        phase=phase,
        model=program.model,
        definition=program.definition,
        infos=program.infos,
        abstract=program.abstract,
        optimizer=program.optimizer,
        loader=loader,
        step=_taught(run, program.step, parallel, programs).with_seed(run.seed),
        evaluate=_evaluator(run, phase, parallel, program, names, programs),
        names=names,
        flops_per_token=program.flops_per_token,
        row_tokens=program.row_tokens,
        active_parameters=program.active_parameters,
    )


def _program(run: RunConfig, phase: Phase, parallel: Parallelism, loader: Loader, programs: Programs) -> Program:
    return programs.shared(run, f"step {phase.start}", lambda: make_program(run, phase, parallel, layout_of(loader)))


def _taught(run: RunConfig, step: TrainStep, parallel: Parallelism, programs: Programs) -> TrainStep:
    """The step with its teacher's parameters, which all phases share."""
    if (distillation := run.loss.distillation) is None:
        return step
    return step.with_teacher(programs.teacher(distillation, parallel))


def _optimizer(run: RunConfig, phase: Phase, model: ModelConfig, infos: Tree) -> Optimizer:
    config, stage = run.optimizer, phase.stage
    total_steps = run.train_steps
    if stage.freeze is not None:
        config = dataclasses.replace(config, freeze=stage.freeze)
    if stage.learning_rate is not None:
        schedule = stage.learning_rate
        if phase.stage_start:
            schedule = Join((Constant(0.0), schedule), lengths=(phase.stage_start,))
        config, total_steps = dataclasses.replace(config, learning_rate=schedule), phase.stage_end
    whole = model.discriminator if isinstance(model, ReplacedTokenDetectorConfig) else model
    return build_optimizer(config, infos, total_steps=total_steps, parametrization=whole.scaling)


def _evaluator(
    run: RunConfig, phase: Phase, parallel: Parallelism, program: Program, names: metrics.Names, programs: Programs
) -> Evaluator | None:
    if run.evaluation is None:
        return None

    def make_loader() -> Loader:
        return open_evaluation(run, phase, parallel)

    loader = make_loader()  # opened now, so that what is wrong with it is said before training
    names = dataclasses.replace(names, datasets=loader.dataset_names, objectives=loader.objective.parts)
    # Cross-entropy alone, so that runs with different losses compare.
    plain = {"z_loss": 0.0, "label_smoothing": 0.0, "distillation": None}
    loss = dataclasses.replace(run.loss, **plain, num_datasets=len(loader.dataset_names))

    def make_step() -> Callable:
        definition, optimizer = program.definition, program.optimizer
        return make_eval_step(definition, loader.objective, optimizer, parallel, config=program.config, loss=loss)

    return Evaluator(
        programs.shared(run, f"evaluation {phase.start}", make_step),
        make_loader,
        parallel,
        names=names,
        max_batches=run.evaluation.max_batches,
    )
