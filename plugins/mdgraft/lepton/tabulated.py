"""Tabulated functions in one to three dimensions, differentiable in arguments and in the table.

A continuous table is a tensor product of cubic Hermite segments whose slopes at the knots are
those of the natural (or periodic) cubic spline along each axis. In one dimension that is the spline
itself; in two and three it is the bicubic and tricubic interpolation that OpenMM uses. Everything
is linear in the table.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from mdgraft._errors import InvalidInputError

# The influence of a value on a spline's slope falls off as (2 - sqrt 3)^distance: 1e-18 at 32.
_REACH = 32


@dataclasses.dataclass(frozen=True)
class TabulatedFunction(abc.ABC):
    """A function of one to three arguments given by a table.

    Attributes
    ----------
    sizes
        Number of entries along each axis.
    """

    sizes: tuple[int, ...]

    @property
    def arguments(self) -> int:
        """How many arguments the function takes."""
        return len(self.sizes)

    def __call__(self, entries: Tensor, *arguments: Tensor) -> Tensor:
        """Evaluate.

        Parameters
        ----------
        entries
            ``(entries,)``, the first axis running fastest.
        *arguments
            Tensors that broadcast.
        """
        return self.at(self.columns(entries), *arguments)

    @property
    @abc.abstractmethod
    def n_columns(self) -> int:
        """How many arrays `columns` returns."""

    @abc.abstractmethod
    def columns(self, entries: Tensor) -> list[Tensor]:
        """Arrays like the table, linear in it, in which `at` looks numbers up."""

    @abc.abstractmethod
    def at(self, columns: Sequence[Tensor], *arguments: Tensor) -> Tensor:
        """Evaluate with what `columns` returned."""


@dataclasses.dataclass(frozen=True)
class DiscreteTable(TabulatedFunction):
    """The entry at the arguments rounded to integers; beyond the ends it is the last one."""

    @property
    def n_columns(self) -> int:
        """The table itself."""
        return 1

    def columns(self, entries: Tensor) -> list[Tensor]:
        """The table itself."""
        return [entries]

    def at(self, columns: Sequence[Tensor], *arguments: Tensor) -> Tensor:
        """Look up; the derivative in the arguments is zero."""
        (entries,) = columns
        position: Tensor | int = 0
        stride = 1
        for size, argument in zip(self.sizes, arguments, strict=True):
            x = torch.nan_to_num(argument.detach()).clamp(min=0)
            below = torch.floor(x)
            # Half-way cases go up, as in C; x + 0.5 could be rounded up to the next number.
            index = (below + (x - below >= 0.5)).clamp(max=size - 1).long()
            position = position + stride * index
            stride *= size
        return entries[position]


@dataclasses.dataclass(frozen=True)
class ContinuousTable(TabulatedFunction):
    """Spline through a table over a rectangle; zero outside, unless periodic.

    Attributes
    ----------
    limits
        Smallest and largest argument along each axis, where the first and last entries stand.
    periodic
        Whether the function repeats beyond the limits; first and last entries are then equal.

    Raises
    ------
    InvalidInputError
        For too few entries or limits that are not in order, as OpenMM does.
    """

    limits: tuple[tuple[float, float], ...]
    periodic: bool = False

    def __post_init__(self) -> None:
        fewest = 3 if self.periodic else 2
        for size, (lower, upper) in zip(self.sizes, self.limits, strict=True):
            if size < fewest or not upper > lower:
                raise InvalidInputError(
                    f"sizes, limits: got {self.sizes} and {self.limits}, wanted at least {fewest} "
                    "entries and increasing limits along each axis"
                )

    @property
    def n_columns(self) -> int:
        """As many as `orders`."""
        return int(2**self.arguments)

    @property
    def orders(self) -> list[tuple[int, ...]]:
        """Along which axes each of the `columns` is a slope."""
        return list(itertools.product((0, 1), repeat=self.arguments))

    def columns(self, entries: Tensor) -> list[Tensor]:
        """Values and slopes at the knots, the latter per grid spacing."""
        # Axes in reverse: the first argument runs fastest.
        grid = entries.reshape(self.sizes[::-1])
        tables: dict[tuple[int, ...], Tensor] = {(): grid}
        for axis, size in enumerate(self.sizes):
            dimension = grid.ndim - 1 - axis
            slopes: dict[tuple[int, ...], Tensor] = {}
            for key, table in tables.items():
                slopes[(*key, 0)] = table
                slopes[(*key, 1)] = _slopes(table, dimension, size, self.periodic)
            tables = slopes
        return [tables[order].reshape(-1) for order in self.orders]

    def at(self, columns: Sequence[Tensor], *arguments: Tensor) -> Tensor:
        """Interpolate."""
        broadcast: Any = torch.broadcast_tensors
        arguments = broadcast(*arguments)
        axes = list(zip(self.sizes, self.limits, arguments, strict=True))
        inside: Tensor | None = None
        if not self.periodic:
            # What is not a number stays so, unless another argument is outside.
            within = (~((x < lower) | (x > upper)) for _, (lower, upper), x in axes)
            inside = functools.reduce(torch.logical_and, within)
        cells, weights = [], []
        for size, (lower, upper), argument in axes:
            scaled = (argument - lower) / ((upper - lower) / (size - 1))
            if inside is None:
                scaled = scaled - (size - 1) * torch.floor(scaled.detach() / (size - 1))
            else:
                scaled = torch.where(inside, scaled, 0.0)
            cell = torch.nan_to_num(scaled.detach()).floor().clamp(0, size - 2)
            cells.append(cell.long())
            weights.append(_hermite(scaled - cell))

        total: Tensor | None = None
        for corner in itertools.product((0, 1), repeat=self.arguments):
            position: Tensor | int = 0
            stride = 1
            for size, cell, side in zip(self.sizes, cells, corner, strict=True):
                position = position + stride * (cell + side)
                stride *= size
            for order, table in zip(self.orders, columns, strict=True):
                factors = [w[s][o] for w, s, o in zip(weights, corner, order, strict=True)]
                part = table[position] * functools.reduce(torch.mul, factors)
                total = part if total is None else total + part
        assert total is not None
        return total if inside is None else torch.where(inside, total, 0.0)


def _hermite(t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights of (value, slope) at the lower and at the upper end of a unit segment."""
    u = 1 - t
    return ((u * u * (1 + 2 * t), u * u * t), (t * t * (3 - 2 * t), -t * t * u))


