"""Compiler flags by chip: presets as data, each flag with its reason and where it comes from.

Imports nothing but the standard library: flags have to be in the environment before a device is touched, XLA's in
XLA_FLAGS, libtpu's in LIBTPU_INIT_ARGS. Both are read once a process.

    python -m jaxlm.train --xla_preset=v6e ...       from the command line
    python -m jaxlm.parallel.xla_flags v6e           prints the preset, with reasons
    eval "$(python -m jaxlm.parallel.xla_flags --export v6e)"     for another program

A flag that is in the environment already keeps the value it has there. A preset is small on purpose: what the compiler
does by default is not repeated, and a flag that can change numbers says so. Left out, though in use elsewhere:
- fused asynchronous all-gathers (xla_tpu_enable_async_collective_fusion_fuse_all_gather) on other chips than v5e:
  libtpu 0.0.51 refuses to compile with them, for fear of wrong results;
- collectives on SparseCore: AXLearn's authors record a discrepancy of quality with all-reduce on v6e and an abnormal
  loss on tpu7x.
"""

import dataclasses
import enum
import os
import sys
from collections.abc import Mapping, MutableMapping


class Variable(enum.Enum):
    """The environment variable that a flag is read from."""

    XLA = "XLA_FLAGS"
    LIBTPU = "LIBTPU_INIT_ARGS"


class Numerics(enum.Enum):
    """Whether a flag changes the numbers.

    SAME: where and when things are computed, not what; results are the same bits.
    ORDER: the order of a sum or the algorithm of a product, so the last bits.
    """

    SAME = "same"
    ORDER = "order"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a compiler.

    Attributes:
      name: without dashes.
      value: as it is written after "=".
      reason: what it does for training.
      source: who recommends it.
      variable: where it is read from.
      numerics: whether it changes the numbers.
    """

    name: str
    value: str
    reason: str
    source: str
    variable: Variable
    numerics: Numerics = Numerics.SAME

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Flags of a chip.

    Attributes:
      name: for --xla_preset.
      chip: what it is for.
      flags: no two of one name.
    """

    name: str
    chip: str
    flags: tuple[Flag, ...]


def _tpu(name: str, value: str, reason: str, source: str, numerics: Numerics = Numerics.SAME) -> Flag:
    return Flag(name, value, reason, source, Variable.LIBTPU, numerics)


def _gpu(name: str, value: str, reason: str, source: str, numerics: Numerics = Numerics.SAME) -> Flag:
    return Flag(name, value, reason, source, Variable.XLA, numerics)


_MAXTEXT = "AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py"
_AXLEARN = "apple/axlearn axlearn/common/compiler_options.py"
_JAX_GPU = "docs.jax.dev gpu_performance_tips"
_TOOLBOX = "NVIDIA/JAX-Toolbox rosetta/docs/GPU_performance.md"


def _scoped_vmem(kib: int, source: str = _MAXTEXT) -> Flag:
    reason = "on-chip memory of one operation: matrix products take larger tiles, and less is left to prefetch into"
    return _tpu("xla_tpu_scoped_vmem_limit_kib", str(kib), reason, source, Numerics.ORDER)


_OVERLAPPED_ALL_GATHER = (
    _tpu(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "a collective runs beside a matrix product, in pieces",
        _MAXTEXT,
    ),
    _tpu(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        "so also FSDP's all-gathers of parameters",
        _MAXTEXT,
    ),
    _tpu(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "over several products, where one is too short to hide it",
        _MAXTEXT,
    ),
    _tpu("xla_tpu_overlap_compute_collective_tc", "true", "on the core that computes, while it computes", _MAXTEXT),
    _tpu("xla_enable_async_all_gather", "true", "all-gathers have a start and an end to put work between", _MAXTEXT),
)

_ACROSS_SLICES = (
    _tpu(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "true",
        "between slices, a layer's gradients are summed while the next layer's are computed; nothing on one slice",
        _MAXTEXT,
        Numerics.ORDER,
    ),
    _tpu(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "true",
        "the same where the gradients differ in size, as embeddings and layers do",
        _MAXTEXT,
        Numerics.ORDER,
    ),
)

