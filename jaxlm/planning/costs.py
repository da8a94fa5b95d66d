"""What one run of a compiled program costs a device: products, memory traffic and collectives, loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop, and so a scanned stack of layers, once, and a kernel as nothing.

- FLOPs are those of matrix products, two for a multiplication and addition, and what kernels declare
  (`pl.CostEstimate`). Additions, norms and the like are not counted: they cost memory traffic.
- Bytes are those that an operation reads from and writes to the device's main memory: operands and results, of a slice
  the slice, of an update in place the update. What lies in on-chip memory is free. A kernel reads and writes what it
  declares, or everything once.
- A collective's size is that of the whole array: an all-gather's result, what the others are given.
- Of a conditional the dearer branch counts.
- Loops that end when their data say are counted as one turn, kernels without a declared cost as no FLOPs, and both are
  named in `not_counted`.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxlm.planning.hlo import Array, Computation, Instruction, Module, parse
from jaxlm.planning.trips import Frame, entry_frame

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier "
    "optimization-barrier while conditional call async-update add-dependency".split()
)
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Custom calls that hand a buffer on.
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AsyncCollective", "Pin")
_KERNELS = re.compile(r"tpu_custom_call|mosaic|triton|fmha|flash|ffi|pallas", re.IGNORECASE)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_LIBRARY_PRODUCT = re.compile(r"gemm|matmul|dot", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes of the mesh.

    Attributes:
      kind: HLO's name: "all-gather", "reduce-scatter", ...
      axes: the mesh axes that its groups run over; () where they are no axes of the mesh.
      group: devices that take part.
      count: how often they run.
      bytes: sizes of the arrays, summed over the runs.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the algorithms that send least (rings).

        All-gather, reduce-scatter and all-to-all (n - 1) / n of the array, all-reduce twice that.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        share = (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run costs a device.

    Attributes:
      matmul_flops: of matrix products that XLA compiled.
      kernel_flops: as kernels declare.
      bytes: to and from main memory.
      host_bytes: to and from the host's memory.
      collectives: sorted by bytes sent, the largest first.
      kernels: {name: runs} of all kernels.
      not_counted: sentences about what is missing above.
    """

    matmul_flops: int
    kernel_flops: int
    bytes: int
    host_bytes: int
    collectives: tuple[Collective, ...]
    kernels: Mapping[str, int]
    not_counted: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Of products and kernels."""
        return self.matmul_flops + self.kernel_flops

    def collective_bytes(self) -> dict[str, int]:
        """Bytes by kind."""
        total: collections.Counter[str] = collections.Counter()
        for collective in self.collectives:
            total[collective.kind] += collective.bytes
        return dict(total)


def costs(hlo: str | Module, mesh: Mapping[str, int] | None = None, *, platform: str = "tpu") -> Costs:
    """Costs of a compiled program.

    Args:
      hlo: `jax.stages.Compiled.as_text()`, or that parsed.
      mesh: {axis: degree} in the mesh's order, to name the axes of collectives; the devices must be numbered along it.
      platform: "tpu", "gpu" or "cpu": only TPUs have on-chip memory that layouts name.

    Raises:
      ValueError: the text is no compiled module.
    """
    module = parse(hlo) if isinstance(hlo, str) else hlo
    counter = _Counter(module, dict(mesh or {}), platform)
    counter.run(entry_frame(module), 1)
    return counter.result()


def matmul_flops(hlo: str) -> int:
    """FLOPs of all matrix products that one run of a compiled program executes.

    Raises:
      ValueError: a loop around a product ends when its data say, or a product hides in a library call.
    """
    module = parse(hlo)
    counter = _Counter(module, {}, "cpu")
    counter.run(entry_frame(module), 1)
    if counter.loops_with_products:
        raise ValueError(
            f"The loop {counter.loops_with_products[0]!r} multiplies matrices and has no known trip count."
        )
    if counter.unread:
        raise ValueError(f"The products in {min(counter.unread)} cannot be counted; compile without library calls.")
    return counter.matmul


class _Counter:
    """Walks through a program once, with the number of times that each computation runs."""

    def __init__(self, module: Module, mesh: dict[str, int], platform: str):
        self._module, self._mesh, self._platform = module, mesh, platform
        self.matmul = self._kernel = self._bytes = self._host = 0
        self._collectives: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
        self._kernels: collections.Counter[str] = collections.Counter()
        self._undeclared: collections.Counter[str] = collections.Counter()
        self._loops: list[str] = []
        self.loops_with_products: list[str] = []
        self.unread: set[str] = set()

    def result(self) -> Costs:
        found = [Collective(*key, count, size) for key, (count, size) in self._collectives.items()]
        notes = [f"The loop {name} ends when its data say; one turn of it is counted." for name in self._loops]
        notes += [
            f"The kernel {name} ({times} runs) declares no cost; its FLOPs are missing."
            for name, times in self._undeclared.items()
        ]
        notes += [f"The products in {name} cannot be read; their FLOPs are missing." for name in sorted(self.unread)]
        return Costs(
            matmul_flops=self.matmul,
            kernel_flops=self._kernel,
            bytes=self._bytes,
            host_bytes=self._host,
            collectives=tuple(sorted(found, key=lambda c: -c.sent)),
            kernels=dict(self._kernels),
            not_counted=tuple(notes),
        )

    def run(self, frame: Frame, times: int) -> None:
        """Counts a computation that is not fused."""
        computation, seen = frame.computation, set()
        for instruction in computation.instructions.values():
            self._count_products(computation, instruction, times)
            self._count_collectives(computation, instruction, times, seen)
            self._count_bytes(computation, instruction, times)
            if instruction.op == "while":
                trips, inside = frame.loop(instruction)
                before = self.matmul
                self.run(inside, times * (1 if trips is None else trips))
                if trips is None:
                    self._loops.append(instruction.name)
                    self.loops_with_products += [instruction.name] if self.matmul > before else []
            elif instruction.op == "conditional":
                self._run_dearest(frame, instruction, times)
            elif instruction.op in ("call", "async-start"):
                inner = self._module.computations[instruction.called[0]]
                operands = instruction.operands
                self.run(Frame(self._module, inner, lambda i, ops=operands: frame.value(ops[i])), times)

    def _run_dearest(self, frame: Frame, instruction: Instruction, times: int) -> None:
        tried = []
        for name, operand in zip(instruction.branches, instruction.operands[1:], strict=True):
            branch = _Counter(self._module, self._mesh, self._platform)
            inner = self._module.computations[name]
            branch.run(Frame(self._module, inner, lambda _, given=operand: frame.value(given)), times)
            tried.append(branch)
        dearest = max(tried, key=lambda b: (b.matmul + b._kernel, b._bytes))
        self.matmul += dearest.matmul
        self._kernel += dearest._kernel
        self._bytes += dearest._bytes
        self._host += dearest._host
        for key, (count, size) in dearest._collectives.items():
            self._add_collective(key, count, size)
        self._kernels += dearest._kernels
        self._undeclared += dearest._undeclared
        self._loops += dearest._loops
        self.loops_with_products += dearest.loops_with_products
        self.unread |= dearest.unread

    # Products.

    def _count_products(self, computation: Computation, instruction: Instruction, times: int) -> None:
        op = instruction.op
        if op == "dot":
            self.matmul += times * _dot_flops(computation, instruction, "lhs_contracting_dims")
        elif op == "convolution":
            self.matmul += times * _convolution_flops(computation, instruction)
        elif op == "custom-call":
            self._count_custom_call(computation, instruction, times)
        elif op == "fusion":
            inner = self._module.computations[instruction.called[0]]
            for fused in inner.instructions.values():
                self._count_products(inner, fused, times)

    def _count_custom_call(self, computation: Computation, instruction: Instruction, times: int) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
        if target.startswith(_NO_WORK):
            return
        if declared := _declared(instruction, "flops"):
            self._kernels[_family(instruction.name)] += times
            self._kernel += times * declared
        elif "lhs_contracting_dimensions" in instruction.attributes:
            self.matmul += times * _library_flops(computation, instruction)
        elif _LIBRARY_PRODUCT.search(target):
            self.unread.add(f"{target} {instruction.name!r}")
        elif _KERNELS.search(target):
            self._kernels[_family(instruction.name)] += times
            self._undeclared[_family(instruction.name)] += times

    # Collectives.

    def _count_collectives(
        self, computation: Computation, instruction: Instruction, times: int, seen: set[tuple[str, str]]
    ) -> None:
        """`seen`: collectives of this run by channel. TPUs spread one over several fusions, each holding a copy."""
        kind = instruction.op.removesuffix("-start")
        if kind in _COLLECTIVES:
            self._count_collective(computation, instruction, kind, times)
        elif instruction.op == "fusion":
            inner = self._module.computations[instruction.called[0]]
            for fused in inner.instructions.values():
                kind = fused.op.removesuffix("-start")
                if kind in _COLLECTIVES:
                    channel = fused.attribute("channel_id")
                    if channel is None or (kind, channel) not in seen:
                        if kind == "all-reduce" and "all-reduce-scatter" in inner.name + instruction.name:
                            kind = "reduce-scatter"
                        self._count_collective(inner, fused, kind, times)
                    seen.add((fused.op.removesuffix("-start"), channel))

    def _count_collective(self, computation: Computation, instruction: Instruction, kind: str, times: int) -> None:
        size = sum(array.bytes for operand in computation.operands(instruction) for array in operand.arrays)
        group, axes = _group(instruction, self._mesh)
        if kind == "all-gather":
            size *= group
        if group > 1:
            self._add_collective((kind, axes, group), times, times * size)

    def _add_collective(self, key: tuple[str, tuple[str, ...], int], count: int, size: int) -> None:
        total = self._collectives.setdefault(key, [0, 0])
        total[0] += count
        total[1] += size

    # Memory traffic.

    def _count_bytes(self, computation: Computation, instruction: Instruction, times: int) -> None:
        op = instruction.op
        if op in _FREE or op.endswith("-done") or op == "async-start":
            return
        if op == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
            if target.startswith(_NO_WORK):
                return
            if declared := _declared(instruction, "bytes_accessed"):
                self._bytes += times * declared
                return
        for array, size in self._traffic(computation, instruction):
            if array.space == 5:
                self._host += times * size
            elif array.space == 0 or self._platform != "tpu":
                self._bytes += times * size

    def _traffic(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Array, int]]:
        """(array, bytes of it that are read or written)."""
        op, operands = instruction.op, computation.operands(instruction)
        if op in ("copy-start", "slice-start", "dynamic-slice-start"):
            moved = instruction.arrays[1] if op == "slice-start" else instruction.arrays[0]
            source = operands[0].arrays[0]
            yield moved, moved.bytes
            yield source, moved.bytes
        elif op == "fusion":
            yield from self._fusion_traffic(instruction, operands)
        elif op in ("slice", "dynamic-slice", "gather"):
            result = instruction.arrays[0]
            yield result, result.bytes
            yield operands[0].arrays[0], result.bytes
        elif op == "dynamic-update-slice":
            update = operands[1].arrays[0]
            yield instruction.arrays[0], update.bytes
            yield update, update.bytes
        elif op.removesuffix("-start") in _COLLECTIVES and instruction.op.endswith("-start"):
            for array in (a for operand in operands for a in operand.arrays):
                yield array, array.bytes
            given = instruction.arrays[len(operands) :] or instruction.arrays
            for array in given[: len(operands)]:
                yield array, array.bytes
        else:
            for array in itertools.chain(instruction.arrays, *(operand.arrays for operand in operands)):
                yield array, array.bytes

    def _fusion_traffic(self, instruction: Instruction, operands: list[Instruction]) -> Iterator[tuple[Array, int]]:
        inner = self._module.computations[instruction.called[0]]
        for number, operand in enumerate(operands):
            for array in operand.arrays:
                yield array, _read(inner, inner.parameters[number], array)
        roots = inner.operands(inner.root) if inner.root.op == "tuple" else [inner.root]
        if len(roots) != len(instruction.arrays):
            roots = [None] * len(instruction.arrays)
        for root, array in zip(roots, instruction.arrays):
            yield array, _written(inner, root, array)


def _through(computation: Computation, instruction: Instruction) -> Instruction:
    """Where a value comes from, behind changes of its form."""
    while instruction.op in ("bitcast", "convert", "copy", "reshape") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _read(computation: Computation, parameter: Instruction, array: Array) -> int:
    """Bytes of a fusion's parameter that it reads: of one that is only sliced, the slices."""
    total, waiting = 0, [parameter]
    while waiting:
        value = waiting.pop()
        users = computation.users[value.name]
        if not users:  # handed through
            return 0 if value is parameter else array.bytes
        for user in users:
            first = user.operands[0] == value.name and user.operands.count(value.name) == 1
            if user.op == "bitcast":
                waiting.append(user)
            elif first and user.op in ("dynamic-slice", "slice", "gather"):
                total += user.arrays[0].bytes
            elif first and user.op == "dynamic-update-slice":
                continue  # in place
            elif user.op == "tuple" and user is computation.root:
                continue
            else:
                return array.bytes
    return min(total, array.bytes)