def _slopes(table: Tensor, dimension: int, size: int, periodic: bool) -> Tensor:
    """Slopes of the spline along one axis, per grid spacing."""
    columns, weights = _slope_operator(size, periodic)
    index = torch.as_tensor(columns, device=table.device)
    factor = torch.as_tensor(weights, dtype=table.dtype, device=table.device)
    last = table.movedim(dimension, -1)
    return (last[..., index] * factor).sum(dim=-1).movedim(-1, dimension)


# Arrays, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=64)
def _slope_operator(size: int, periodic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which entries give each slope, and with which weights: two ``(size, reach)`` arrays."""
    window = 2 * _REACH + 1
    if periodic:
        n = size - 1
        if n <= window:
            dense = _dense_slopes(n, periodic=True)
            rows = np.concatenate([dense, dense[:1]])
            return np.tile(np.arange(n), (size, 1)), rows
        stencil = _dense_slopes(4 * _REACH + 1, periodic=True)[2 * _REACH, _REACH : 3 * _REACH + 1]
        offsets = np.arange(-_REACH, _REACH + 1)
        columns = (np.arange(size)[:, None] + offsets) % n
        return columns, np.tile(stencil, (size, 1))
    if size <= 4 * _REACH:
        return np.tile(np.arange(size), (size, 1)), _dense_slopes(size, periodic=False)
    # Rows near the ends come from a short table; those in between are all alike.
    short = 4 * _REACH + 1
    dense = _dense_slopes(short, periodic=False)
    first = np.clip(np.arange(size) - _REACH, 0, size - window)
    rows = np.empty((size, window))
    for i in range(size):
        if i < 2 * _REACH:
            row, start = i, first[i]
        elif i >= size - 2 * _REACH:
            row = i - (size - short)
            start = first[i] - (size - short)
        else:
            row, start = 2 * _REACH, _REACH
        rows[i] = dense[row, start : start + window]
    return first[:, None] + np.arange(window), rows


def _dense_slopes(n: int, *, periodic: bool) -> np.ndarray:
    """Matrix ``(n, n)`` from values to slopes at the knots of a spline with unit spacing.

    Second derivatives m solve m[i-1] + 4 m[i] + m[i+1] = 6 (y[i-1] - 2 y[i] + y[i+1]); the slope at
    a knot is y[i+1] - y[i] - (2 m[i] + m[i+1])/6. Periodic tables hold n different values.
    """
    identity = np.eye(n)
    if periodic:
        up, down = np.roll(identity, -1, axis=0), np.roll(identity, 1, axis=0)
        system = 4 * identity + np.roll(identity, 1, axis=1) + np.roll(identity, -1, axis=1)
        m = np.linalg.solve(system, 6 * (up - 2 * identity + down))
        slopes: np.ndarray = up - identity - (2 * m + np.roll(m, -1, axis=0)) / 6
        return slopes
    bands = np.ones((3, n))
    bands[1] = 4.0
    bands[1, [0, -1]] = 1.0
    bands[0, 1] = bands[2, -2] = 0.0
    right = np.zeros((n, n))
    right[1:-1] = 6 * (identity[:-2] - 2 * identity[1:-1] + identity[2:])
    m = solve_banded((1, 1), bands, right) if n > 2 else np.zeros((n, n))
    slopes = np.empty((n, n))
    slopes[:-1] = identity[1:] - identity[:-1] - (2 * m[:-1] + m[1:]) / 6
    slopes[-1] = identity[-1] - identity[-2] + (2 * m[-1] + m[-2]) / 6
    return slopes
