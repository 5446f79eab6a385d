"""From formulas to the text of Triton programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from mdgraft.kernels.fused.arithmetic import Format, Integer, Mask, Operand, Real
from mdgraft.kernels.fused.functions import emit_function
from mdgraft.kernels.fused.graph import Node, Series, topological

#: The name of a variable of the program.
Name: TypeAlias = str

_INDENT = "    "
_BINARY = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_COMPARISON = {"less": "<", "less_equal": "<=", "equal": "==", "not_equal": "!="}
_UNARY = {"sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt", "abs": "tl.abs"}
_UNARY |= {"floor": "tl.floor", "ceil": "tl.ceil"}
#: Where arguments are numbers, so is the result.
_NUMBERS: Mapping[str, Callable[..., float]] = {"pow": math.pow, "sqrt": math.sqrt}


class Writer:
    """Lines of a program; also the part of an ``llvmlite.ir.IRBuilder`` that functions use.

    Expressions that are written twice at the same place become one variable.

    Parameters
    ----------
    double
        Whether numbers have float64.
    shape
        Of what is the same everywhere, with as many dimensions as all else.
    """

    def __init__(self, *, double: bool, shape: str = "[1]") -> None:
        self.double, self.shape = double, shape
        self.lines: list[str] = []
        self._depth = 1
        self._count = 0
        self._known: list[dict[str, Name]] = [{}]

    @property
    def number(self) -> str:
        """The type of numbers."""
        return "tl.float64" if self.double else "tl.float32"

    def line(self, text: str) -> None:
        """A line as it is."""
        self.lines.append(_INDENT * self._depth + text)

    def new(self, expression: str) -> Name:
        """A variable for an expression without side effects, of variables that never change."""
        for known in self._known:
            if expression in known:
                return known[expression]
        self._count += 1
        name = f"v{self._count}"
        self._known[-1][expression] = name
        self.line(f"{name} = {expression}")
        return name

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """An indented block below a line."""
        self.line(header)
        self._depth += 1
        self._known.append({})
        yield
        self._known.pop()
        self._depth -= 1

    def constant(self, value: float, kind: str) -> Name:
        """A number."""
        if isinstance(value, float) and not math.isfinite(value):
            return self.new(f'tl.full({self.shape}, float("{value}"), {kind})')
        return self.new(f"tl.full({self.shape}, {value!r}, {kind})")

    def loaded(self, place: str) -> Name:
        """A number from memory that is the same everywhere."""
        return self.new(f"tl.full({self.shape}, tl.load({place}), {self.number})")

    # What builders of instructions have -------------------------------------------------------

    def fadd(self, a: Name, b: Name) -> Name:
        """A + b."""
        return self.new(f"{a} + {b}")

    def fsub(self, a: Name, b: Name) -> Name:
        """A - b."""
        return self.new(f"{a} - {b}")

    def fmul(self, a: Name, b: Name) -> Name:
        """A b."""
        return self.new(f"{a} * {b}")

    def fdiv(self, a: Name, b: Name) -> Name:
        """A / b."""
        return self.new(f"{a} / {b}")

    def fneg(self, a: Name) -> Name:
        """-a."""
        return self.new(f"-{a}")

    def fcmp_ordered(self, comparison: str, a: Name, b: Name) -> Name:
        """A comparison."""
        return self.new(f"{a} {comparison} {b}")

    def icmp_unsigned(self, comparison: str, a: Name, b: Name) -> Name:
        """A comparison of integers."""
        return self.new(f"{a} {comparison} {b}")

    def select(self, condition: Name, a: Name, b: Name) -> Name:
        """One of two."""
        return self.new(f"tl.where({condition}, {a}, {b})")

    def bitcast(self, a: Name, kind: str) -> Name:
        """The same bits."""
        return self.new(f"{a}.to({kind}, bitcast=True)")

    def fpext(self, a: Name, kind: str) -> Name:
        """In another precision."""
        return self.new(f"{a}.to({kind})")

    fptrunc = fpext

    def add(self, a: Name, b: Name) -> Name:
        """A + b, of integers."""
        return self.new(f"{a} + {b}")

    def sub(self, a: Name, b: Name) -> Name:
        """A - b, of integers."""
        return self.new(f"{a} - {b}")

    def and_(self, a: Name, b: Name) -> Name:
        """Bits of both."""
        return self.new(f"{a} & {b}")

    def or_(self, a: Name, b: Name) -> Name:
        """Bits of either."""
        return self.new(f"{a} | {b}")

    def xor(self, a: Name, b: Name) -> Name:
        """Bits of one of them."""
        return self.new(f"{a} ^ {b}")

    def not_(self, a: Name) -> Name:
        """The other bits."""
        return self.new(f"{a} == 0")

    def shl(self, a: Name, b: Name) -> Name:
        """Bits moved up."""
        return self.new(f"{a} << {b}")

    def lshr(self, a: Name, b: Name) -> Name:
        """Bits moved down; integers have no sign."""
        return self.new(f"{a} >> {b}")


@dataclasses.dataclass(frozen=True)
class TextFormat(Format):
    """Numbers of a program in one precision."""

    builder: Any
    double: bool
    lanes: int = 1

    @property
    def vector(self) -> str:
        """The type."""
        return "tl.float64" if self.double else "tl.float32"

    @property
    def integers(self) -> str:
        """The type of integers that are as long."""
        return "tl.uint64" if self.double else "tl.uint32"

    def real(self, value: Operand) -> Real:
        """A number."""
        if isinstance(value, Real):
            return value
        return Real(self, self.builder.constant(float(value), self.vector))

    def integer(self, value: int) -> Integer:
        """An integer."""
        return Integer(self, self.builder.constant(value % 2**self.bits, self.integers))

    def call(self, name: str, *operands: Operand) -> Real:
        """A function that the hardware has."""
        a, *others = (self.real(x) for x in operands)
        if name == "copysign":
            return (a.bits() & ((1 << (self.bits - 1)) - 1)).real().flipped(others[0].sign())
        values = ", ".join(x.value for x in (a, *others))
        function = {"fabs": "tl.abs", "fmuladd": "tl.fma"}.get(name, f"tl.{name}")
        return Real(self, self.builder.new(f"{function}({values})"))


class TextEmitter:
    """Writes formulas into a program.

    Parameters
    ----------
    writer
        Where lines go.
    coefficients
        For a `Series` its coefficients, lowest power first, and the factor and shift that map its
        argument to the polynomial's.
    lookup
        For the name of a table and indices the entries there; None without tables.
    """

    def __init__(
        self,
        writer: Writer,
        coefficients: Callable[[Series], tuple[Sequence[Name], Name, Name]],
        lookup: Callable[[str, Name], Name] | None = None,
    ) -> None:
        self.writer = writer
        self._coefficients = coefficients
        self._lookup = lookup
        self.shared: dict[Any, Any] = {}

    @property
    def form(self) -> TextFormat:
        """Of the numbers."""
        return TextFormat(self.writer, self.writer.double)

    def corrected(self, mask: Mask, usual: Real, name: str, arguments: Sequence[Name]) -> Real:
        """The usual numbers, except where the mask, hardly ever, wants the library's function."""
        sine, cosine = (f"tl.{n}({arguments[0]})" for n in ("sin", "cos"))
        text = {"sin": sine, "cos": cosine, "tan": f"{sine} / {cosine}"}[name]
        return mask.choose(Real(self.form, self.writer.new(text)), usual)

    def formulas(self, roots: Sequence[Node], inputs: Mapping[str, Name]) -> list[Name]:
        """Write formulas; ``inputs`` are variables by name."""
        values: dict[int, Name] = {}
        numbers: dict[int, float] = {}
        self.shared.clear()
        for node in topological(roots):
            number = self._number(node, numbers)
            if number is not None:
                numbers[node.index] = number
                values[node.index] = self.writer.constant(number, self.writer.number)
                continue
            values[node.index] = self._emit(node, [values[a.index] for a in node.arguments], inputs)
        return [values[root.index] for root in roots]

    def _number(self, node: Node, numbers: Mapping[int, float]) -> float | None:
        """What a node is if it does not depend on inputs."""
        if node.operation == "constant":
            return node.value
        if node.operation == "limit":
            kind = np.float64 if self.writer.double else np.float32
            return float(getattr(np.finfo(kind), str(node.payload)))
        if node.operation in _NUMBERS and all(a.index in numbers for a in node.arguments):
            return _NUMBERS[node.operation](*(numbers[a.index] for a in node.arguments))
        return None

    def _emit(self, node: Node, arguments: list[Name], inputs: Mapping[str, Name]) -> Name:
        writer, operation = self.writer, node.operation
        if operation == "still":
            return arguments[0]
        if operation == "input":
            return inputs[str(node.payload)]
        if operation in _BINARY or operation in _COMPARISON:
            a, b = arguments
            return writer.new(f"{a} {(_BINARY | _COMPARISON)[operation]} {b}")
        if operation == "negative":
            return writer.fneg(*arguments)
        if operation == "select":
            return writer.select(*arguments)
        if operation in _UNARY:
            return writer.new(f"{_UNARY[operation]}({arguments[0]})")
        if operation == "lookup":
            assert self._lookup is not None
            return self._lookup(str(node.payload), *arguments)
        if operation == "series":
            assert isinstance(node.payload, Series)
            return self._series(node.payload, arguments[0])
        value = emit_function(self, operation, arguments)
        assert value is not None, operation
        return str(value)

    def _series(self, series: Series, argument: Name) -> Name:
        """Horner's rule."""
        coefficients, factor, shift = self._coefficients(series)
        x = self.writer.new(f"{argument} * {factor} + {shift}")
        result = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            result = self.writer.new(f"{result} * {x} + {coefficient}")
        return result
