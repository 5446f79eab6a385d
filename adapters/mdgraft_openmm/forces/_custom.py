"""What the converters of custom forces share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.lepton import ContinuousTable, DiscreteTable, TabulatedFunction
from mdgraft.potentials.custom.base import parameter_keys
from torch import Tensor

from mdgraft_openmm._converter import Values, checked_indices, number

_CONTINUOUS = (
    openmm.Continuous1DFunction,
    openmm.Continuous2DFunction,
    openmm.Continuous3DFunction,
)
_DISCRETE = (openmm.Discrete1DFunction, openmm.Discrete2DFunction, openmm.Discrete3DFunction)


def global_names(force: Any) -> tuple[str, ...]:
    """Names of the force's global parameters."""
    return tuple(force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters()))


def item_names(force: Any, item: str) -> tuple[str, ...]:
    """Names of the per-item parameters; ``item`` is ``"Bond"``, ``"Particle"``, ``"Donor"``..."""
    count = getattr(force, f"getNumPer{item}Parameters")()
    return tuple(getattr(force, f"getPer{item}ParameterName")(i) for i in range(count))


def checked_exclusions(force: Any, n_particles: int) -> Tensor:
    """Excluded pairs ``(exclusions, 2)``; each may be given only once."""
    rows = [force.getExclusionParticles(i) for i in range(force.getNumExclusions())]
    pairs = checked_indices(force.getName(), rows, 0, 1, n_particles=n_particles)
    unique, counts = torch.unique(pairs.sort(dim=-1).values, dim=0, return_counts=True)
    if bool((counts > 1).any()):
        raise InvalidInputError(
            f"{force.getName()}: particles {unique[counts > 1][0].tolist()} have more than one "
            "exclusion; remove all but one"
        )
    return pairs


def item_parameters(
    force: Any, names: Sequence[str], rows: Sequence[Sequence[Any]]
) -> dict[str, Tensor]:
    """Per-item parameters ``(items,)`` by name from one sequence of numbers for each item."""
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise InvalidInputError(
                f"{force.getName()}: entry {i} has {len(row)} parameters, wanted {len(names)}: "
                f"{', '.join(names)}"
            )
    matrix = torch.tensor([[number(x) for x in row] for row in rows], dtype=torch.float64)
    matrix = matrix.reshape(len(rows), len(names))
    if len(set(names)) != len(names):
        raise InvalidInputError(f"{force.getName()}: two parameters have one name: {list(names)}")
    return {name: matrix[:, c].clone() for c, name in enumerate(names)}


def item_rows(values: Values, names: Sequence[str], n_items: int) -> np.ndarray:
    """The inverse of `item_parameters`: ``(items, parameters)``."""
    keys = parameter_keys(names)
    if not keys:
        return np.zeros((n_items, 0))
    return np.stack([values[key] for key in keys], axis=-1)


def tables(force: Any) -> dict[str, tuple[TabulatedFunction, Tensor]]:
    """Tabulated functions and their values by name."""
    found = {}
    for i in range(force.getNumTabulatedFunctions()):
        name = force.getTabulatedFunctionName(i)
        if name in found:
            raise InvalidInputError(
                f"{force.getName()}: two tabulated functions are called {name!r}; rename one"
            )
        found[name] = _read_table(force.getTabulatedFunction(i))
    return found


def refused_tables(force: Any, values: Values, names: Sequence[str]) -> str | None:
    """Describe a periodic table whose ends differ, which no Context accepts, or return None."""
    for i, key in enumerate(_table_keys(force, names)):
        sizes, _, periodic = _layout(force.getTabulatedFunction(i))
        grid = values[key].reshape(sizes[::-1])
        for axis in range(grid.ndim if periodic else 0):
            # OpenMM compares them to this accuracy.
            first, last = np.take(grid, 0, axis), np.take(grid, -1, axis)
            if (np.abs(first - last) > 1e-15 + 1e-15 * np.abs(last)).any():
                return (
                    f"{force.getName()}.{key}: first and last entries of a periodic function must "
                    "be equal along every axis; tie them (potential.tie) to train them"
                )
    return None


def _table_keys(force: Any, names: Sequence[str]) -> list[str]:
    functions = [force.getTabulatedFunctionName(i) for i in range(force.getNumTabulatedFunctions())]
    return parameter_keys([*names, *functions])[len(names) :]


def write_tables(force: Any, values: Values, names: Sequence[str]) -> None:
    """Set the values of tabulated functions; ``names`` are those of the per-item parameters."""
    for i, key in enumerate(_table_keys(force, names)):
        function = force.getTabulatedFunction(i)
        # A Context parses all expressions again when a table was set.
        if values[key].tolist() == _entries(function):
            continue
        sizes, limits, _ = _layout(function)
        bounds = [x for pair in limits for x in pair]
        # In one dimension the number of entries is not an argument of its own.
        function.setFunctionParameters(*sizes[len(sizes) == 1 :], values[key].tolist(), *bounds)


def _read_table(function: Any) -> tuple[TabulatedFunction, Tensor]:
    sizes, limits, periodic = _layout(function)
    entries = torch.tensor(_entries(function), dtype=torch.float64)
    if isinstance(function, _CONTINUOUS):
        return ContinuousTable(sizes=sizes, limits=limits, periodic=periodic), entries
    return DiscreteTable(sizes=sizes), entries


def _entries(function: Any) -> list[float]:
    parameters = function.getFunctionParameters()
    # Sizes precede the values in two and three dimensions.
    position = 0 if isinstance(function, (_CONTINUOUS[0], _DISCRETE[0])) else _rank(function)
    if isinstance(function, _DISCRETE[0]):
        values = parameters[0] if isinstance(parameters[0], (tuple, list)) else parameters
        return [float(v) for v in values]
    return [float(v) for v in parameters[position]]


def _rank(function: Any) -> int:
    for rank, kinds in enumerate(zip(_CONTINUOUS, _DISCRETE, strict=True), start=1):
        if isinstance(function, kinds):
            return rank
    raise InvalidInputError(f"unknown kind of tabulated function, {type(function).__name__}")


def _layout(
    function: Any,
) -> tuple[tuple[int, ...], tuple[tuple[float, float], ...], bool]:
    """Sizes, limits (none for discrete functions) and periodicity."""
    rank = _rank(function)
    parameters = function.getFunctionParameters()
    sizes = tuple(int(n) for n in parameters[:rank]) if rank > 1 else (len(_entries(function)),)
    if not isinstance(function, _CONTINUOUS):
        return sizes, (), False
    bounds = [float(x) for x in parameters[(rank + 1 if rank > 1 else 1) :][: 2 * rank]]
    limits = tuple(zip(bounds[0::2], bounds[1::2], strict=True))
    return sizes, limits, bool(function.getPeriodic())
