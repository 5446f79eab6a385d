"""Compiled steps of Markov chains that move one group of particles each, C chains at a time.

Random numbers are columns of a table ``(3, L)`` that loops walk through: uniform numbers, the
normal numbers that these are mapped to, and their logarithms. Each loop takes of a column what it
needs, in the order in which moves draw step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from mdgraft.kernels.fused.spreading import Array

_F = TypeVar("_F", bound=Callable[..., Any])

#: How the particles of a group move: each by itself, as a whole, about their centre, about a bond.
APART, SHIFT, ABOUT_CENTRE, ABOUT_BOND = range(4)
#: Columns of the row that follows the particles.
ENERGY, LOG_U, LOG_ALPHA = range(3)


def exact(function: _F, inline: str = "never") -> _F:
    """Compile at the first call, every operation rounded as plain ones are; kept on disk.

    What a loop computes must not depend on the loop that it is part of.
    """
    jit: Any = numba.njit
    options = {"nogil": True, "error_model": "numpy", "inline": inline}
    try:
        result: _F = jit(cache=True, **options)(function)
    except RuntimeError:
        result = jit(**options)(function)
    return result


def inlined(function: _F) -> _F:
    """As `exact`, a part of each loop that calls it: calls with many arrays take their time."""
    return exact(function, inline="always")


@inlined
def propose(
    places: Array,
    counts: Array,
    groups: Array,
    motions: Array,
    numbers: Array,
    at: int,
) -> int:
    """Propose for every chain one of the motions of a mixture, or the only one.

    Few arrays hold everything, since each takes its time in every call.

    Parameters
    ----------
    places
        ``(2, C, N + 1, 3)``: positions and proposals. After the particles, a row has the energy;
        that of a proposal also the logarithm of the number that decides, and that of the ratio.
    counts
        ``(2, R + 1, C)``: attempts and acceptances of R moves, and which motion each chain chooses
        and the row in which that is counted.
    groups
        For each group where its members begin and end in this array, and the bond to turn about;
        then the members of all groups.
    motions
        ``(P, 7)``, float64: kind, first group, number of groups, random numbers of each chain, the
        row in which the motion is counted, scale, and probability of this motion or one before,
        which is zero if there is no choice to draw.
    numbers, at
        Random numbers ``(3, L)``, and from which column on they are used.

    Returns
    -------
    int
        The first column that is not used.
    """
    n_chains, n, n_motions = places.shape[1], places.shape[2] - 1, len(motions)
    for c in range(n_chains):
        p = 0
        while p < n_motions - 1 and numbers[0, at + c] >= motions[p, 6]:
            p += 1
        counts[0, -1, c], counts[1, -1, c] = p, int(motions[p, 4])
        for i in range(n):
            for axis in range(3):
                places[1, c, i, axis] = places[0, c, i, axis]
    if motions[0, 6] > 0.0:
        at += n_chains
    for p in range(n_motions):
        # Motions that no chain has chosen draw nothing.
        used = 0
        for c in range(n_chains):
            if counts[0, -1, c] == p:
                used = n_chains * int(motions[p, 3])
                _move(places[1], c, motions[p], groups, numbers, at)
        at += used
    for c in range(n_chains):
        places[1, c, n, LOG_U] = numbers[2, at + c]
    after: int = at + n_chains
    return after


@inlined
def _move(x: Array, c: int, motion: Array, groups: Array, numbers: Array, at: int) -> None:
    """Move a group of chain c, by the random numbers of all chains from ``at`` on."""
    kind, group, n_groups = int(motion[0]), int(motion[1]), int(motion[2])
    scale, n_chains = motion[5], len(x)
    if kind != APART:
        # A product just below the number may round up to it.
        group += min(int(numbers[0, at + c] * n_groups), n_groups - 1)
        at += n_chains
    start, stop = groups[4 * group], groups[4 * group + 1]
    if kind == APART:
        at += 3 * (stop - start) * c
        for k in range(stop - start):
            for axis in range(3):
                x[c, groups[start + k], axis] += scale * numbers[1, at + 3 * k + axis]
    elif kind == SHIFT:
        at += 3 * c
        for k in range(start, stop):
            for axis in range(3):
                x[c, groups[k], axis] += scale * numbers[1, at + axis]
    elif kind == ABOUT_CENTRE:
        angle = scale * numbers[1, at + 3 * n_chains + c]
        at += 3 * c
        _turn_about_centre(x[c], groups[start:stop], numbers[1, at : at + 3], angle)
    else:
        first, second = groups[4 * group + 2], groups[4 * group + 3]
        _turn_about_bond(x[c], groups[start:stop], first, second, scale * numbers[1, at + c])


@inlined
def decide(places: Array, counts: Array, trajectory: Array, beta: float, t: int) -> bool:
    """Accept or reject symmetric proposals, and count, in place.

    Parameters
    ----------
    places, counts
        Those of `propose`.
    trajectory, t
        ``(T, C, N + 1, 3)``, which is given the present positions and energies at t.
    beta
        Inverse temperature.

    Returns
    -------
    bool
        False, and nothing is done, if an energy of a proposal is NaN or -inf.
    """
    n_chains, n = places.shape[1], places.shape[2] - 1
    for c in range(n_chains):
        if not places[1, c, n, ENERGY] > -np.inf:
            return False
    for c in range(n_chains):
        row = counts[1, -1, c]
        counts[0, row, c] += 1
        log_alpha = -beta * places[1, c, n, ENERGY] - -beta * places[0, c, n, ENERGY]
        places[1, c, n, LOG_ALPHA] = log_alpha
        if places[1, c, n, LOG_U] < log_alpha:
            counts[1, row, c] += 1
            for i in range(n + 1):
                for axis in range(3):
                    places[0, c, i, axis] = places[1, c, i, axis]
        for i in range(n + 1):
            for axis in range(3):
                trajectory[t, c, i, axis] = places[0, c, i, axis]
    return True


@exact
def advance(
    places: Array,
    counts: Array,
    groups: Array,
    trajectory: Array,
    beta: float,
    motions: Array,
    numbers: Array,
    at: int,
    t: int,
) -> int:
    """`decide` and then `propose`, in one call; -1 where energies allow no decision."""
    if not decide(places, counts, trajectory, beta, t):
        return -1
    return propose(places, counts, groups, motions, numbers, at)


@exact
def turn_about_bonds(
    positions: Array, which: Array, rows: Array, sizes: Array, bonds: Array, angles: Array
) -> None:
    """Turn one group of each configuration about a bond, in place.

    Parameters
    ----------
    positions
        ``(C, N, 3)``.
    which
        ``(C,)``: which of M groups.
    rows, sizes
        Their particles, a padded table ``(M, K)``, and how many there are ``(M,)``.
    bonds
        ``(M, 2)``, particles that belong to no group of theirs.
    angles
        ``(C,)`` [rad].
    """
    for c in range(len(positions)):
        m = which[c]
        _turn_about_bond(positions[c], rows[m, : sizes[m]], bonds[m, 0], bonds[m, 1], angles[c])


@exact
def turn_about_centres(
    positions: Array, which: Array, rows: Array, sizes: Array, axes: Array, angles: Array
) -> None:
    """Turn one group of each configuration about an axis ``(C, 3)`` through its centre, in place.

    The rest as for `turn_about_bonds`.
    """
    for c in range(len(positions)):
        m = which[c]
        _turn_about_centre(positions[c], rows[m, : sizes[m]], axes[c], angles[c])


@exact
def _turn_about_bond(x: Array, mine: Array, first: int, second: int, angle: float) -> None:
    a, b, c = x[first, 0], x[first, 1], x[first, 2]
    axis = (x[second, 0] - a, x[second, 1] - b, x[second, 2] - c)
    _turn(x, mine, (a, b, c), axis, angle)


@exact
def _turn_about_centre(x: Array, mine: Array, axis: Array, angle: float) -> None:
    a, b, c = x[mine[0], 0], x[mine[0], 1], x[mine[0], 2]
    for k in range(1, len(mine)):
        a, b, c = a + x[mine[k], 0], b + x[mine[k], 1], c + x[mine[k], 2]
    n = len(mine)
    _turn(x, mine, (a / n, b / n, c / n), (axis[0], axis[1], axis[2]), angle)


@exact
def _turn(
    x: Array,
    mine: Array,
    origin: tuple[float, float, float],
    axis: tuple[float, float, float],
    angle: float,
) -> None:
    """Rodrigues' formula for some particles of x ``(N, 3)``."""
    length = math.sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2])
    u, v, w = axis[0] / length, axis[1] / length, axis[2] / length
    sine, haversine = math.sin(angle), math.sin(0.5 * angle)
    # 1 - cos(angle), without cancellation.
    versine = 2.0 * haversine * haversine
    for i in mine:
        a, b, c = x[i, 0] - origin[0], x[i, 1] - origin[1], x[i, 2] - origin[2]
        # p = axis x arm and q = axis x p; the arm changes by p sin + q (1 - cos).
        p, q, r = v * c - w * b, w * a - u * c, u * b - v * a
        x[i, 0] += p * sine + (v * r - w * q) * versine
        x[i, 1] += q * sine + (w * p - u * r) * versine
        x[i, 2] += r * sine + (u * q - v * p) * versine
