"""The simplifications that give Lepton's expressions their values and slopes at singular points.

OpenMM simplifies before it differentiates, so that ``sqrt(x^2)`` has the slope of ``abs(x)`` at
zero, ``sqrt(x)^2`` is ``x`` for every x, and ``x/x`` is one. Which parts are equal depends on the
rules that only save time, such as ``-(2*x) = -2*x``, so these are here as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdgraft.lepton.operations import OPERATIONS
from mdgraft.lepton.syntax import Apply, Call, Constant, Node, Variable, walk

_SYMMETRIC = ("+", "*")
_POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -1.0: "recip"}


def simplify(root: Node) -> Node:
    """The simplified tree, in which equal subtrees are one object."""
    simplifier = _Simplifier()
    done: dict[int, Node] = {}
    numbers = set()
    for node in walk(root):
        if not isinstance(node, Apply):
            done[id(node)] = simplifier.unique(node)
            if isinstance(node, Constant):
                numbers.add(id(node))
            continue
        arguments = [done[id(argument)] for argument in node.arguments]
        if not node.custom and all(id(argument) in numbers for argument in node.arguments):
            # Only what is constant as written: 0^0 is one, but (x-x)^0 is zero.
            numbers.add(id(node))
            done[id(node)] = simplifier.fold(node.operation, *arguments)
        else:
            done[id(node)] = simplifier.reduce(node.operation, *arguments, custom=node.custom)
    return done[id(root)]


class _Simplifier:
    def __init__(self) -> None:
        self._nodes: dict[object, Node] = {}
        self._rules: dict[str, Callable[..., Node | None]] = {
            "+": self._sum,
            "-": self._difference,
            "*": self._product,
            "/": self._quotient,
            "^": self._power,
            "negate": self._negation,
            "sqrt": self._root,
            "square": self._square,
            "select": self._selection,
        }

    def unique(self, leaf: Constant | Variable | Call) -> Node:
        """The one object for all leaves that are equal."""
        return self._nodes.setdefault(_key(leaf), leaf)

    def reduce(self, operation: str, *arguments: Node, custom: bool = False) -> Node:
        """A node whose arguments are simple already."""
        if not custom:
            rule = self._rules.get(operation)
            simpler = rule(*arguments) if rule else None
            if simpler is not None:
                return simpler
            if all(isinstance(argument, Constant) for argument in arguments):
                return self.fold(operation, *arguments)
        places = [id(argument) for argument in arguments]
        if operation in _SYMMETRIC and not custom:
            places.sort()
        key = (operation, custom, *places)
        return self._nodes.setdefault(key, Apply(operation, arguments, custom))

    def _constant(self, value: float) -> Node:
        return self.unique(Constant(value))

    def fold(self, operation: str, *arguments: Node) -> Node:
        """The value of an operation on constants."""
        numbers = [a.value for a in arguments if isinstance(a, Constant)]
        if operation == "select":
            return self._constant(numbers[1] if numbers[0] != 0 else numbers[2])
        if operation in ("min", "max"):
            return self._constant({"min": min, "max": max}[operation](numbers))
        tensors = (torch.tensor(number, dtype=torch.float64) for number in numbers)
        return self._constant(OPERATIONS[operation](*tensors).item())

    # One rule for each operation; None stands for what cannot be simplified ---------------------

    def _sum(self, a: Node, b: Node) -> Node | None:
        if isinstance(a, Constant):
            a, b = b, a
        if _is(b, 0.0):
            return a
        if (inner := _inside(b, "negate")) is not None:
            return self.reduce("-", a, inner)
        if (inner := _inside(a, "negate")) is not None and not isinstance(b, Constant):
            return self.reduce("-", b, inner)
        return None

    def _difference(self, a: Node, b: Node) -> Node | None:
        if a is b:
            return self._constant(0.0)
        if _is(a, 0.0):
            return self.reduce("negate", b)
        if isinstance(b, Constant):
            return self.reduce("+", a, self._constant(-b.value))
        if (inner := _inside(b, "negate")) is not None:
            return self.reduce("+", a, inner)
        return None

    def _product(self, a: Node, b: Node) -> Node | None:
        if isinstance(a, Constant):
            return self._multiple(a.value, b)
        if isinstance(b, Constant):
            # A constant factor comes first, which `_scaled` relies on.
            return self.reduce("*", b, a)
        first, second = _inside(a, "negate"), _inside(b, "negate")
        if first is not None and second is not None:
            return self.reduce("*", first, second)
        if first is not None and _scaled(b):
            return self.reduce("*", first, self.reduce("negate", b))
        if second is not None and _scaled(a):
            return self.reduce("*", self.reduce("negate", a), second)
        if first is not None:
            return self.reduce("negate", self.reduce("*", first, b))
        if second is not None:
            return self.reduce("negate", self.reduce("*", a, second))
        if (inner := _inside(b, "recip")) is not None:
            return self.reduce("/", a, inner)
        if (inner := _inside(a, "recip")) is not None:
            return self.reduce("/", b, inner)
        if a is b:
            return self.reduce("square", a)
        if _inside(a, "square") is b or _inside(b, "square") is a:
            return self.reduce("cube", b if _inside(a, "square") is b else a)
        return None

    def _multiple(self, factor: float, node: Node) -> Node | None:
        if factor == 0.0:
            return self._constant(0.0)
        if factor == 1.0:
            return node
        if scaled := _scaled(node):
            return self.reduce("*", self._constant(factor * scaled[0]), scaled[1])
        if (inner := _inside(node, "negate")) is not None:
            return self.reduce("*", self._constant(-factor), inner)
        return None

    def _quotient(self, a: Node, b: Node) -> Node | None:
        if a is b:
            return self._constant(1.0)
        if _is(a, 0.0):
            return a
        if _is(a, 1.0):
            return self.reduce("recip", b)
        if isinstance(b, Constant):
            factor, rest = _scaled(a) or (1.0, a)
            return self.reduce("*", self.fold("/", self._constant(factor), b), rest)
        first, second = _inside(a, "negate"), _inside(b, "negate")
        if first is not None and second is not None:
            return self.reduce("/", first, second)
        if second is not None and _scaled(a):
            return self.reduce("/", self.reduce("negate", a), second)
        if first is not None:
            return self.reduce("negate", self.reduce("/", first, b))
        if second is not None:
            return self.reduce("negate", self.reduce("/", a, second))
        if (inner := _inside(b, "recip")) is not None:
            return self.reduce("*", a, inner)
        return None

    def _power(self, base: Node, exponent: Node) -> Node | None:
        if _is(base, 0.0) or _is(base, 1.0):
            return base
        if not isinstance(exponent, Constant):
            return None
        if exponent.value == 0.0:
            return self._constant(1.0)
        if exponent.value == 1.0:
            return base
        if exponent.value in _POWERS:
            return self.reduce(_POWERS[exponent.value], base)
        return None

    def _negation(self, a: Node) -> Node | None:
        if scaled := _scaled(a):
            return self.reduce("*", self._constant(-scaled[0]), scaled[1])
        return _inside(a, "negate")

    def _root(self, a: Node) -> Node | None:
        inner = _inside(a, "square")
        return None if inner is None else self.reduce("abs", inner)

    def _square(self, a: Node) -> Node | None:
        return _inside(a, "sqrt")

    def _selection(self, chooser: Node, first: Node, second: Node) -> Node | None:
        return first if first is second else None


def _is(node: Node, value: float) -> bool:
    return isinstance(node, Constant) and node.value == value


def _inside(node: Node, operation: str) -> Node | None:
    """The argument of one operation, or None if the node is another."""
    if isinstance(node, Apply) and not node.custom and node.operation == operation:
        return node.arguments[0]
    return None


def _scaled(node: Node) -> tuple[float, Node] | None:
    """Factor and rest of a constant times something, or None."""
    if isinstance(node, Apply) and not node.custom and node.operation == "*":
        factor, rest = node.arguments
        if isinstance(factor, Constant):
            return factor.value, rest
    return None


def _key(node: Constant | Variable | Call) -> object:
    """What tells leaves apart."""
    if isinstance(node, Constant):
        return ("constant", repr(node.value))
    if isinstance(node, Variable):
        return ("variable", node.name)
    return node
