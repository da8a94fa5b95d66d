"""Compiling for TPUs and GPUs that are not there, and reading what their compilers know about a kernel.

TPUs need the `libtpu` package and nothing else. The H200 needs jax's CUDA plugin of jax's own version, best kept out of
the environment that runs on this machine:

    pip install --no-deps --target FOLDER jax-cuda13-plugin==V jax-cuda13-pjrt==V
    export PALLAS_KERNELS_CUDA_PLUGIN=FOLDER

`compile_for` and `memory` work in this process. The instruments (`tpu_cycles`, `tpu_units`, `gpu_registers`) compile a
`Case` in a process of its own: their flags are read once a process, and a compiler that gives up aborts its process.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CUDA_PLUGIN = "PALLAS_KERNELS_CUDA_PLUGIN"
"""Environment variable: the folder with jax-cuda13-plugin and jax-cuda13-pjrt."""

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
"""The smallest topology of each generation, as a rule of one host."""

_TPU_NAME = re.compile(r"(v5e|v5p|v6e|tpu7x):[1-9]\d*(x[1-9]\d*){1,2}")  # libtpu crashes on a size of 0
_H200 = "h200"
_GPU_NAME = re.compile(r"h200(:[1-9]\d*)?")
_GPUS_PER_NODE = 8

_LIBTPU_WITHOUT_A_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # into several processes
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do; without these two it complains
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class CannotCompile(RuntimeError):
    """What compiles for the topology is not installed, or gave up."""


def why_not(topology: str) -> str | None:
    """Why nothing can be compiled for `topology` here, as a sentence for a skipped test; None if it can.

    Raises:
      ValueError: there is no such topology.
    """
    _check_name(topology)
    if not _GPU_NAME.fullmatch(topology):
        return None if _found("libtpu") else f"compiling for {topology} needs the package libtpu"
    if _found("jax_plugins.xla_cuda13"):
        return None
    folder = os.environ.get(CUDA_PLUGIN)
    remedy = f"set {CUDA_PLUGIN} to a folder made by `pip install --no-deps --target` of it and of jax-cuda13-pjrt"
    if not folder:
        return f"compiling for {topology} needs jax-cuda13-plugin: {remedy}"
    if not pathlib.Path(folder, "jax_cuda13_plugin").is_dir():
        return f"there is no jax-cuda13-plugin in {folder}: {remedy}"
    if not pathlib.Path(folder, f"jax_cuda13_plugin-{jax.__version__}.dist-info").is_dir():
        return f"jax-cuda13-plugin in {folder} is not of jax's version {jax.__version__}: {remedy}"
    return None


def compile_for(
    topology: str, function: Callable, *shapes: Any, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """`function` compiled for one device of `topology`, without a device.

    `platforms.current()` is that device while `function` is traced.

    Args:
      topology: "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1" (see `TPUS`) or another size of these; or "h200".
      function: takes arrays; may be jitted.
      *shapes: its positional arguments, pytrees of `jax.ShapeDtypeStruct` without sharding.
      options: the compiler's options, as of `jax.stages.Lowered.compile`.

    Raises:
      ValueError: there is no such topology.
      CannotCompile: what compiles for it is absent.
    """
    mesh = Mesh(np.array(devices(topology)[:1]), ("device",), axis_types=(AxisType.Auto,))
    placed = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), writing_no_cache():
        return jitted.lower(*shapes).compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a compiled program takes on its device.

    Attributes:
      arguments: what is passed in.
      outputs: what comes out, what shares memory with an argument included.
      temporaries: what it needs besides, in the device's main memory; on-chip memory is not counted.
      peak: the most at one time: arguments, outputs, temporaries, and copies in on-chip memory.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """The bytes that `compiled` takes, by its compiler's account."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class DeclaredCost:
    """What a TPU kernel says of its work, from its static grid: blocks that a mask hides at run time count as visited.

    Attributes:
      flops: a multiplication and an addition are two.
      transcendentals: exponentials and their like.
      bytes: moved between the chip and its main memory.
    """

    flops: int
    transcendentals: int
    bytes: int


