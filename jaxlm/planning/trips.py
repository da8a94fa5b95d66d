"""How often a loop of a compiled program runs: XLA's own annotation, or the loop's counter followed by hand.

TPU programs carry no `known_trip_count`, and their compiler adds loops of its own (collective matrix products).
Counters are scalars made of constants; everything else of a loop is left alone.
"""

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

from jaxlm.planning.hlo import Computation, Instruction, Module

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MOST_TRIPS = 1_000_000
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "negate": operator.neg,
    "shift-left": operator.lshift,
    "remainder": lambda a, b: a - b * int(a / b),
    "divide": lambda a, b: int(a / b),
    "clamp": lambda low, x, high: min(max(low, x), high),
    "select": lambda p, a, b: a if p else b,
}
_COMPARISONS = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_PASSED_ON = ("copy", "bitcast", "convert", "reshape", "broadcast", "optimization-barrier")


class Unknown(Exception):
    """A value that depends on the program's data."""


@dataclasses.dataclass
class Frame:
    """A computation that runs, and what it was called with.

    Attributes:
      module: the program.
      computation: what runs.
      argument: number of a parameter -> its value: an int, or a function from a tuple's index to one.
    """

    module: Module
    computation: Computation
    argument: Callable[[int], Any]

    def __post_init__(self):
        self._known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """A scalar's value, or a tuple's as a function of the index.

        Raises:
          Unknown: it depends on the program's data.
        """
        if name not in self._known:
            self._known[name] = self._evaluate(self.computation.instructions[name])
        return self._known[name]

    def _evaluate(self, instruction: Instruction) -> Any:
        op, operands = instruction.op, instruction.operands
        if op == "parameter":
            return self.argument(int(instruction.text))
        if op == "tuple":
            return lambda index: self.value(operands[index])
        if op == "get-tuple-element":
            return self.value(operands[0])(int(instruction.attribute("index")))
        if op == "copy-start":
            return lambda _: self.value(operands[0])
        if op == "copy-done":
            return self.value(operands[0])(0)
        if op == "fusion" or op == "call":
            inner = self.module.computations[instruction.called[0]]
            return Frame(self.module, inner, lambda i: self.value(operands[i])).value(inner.root.name)
        if instruction.is_tuple or instruction.arrays[0].size != 1:
            raise Unknown(instruction.name)
        if op == "constant":
            return _constant(instruction.text)
        if op in _PASSED_ON:
            return self.value(operands[0])
        if op == "compare":
            a, b = (self.value(operand) for operand in operands)
            return _COMPARISONS[instruction.attribute("direction")](a, b)
        if op in _ARITHMETIC:
            return _ARITHMETIC[op](*(self.value(operand) for operand in operands))
        raise Unknown(instruction.name)

    def loop(self, instruction: Instruction) -> tuple[int | None, "Frame"]:
        """How often a `while` of this computation runs (None: as its data say), and its body as a frame.

        In the body's frame, what changes from one turn to the next is unknown.
        """
        body = self.module.computations[instruction.attribute("body")]
        condition = self.module.computations[instruction.attribute("condition")]

        def first(index: int) -> Any:
            return self.value(instruction.operands[0])(index)

        def unchanging(index: int) -> Any:
            if body.root.op != "tuple":
                raise Unknown(instruction.name)
            kept = body.instructions[body.root.operands[index]]
            while kept.op in _PASSED_ON:
                kept = body.instructions[kept.operands[0]]
            if kept.op == "get-tuple-element" and int(kept.attribute("index")) == index:
                if body.instructions[kept.operands[0]].op == "parameter":
                    return first(index)
            raise Unknown(instruction.name)

        inside = Frame(self.module, body, lambda _: unchanging)
        if annotated := _TRIPS.search(instruction.attributes):
            return int(annotated[1]), inside
        try:
            return self._count(body, condition, first), inside
        except (Unknown, RecursionError, TypeError, ValueError, ZeroDivisionError):
            return None, inside

    def _count(self, body: Computation, condition: Computation, first: Callable[[int], Any]) -> int:
        state: dict[int, Any] = {}
        read: set[int] = set()

        def current(index: int) -> Any:
            read.add(index)
            if index not in state:
                state[index] = first(index)
            return state[index]

        trips = 0
        while Frame(self.module, condition, lambda _: current).value(condition.root.name):
            turn = Frame(self.module, body, lambda _: current)
            following: dict[int, Any] = {}
            while missing := read - set(following):  # computing one may read others
                for index in missing:
                    following[index] = turn.value(body.root.name)(index)
            if all(following[index] == state[index] for index in following):
                raise Unknown(condition.name)  # its counter stands still
            state, trips = following, trips + 1
            if trips > _MOST_TRIPS:
                raise Unknown(condition.name)
        return trips


def entry_frame(module: Module) -> Frame:
    """The program's entry; its arguments are unknown."""

    def argument(number: int) -> Any:
        raise Unknown(f"argument {number}")

    return Frame(module, module.entry, argument)


def executions(module: Module) -> dict[str, int]:
    """How often each instruction runs that is not fused: {its name: times}, branches of conditionals left out.

    Raises:
      ValueError: a loop ends when its data say.
    """
    found: dict[str, int] = {}

    def run(frame: Frame, times: int) -> None:
        for instruction in frame.computation.instructions.values():
            found[instruction.name] = found.get(instruction.name, 0) + times
            if instruction.op == "while":
                trips, inside = frame.loop(instruction)
                if trips is None:
                    raise ValueError(f"The loop {instruction.name!r} ends when its data say.")
                run(inside, times * trips)
            elif instruction.op in ("call", "async-start"):
                inner, operands = module.computations[instruction.called[0]], instruction.operands
                run(Frame(module, inner, lambda i, operands=operands: frame.value(operands[i])), times)

    run(entry_frame(module), 1)
    return found


def _constant(text: str) -> Any:
    text = text.strip("{} ")
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise Unknown(text) from None
