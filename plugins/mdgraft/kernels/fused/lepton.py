"""Lepton expressions as formulas: the values and slopes of `mdgraft.lepton`, for compiled loops."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from mdgraft.kernels.fused.graph import Graph, Node
from mdgraft.lepton.program import Program, Step
from mdgraft.lepton.syntax import Call, Constant, Variable
from mdgraft.lepton.tabulated import ContinuousTable, DiscreteTable, TabulatedFunction

#: The steps of a program: ``("constant", number)``, ``("variable", name)``, or an operation and the
#: places of its arguments.
Description: TypeAlias = tuple[tuple[Any, ...], ...]

#: Splines of more have three axes, and read 64 numbers.
_MOST_COLUMNS = 4
#: Larger integer powers are left to the C library.
_LARGEST_POWER = 64
#: Longer sums and products are compared as they are written.
_MOST_OPERANDS = 64

_FUNCTIONS: dict[str, Callable[..., Node]] = {
    "+": lambda g, a, b: a + b,
    "-": lambda g, a, b: a - b,
    "^": lambda g, a, b: g.apply("pow", a, b),
    "sec": lambda g, a: 1 / g.apply("cos", a),
    "csc": lambda g, a: 1 / g.apply("sin", a),
    "cot": lambda g, a: 1 / g.apply("tan", a),
    "step": lambda g, a: g.select(a >= 0, 1.0, 0.0),
    "delta": lambda g, a: g.select(g.apply("equal", a, 0.0), 1.0, 0.0),
    # Slopes at zero, and of equal arguments, are those of Lepton.
    "abs": lambda g, a: g.select(a >= 0, a, -a),
    "min": lambda g, a, b: g.select(a < b, a, b),
    "max": lambda g, a, b: g.select(a >= b, a, b),
    # What is not a number is not zero.
    "select": lambda g, a, b, c: g.select(g.apply("equal", a, 0.0), c, b),
}
_SAME = frozenset(
    ("sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh")
    + ("tanh", "erf", "erfc", "floor", "ceil")
)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A function as an operation: where its columns begin among the tables of a formula."""

    first: int
    function: TabulatedFunction


def describe(
    program: Program,
    names: Mapping[str, str],
    tables: Mapping[str, TabulatedFunction] | None = None,
) -> Description | None:
    """What a program computes, as a value that can be compared and hashed.

    Parameters
    ----------
    program
        Of an expression.
    names
        What its variables, and geometric functions by their keys, are called here.
    tables
        Functions of the caller, in the order in which the formula has their columns as tables.

    Returns
    -------
    Description | None
        None if the program calls functions that are not among the tables, or have too many
        arguments.
    """
    known: dict[str, _Table] = {}
    place = 0
    for name, function in (tables or {}).items():
        known[name] = _Table(place, function)
        place += function.n_columns
    steps: list[tuple[Any, ...]] = []
    for step in program.steps:
        if isinstance(step, Constant):
            # -0.0 is equal to 0.0, and nan is not equal to itself.
            steps.append(("constant", repr(step.value)))
        elif isinstance(step, Variable):
            steps.append(("variable", names[step.name]))
        elif isinstance(step, Call) and step.key in names:
            steps.append(("variable", names[step.key]))
        elif isinstance(step, Step) and not step.custom:
            steps.append((step.operation, *step.arguments))
        elif (
            isinstance(step, Step)
            and step.operation in known
            and (known[step.operation].function.n_columns <= _MOST_COLUMNS)
        ):
            steps.append((known[step.operation], *step.arguments))
        else:
            return None
    return tuple(steps)


def symmetric(description: Description, exchanged: Mapping[str, str]) -> bool:
    """Whether an expression stays the same when variables are exchanged.

    False also if that takes more than the commutative and associative laws to see.
    """
    known: dict[tuple[Any, ...], int] = {}
    return _signature(description, {}, known) == _signature(description, exchanged, known)