def _written(computation: Computation, root: Instruction | None, array: Array) -> int:
    """Bytes of a fusion's result that it writes: of an update in place, the update."""
    if root is None:
        return array.bytes
    source = _through(computation, root)
    if source.op == "dynamic-update-slice":
        return computation.instructions[source.operands[1]].arrays[0].bytes
    if source.op == "parameter":
        return 0
    return array.bytes


def _dot_flops(computation: Computation, instruction: Instruction, contracting: str) -> int:
    left = computation.instructions[instruction.operands[0]].arrays[0].dims
    return 2 * instruction.arrays[0].size * math.prod(left[i] for i in instruction.dimensions(contracting))


def _library_flops(computation: Computation, instruction: Instruction) -> int:
    """Of a call of cuBLAS and the like, which says what it contracts."""
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    left = computation.instructions[instruction.operands[0]].arrays[0].dims
    axes = [int(axis.strip('" ')) for axis in found[1].split(",") if axis]
    return 2 * instruction.arrays[0].size * math.prod(left[i] for i in axes)


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """TPUs compile every matrix product to a convolution; multiplications with padding are none."""
    left, right = (operand.arrays[0].dims for operand in computation.operands(instruction)[:2])
    of_left, _, rest = instruction.attribute("dim_labels").partition("_")
    of_right, _, of_result = rest.partition("->")
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    window = _window(instruction)
    pairs = 1
    for dimension in range(len(of_left) - 2):
        label = str(dimension)
        pairs *= _valid_pairs(
            left[of_left.index(label)],
            right[of_right.index(label)],
            instruction.arrays[0].dims[of_result.index(label)],
            {name: values[dimension] for name, values in window.items()},
        )
    batch, features = left[of_left.index("b")] // batch_groups, left[of_left.index("f")] // groups
    return 2 * batch * features * right[of_right.index("o")] * pairs