_HOPPER = (
    _gpu(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "collectives start early and run beside computation",
        f"{_JAX_GPU}; NVIDIA's JAX image sets it",
    ),
    _gpu(
        "xla_gpu_enable_while_loop_double_buffering",
        "true",
        "layers run by scan: the next layer's parameters are gathered while this one computes",
        _TOOLBOX,
    ),
    _gpu("xla_gpu_enable_pipelined_all_gather", "true", "FSDP's all-gathers cross the loop's boundary", _TOOLBOX),
    _gpu("xla_gpu_enable_pipelined_reduce_scatter", "true", "so do its reduce-scatters of gradients", _TOOLBOX),
    _gpu("xla_gpu_enable_pipelined_all_reduce", "true", "so do data parallelism's all-reduces", _TOOLBOX),
    _gpu(
        "xla_gpu_all_gather_combine_threshold_bytes",
        "134217728",
        "a layer's parameters are gathered in few large messages rather than many small ones",
        _TOOLBOX,
    ),
    _gpu(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        "134217728",
        "the same for gradients",
        _TOOLBOX,
        Numerics.ORDER,
    ),
)

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("v5e", "TPU v5e", (*_OVERLAPPED_ALL_GATHER, *_ACROSS_SLICES)),
        Preset("v5p", "TPU v5p", (_scoped_vmem(65472), *_ACROSS_SLICES)),
        Preset("v6e", "TPU v6e (Trillium)", (_scoped_vmem(98304, f"{_MAXTEXT}; {_AXLEARN}"), *_ACROSS_SLICES)),
        Preset("tpu7x", "TPU7x (Ironwood)", (_scoped_vmem(65536), *_ACROSS_SLICES)),
        Preset("h100", "NVIDIA H100", _HOPPER),
        Preset("h200", "NVIDIA H200", _HOPPER),
        Preset("cpu", "any processor", ()),
    )
}
"""{name: preset}."""

_used: list[Preset] = []  # of this process


def use(name: str | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts a preset's flags into the environment; to be called before a device is touched. None does nothing.

    Raises:
      ValueError: there is no such preset.
    """
    if name is None:
        return
    preset = find(name)
    environment.update(merged(preset, environment))
    if environment is os.environ:
        _used[:] = [preset]


def find(name: str) -> Preset:
    """The preset of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no XLA preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


def merged(preset: Preset, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables with the preset's flags, behind which come those that are there already."""
    result = {}
    for variable in Variable:
        there = environment.get(variable.value, "").split()
        names = {flag.partition("=")[0].lstrip("-") for flag in there}
        new = [str(flag) for flag in preset.flags if flag.variable is variable and flag.name not in names]
        if new:
            result[variable.value] = " ".join([*new, *there])
    return result


def in_use(environment: Mapping[str, str] = os.environ) -> str:
    """The preset of this process and the flags that it runs under, for its records; "" where there are neither."""
    flags = [flag for variable in Variable for flag in environment.get(variable.value, "").split()]
    # The number of simulated devices is no matter of how programs are compiled; the devices themselves are recorded.
    flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    return ": ".join(filter(None, [*(preset.name for preset in _used), " ".join(flags)]))


def main(arguments: list[str]) -> int:
    """Prints a preset: python -m jaxlm.parallel.xla_flags [--export] NAME."""
    names = [argument for argument in arguments if argument != "--export"]
    try:
        preset = find(names[0] if len(names) == 1 else "")
    except ValueError as error:
        print(f"jaxlm.parallel.xla_flags: {error}", file=sys.stderr)
        return 2
    if "--export" in arguments:
        for name, flags in merged(preset, os.environ).items():
            print(f"export {name}='{flags}'")
        return 0
    print(f"{preset.name}: {preset.chip}")
    for flag in preset.flags:
        print(f"\n{flag}\n  {flag.reason}\n  {flag.source}; numbers: {flag.numerics.value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
