"""The simplifications that give Lepton's expressions their values and slopes at singular points.

OpenMM simplifies before it differentiates, so that ``sqrt(x^2)`` has the slope of ``abs(x)`` at
zero, ``sqrt(x)^2`` is ``x`` for every x, and ``x/x`` is one. Only rules of that kind are applied
here; those that merely save time are not.
"""

from __future__ import annotations

import torch

from mdgraft.lepton.operations import OPERATIONS
from mdgraft.lepton.syntax import Apply, Call, Constant, Node, Variable

_ZERO, _ONE = Constant(0.0), Constant(1.0)
_SYMMETRIC = ("+", "*")
_POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -1.0: "recip"}


def simplify(root: Node) -> Node:
    """The simplified tree, in which equal subtrees are one object."""
    return _Simplifier()(root)


class _Simplifier:
    def __init__(self) -> None:
        #: What a node of the original tree became, with that node to keep its identity alive.
        self._done: dict[int, tuple[Node, Node]] = {}
        self._nodes: dict[object, Node] = {}

    def __call__(self, node: Node) -> Node:
        if id(node) not in self._done:
            self._done[id(node)] = (node, self._one(node))
        return self._done[id(node)][1]

    def _one(self, node: Node) -> Node:
        if not isinstance(node, Apply):
            return self._nodes.setdefault(_key(node), node)
        return self._reduce(node.operation, tuple(map(self, node.arguments)), node.custom)

    def _reduce(self, operation: str, arguments: tuple[Node, ...], custom: bool) -> Node:
        """A node whose arguments are simple already."""
        if custom:
            return self._make(operation, arguments, custom=True)
        numbers = [a.value if isinstance(a, Constant) else None for a in arguments]
        known = [n for n in numbers if n is not None]
        if len(known) == len(numbers) and operation in OPERATIONS:
            tensors = (torch.tensor(n, dtype=torch.float64) for n in known)
            return self(Constant(OPERATIONS[operation](*tensors).item()))
        first, *rest = arguments
        if operation == "-" and first is rest[0]:
            return self(_ZERO)
        if operation == "*" and 0.0 in numbers:
            return self(_ZERO)
        if operation == "*" and first is rest[0]:
            return self._reduce("square", (first,), False)
        if operation == "/" and first is rest[0]:
            return self(_ONE)
        if operation == "/" and numbers[0] == 0.0:
            return self(_ZERO)
        if operation == "^":
            return self._power(arguments, numbers)
        if operation == "sqrt" and isinstance(first, Apply) and first.operation == "square":
            return self._reduce("abs", first.arguments, False)
        if operation == "square" and isinstance(first, Apply) and first.operation == "sqrt":
            return first.arguments[0]
        if operation == "select" and rest[0] is rest[1]:
            return rest[0]
        return self._make(operation, arguments)

    def _power(self, arguments: tuple[Node, ...], numbers: list[float | None]) -> Node:
        base, exponent = numbers
        if base in (0.0, 1.0):
            return arguments[0]
        if exponent == 0.0:
            return self(_ONE)
        if exponent == 1.0:
            return arguments[0]
        if exponent in _POWERS:
            return self._reduce(_POWERS[exponent], arguments[:1], False)
        return self._make("^", arguments)

    def _make(self, operation: str, arguments: tuple[Node, ...], *, custom: bool = False) -> Node:
        places = [id(argument) for argument in arguments]
        if operation in _SYMMETRIC and not custom:
            places.sort()
        key = (operation, custom, *places)
        return self._nodes.setdefault(key, Apply(operation, arguments, custom))


def _key(node: Constant | Variable | Call) -> object:
    """What tells leaves apart."""
    if isinstance(node, Constant):
        return ("constant", repr(node.value))
    if isinstance(node, Variable):
        return ("variable", node.name)
    return node