def _window(instruction: Instruction) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    parts = dict(part.split("=") for part in found[1].split()) if found else {}
    given = [name for name in ("stride", "lhs_dilate", "rhs_dilate") if name in parts]
    values = {name: [int(n) for n in parts[name].split("x")] for name in given}
    if "pad" in parts:
        values["pad"] = [int(pad.split("_")[0]) for pad in parts["pad"].split("x")]
    return values


def _valid_pairs(inputs: int, kernel: int, outputs: int, window: Mapping[str, int]) -> int:
    """(output position, kernel position) pairs of a dimension that meet an input, not padding."""
    stride, pad = window.get("stride", 1), window.get("pad", 0)
    spread, apart = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    if kernel == inputs == 1 or (kernel == 1 and not pad and spread == 1):
        return outputs * kernel
    first = np.arange(outputs) * stride - pad
    total = 0
    for position in range(kernel):
        at = first + position * apart
        total += int(((at >= 0) & (at < inputs * spread - (spread - 1)) & (at % spread == 0)).sum())
    return total


def _declared(instruction: Instruction, what: str) -> int:
    """A kernel's `pl.CostEstimate`, or 0."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"?(-?\d+)"?', instruction.attributes)
    return max(int(found[1]), 0) if found else 0


def _family(name: str) -> str:
    """A kernel's name without the number that makes it unique."""
    return re.sub(r"[.\d]+$", "", name)