def _signature(
    description: Description, exchanged: Mapping[str, str], known: dict[tuple[Any, ...], int]
) -> int:
    """A number that expressions have in common if they are the same."""
    numbers: list[int] = []
    # Sums and products as sorted lists of all their operands.
    operands: list[dict[str, tuple[int, ...]]] = []
    for operation, *arguments in description:
        flat: dict[str, tuple[int, ...]] = {}
        if operation == "constant":
            key: tuple[Any, ...] = (operation, *arguments)
        elif operation == "variable":
            key = (operation, exchanged.get(arguments[0], arguments[0]))
        else:
            places = [numbers[a] for a in arguments]
            key = (operation, *places)
            joined, inverse = {"-": ("+", "negate"), "/": ("*", "recip")}.get(
                operation, (operation, "")
            )
            if joined in ("+", "*"):
                a, b = arguments
                right = operands[b].get(joined, (numbers[b],))
                if inverse:
                    right = (known.setdefault((inverse, numbers[b]), len(known)),)
                both = tuple(sorted((*operands[a].get(joined, (numbers[a],)), *right)))
                if len(both) <= _MOST_OPERANDS:
                    flat[joined] = both
                    key = (joined, *both)
        numbers.append(known.setdefault(key, len(known)))
        operands.append(flat)
    return numbers[-1]


# Translation ----------------------------------------------------------------------------------


