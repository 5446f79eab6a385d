"""Compiled steps of Markov chains: C configurations ``(C, N, 3)`` that move one group each.

Groups are rows of a padded table ``(M, K)`` with their sizes ``(M,)``; ``which`` ``(C,)`` says
which group moves. Angles ``(C,)`` are in rad. ``positions`` are changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from mdgraft.kernels.fused.spreading import Array, compiled

_F = TypeVar("_F", bound=Callable[..., Any])


def exact(function: _F) -> _F:
    """As `compiled`, with every operation rounded as plain ones are."""
    jit: Any = numba.njit
    options = {"nogil": True, "error_model": "numpy"}
    try:
        result: _F = jit(cache=True, **options)(function)
    except RuntimeError:
        result = jit(**options)(function)
    return result


@exact
def chosen(u: Array, n: int) -> Array:
    """One of n for each of the uniform numbers ``(C,)``, int64."""
    which = np.empty(len(u), np.int64)
    for c in range(len(u)):
        # A product just below the number may round up to it.
        which[c] = min(int(u[c] * n), n - 1)
    return which


@exact
def displace(positions: Array, particles: Array, steps: Array) -> None:
    """Move one particle of each ``(C,)`` by steps ``(C, 1, 3)``."""
    for c in range(len(positions)):
        for axis in range(3):
            positions[c, particles[c], axis] += steps[c, 0, axis]


@exact
def shift(positions: Array, which: Array, rows: Array, sizes: Array, steps: Array) -> None:
    """Move groups by steps ``(C, 3)``."""
    for c in range(len(positions)):
        x, m = positions[c], which[c]
        for k in range(sizes[m]):
            for axis in range(3):
                x[rows[m, k], axis] += steps[c, axis]


@exact
def decide(
    positions: Array,
    energies: Array,
    proposed: Array,
    proposed_energies: Array,
    log_u: Array,
    beta: float,
    acceptances: Array,
) -> bool:
    """Accept or reject symmetric proposals, in place; False, and neither, for NaN or -inf."""
    for c in range(len(positions)):
        if not proposed_energies[c] > -np.inf:
            return False
    for c in range(len(positions)):
        if log_u[c] < -beta * proposed_energies[c] - -beta * energies[c]:
            positions[c] = proposed[c]
            energies[c] = proposed_energies[c]
            acceptances[c] += 1
    return True


@compiled
def _turn(x: Array, rows: Array, size: int, origin: Array, axis: Array, angle: float) -> None:
    """Rodrigues' formula for the first ``size`` of ``rows``, particles of x ``(N, 3)``."""
    length = math.sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2])
    u, v, w = axis[0] / length, axis[1] / length, axis[2] / length
    sine, haversine = math.sin(angle), math.sin(0.5 * angle)
    # 1 - cos(angle), without cancellation.
    versine = 2.0 * haversine * haversine
    for k in range(size):
        i = rows[k]
        a, b, c = x[i, 0] - origin[0], x[i, 1] - origin[1], x[i, 2] - origin[2]
        # p = axis x arm and q = axis x p; the arm changes by p sin + q (1 - cos).
        p, q, r = v * c - w * b, w * a - u * c, u * b - v * a
        x[i, 0] += p * sine + (v * r - w * q) * versine
        x[i, 1] += q * sine + (w * p - u * r) * versine
        x[i, 2] += r * sine + (u * q - v * p) * versine


@compiled
def turn_about_bonds(
    positions: Array, which: Array, rows: Array, sizes: Array, bonds: Array, angles: Array
) -> None:
    """Turn groups about bonds ``(M, 2)``, particles that belong to no group of theirs."""
    for c in range(len(positions)):
        x, m = positions[c], which[c]
        origin = x[bonds[m, 0]].copy()
        _turn(x, rows[m], sizes[m], origin, x[bonds[m, 1]] - origin, angles[c])


@compiled
def turn_about_centres(
    positions: Array, which: Array, rows: Array, sizes: Array, axes: Array, angles: Array
) -> None:
    """Turn groups about axes ``(C, 3)`` through their geometric centres."""
    for c in range(len(positions)):
        x, m = positions[c], which[c]
        centre = np.zeros(3, x.dtype)
        for k in range(sizes[m]):
            centre += x[rows[m, k]]
        centre /= sizes[m]
        _turn(x, rows[m], sizes[m], centre, axes[c], angles[c])
