"""Derivatives by finite differences, with an error estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mdgraft._errors import InvalidInputError

_EPSILON = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A derivative by finite differences.

    Attributes
    ----------
    value
        The derivative, of the shape of the function's value.
    error
        Estimated absolute error, of the same shape; infinite where no step gave a finite number.
    step
        The step that the best entry was extrapolated to, of the same shape.
    """

    value: np.ndarray
    error: np.ndarray
    step: np.ndarray


def finite_difference(
    function: Callable[[float], Any],
    *,
    step: float = 1e-2,
    side: int = 0,
    levels: int = 9,
    shrink: float = 4.0,
    rtol: float = 1e-10,
    atol: float | np.ndarray = 0.0,
) -> Difference:
    """Derivative of ``function(t)`` at ``t = 0``, extrapolated to zero step.

    Differences at steps ``step / shrink**k`` enter a Neville tableau (Ridders, Adv. Eng. Softw. 4,
    75 (1982)). Each entry is as good as it agrees with its two predecessors, but never better than
    rounding allows; the best entry wins, separately for every element. The long ladder of steps
    serves energies that jump, as those with a plain cutoff do: a small enough step sees no jump.

    Parameters
    ----------
    function
        Maps a displacement to a number or array. Displacements at which it returns NaN or infinity
        are left out.
    step
        The largest displacement.
    side
        0 for central differences; 1 or -1 to use displacements of that sign and zero only.
    levels
        The largest number of steps.
    shrink
        Ratio of consecutive steps.
    rtol, atol
        Stop as soon as every element's error is below ``atol + rtol * abs(value)``.

    Returns
    -------
    Difference

    Raises
    ------
    InvalidInputError
        If ``step`` is not positive, ``shrink`` not above one or ``side`` not -1, 0 or 1.
    """
    if not step > 0 or not shrink > 1 or side not in (-1, 0, 1) or levels < 2:
        raise InvalidInputError(
            f"step, shrink, side, levels: got {step}, {shrink}, {side}, {levels}; wanted step > 0, "
            "shrink > 1, side -1, 0 or 1, and two levels or more"
        )
    at_zero = None if side == 0 else np.asarray(function(0.0), dtype=np.float64)
    # Errors of central differences are even in the step, those of one-sided ones are not.
    order = 2 if side == 0 else 1
    best: Difference | None = None
    previous: list[np.ndarray] = []
    with np.errstate(all="ignore"):
        for level in range(levels):
            h = step / shrink**level
            if at_zero is None:
                upper = np.asarray(function(h), dtype=np.float64)
                lower = np.asarray(function(-h), dtype=np.float64)
                quotient = (upper - lower) / (2 * h)
            else:
                upper = np.asarray(function(side * h), dtype=np.float64)
                lower = at_zero
                quotient = side * (upper - lower) / h
            # Half a unit in the last place of each value, doubled for what led up to it.
            floor = 2 * _EPSILON * np.maximum(np.abs(upper), np.abs(lower)) / h
            best = best or Difference(
                value=np.full(quotient.shape, np.nan),
                error=np.full(quotient.shape, np.inf),
                step=np.full(quotient.shape, h),
            )
            row = [quotient]
            for column, above in enumerate(previous):
                factor = shrink ** (order * (column + 1))
                # T(k, j+1) = (f T(k, j) - T(k-1, j)) / (f - 1)
                entry = (factor * row[column] - above) / (factor - 1)
                change = np.maximum(np.abs(entry - row[column]), np.abs(entry - above))
                best = _better(best, entry, np.maximum(change, floor), h)
                row.append(entry)
            if not np.isfinite(quotient).any():
                row = []
            # Extrapolating from far away adds nothing but rounding.
            previous = row[:4]
            done = best.error <= atol + rtol * np.abs(best.value)
            # Elements that stay undefined need not keep the others waiting.
            if level >= 3:
                done |= ~np.isfinite(best.error)
            if done.all() and np.isfinite(best.error).any():
                break
    assert best is not None
    return best


def _better(best: Difference, value: np.ndarray, error: np.ndarray, step: float) -> Difference:
    """Replace the elements for which the new entry has the smaller error."""
    wins = np.isfinite(value) & (error < best.error)
    return Difference(
        value=np.where(wins, value, best.value),
        error=np.where(wins, error, best.error),
        step=np.where(wins, step, best.step),
    )
