"""Scalar formulas as graphs that are differentiated before they are compiled.

A formula is written once, with ordinary operators on nodes. Its derivatives are formulas too, made
by the chain rule; equal subexpressions are one node, so that energy, forces and all other
derivatives share what they have in common when they are compiled into one loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

#: A node, or a number that becomes a constant.
Operand: TypeAlias = "Node | float"


@dataclasses.dataclass(frozen=True)
class Series:
    """A smooth function that is evaluated as a polynomial.

    Attributes
    ----------
    name
        Which function; whoever runs the compiled code supplies coefficients for it.
    degree
        Of the polynomial.
    order
        Derivative of the function that the polynomial stands for.
    """

    name: str
    degree: int
    order: int = 0


class Node:
    """An operation on other nodes; made by a `Graph`, where equal ones are the same object."""

    __slots__ = ("arguments", "graph", "index", "operation", "payload")

    def __init__(
        self,
        graph: Graph,
        index: int,
        operation: str,
        arguments: tuple[Node, ...],
        payload: Hashable,
    ) -> None:
        self.graph = graph
        self.index = index
        self.operation = operation
        self.arguments = arguments
        self.payload = payload

    @property
    def value(self) -> float | None:
        """The number that a constant is."""
        return float(self.payload) if self.operation == "constant" else None  # type: ignore[arg-type]

    def __add__(self, other: Operand) -> Node:
        return self.graph.add(self, self.graph.node(other))

    def __radd__(self, other: Operand) -> Node:
        return self + other

    def __sub__(self, other: Operand) -> Node:
        return self.graph.subtract(self, self.graph.node(other))

    def __rsub__(self, other: Operand) -> Node:
        return self.graph.node(other) - self

    def __mul__(self, other: Operand) -> Node:
        return self.graph.multiply(self, self.graph.node(other))

    def __rmul__(self, other: Operand) -> Node:
        return self * other

    def __truediv__(self, other: Operand) -> Node:
        return self.graph.divide(self, self.graph.node(other))

    def __rtruediv__(self, other: Operand) -> Node:
        return self.graph.node(other) / self

    def __neg__(self) -> Node:
        return self.graph.negative(self)

    def __pow__(self, exponent: int) -> Node:
        return self.graph.power(self, exponent)

    def __lt__(self, other: Operand) -> Node:
        return self.graph.apply("less", self, other)

    def __le__(self, other: Operand) -> Node:
        return self.graph.apply("less_equal", self, other)

    def __gt__(self, other: Operand) -> Node:
        return self.graph.node(other) < self

    def __ge__(self, other: Operand) -> Node:
        return self.graph.node(other) <= self


class Graph:
    """Formulas over named inputs."""

    def __init__(self) -> None:
        self._nodes: dict[Hashable, Node] = {}

    # Leaves -----------------------------------------------------------------------------------

    def constant(self, value: float) -> Node:
        """A number."""
        return self._make("constant", (), float(value))

    def input(self, name: str) -> Node:
        """A quantity that is given from outside."""
        return self._make("input", (), name)

    def node(self, operand: Operand) -> Node:
        """The operand as a node."""
        return operand if isinstance(operand, Node) else self.constant(operand)

    def _make(self, operation: str, arguments: tuple[Node, ...], payload: Hashable) -> Node:
        # repr tells 0.0 from -0.0 and takes nan as equal to itself.
        mark = repr(payload) if isinstance(payload, float) else payload
        key = (operation, tuple(a.index for a in arguments), mark)
        found = self._nodes.get(key)
        if found is None:
            found = Node(self, len(self._nodes), operation, arguments, payload)
            self._nodes[key] = found
        return found

    # Arithmetic -------------------------------------------------------------------------------

    def add(self, a: Node, b: Node) -> Node:
        """A + b."""
        if a.value is not None and b.value is not None:
            return self.constant(a.value + b.value)
        if a.value == 0:
            return b
        if b.value == 0:
            return a
        if b.operation == "negative":
            return self.subtract(a, b.arguments[0])
        if a.operation == "negative":
            return self.subtract(b, a.arguments[0])
        if a is b:
            return self.multiply(self.constant(2.0), a)
        return self._make("add", _ordered(a, b), None)

    def subtract(self, a: Node, b: Node) -> Node:
        """A - b."""
        if a.value is not None and b.value is not None:
            return self.constant(a.value - b.value)
        if b.value == 0:
            return a
        if a.value == 0:
            return self.negative(b)
        if a is b:
            return self.constant(0.0)
        if b.operation == "negative":
            return self.add(a, b.arguments[0])
        return self._make("subtract", (a, b), None)

    def multiply(self, a: Node, b: Node) -> Node:
        """A b, zero if one of them is the constant zero."""
        if a.value is not None and b.value is not None:
            return self.constant(a.value * b.value)
        if b.value is not None:
            a, b = b, a
        if a.value is not None:
            if a.value == 0 or a.value == 1:
                return b if a.value else a
            if a.value == -1:
                return self.negative(b)
            if b.operation == "multiply" and b.arguments[0].value is not None:
                return self.multiply(self.constant(a.value * b.arguments[0].value), b.arguments[1])
            if b.operation == "negative":
                return self.multiply(self.constant(-a.value), b.arguments[0])
            return self._make("multiply", (a, b), None)
        if a.operation == "negative":
            return self.negative(self.multiply(a.arguments[0], b))
        if b.operation == "negative":
            return self.negative(self.multiply(a, b.arguments[0]))
        # Constants move outwards, where they meet.
        for x, y in ((a, b), (b, a)):
            if x.operation == "multiply" and x.arguments[0].value is not None:
                return self.multiply(x.arguments[0], self.multiply(x.arguments[1], y))
        return self._make("multiply", _ordered(a, b), None)

    def divide(self, a: Node, b: Node) -> Node:
        """A / b."""
        if b.value is not None and b.value != 0:
            return self.multiply(a, self.constant(1 / b.value))
        if a.value == 0:
            return a
        if b.operation == "sqrt":
            # The root itself and all quotients then share one division.
            return self.multiply(a, self._make("rsqrt", b.arguments, None))
        return self._make("divide", (a, b), None)

    def negative(self, a: Node) -> Node:
        """-a."""
        if a.value is not None:
            return self.constant(-a.value)
        if a.operation == "negative":
            return a.arguments[0]
        if a.operation == "subtract":
            return self.subtract(a.arguments[1], a.arguments[0])
        if a.operation == "multiply" and a.arguments[0].value is not None:
            return self.multiply(self.constant(-a.arguments[0].value), a.arguments[1])
        return self._make("negative", (a,), None)

    def power(self, a: Node, exponent: int) -> Node:
        """An integer power by repeated multiplication."""
        if exponent < 0:
            return self.divide(self.constant(1.0), self.power(a, -exponent))
        result, square = self.constant(1.0), a
        while exponent:
            if exponent & 1:
                result = self.multiply(result, square)
            exponent >>= 1
            if exponent:
                square = self.multiply(square, square)
        return result

    # Functions --------------------------------------------------------------------------------

    def apply(self, operation: str, *operands: Operand) -> Node:
        """A function of `DERIVATIVES` or a comparison."""
        arguments = tuple(self.node(x) for x in operands)
        return self._make(operation, arguments, None)

    def select(self, condition: Node, first: Operand, second: Operand) -> Node:
        """The first where the condition holds, otherwise the second."""
        a, b = self.node(first), self.node(second)
        if a.operation == "select" and a.arguments[0] is condition:
            a = a.arguments[1]
        if b.operation == "select" and b.arguments[0] is condition:
            b = b.arguments[2]
        return a if a is b else self._make("select", (condition, a, b), None)

    def series(self, series: Series, argument: Node) -> Node:
        """A function given by a polynomial."""
        return self._make("series", (argument,), series)

    def lookup(self, table: str, index: Node) -> Node:
        """The entry of a table at an index, a whole number within it."""
        return self._make("lookup", (index,), table)

    def limit(self, name: str) -> Node:
        """``"tiny"`` or ``"eps"`` of the precision that is compiled for; see `numpy.finfo`."""
        return self._make("limit", (), name)

    def still(self, a: Node) -> Node:
        """The same number, taken as a constant of differentiation."""
        return self._make("still", (a,), None)

    def larger(self, a: Node, b: Node) -> Node:
        """The larger of two."""
        return self.select(a < b, b, a)

    def smaller(self, a: Node, b: Node) -> Node:
        """The smaller of two."""
        return self.select(a < b, a, b)

    def sqrt(self, a: Operand) -> Node:
        """The square root."""
        return self.apply("sqrt", a)

    def rsqrt(self, a: Operand) -> Node:
        """One over the square root."""
        return self.apply("rsqrt", a)


def _ordered(a: Node, b: Node) -> tuple[Node, Node]:
    return (a, b) if a.index <= b.index else (b, a)


def topological(roots: Sequence[Node]) -> list[Node]:
    """All nodes that the roots need, each after its arguments."""
    found: dict[int, Node] = {}
    pending = [node for node in roots]
    while pending:
        node = pending.pop()
        if node.index not in found:
            found[node.index] = node
            pending.extend(node.arguments)
    # Arguments are made before the nodes that use them.
    return [found[index] for index in sorted(found)]


# Derivatives ----------------------------------------------------------------------------------

#: Partial derivatives by operation, ``(graph, node, arguments) -> nodes``, one an argument.
Rule: TypeAlias = "Callable[[Graph, Node, tuple[Node, ...]], Sequence[Operand]]"


def _pow(g: Graph, n: Node, a: tuple[Node, ...]) -> Sequence[Operand]:
    x, y = a
    in_x = y * g.apply("pow", x, y - 1)
    if y.value is not None:
        return in_x, 0.0
    in_y = n * g.apply("log", x)
    # At x = 0, what torch has: x^0 is constant, and so is 0^y for y >= 0.
    origin = g.apply("equal", x, 0.0)
    in_x = g.select(origin, g.select(g.apply("equal", y, 0.0), 0.0, in_x), in_x)
    return in_x, g.select(origin, g.select(y >= 0, 0.0, in_y), in_y)


def _atan2(g: Graph, n: Node, a: tuple[Node, ...]) -> Sequence[Operand]:
    y, x = a
    square = x * x + y * y
    # Zero at the origin, as torch has it.
    inverse = g.select(g.apply("equal", square, 0.0), 0.0, 1 / square)
    return x * inverse, -(y * inverse)


def _divide(g: Graph, n: Node, a: tuple[Node, ...]) -> Sequence[Operand]:
    inverse = 1 / a[1]
    return inverse, -n * inverse


DERIVATIVES: Mapping[str, Rule] = {
    "add": lambda g, n, a: (1.0, 1.0),
    "subtract": lambda g, n, a: (1.0, -1.0),
    "multiply": lambda g, n, a: (a[1], a[0]),
    "divide": _divide,
    "negative": lambda g, n, a: (-1.0,),
    "sqrt": lambda g, n, a: (0.5 / n,),
    "rsqrt": lambda g, n, a: (-0.5 * (n * (n * n)),),
    "exp": lambda g, n, a: (n,),
    "log": lambda g, n, a: (1 / a[0],),
    "sin": lambda g, n, a: (g.apply("cos", a[0]),),
    "cos": lambda g, n, a: (-g.apply("sin", a[0]),),
    "tan": lambda g, n, a: (1 + n * n,),
    "asin": lambda g, n, a: (g.rsqrt(1 - a[0] * a[0]),),
    "acos": lambda g, n, a: (-g.rsqrt(1 - a[0] * a[0]),),
    "atan": lambda g, n, a: (1 / (1 + a[0] * a[0]),),
    "atan2": _atan2,
    "sinh": lambda g, n, a: (g.apply("cosh", a[0]),),
    "cosh": lambda g, n, a: (g.apply("sinh", a[0]),),
    "tanh": lambda g, n, a: (1 - n * n,),
    "erf": lambda g, n, a: (2 / math.sqrt(math.pi) * g.apply("exp", -(a[0] * a[0])),),
    "erfc": lambda g, n, a: (-2 / math.sqrt(math.pi) * g.apply("exp", -(a[0] * a[0])),),
    "pow": _pow,
    "floor": lambda g, n, a: (0.0,),
    "ceil": lambda g, n, a: (0.0,),
    "abs": lambda g, n, a: (g.select(a[0] < 0, -1.0, g.select(a[0] > 0, 1.0, 0.0)),),
    "still": lambda g, n, a: (0.0,),
    "lookup": lambda g, n, a: (0.0,),
    "series": lambda g, n, a: (g.series(_next(n.payload), a[0]),),
}
_CONSTANT = {"limit", "less", "less_equal", "equal", "not_equal", "constant", "input"}


def _next(series: object) -> Series:
    assert isinstance(series, Series)
    return dataclasses.replace(series, order=series.order + 1)


def tangents(roots: Sequence[Node], seeds: Mapping[Node, Node]) -> list[Node]:
    """Changes of the roots when inputs change by the seeds: the chain rule, forwards.

    A branch that is not taken does not matter, whatever its derivative: selections select between
    derivatives, and are never multiplied by them.
    """
    graph = roots[0].graph
    zero = graph.constant(0.0)
    change: dict[int, Node] = {node.index: seed for node, seed in seeds.items()}
    for node in topological(roots):
        if node.index in change:
            continue
        if node.operation in _CONSTANT:
            change[node.index] = zero
        elif node.operation == "select":
            condition, first, second = node.arguments
            change[node.index] = graph.select(condition, change[first.index], change[second.index])
        else:
            changes = [change[a.index] for a in node.arguments]
            total = zero
            if any(c is not zero for c in changes):
                partials = DERIVATIVES[node.operation](graph, node, node.arguments)
                for partial, c in zip(partials, changes, strict=True):
                    if c is not zero:
                        total = _sum(graph, total, _product(graph, c, graph.node(partial)))
            change[node.index] = total
    return [change[root.index] for root in roots]


def _product(graph: Graph, change: Node, partial: Node) -> Node:
    """Change times partial derivative; a branch without a change has none, come what may."""
    if change.operation == "select":
        condition, first, second = change.arguments
        if first.value == 0 or second.value == 0:
            return graph.select(
                condition, _product(graph, first, partial), _product(graph, second, partial)
            )
    return change * partial


def _sum(graph: Graph, a: Node, b: Node) -> Node:
    """Sum of changes; two that one condition makes zero somewhere are one selection."""
    if a.operation == b.operation == "select" and a.arguments[0] is b.arguments[0]:
        firsts, seconds = zip(a.arguments[1:], b.arguments[1:], strict=True)
        if any(x.value == 0 for x in (*firsts, *seconds)):
            return graph.select(a.arguments[0], _sum(graph, *firsts), _sum(graph, *seconds))
    return a + b


def gradient(root: Node, inputs: Sequence[Node]) -> list[Node]:
    """Derivatives in a few inputs, each a formula of its own."""
    one = root.graph.constant(1.0)
    return [tangents([root], {node: one})[0] for node in inputs]


#: Branches that must be taken for something to matter: places of conditions, and which branch.
_Path: TypeAlias = "frozenset[tuple[int, bool]]"


def reverse_gradient(root: Node, inputs: Sequence[Node]) -> list[Node]:
    """Derivatives in many inputs: the chain rule, backwards.

    What reaches a node through branches of selections is kept by branch, and selected only where
    other branches lead to the same node or at the inputs. So a branch that is not taken does not
    matter, whatever its derivative, as in `tangents`.
    """
    graph = root.graph
    zero = graph.constant(0.0)
    found: dict[int, dict[_Path, Node]] = {root.index: {frozenset(): graph.constant(1.0)}}
    conditions: dict[int, Node] = {}
    stop = {node.index for node in inputs}
    for node in reversed(topological([root])):
        if node.index not in found or node.operation in _CONSTANT or node.index in stop:
            continue
        adjoints = _joined(found.pop(node.index), conditions)
        parts: list[tuple[Node, _Path, Node]] = []
        if node.operation == "select":
            condition, *branches = node.arguments
            conditions[condition.index] = condition
            for argument, taken in zip(branches, (True, False), strict=True):
                for path, weight in adjoints.items():
                    if (condition.index, not taken) not in path:
                        parts.append((argument, path | {(condition.index, taken)}, weight))
        else:
            partials = DERIVATIVES[node.operation](graph, node, node.arguments)
            for argument, partial in zip(node.arguments, partials, strict=True):
                for path, weight in adjoints.items():
                    parts.append((argument, path, weight * graph.node(partial)))
        for argument, path, part in parts:
            if part is not zero:
                known = found.setdefault(argument.index, {})
                known[path] = known[path] + part if path in known else part
    result = []
    for node in inputs:
        total = zero
        for path, part in _joined(found.get(node.index, {}), conditions).items():
            total = total + _where(path, part, conditions)
        result.append(total)
    return result


def _joined(parts: dict[_Path, Node], conditions: Mapping[int, Node]) -> dict[_Path, Node]:
    """Adjoints by path, where those of a path within another and of both branches are one."""

    def join() -> bool:
        paths = sorted(parts, key=lambda path: (len(path), sorted(path)))
        for wide, narrow in itertools.combinations(paths, 2):
            (condition, taken), *more = sorted(narrow - wide) or [(0, False)]
            if wide < narrow:
                parts[wide] += _where(narrow - wide, parts.pop(narrow), conditions)
            elif not more and wide - narrow == {(condition, not taken)}:
                branches = (parts.pop(narrow), parts.pop(wide))
                first, second = branches if taken else reversed(branches)
                chosen = first.graph.select(conditions[condition], first, second)
                both = wide & narrow
                parts[both] = parts[both] + chosen if both in parts else chosen
            else:
                continue
            return True
        return False

    while len(parts) > 1 and join():
        pass
    return parts


def _where(path: _Path, part: Node, conditions: Mapping[int, Node]) -> Node:
    """The part where these branches are taken, otherwise zero."""
    for condition, taken in sorted(path):
        branches = (part, 0.0) if taken else (0.0, part)
        part = part.graph.select(conditions[condition], *branches)
    return part
