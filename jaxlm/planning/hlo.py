"""Reads the text of a compiled program (HLO) into computations and instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations=\{)=?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type and where it lies.

    Attributes:
      dtype: HLO's name, "bf16".
      dims: sizes.
      space: memory space of the layout; 0 is the device's main memory, others are on the chip (or 5: the host).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.size * element_bits(self.dtype) // 8)


def element_bits(dtype: str) -> int:
    """Bits of an element of HLO's type `dtype`; 0 for tokens and the like."""
    if dtype == "pred":
        return 8
    if dtype.startswith("c") and dtype[1:].isdigit():
        return int(dtype[1:])
    found = re.match(r"(?:bf|f|s|u)(\d+)", dtype)
    return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      op: "dot", "fusion", "while", ...
      arrays: what it gives; a tuple's leaves in order.
      is_tuple: whether that is a tuple.
      operands: names of instructions of the same computation.
      text: between the parentheses of the operands: a parameter's number, a constant's value.
      attributes: what follows.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    text: str
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it calls once each: of a loop, body and condition."""
        return tuple(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of which a `conditional` runs one."""
        found = [n for a, b in _BRANCHES.findall(self.attributes) for n in (a or b).split(",")]
        return tuple(name.strip().removeprefix("%") for name in found)

    def attribute(self, name: str) -> str | None:
        """The value of a short attribute: `body`, `index`, `direction`, `dim_labels`, ...; None where it has none."""
        found = re.search(rf"\b{name}=%?([\w.\->]+)", self.attributes)
        return found[1] if found else None

    def dimensions(self, name: str) -> tuple[int, ...]:
        """The value of an attribute such as `lhs_contracting_dims={1}`; () where it has none."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in an order in which they can run.

    Attributes:
      name: in the module.
      instructions: by name.
      root: the one whose result is the computation's.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.text): i for i in self.instructions.values() if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes an instruction as an operand."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                found[operand].append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: where it begins.
    """

    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """The module of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: there is no ENTRY computation in the text.
    """
    computations: dict[str, Computation] = {}
    entry, lines = None, None
    for line in text.splitlines():
        if lines is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                lines = []
        elif line == "}" or line.startswith("}, execution_thread"):
            computation = _computation(header[2], lines)
            computations[computation.name] = computation
            entry = computation if header[1] else entry
            lines = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        else:  # a line break inside an attribute
            lines[-1] += line
    if entry is None:
        raise ValueError("The text has no ENTRY computation; give the text of a compiled HLO module.")
    return Module(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in lines:
        is_root, own, rest = _INSTRUCTION.match(line).groups()
        instructions[own] = _instruction(own, rest)
        root = instructions[own] if is_root else root
    return Computation(name, instructions, root or instructions[own])


def _instruction(name: str, rest: str) -> Instruction:
    is_tuple = rest.startswith("(")
    end = _closing(rest, 0) + 1 if is_tuple else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    start = len(op)
    close = _closing(rest, start)
    inside = _COMMENT.sub("", rest[start + 1 : close])
    operands = () if op in ("parameter", "constant") else tuple(_NAME.findall(inside))
    return Instruction(name, op, tuple(_arrays(shape)), is_tuple, operands, inside, rest[close + 1 :])


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", shape)):
        space = _MEMORY_SPACE.search(layout)
        sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
        yield Array(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth, quoted, i = 0, False, start
    while i < len(text):
        character = text[i]
        if character == "\\" and quoted:
            i += 1
        elif character == '"':
            quoted = not quoted
        elif not quoted and character == "(":
            depth += 1
        elif not quoted and character == ")":
            depth -= 1
            if not depth:
                return i
        i += 1
    raise ValueError(f"Unbalanced parentheses in an HLO instruction: {text[:80]!r}.")
