"""From formulas to vector instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir

from mdgraft.kernels.fused.arithmetic import Format, Mask, Real, rarely
from mdgraft.kernels.fused.functions import emit_function
from mdgraft.kernels.fused.graph import Node, Series, topological

#: A value of the intermediate representation; llvmlite has no types of its own for them.
Value: TypeAlias = Any

#: Sums may be fused with products and divisions by reciprocals, in the same way every time.
FLAGS = ("contract", "nsz", "arcp", "afn")

_BINARY = {"add": "fadd", "subtract": "fsub", "multiply": "fmul", "divide": "fdiv"}
_COMPARISON = {"less": "<", "less_equal": "<=", "equal": "==", "not_equal": "!="}
_INTRINSIC = {"sqrt": "sqrt", "abs": "fabs", "floor": "floor", "ceil": "ceil"}
#: Functions of the C library, for one number at a time.
_LIBRARY = {
    **{name: name for name in ("exp", "log", "sin", "cos", "tan", "asin", "acos", "atan")},
    **{name: name for name in ("sinh", "cosh", "tanh", "erf", "erfc", "pow", "atan2")},
}


class Emitter:
    """Emits formulas into a block of code.

    Parameters
    ----------
    builder
        Where instructions go.
    scalar
        `ir.FloatType` or `ir.DoubleType`.
    lanes
        Length of the vectors.
    coefficients
        For a `Series` its coefficients as vectors, lowest power first, and the factor and shift
        that map its argument to the polynomial's.
    lookup
        For the name of a table and a vector of indices the entries there; None without tables.
    """

    def __init__(
        self,
        builder: ir.IRBuilder,
        scalar: Any,
        lanes: int,
        coefficients: Callable[[Series], tuple[Sequence[Value], Value, Value]],
        lookup: Callable[[str, Value], Value] | None = None,
    ) -> None:
        self.builder = builder
        self.scalar = scalar
        self.lanes = lanes
        self.double = isinstance(scalar, ir.DoubleType)
        self.vector = ir.VectorType(scalar, lanes)
        self._coefficients = coefficients
        self._lookup = lookup
        #: What functions of the same argument have in common, while formulas are emitted.
        self.shared: dict[Any, Any] = {}

    @property
    def form(self) -> Format:
        """Of the vectors."""
        return Format(self.builder, self.double, self.lanes)

    def constant(self, value: float) -> Value:
        """A number in all lanes."""
        return ir.Constant(self.vector, [ir.Constant(self.scalar, value)] * self.lanes)

    def broadcast(self, value: Value) -> Value:
        """A scalar in all lanes."""
        first = ir.Constant(ir.IntType(32), 0)
        single = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, first)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(single, ir.Constant(self.vector, ir.Undefined), mask)

    def total(self, vector: Value) -> Value:
        """Sum over the lanes, pairwise."""
        width = self.lanes
        while width > 1:
            half = width // 2
            parts = [
                self.builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(
                        ir.VectorType(ir.IntType(32), half), list(range(start, start + half))
                    ),
                )
                for start in (0, half)
            ]
            vector = self.builder.fadd(*parts)
            width = half
        return self.builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    def formulas(self, roots: Sequence[Node], inputs: Mapping[str, Value]) -> list[Value]:
        """Emit formulas; ``inputs`` are vectors by name."""
        values: dict[int, Value] = {}
        # What was emitted before may lie in a branch that does not lead here.
        self.shared.clear()
        for node in topological(roots):
            values[node.index] = self._emit(node, [values[a.index] for a in node.arguments], inputs)
        return [values[root.index] for root in roots]

    def _emit(self, node: Node, arguments: list[Value], inputs: Mapping[str, Value]) -> Value:
        builder, operation = self.builder, node.operation
        if operation == "constant":
            return self.constant(float(node.payload))  # type: ignore[arg-type]
        if operation == "limit":
            kind = np.float64 if isinstance(self.scalar, ir.DoubleType) else np.float32
            return self.constant(float(getattr(np.finfo(kind), str(node.payload))))
        if operation == "still":
            return arguments[0]
        if operation == "input":
            return inputs[str(node.payload)]
        if operation in _BINARY:
            return getattr(builder, _BINARY[operation])(*arguments, flags=FLAGS)
        if operation == "negative":
            return builder.fneg(*arguments)
        if operation in _COMPARISON:
            return builder.fcmp_ordered(_COMPARISON[operation], *arguments)
        if operation == "select":
            return builder.select(*arguments)
        if operation == "rsqrt":
            root = self.intrinsic("sqrt", arguments)
            return builder.fdiv(self.constant(1.0), root, flags=FLAGS)
        if operation in _INTRINSIC:
            return self.intrinsic(_INTRINSIC[operation], arguments)
        if operation == "lookup":
            assert self._lookup is not None
            return self._lookup(str(node.payload), *arguments)
        if operation == "series":
            assert isinstance(node.payload, Series)
            return self._series(node.payload, arguments[0])
        value = emit_function(self, operation, arguments)
        return self._lane_by_lane(_LIBRARY[operation], arguments) if value is None else value

    def intrinsic(self, name: str, arguments: list[Value]) -> Value:
        """One of the compiler's own functions."""
        bits = 64 if isinstance(self.scalar, ir.DoubleType) else 32
        name = f"llvm.{name}.v{self.lanes}f{bits}"
        function = self.builder.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(self.vector, [self.vector] * len(arguments))
            function = ir.Function(self.builder.module, signature, name)
        return self.builder.call(function, arguments, fastmath=FLAGS)

    def _series(self, series: Series, argument: Value) -> Value:
        """Horner's rule."""
        coefficients, factor, shift = self._coefficients(series)
        x = self._fma(argument, factor, shift)
        result = coefficients[-1]
        for coefficient in reversed(coefficients[:-1]):
            result = self._fma(result, x, coefficient)
        return result

    def _fma(self, a: Value, b: Value, c: Value) -> Value:
        product = self.builder.fmul(a, b, flags=FLAGS)
        return self.builder.fadd(product, c, flags=FLAGS)

    def _lane_by_lane(self, name: str, arguments: list[Value]) -> Value:
        module = self.builder.module
        name = name if isinstance(self.scalar, ir.DoubleType) else f"{name}f"
        function = module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(self.scalar, [self.scalar] * len(arguments))
            function = ir.Function(module, signature, name)
            function.attributes.add("readnone")
            function.attributes.add("nounwind")
        result = ir.Constant(self.vector, ir.Undefined)
        for lane in range(self.lanes):
            place = ir.Constant(ir.IntType(32), lane)
            numbers = [self.builder.extract_element(a, place) for a in arguments]
            value = self.builder.call(function, numbers)
            result = self.builder.insert_element(result, value, place)
        return result

    def corrected(self, mask: Mask, usual: Real, name: str, arguments: Sequence[Value]) -> Real:
        """The usual numbers, except where the mask, hardly ever, wants the library's function."""
        return rarely(mask, usual, lambda: self.out_of_line(name, arguments))

    def out_of_line(self, name: str, arguments: Sequence[Value]) -> Value:
        """A function of the C library in a function of its own, for branches that are rare."""
        module = self.builder.module
        label = f"{name}_of_{self.lanes}_{'doubles' if self.double else 'floats'}"
        function = module.globals.get(label)
        if function is None:
            signature = ir.FunctionType(self.vector, [self.vector] * len(arguments))
            function = ir.Function(module, signature, label)
            function.linkage = "internal"
            function.attributes.add("noinline")
            function.attributes.add("nounwind")
            builder = ir.IRBuilder(function.append_basic_block("entry"))
            inner = Emitter(builder, self.scalar, self.lanes, self._coefficients)
            builder.ret(inner._lane_by_lane(_LIBRARY[name], list(function.args)))
        return self.builder.call(function, arguments)
