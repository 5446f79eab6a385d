"""Vectors of numbers with operators that each round once, as IEEE 754 has it.

Nothing here is fused or reordered, so that errors of rounding can be computed and corrected; code
for which that does not matter is emitted with flags instead (see `emit`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir

from mdgraft.kernels.fused.coefficients import Table

#: A value of the intermediate representation.
Value: TypeAlias = Any
#: A vector, or a number in all lanes.
Operand: TypeAlias = "Real | float"

#: Probabilities of a branch that is hardly ever taken.
_RARELY = (1, 1 << 20)


@dataclasses.dataclass(frozen=True)
class Format:
    """Vectors of one precision and the place where instructions on them go."""

    builder: ir.IRBuilder
    double: bool
    lanes: int

    @property
    def bits(self) -> int:
        """Length of a number."""
        return 64 if self.double else 32

    @property
    def mantissa(self) -> int:
        """Length of the fraction."""
        return 52 if self.double else 23

    @property
    def bias(self) -> int:
        """What is added to exponents."""
        return 1023 if self.double else 127

    @property
    def vector(self) -> Any:
        """The type."""
        return ir.VectorType(ir.DoubleType() if self.double else ir.FloatType(), self.lanes)

    @property
    def integers(self) -> Any:
        """The type of vectors of integers that are as long."""
        return ir.VectorType(ir.IntType(self.bits), self.lanes)

    @property
    def other(self) -> Format:
        """The other precision."""
        return dataclasses.replace(self, double=not self.double)

    @property
    def round(self) -> float:
        """Added to and subtracted from a number below 2^(mantissa - 2), it rounds to integers.

        In between, the last bits of the sum are the integer.
        """
        return 1.5 * 2.0**self.mantissa

    def real(self, value: Operand) -> Real:
        """A number in all lanes."""
        if isinstance(value, Real):
            return value
        element = ir.Constant(self.vector.element, value)
        return Real(self, ir.Constant(self.vector, [element] * self.lanes))

    def integer(self, value: int) -> Integer:
        """An integer in all lanes."""
        return Integer(self, ir.Constant(self.integers, [value % 2**self.bits] * self.lanes))

    def pattern(self, value: float) -> int:
        """The bits of a number."""
        kinds = "dQ" if self.double else "fI"
        (bits,) = struct.unpack(kinds[1], struct.pack(kinds[0], value))
        return int(bits)

    def call(self, name: str, *operands: Operand) -> Real:
        """An intrinsic function."""
        name = f"llvm.{name}.v{self.lanes}f{self.bits}"
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(self.vector, [self.vector] * len(operands))
            function = ir.Function(module, signature, name)
        return Real(self, self.builder.call(function, [self.real(x).value for x in operands]))


@dataclasses.dataclass(frozen=True)
class Integer:
    """A vector of integers as long as the numbers of a format."""

    format: Format
    value: Value

    def _with(self, operation: str, other: Integer | int) -> Integer:
        if isinstance(other, int):
            other = self.format.integer(other)
        return Integer(
            self.format, getattr(self.format.builder, operation)(self.value, other.value)
        )

    def __add__(self, other: Integer | int) -> Integer:
        return self._with("add", other)

    def __sub__(self, other: Integer | int) -> Integer:
        return self._with("sub", other)

    def __and__(self, other: Integer | int) -> Integer:
        return self._with("and_", other)

    def __xor__(self, other: Integer | int) -> Integer:
        return self._with("xor", other)

    def __lshift__(self, other: int) -> Integer:
        return self._with("shl", other)

    def __rshift__(self, other: int) -> Integer:
        return self._with("lshr", other)

    def nonzero(self) -> Mask:
        """Lanes that are not zero."""
        zero = self.format.integer(0)
        return Mask(self.format, self.format.builder.icmp_unsigned("!=", self.value, zero.value))

    def real(self) -> Real:
        """The numbers with these bits."""
        return Real(self.format, self.format.builder.bitcast(self.value, self.format.vector))


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which lanes something holds for."""

    format: Format
    value: Value

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.format, self.format.builder.and_(self.value, other.value))

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.format, self.format.builder.or_(self.value, other.value))

    def __invert__(self) -> Mask:
        return Mask(self.format, self.format.builder.not_(self.value))

    def choose(self, first: Operand, second: Operand) -> Real:
        """The first where it holds, otherwise the second."""
        a, b = self.format.real(first).value, self.format.real(second).value
        return Real(self.format, self.format.builder.select(self.value, a, b))


