"""Compiled rotations of groups of particles, one group in each of C configurations.

Groups are rows of a padded table ``(M, K)`` with their sizes ``(M,)``; ``which`` ``(C,)`` says
which group turns. Angles ``(C,)`` are in rad. ``positions`` ``(C, N, 3)`` are changed in place.
"""

from __future__ import annotations

import math

import numpy as np

from mdgraft.kernels.fused.spreading import Array, compiled


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