def declared_costs(compiled: jax.stages.Compiled) -> list[tuple[str, DeclaredCost]]:
    """The kernels of a program compiled for a TPU, by name, in the program's order; one in a loop is there once."""
    kernel = re.compile(
        r"%([\w.]+?)(?:\.\d+)? = .*tpu_custom_call.*\"cost_estimate\":"
        r'\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"'
    )
    return [(name, DeclaredCost(*map(int, cost))) for name, *cost in kernel.findall(compiled.as_text())]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile in another process.

    Attributes:
      maker: "module:function"; called there with `arguments`, the function gives (callable, shapes), where shapes is a
        tuple of positional arguments as `compile_for` takes them.
      arguments: its keyword arguments, of types that JSON has.
      options: the compiler's options, as `compile_for` takes them.
    """

    maker: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] | None = None


def tpu_cycles(case: Case, topology: str, timeout: float = 300) -> dict[str, int]:
    """Cycles that the TPU compiler expects of each HLO operation: {the operation's name in the program: cycles}.

    A Pallas kernel is one operation, named by `pallas_call(name=...)` and a number. The compiler walks the grid,
    follows scalar branches and models the copies. An estimate, good for ranking two kernels on one chip; known to
    mislead in that
    - scalars read from SMEM are 0: a branch on prefetched data always takes the side of 0, so what is measured must do
      all its work there;
    - operations inside a loop of the program (`lax.scan`, not a kernel's grid) count once;
    - copies in and out of a kernel do not slow each other down.
    It takes about as long as there are grid steps times instructions: seconds, up to minutes for blocks of 128.

    Args:
      case: the program.
      topology: as of `compile_for`, TPUs only.
      timeout: seconds.

    Raises:
      ValueError: `topology` is not a TPU's.
      CannotCompile: the compile failed, crashed or took longer than `timeout`; the notes have the compiler's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        _compile_apart(case, _tpu(topology), timeout, LIBTPU_INIT_ARGS=f"--xla_jf_dump_static_llo_profile_to={folder}")
        dumps = [path.read_text() for path in sorted(pathlib.Path(folder).iterdir())]
    estimate = re.compile(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)')
    cycles = {op: int(each) * int(alike) for dump in dumps for op, each, alike in estimate.findall(dump)}
    if not cycles:
        raise CannotCompile(
            f"The compiler estimated no operation of {case.maker} for {topology}: has it any work to do?"
        )
    return cycles


@dataclasses.dataclass(frozen=True)
class Units:
    """How one operation's instructions fill a TPU core, counted in the program text: a loop's body counts once.

    Attributes:
      bundles: very long instruction words.
      used: {unit: instructions}; units are MATMUL, MATPUSH (to older compilers both are MXU), XLU, VALU, VPOP, EUP,
        VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU.
      slots: {unit: instructions that one bundle has room for}.
    """

    bundles: int
    used: dict[str, int]
    slots: dict[str, int]

    def share(self, unit: str) -> float:
        """Part of the room for `unit` that is used, in [0, 1]."""
        return self.used[unit] / (self.slots[unit] * self.bundles)

    @property
    def spills(self) -> int:
        """Vector registers stored for want of room."""
        return self.used["VSTORE:SPILL"]


def tpu_units(case: Case, topology: str, timeout: float = 300) -> dict[str, Units]:
    """Use of a TPU core's units by each HLO operation; arguments and errors as of `tpu_cycles`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
        _compile_apart(case, _tpu(topology), timeout, LIBTPU_INIT_ARGS=flags)
        names = re.compile(r"\d+-(.*)-\d+-final_hlo-static-per-bundle-utilization\.txt")
        dumps = {m[1]: p.read_text() for p in sorted(pathlib.Path(folder).iterdir()) if (m := names.fullmatch(p.name))}
    # TLP and what is in brackets are the program's frame.
    return {op: _read_units(dump) for op, dump in dumps.items() if op != "TLP" and not op.startswith("<")}


@dataclasses.dataclass(frozen=True)
class Registers:
    """What ptxas says of a GPU kernel.

    Attributes:
      kernel: its name.
      registers: of one thread; 255 at most.
      spill_stores: bytes a thread stores for want of registers.
      spill_loads: bytes it loads again.
    """

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int


def gpu_registers(case: Case, topology: str = _H200, timeout: float = 300) -> list[Registers]:
    """Registers and spills of each Mosaic GPU kernel of the program, in the order of compiling.

    Args:
      case: the program.
      topology: "h200".
      timeout: seconds.

    Raises:
      ValueError: `topology` is not a GPU's.
      CannotCompile: as of `tpu_cycles`; or there is no kernel in the program.
    """
    _check_name(topology)
    if not _GPU_NAME.fullmatch(topology):
        raise ValueError(f"gpu_registers is for GPUs, not {topology!r}: use {_H200!r}.")
    said = _compile_apart(case, topology, timeout, MOSAIC_GPU_DUMP_PTXAS="1")
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = [Registers(name, int(used), int(stores), int(loads)) for name, stores, loads, used in entry.findall(said)]
    if not found:
        raise CannotCompile(f"There is no Mosaic GPU kernel in the program of {case.maker}.")
    return found


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


def _check_name(topology: str) -> None:
    if not _GPU_NAME.fullmatch(topology) and not _TPU_NAME.fullmatch(topology):
        raise ValueError(f"There is no topology {topology!r}; there are sizes of {', '.join(TPUS)}, and {_H200!r}.")


def _tpu(topology: str) -> str:
    _check_name(topology)
    if _GPU_NAME.fullmatch(topology):
        raise ValueError(f"Cycles and units are estimated for TPUs, not {topology!r}: use one of {', '.join(TPUS)}.")
    return topology


@functools.cache
def devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices that can be compiled for and nothing else.

    Args:
      topology: as of `compile_for`, with "h200:16" for so many GPUs in nodes of 8.
      slices: copies of a TPU's topology, joined by the data-centre network.

    Raises:
      ValueError: there is no such topology.
      CannotCompile: what compiles for it is absent.
    """
    if reason := why_not(topology):
        raise CannotCompile(reason)
    jax.devices()  # the machine's own devices come first: what follows tells libtpu not to look for any
    if _GPU_NAME.fullmatch(topology):
        if not _found("jax_plugins.xla_cuda13"):
            _load_cuda_plugin(pathlib.Path(os.environ[CUDA_PLUGIN]).resolve())
        target = pathlib.Path(__file__).with_name("h200.txtpb").read_text()
        nodes, gpus = _nodes(int(topology.partition(":")[2] or 1))
        shape = f"1x{nodes}x{gpus}"
        return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices
    for name, value in _LIBTPU_WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {str(error).splitlines()[0]}") from error


def _nodes(gpus: int) -> tuple[int, int]:
    """(nodes, GPUs in each)."""
    if gpus > _GPUS_PER_NODE and gpus % _GPUS_PER_NODE:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {_GPUS_PER_NODE}; give a multiple of {_GPUS_PER_NODE}.")
    return max(1, gpus // _GPUS_PER_NODE), min(gpus, _GPUS_PER_NODE)


@contextlib.contextmanager
def writing_no_cache() -> Iterator[None]:
    """Keeps jax's persistent cache from storing programs that, without a device, it cannot read again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _load_cuda_plugin(folder: pathlib.Path) -> None:
    """Does for a plugin outside of the environment what jax, which has looked for plugins already, did not."""
    sys.path.append(str(folder))
    # Libraries that only a device needs are not looked for.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    importlib.import_module("jax_plugins.xla_cuda13").initialize()
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(folder / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so")


def _compile_apart(case: Case, topology: str, timeout: float, **environment: str) -> str:
    """Compiles `case` in a process with `environment` set; what the process wrote."""
    if reason := why_not(topology):
        raise CannotCompile(reason)
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache is not compiled, and nothing is told of it
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }
    command = [sys.executable, "-m", "pallas_kernels.ahead_of_time", topology, json.dumps(dataclasses.asdict(case))]
    named = f"{case.maker}({json.dumps(case.arguments)}) for {topology}"
    try:
        ended = subprocess.run(
            command, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"Compiling {named} took longer than {timeout} seconds.") from error
    if ended.returncode:
        failure = CannotCompile(f"Compiling {named} failed, with exit status {ended.returncode}.")
        failure.add_note(ended.stderr[-4000:])
        raise failure
    return ended.stdout + ended.stderr


def _read_units(dump: str) -> Units:
    """A dump is two titles, the units' names, their slots, and a row of counts for each bundle."""
    _, names, slots, _, *rows = dump.splitlines()
    names = [name.strip() for name in names.split(",")]
    counts = np.array([row.split() for row in rows if row], int)
    return Units(
        bundles=len(counts),
        used=dict(zip(names, counts.sum(axis=0).tolist())),
        slots=dict(zip(names, map(int, slots.split()))),
    )


def main() -> None:
    """Compiles one case: python -m pallas_kernels.ahead_of_time TOPOLOGY CASE_AS_JSON."""
    topology, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    module, _, name = case.maker.partition(":")
    function, shapes = getattr(importlib.import_module(module), name)(**case.arguments)
    compile_for(topology, function, *shapes, options=case.options)


if __name__ == "__main__":
    main()
