"""Expressions as lists of steps, evaluated on tensors.

In reverse mode zero times infinity is not a number, so a branch that is not taken must not see the
derivative that is zero there if one of its operations is singular. Before the evaluation, the
steps learn where their results are in use; wherever one step uses the result of another more
narrowly than others do, the rest of that result is passed on without its derivative. Functions of
the caller, which may hold parameters, are not evaluated for arguments that nothing uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mdgraft.lepton.operations import OPERATIONS, SINGULAR
from mdgraft.lepton.syntax import Apply, Call, Constant, Node, Variable, walk

#: Which arguments of an operation are alternatives; the others choose between them.
_BRANCHES = {"select": (1, 2), "min": (0, 1), "max": (0, 1)}
_CHOOSERS = {"select": (0,), "min": (0, 1), "max": (0, 1)}

#: Named functions that the caller supplies.
Functions = Mapping[str, Callable[..., Tensor]]


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation on the results of earlier steps."""

    operation: str
    arguments: tuple[int, ...]
    #: Whether the operation is a function that the caller supplies.
    custom: bool = False

    @property
    def branches(self) -> tuple[int, ...]:
        """Arguments that are alternatives, by position."""
        return () if self.custom else _BRANCHES.get(self.operation, ())


class Program:
    """A tree as a list without references between its entries: safe to copy, at any depth.

    Parameters
    ----------
    root
        A tree in which equal subtrees are one object.
    """

    def __init__(self, root: Node) -> None:
        nodes = walk(root)
        place = {id(node): i for i, node in enumerate(nodes)}
        #: Leaves and operations; the last one is the result.
        self.steps: tuple[Constant | Variable | Call | Step, ...] = tuple(
            Step(node.operation, tuple(place[id(a)] for a in node.arguments), node.custom)
            if isinstance(node, Apply)
            else node
            for node in nodes
        )
        singular: list[bool] = []
        #: Branches of each step that hold a singular operation.
        self._guarded: dict[int, frozenset[int]] = {}
        for i, step in enumerate(self.steps):
            if not isinstance(step, Step):
                singular.append(False)
                continue
            inside = [singular[argument] for argument in step.arguments]
            singular.append(step.custom or step.operation in SINGULAR or any(inside))
            guarded = frozenset(branch for branch in step.branches if inside[branch])
            if guarded:
                self._guarded[i] = guarded
        self._probed = self._needed_for_choices()

    def _needed_for_choices(self) -> list[int]:
        needed: set[int] = set()
        for i in reversed(range(len(self.steps))):
            step = self.steps[i]
            if not isinstance(step, Step):
                continue
            if i in needed:
                needed.update(step.arguments)
            elif i in self._guarded:
                needed.update(step.arguments[c] for c in _CHOOSERS[step.operation])
        return sorted(needed)

    def __call__(self, values: Mapping[str, Tensor], functions: Functions) -> Tensor | float:
        """Evaluate; a float if the result depends on nothing."""
        uses = self._uses(values, functions) if self._guarded else _Uses()
        everything = range(len(self.steps))
        result: Tensor | float = self._run(everything, values, functions, uses)[everything[-1]]
        return result

    def _run(
        self,
        places: Iterable[int],
        values: Mapping[str, Tensor],
        functions: Functions,
        uses: _Uses,
    ) -> dict[int, Any]:
        results: dict[int, Any] = {}
        for i in places:
            step = self.steps[i]
            if isinstance(step, Constant):
                results[i] = step.value
            elif isinstance(step, Variable):
                results[i] = values[step.name]
            elif isinstance(step, Call):
                results[i] = values[step.key]
            else:
                arguments = [
                    uses.narrowed(i, position, j, results[j])
                    for position, j in enumerate(step.arguments)
                ]
                if step.custom:
                    arguments = uses.sensible(i, _tensors(arguments, values))
                    results[i] = functions[step.operation](*arguments)
                elif step.branches:
                    results[i] = _branch(step, arguments, values, uses.taken.get(i))
                else:
                    if step.operation == "atan2":
                        arguments = _tensors(arguments, values)
                    results[i] = OPERATIONS[step.operation](*arguments)
        return results

    def _uses(self, values: Mapping[str, Tensor], functions: Functions) -> _Uses:
        """Where results are in use, from a first evaluation of what the choices depend on."""

        def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *arguments: function(*arguments).detach()

        known = self._run(
            self._probed,
            {name: value.detach() for name, value in values.items()},
            {name: constant(function) for name, function in functions.items()},
            _Uses(),
        )
        last = len(self.steps) - 1
        used: dict[int, Tensor | None] = {last: None}
        edges: dict[tuple[int, int], Tensor] = {}
        taken: dict[int, Any] = {}
        for i in range(last, -1, -1):
            step = self.steps[i]
            if not isinstance(step, Step):
                continue
            guarded = self._guarded.get(i, frozenset())
            if guarded:
                choosers = [known[step.arguments[c]] for c in _CHOOSERS[step.operation]]
                taken[i] = _first_is_taken(step.operation, choosers)
            for position, j in enumerate(step.arguments):
                mask = used[i]
                if position in guarded and isinstance(taken[i], Tensor):
                    here = taken[i] if position == step.branches[0] else ~taken[i]
                    mask = here if mask is None else mask & here
                if mask is not None:
                    edges[i, position] = mask
                used[j] = _union(used[j], mask) if j in used else mask
        return _Uses(
            edges={edge: mask for edge, mask in edges.items() if self._differs(edge, mask, used)},
            results={i: m for i, m in used.items() if m is not None},
            taken=taken,
        )

    def _differs(
        self, edge: tuple[int, int], mask: Tensor, used: Mapping[int, Tensor | None]
    ) -> bool:
        step = self.steps[edge[0]]
        assert isinstance(step, Step)
        j = step.arguments[edge[1]]
        source = self.steps[j]
        # Derivatives of leaves and of the caller's functions go to the caller, wherever they are.
        return not isinstance(source, Step) or source.custom or mask is not used[j]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Uses:
    """Where results are in use; what is not listed is in use everywhere.

    Attributes
    ----------
    edges
        Masks by step and position of the argument, where they are narrower than in `results`.
    results
        Masks by step.
    taken
        Whether the first branch is, by step.
    """

    edges: Mapping[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict)
    results: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    taken: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def narrowed(self, i: int, position: int, j: int, result: Any) -> Any:
        """The result of step ``j``, with a derivative only where step ``i`` uses it."""
        mask = self.edges.get((i, position))
        if mask is None or not isinstance(result, Tensor):
            return result
        return torch.where(mask, result, result.detach())

    def sensible(self, i: int, arguments: list[Tensor]) -> list[Tensor]:
        """Arguments of step ``i``, zero where nothing uses its result."""
        mask = self.results.get(i)
        return arguments if mask is None else [torch.where(mask, x, 0.0) for x in arguments]


def _union(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return None
    return a if a is b else a | b


def _first_is_taken(operation: str, choosers: list[Any]) -> Any:
    """Whether the first branch is: a tensor, or a bool if nothing can change it."""
    if operation == "select":
        return choosers[0] != 0
    # Equal arguments: Lepton takes the slope of the second in min, of the first in max.
    return choosers[0] < choosers[1] if operation == "min" else choosers[0] >= choosers[1]


def _branch(
    step: Step, arguments: list[Any], values: Mapping[str, Tensor], taken: Any | None
) -> Tensor:
    if taken is None:
        taken = _first_is_taken(step.operation, [arguments[c] for c in _CHOOSERS[step.operation]])
    first, second = _tensors([arguments[b] for b in step.branches], values)
    if not isinstance(taken, Tensor):
        return first if taken else second
    return torch.where(taken, first, second)


def _tensors(arguments: list[Any], values: Mapping[str, Tensor]) -> list[Tensor]:
    """Arguments as tensors of one dtype and device."""
    example = next((x for x in (*arguments, *values.values()) if isinstance(x, Tensor)), None)
    dtype = torch.float64 if example is None else example.dtype
    device = None if example is None else example.device
    return [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)
        for x in arguments
    ]
