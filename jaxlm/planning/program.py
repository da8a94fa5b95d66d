"""A run's own training step, compiled for a machine that need not be there, and what its compiler says of it."""

import dataclasses
import resource
import time
from collections.abc import Mapping

import jax

from jaxlm.layers.remat import Remat, RematPolicy
from jaxlm.models.config import ReplacedTokenDetectorConfig
from jaxlm.parallel.parallelism import Parallelism
from jaxlm.planning.costs import Costs, costs
from jaxlm.planning.estimate import Estimate, estimate
from jaxlm.planning.memory import Memory, memory, refused
from jaxlm.planning.shapes import Expected, expected
from jaxlm.planning.topology import Topology
from jaxlm.run import BatchLayout, Program, RunConfig, expected_layout, make_program
from jaxlm.training.parameters import flatten
from jaxlm.training.stages import Phase
from jaxlm.training.state import TrainState, abstract_state, unsplit_dimensions
from pallas_kernels.ahead_of_time import writing_no_cache


@dataclasses.dataclass(frozen=True)
class Compile:
    """What it took.

    Attributes:
      seconds: wall time of tracing, lowering and compiling.
      cpu_seconds: processor time of all threads meanwhile.
      peak_bytes: the most memory this process has had so far.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of a run will be like on a machine.

    Attributes:
      topology: the machine's name.
      chip: of what it is made; "cpu" where nothing is known of it.
      mesh: degrees of the mesh, axes of degree 1 left out.
      devices: of the whole machine.
      model: architecture of the model.
      parameters: number of them.
      batch_size, row_tokens: rows a step, tokens a row.
      microbatches, remat: the levers of memory.
      model_flops: of one step on all devices, as the model counts them.
      limit: bytes of memory that a program can have on a device; None where it is not known.
      memory: by the compiler's account; None where it refused.
      wanted: bytes that the compiler would need, where it refused for want of memory.
      expected: by shapes alone.
      costs, estimate: of one step; None where the compiler refused, or where nothing is known of the chip.
      compiled: what compiling took.
      replicated: sentences about dimensions that the mesh could not split.
    """

    topology: str
    chip: str
    mesh: Mapping[str, int]
    devices: int
    model: str
    parameters: int
    batch_size: int
    row_tokens: int
    microbatches: int
    remat: str
    model_flops: float
    limit: int | None
    memory: Memory | None
    wanted: int | None
    expected: Expected
    costs: Costs | None
    estimate: Estimate | None
    compiled: Compile
    replicated: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of one step, on all devices."""
        return self.batch_size * self.row_tokens

    @property
    def peak(self) -> int:
        """Bytes on a device, by the compiler or its refusal."""
        return self.memory.peak if self.memory is not None else self.wanted

    @property
    def fits(self) -> bool:
        """Whether the memory is enough, where it is known."""
        return self.memory is not None and (self.limit is None or self.memory.peak <= self.limit)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A step that can be compiled, and what its shapes say.

    Attributes:
      run, phase, machine, parallel, layout, program: what it is made of.
      state, batch: its arguments, as shapes with shardings.
      expected: memory by shapes alone.
      replicated: sentences about dimensions that the mesh could not split.
    """

    run: RunConfig
    phase: Phase
    machine: Topology
    parallel: Parallelism
    layout: BatchLayout
    program: Program
    state: TrainState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    expected: Expected
    replicated: tuple[str, ...]


def prepare(run: RunConfig, machine: Topology) -> Prepared:
    """The step of a run's first phase, as `jaxlm.train` makes it; no data is opened and nothing compiled.

    Raises:
      ValueError: mesh, batch, data and model do not go together; the message says what to do.
      CannotCompile: the machine's compiler is not installed.
    """
    phase = run.phases[0]
    parallel = run.parallel.on(machine.devices())
    layout = expected_layout(run, phase)
    program = make_program(run, phase, parallel, layout)
    parallel.batch_sharding(phase.batch_size // run.step.microbatches)
    by_rows = parallel.batch_sharding(phase.batch_size)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows) for name, (shape, dtype) in layout.features.items()
    }
    state = abstract_state(program.abstract, program.optimizer, parallel)
    return Prepared(
        run=run,
        phase=phase,
        machine=machine,
        parallel=parallel,
        layout=layout,
        program=program,
        state=state,
        batch=batch,
        expected=expected(run, program, layout, parallel),
        replicated=unsplit_dimensions(program.infos, parallel),
    )


