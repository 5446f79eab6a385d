"""Expressions evaluated on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mdgraft.lepton.operations import OPERATIONS, SINGULAR
from mdgraft.lepton.simplify import simplify
from mdgraft.lepton.syntax import Apply, Call, Constant, Node, Parser, Variable, walk

_BRANCHES = ("select", "min", "max")


class Expression:
    """A Lepton expression.

    Parameters
    ----------
    text
        The expression, perhaps with definitions after semicolons.
    variables
        Names that it may use.
    functions
        Number of arguments of each function that the caller supplies, such as tabulated ones; a
        function of the language with the same name is hidden.
    geometry
        Number of arguments of each function of particles or groups, such as ``{"distance": 2}``.
    labels
        What those arguments may be, such as ``("p1", "p2")``.
    where
        What errors call the expression, such as ``"CustomBondForce.energy"``.

    Raises
    ------
    InvalidInputError
        For a syntax error, an unknown name or a wrong number of arguments, as OpenMM does; the
        message quotes the expression and marks the place.
    """

    def __init__(
        self,
        text: str,
        *,
        variables: Iterable[str],
        functions: Mapping[str, int] | None = None,
        geometry: Mapping[str, int] | None = None,
        labels: Iterable[str] = (),
        where: str = "expression",
    ) -> None:
        self.text = text
        parsed = Parser(
            text,
            where=where,
            variables=frozenset(variables),
            functions=functions or {},
            geometry=geometry or {},
            labels=frozenset(labels),
        ).parse()
        #: The tree; equal subtrees are one object.
        self.root: Node = simplify(parsed)
        nodes = walk(self.root)
        #: Variables that the value depends on.
        self.variables = frozenset(n.name for n in nodes if isinstance(n, Variable))
        #: Geometric functions that the value depends on.
        self.calls = tuple(dict.fromkeys(n for n in nodes if isinstance(n, Call)))
        # Branches with one of these must not send their derivative where they are not taken.
        self._singular = {id(n) for n in nodes if self._is_singular(n)}

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __call__(
        self,
        values: Mapping[str, Tensor],
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
        *,
        like: Tensor | None = None,
    ) -> Tensor:
        """Evaluate.

        Parameters
        ----------
        values
            A tensor for each of `variables`, and for the ``key`` of each of `calls`; shapes
            broadcast.
        functions
            The functions that the caller supplies.
        like
            Gives dtype and device if the value is a constant; by default any of ``values``.

        Returns
        -------
        Tensor
            Of the broadcast shape; a constant has shape ``()``.
        """
        result = _Evaluation(self._singular, functions or {})(self.root, dict(values), {})
        if isinstance(result, Tensor):
            return result
        example = like if like is not None else next(iter(values.values()), None)
        if example is None:
            return torch.tensor(result, dtype=torch.float64)
        return torch.full((), result, dtype=example.dtype, device=example.device)

    @staticmethod
    def _is_singular(node: Node) -> bool:
        return any(
            isinstance(inner, Apply) and (inner.operation in SINGULAR or inner.custom)
            for inner in walk(node)
        )


class _Evaluation:
    """One evaluation; subtrees that occur more than once are computed once."""

    def __init__(self, singular: set[int], functions: Mapping[str, Callable[..., Tensor]]) -> None:
        self._singular, self._functions = singular, functions

    def __call__(self, node: Node, values: dict[str, Tensor], known: dict[int, Any]) -> Any:
        """Value of a node: a tensor, or a float if it depends on nothing."""
        if isinstance(node, Constant):
            return node.value
        if isinstance(node, Variable):
            return values[node.name]
        if isinstance(node, Call):
            return values[node.key]
        if id(node) not in known:
            known[id(node)] = self._apply(node, values, known)
        return known[id(node)]

    def _apply(self, node: Apply, values: dict[str, Tensor], known: dict[int, Any]) -> Any:
        if node.operation in _BRANCHES and not node.custom:
            return self._branch(node, values, known)
        arguments = [self(argument, values, known) for argument in node.arguments]
        if node.custom:
            return self._functions[node.operation](*_tensors(arguments, values))
        operation = OPERATIONS[node.operation]
        if any(isinstance(argument, Tensor) for argument in arguments):
            return operation(*arguments) if len(arguments) == 1 else _binary(operation, arguments)
        # A constant is folded in double precision, whatever the tensors are.
        return operation(*(torch.tensor(x, dtype=torch.float64) for x in arguments)).item()

    def _branch(self, node: Apply, values: dict[str, Tensor], known: dict[int, Any]) -> Any:
        """Choose between two subtrees; the one not taken has no derivative, however singular."""
        if node.operation == "select":
            chooser = self(node.arguments[0], values, known)
            first, second = node.arguments[1:]
            taken = chooser != 0
        else:
            first, second = node.arguments
            a, b = self(first, values, known), self(second, values, known)
            # Equal arguments: Lepton takes the slope of the second in min, of the first in max.
            taken = a < b if node.operation == "min" else a >= b
        if not isinstance(taken, Tensor):
            return self(first if taken else second, values, known)
        options = [
            self._masked(branch, mask, values, known)
            for branch, mask in ((first, taken), (second, ~taken))
        ]
        return torch.where(taken, *_tensors(options, values))

    def _masked(
        self, node: Node, mask: Tensor, values: dict[str, Tensor], known: dict[int, Any]
    ) -> Any:
        if id(node) not in self._singular:
            return self(node, values, known)
        barred = {name: torch.where(mask, value, value.detach()) for name, value in values.items()}
        return self(node, barred, {})


def _binary(operation: Callable[..., Tensor], arguments: list[Any]) -> Tensor:
    if operation is OPERATIONS["atan2"]:
        arguments = _tensors(arguments, {})
    return operation(*arguments)


def _tensors(arguments: list[Any], values: Mapping[str, Tensor]) -> list[Tensor]:
    """Arguments as tensors of one dtype and device."""
    example = next((x for x in (*arguments, *values.values()) if isinstance(x, Tensor)), None)
    dtype = torch.float64 if example is None else example.dtype
    device = None if example is None else example.device
    return [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)
        for x in arguments
    ]