class Distance:
    """A distance given by its square; even powers need no root.

    Parameters
    ----------
    squared
        Its square.
    tiny
        Up to this square it is zero, and so are its derivatives.
    rooted
        Whether the root is needed anyway; inverse powers are then made from it.
    """

    def __init__(self, squared: Node, tiny: Node, *, rooted: bool = False) -> None:
        graph = squared.graph
        #: Whether an odd power is needed.
        self.rooted = rooted
        self._squared = squared
        self._value = graph.select(squared <= tiny, 0.0, graph.sqrt(squared))
        self._inverse = graph.rsqrt(squared)
        self._inverse_squared = self._inverse * self._inverse if rooted else 1 / squared

    def times(self, node: Node, power: int) -> Node:
        """The node times a power of the distance."""
        square = self._squared if power > 0 else self._inverse_squared
        if abs(power) > 1:
            node = node * square ** (abs(power) // 2)
        if power % 2 == 0:
            return node
        self.rooted = True
        return node * (self._value if power > 0 else self._inverse)


@dataclasses.dataclass(frozen=True)
class _Value:
    """A node times a power of the distance, which other powers may still cancel."""

    node: Node
    power: int = 0


def translate(
    description: Description,
    graph: Graph,
    values: Mapping[str, Node],
    distance: Distance | None = None,
) -> Node:
    """The formula of an expression.

    Parameters
    ----------
    description
        From `describe`.
    graph
        Where nodes are made.
    values
        Nodes of variables, except for ``r``.
    distance
        The variable ``r``, if there is one of that name.
    """
    if distance is None:
        distance = Distance(graph.constant(1.0), graph.constant(0.0))
    results: list[_Value] = []
    for operation, *arguments in description:
        if operation == "constant":
            results.append(_Value(graph.constant(float(arguments[0]))))
        elif operation == "variable":
            name = arguments[0]
            r = _Value(graph.constant(1.0), 1)
            results.append(r if name == "r" else _Value(values[name]))
        else:
            results.append(_apply(operation, [results[a] for a in arguments], graph, distance))
    return distance.times(results[-1].node, results[-1].power)


def _apply(operation: Any, operands: Sequence[_Value], graph: Graph, distance: Distance) -> _Value:
    first, last = operands[0], operands[-1]
    exponent = {"square": 2, "cube": 3, "recip": -1}.get(operation)
    if operation == "^" and last.power == 0 and last.node.value is not None:
        exponent = _whole(last.node.value)
        if last.node.value == -0.5:
            return _Value(graph.rsqrt(distance.times(first.node, first.power)))
    if exponent is not None:
        return _power(first, exponent, distance)
    if operation == "*":
        return _Value(first.node * last.node, first.power + last.power)
    if operation == "/":
        return _Value(first.node / last.node, first.power - last.power)
    if operation == "negate":
        return _Value(-first.node, first.power)
    if operation in ("+", "-") and first.power == last.power:
        return _Value(_FUNCTIONS[operation](graph, first.node, last.node), first.power)
    nodes = [distance.times(x.node, x.power) for x in operands]
    if isinstance(operation, _Table):
        return _Value(_looked_up(graph, operation, nodes))
    if operation in _SAME:
        return _Value(graph.apply(operation, *nodes))
    return _Value(_FUNCTIONS[operation](graph, *nodes))


def _power(value: _Value, exponent: int, distance: Distance) -> _Value:
    """An integer power."""
    if value.power == 0 or value.node.value is not None:
        return _Value(value.node**exponent, value.power * exponent)
    if exponent < 0:
        value = _Value(1 / value.node, -value.power)
    # The distance is squared first, so that all powers share (sigma / r)^2.
    square = distance.times(value.node * value.node, 2 * value.power)
    even, odd = square ** (abs(exponent) // 2), abs(exponent) % 2
    return _Value(even * value.node, value.power) if odd else _Value(even)


def _looked_up(graph: Graph, table: _Table, arguments: Sequence[Node]) -> Node:
    """The value of a tabulated function, as `TabulatedFunction.at` has it."""
    function, sizes = table.function, table.function.sizes
    if isinstance(function, DiscreteTable):
        nearest = []
        for x, size in zip(map(graph.still, arguments), sizes, strict=True):
            # Half-way cases go up; x + 0.5 could be rounded up to the next number.
            below = graph.apply("floor", x)
            up = graph.select(x - below >= 0.5, 1.0, 0.0)
            nearest.append(_within(graph, below + up, size - 1))
        return graph.lookup(f"table{table.first}", _place(nearest, sizes))
    assert isinstance(function, ContinuousTable)
    outside: list[Node] = []
    cells, weights = [], []
    for x, size, (lower, upper) in zip(arguments, sizes, function.limits, strict=True):
        scaled = (x - lower) / ((upper - lower) / (size - 1))
        if function.periodic:
            turns = graph.apply("floor", graph.still(scaled) / (size - 1))
            scaled = scaled - (size - 1) * turns
        else:
            outside += [x < lower, x > upper]
        cell = _within(graph, graph.still(scaled), size - 2)
        t = scaled - cell
        u = 1 - t
        cells.append(cell)
        weights.append(((u * u * (1 + 2 * t), u * u * t), (t * t * (3 - 2 * t), -(t * t * u))))
    total = graph.constant(0.0)
    for corner in itertools.product((0, 1), repeat=function.arguments):
        place = _place([cell + side for cell, side in zip(cells, corner, strict=True)], sizes)
        for k, order in enumerate(function.orders):
            part = graph.lookup(f"table{table.first + k}", place)
            for weight, side, slope in zip(weights, corner, order, strict=True):
                part = part * weight[side][slope]
            total = total + part
    for condition in outside:
        total = graph.select(condition, 0.0, total)
    return total


def _within(graph: Graph, x: Node, last: int) -> Node:
    """The whole number below x, from 0 to the last one; 0 for what is not a number."""
    below = graph.smaller(graph.apply("floor", x), graph.constant(float(last)))
    return graph.select(x >= 0, below, 0.0)


def _place(indices: Sequence[Node], sizes: Sequence[int]) -> Node:
    """Where an entry is; the first index runs fastest."""
    place, stride = indices[0], sizes[0]
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        place = place + float(stride) * index
        stride *= size
    return place


def _whole(exponent: float) -> int | None:
    """The exponent if it is an integer that takes few multiplications."""
    return int(exponent) if exponent % 1 == 0 and abs(exponent) <= _LARGEST_POWER else None