def plan(run: RunConfig, machine: Topology) -> Plan:
    """Compiles the training step of a run's first phase for `machine`.

    A compiler's refusal for want of memory is a plan that does not fit, not an error.

    Raises:
      ValueError, CannotCompile: as `prepare`.
    """
    return compile_plan(prepare(run, machine))


def compile_plan(prepared: Prepared) -> Plan:
    """The plan of a step that is prepared; see `plan`."""
    machine, parallel, program = prepared.machine, prepared.parallel, prepared.program
    started, processor = time.monotonic(), time.process_time()
    compiled = wanted = None
    limit = machine.chip.memory if machine.chip is not None else None
    try:
        # Kernels and chunk sizes are chosen for the mesh in use, so for the machine that is planned.
        with jax.sharding.use_abstract_mesh(parallel.mesh.abstract_mesh), writing_no_cache():
            compiled = program.step.lower(prepared.state, prepared.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if (sizes := refused(error)) is None:
            raise
        wanted = sizes[0] or prepared.expected.total
        limit = sizes[1] or limit
    took = Compile(
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - processor,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    found = guess = None
    model_flops = program.flops_per_token * program.row_tokens * prepared.phase.batch_size
    tokens = program.row_tokens * prepared.phase.batch_size
    mesh = dict(parallel.mesh.shape)
    if compiled is not None:
        found = costs(compiled.as_text(), mesh, platform=machine.kind)
        guess = estimate(found, machine, parallel.mesh, model_flops=model_flops, tokens=tokens)
    return Plan(
        topology=machine.name,
        chip=machine.chip.name if machine.chip is not None else machine.kind,
        mesh={axis: degree for axis, degree in mesh.items() if degree > 1},
        devices=parallel.mesh.size,
        model=program.model.architecture.value,
        parameters=sum(info.size for info in flatten(program.infos).values()),
        batch_size=prepared.phase.batch_size,
        row_tokens=program.row_tokens,
        microbatches=prepared.run.step.microbatches,
        remat=remat_of(prepared.run),
        model_flops=model_flops,
        limit=limit,
        memory=None if compiled is None else memory(compiled, prepared.state, prepared.batch),
        wanted=wanted,
        expected=prepared.expected,
        costs=found,
        estimate=guess,
        compiled=took,
        replicated=prepared.replicated,
    )


def remat_of(run: RunConfig) -> str:
    """Names of the rematerialisation of the model's stacks, the different ones."""
    policies = [stack.remat for model in whole_models(run.model) for stack in model.stacks.values()]
    return ", ".join(dict.fromkeys(policy_name(policy) for policy in policies))


def policy_name(policy: RematPolicy) -> str:
    """ "full", or what a policy of one's own keeps."""
    if isinstance(policy, Remat):
        return policy.value
    return f"of {', '.join(policy.on_device + policy.on_host)}"


def whole_models(model) -> list:
    """The language models that a model is made of."""
    if isinstance(model, ReplacedTokenDetectorConfig):
        return [m for m in (model.generator, model.discriminator) if m is not None]
    return [model]


def with_remat(run: RunConfig, policy: RematPolicy) -> RunConfig:
    """The same run with another rematerialisation in all stacks."""

    def changed(model):
        if isinstance(model, ReplacedTokenDetectorConfig):
            parts = {name: changed(part) for name in ("generator", "discriminator") if (part := getattr(model, name))}
            return dataclasses.replace(model, **parts)
        stacks = {name: dataclasses.replace(stack, remat=policy) for name, stack in model.stacks.items()}
        return dataclasses.replace(model, **stacks)

    return dataclasses.replace(run, model=changed(run.model))