def _group(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """Devices in a collective's group, and the mesh axes along which they lie."""
    text = instruction.attributes
    groups = _device_groups(text)
    if not groups:
        return (math.prod(mesh.values()) if mesh else 1), tuple(axis for axis, n in mesh.items() if n > 1)
    return max(len(group) for group in groups), _axes_of(groups, mesh)


def _device_groups(text: str) -> list[list[int]]:
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        return _groups_along(found[1], found[2])
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])]
        return [[a, b] for a, b in pairs if a != b]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = ([int(n) for n in part.split(",")] for part in found.groups()[:2])
        ids = np.arange(math.prod(source)).reshape(source)
        if found[3]:
            ids = ids.transpose([int(n) for n in found[3].split(",")])
        return ids.reshape(shape[0], -1).tolist()
    return []


def _groups_along(mesh: str, axes: str) -> list[list[int]]:
    """Of "'a'=2,'b'=8" and "'b'", or "'b':(2)4" for the four next to the two outermost parts of b."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    cuts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(axes)}
    shape, chosen = [], []
    for name, size in sizes.items():
        before, own = cuts.get(name, (1, 1))
        chosen += [len(shape) + 1] if name in cuts else []
        shape += [before, own, size // (before * own)]
    ids = np.arange(math.prod(sizes.values())).reshape(shape)
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    return ids.transpose([*others, *chosen]).reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()


def _axes_of(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of groups differ."""
    if not mesh or max(max(group) for group in groups) >= math.prod(mesh.values()):
        return ()
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=1)
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        differ |= (places[group] != places[group[0]]).any(0)
    return tuple(axis for axis, varies in zip(mesh, differ) if varies)


def to_json(found: Costs) -> str:
    """As JSON, for results and tests."""
    return json.dumps(dataclasses.asdict(found), indent=1)
