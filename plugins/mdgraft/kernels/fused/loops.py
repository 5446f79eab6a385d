"""What compiled loops have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from mdgraft.kernels.fused.emit import Value

INDEX = ir.IntType(64)
INT32 = ir.IntType(32)
DOUBLE = ir.DoubleType()


class LoopBuilder:
    """A function that returns nothing, with helpers to write loops in it.

    Parameters
    ----------
    name
        Of the function.
    types
        Of its arguments; those that are pointers do not overlap.
    scalar
        Type of most numbers.
    lanes
        Length of vectors.
    """

    def __init__(self, name: str, types: list[Any], scalar: Any, lanes: int) -> None:
        self.module = ir.Module("mdgraft")
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), name)
        for argument in function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.arguments = function.args
        self.scalar, self.lanes = scalar, lanes
        self.vector = ir.VectorType(scalar, lanes)
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    @property
    def alignment(self) -> int:
        """Bytes of a vector."""
        return self.lanes * (8 if isinstance(self.scalar, ir.DoubleType) else 4)

    def text(self) -> str:
        """The module, closed."""
        self.builder.ret_void()
        # Compilers avoid the longest vectors unless told otherwise.
        attribute = f'"prefer-vector-width"="{8 * self.alignment}"'
        return "\n".join(
            f"{line} {attribute}" if line.startswith("define ") else line
            for line in str(self.module).splitlines()
        )

    def loop(self, begin: Value, end: Value, body: Callable[[Value], None]) -> None:
        """``for (k = begin; k < end; ++k) body(k)``."""
        builder = self.builder
        start = builder.block
        head = builder.append_basic_block("head")
        inside = builder.append_basic_block("body")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(INDEX)
        k.add_incoming(begin, start)
        builder.cbranch(builder.icmp_signed("<", k, end), inside, after)
        builder.position_at_end(inside)
        body(k)
        k.add_incoming(builder.add(k, INDEX(1)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def place(self, index: Value, size: int, offset: int = 0) -> Value:
        """``index * size + offset``."""
        return self.builder.add(self.builder.mul(index, INDEX(size)), INDEX(offset))

    def at(self, array: Value, place: Value) -> Value:
        """An entry of an array."""
        return self.builder.load(self.builder.gep(array, [place]))

    def add_at(self, array: Value, place: Value, value: Value) -> None:
        """Add to an entry of an array."""
        pointer = self.builder.gep(array, [place])
        self.builder.store(self.builder.fadd(self.builder.load(pointer), value), pointer)

    def pointer(self, array: Value, place: Value) -> Value:
        """Where the vector lies that starts at an entry."""
        return self.builder.bitcast(self.builder.gep(array, [place]), self.vector.as_pointer())

    def load(self, array: Value, place: Value) -> Value:
        """The aligned vector that starts at an entry."""
        return self.builder.load(self.pointer(array, place), align=self.alignment)

    def store(self, value: Value, array: Value, place: Value) -> None:
        """Store an aligned vector."""
        self.builder.store(value, self.pointer(array, place), align=self.alignment)

    def precise(self, value: Value) -> Value:
        """A number in double precision."""
        return value if value.type == DOUBLE else self.builder.fpext(value, DOUBLE)