@dataclasses.dataclass(frozen=True)
class Real:
    """A vector of floating-point numbers."""

    format: Format
    value: Value

    def _with(self, operation: str, a: Operand, b: Operand) -> Real:
        builder, real = self.format.builder, self.format.real
        return Real(self.format, getattr(builder, operation)(real(a).value, real(b).value))

    def __add__(self, other: Operand) -> Real:
        return self._with("fadd", self, other)

    def __radd__(self, other: Operand) -> Real:
        return self._with("fadd", other, self)

    def __sub__(self, other: Operand) -> Real:
        return self._with("fsub", self, other)

    def __rsub__(self, other: Operand) -> Real:
        return self._with("fsub", other, self)

    def __mul__(self, other: Operand) -> Real:
        return self._with("fmul", self, other)

    def __rmul__(self, other: Operand) -> Real:
        return self._with("fmul", other, self)

    def __truediv__(self, other: Operand) -> Real:
        return self._with("fdiv", self, other)

    def __rtruediv__(self, other: Operand) -> Real:
        return self._with("fdiv", other, self)

    def __neg__(self) -> Real:
        return Real(self.format, self.format.builder.fneg(self.value))

    def _compare(self, comparison: str, other: Operand) -> Mask:
        builder, b = self.format.builder, self.format.real(other).value
        return Mask(self.format, builder.fcmp_ordered(comparison, self.value, b))

    def __lt__(self, other: Operand) -> Mask:
        return self._compare("<", other)

    def __gt__(self, other: Operand) -> Mask:
        return self._compare(">", other)

    def equals(self, other: Operand) -> Mask:
        """Lanes that are equal; not those that are no number."""
        return self._compare("==", other)

    def bits(self) -> Integer:
        """The bits of the numbers."""
        return Integer(self.format, self.format.builder.bitcast(self.value, self.format.integers))

    def sign(self) -> Integer:
        """The bit that says whether they are negative."""
        return self.bits() & (1 << (self.format.bits - 1))

    def flipped(self, sign: Integer) -> Real:
        """The numbers with other signs where the bit is set."""
        return (self.bits() ^ sign).real()

    def limited(self, low: float | None, high: float | None) -> Real:
        """No less and no more; what is not a number stays that."""
        x = self
        if low is not None:
            x = (x < low).choose(low, x)
        if high is not None:
            x = (x > high).choose(high, x)
        return x

    def magnitude(self) -> Real:
        """Without signs."""
        return self.format.call("fabs", self)

    def with_sign(self, other: Real) -> Real:
        """With the signs of others."""
        return self.format.call("copysign", self, other)

    def floor(self) -> Real:
        """The next integer below."""
        return self.format.call("floor", self)

    def sqrt(self) -> Real:
        """The square root."""
        return self.format.call("sqrt", self)

    def converted(self) -> Real:
        """In the other precision."""
        other, builder = self.format.other, self.format.builder
        convert = builder.fpext if other.double else builder.fptrunc
        return Real(other, convert(self.value, other.vector))


def fma(a: Operand, b: Operand, c: Real) -> Real:
    """A b + c, rounded once."""
    return c.format.call("fma", a, b, c)


def muladd(a: Operand, b: Operand, c: Real) -> Real:
    """A b + c, rounded once or twice, whichever is faster."""
    return c.format.call("fmuladd", a, b, c)


def polynomial(x: Real, table: Table) -> Real:
    """A polynomial with the table's coefficients for the precision of ``x``."""
    return horner(x, table[x.format.double])


def horner(x: Real, coefficients: Sequence[float]) -> Real:
    """A polynomial; of a long one, both ends at the same time."""
    numbers = [x.format.real(c) for c in coefficients]

    def chain(of: list[Real]) -> Real:
        return functools.reduce(lambda total, c: muladd(total, x, c), reversed(of[:-1]), of[-1])

    if len(numbers) < 8:
        return chain(numbers)
    # Squares of squares are few, and the upper end is small, so that errors in it do not matter.
    squarings = round(math.log2(len(numbers) / 2))
    power = functools.reduce(lambda y, _: y * y, range(squarings), x)
    return muladd(power, chain(numbers[1 << squarings :]), chain(numbers[: 1 << squarings]))


def rarely(mask: Mask, usual: Real, other: Callable[[], Value]) -> Real:
    """The usual numbers, except where the mask says other ones, which are hardly ever computed."""
    form = usual.format
    builder = form.builder
    flags = builder.bitcast(mask.value, ir.IntType(form.lanes))
    any_lane = builder.icmp_unsigned("!=", flags, flags.type(0))
    start = builder.block
    rare, after = builder.append_basic_block("rare"), builder.append_basic_block("after")
    builder.cbranch(any_lane, rare, after).set_weights(_RARELY)
    builder.position_at_end(rare)
    replaced = builder.select(mask.value, other(), usual.value)
    rare = builder.block
    builder.branch(after)
    builder.position_at_end(after)
    result = builder.phi(form.vector)
    result.add_incoming(usual.value, start)
    result.add_incoming(replaced, rare)
    return Real(form, result)
