"""Compiled loops between particles and the points of a mesh, with fifth-order B-splines.

A particle at fractional coordinates s sits at u = n (s - floor(s)) on an axis of n points, w = u -
floor(u) past the point c = floor(u), and counts on points c to c + 4 with the weights of
`mdgraft.kernels.pme.spline`. W(g) is the product over the axes. Derivatives of W are those in s,
n times those in w. Meshes are ``(F, nx, ny, nz)`` for F frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

_F = TypeVar("_F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]


class Particles(NamedTuple):
    """What counts on the meshes, by the range of particles that a loop visits."""

    #: ``(F, N, 3)`` [nm].
    positions: Array
    #: Of the boxes, ``(F, 3, 3)`` [1/nm] in float64: s = x R.
    reciprocals: Array
    #: q, ``(F, N)``.
    strengths: Array
    #: ``arange(n + 5) % n`` of each axis.
    wraps: tuple[Array, Array, Array]
    first: int
    last: int


class Motion(NamedTuple):
    """A direction: changes dx ``(F, N, 3)``, dR ``(F, 3, 3)`` in float64, and dq ``(F, N)``."""

    shifts: Array
    turns: Array
    charges: Array


def compiled(function: _F) -> _F:
    """Compile at the first call, once for each dtype; kept on disk where that can be written.

    NaN and infinity keep their meaning, since positions may hold them.
    """
    jit: Any = numba.njit
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        result: _F = jit(cache=True, **options)(function)
    except RuntimeError:
        result = jit(**options)(function)
    return result


@compiled
def _place(s: float, n: int) -> tuple[int, float]:
    """Grid point c at or before fractional coordinate s, and the rest w."""
    u = (s - np.floor(s)) * n
    # Not a number for a lost particle, whose weights then are none either.
    c = int(u) if 0 <= u <= n else 0
    return c, u - c


@compiled
def _fill(table: Array, w: float, n: int, derivatives: int) -> None:
    """Weights M5 of one axis to ``table[0]``, derivatives in s to ``table[1]``, ``table[2]``.

    M_p(k) = [(w + p - 1 - k) M_{p-1}(k - 1) + (k + 1 - w) M_{p-1}(k)]/(p - 1);
    M_p'(k) = M_{p-1}(k - 1) - M_{p-1}(k).
    """
    a0, a1, a2 = 0.5 * (1 - w) * (1 - w), 0.5 + w * (1 - w), 0.5 * w * w
    b0 = (1 - w) * a0 / 3
    b1 = ((w + 2) * a0 + (2 - w) * a1) / 3
    b2 = ((w + 1) * a1 + (3 - w) * a2) / 3
    b3 = w * a2 / 3
    table[0, 0] = 0.25 * (1 - w) * b0
    table[0, 1] = 0.25 * ((w + 3) * b0 + (2 - w) * b1)
    table[0, 2] = 0.25 * ((w + 2) * b1 + (3 - w) * b2)
    table[0, 3] = 0.25 * ((w + 1) * b2 + (4 - w) * b3)
    table[0, 4] = 0.25 * w * b3
    if derivatives >= 1:
        table[1, 0] = -n * b0
        table[1, 1] = n * (b0 - b1)
        table[1, 2] = n * (b1 - b2)
        table[1, 3] = n * (b2 - b3)
        table[1, 4] = n * b3
    if derivatives >= 2:
        m = n * n
        table[2, 0] = m * a0
        table[2, 1] = m * (a1 - 2 * a0)
        table[2, 2] = m * (a0 - 2 * a1 + a2)
        table[2, 3] = m * (a1 - 2 * a2)
        table[2, 4] = m * a2


@compiled
def _locate(
    position: Array, r: Array, mesh: Array, tables: Array, derivatives: int
) -> tuple[int, int, int]:
    """Fill the tables of a particle (axis, derivative, point), and find its grid point."""
    x, y, z = position[0], position[1], position[2]
    nx, ny, nz = mesh.shape
    cx, wx = _place(x * r[0, 0] + y * r[1, 0] + z * r[2, 0], nx)
    cy, wy = _place(x * r[0, 1] + y * r[1, 1] + z * r[2, 1], ny)
    cz, wz = _place(x * r[0, 2] + y * r[1, 2] + z * r[2, 2], nz)
    _fill(tables[0], wx, nx, derivatives)
    _fill(tables[1], wy, ny, derivatives)
    _fill(tables[2], wz, nz, derivatives)
    return cx, cy, cz


@compiled
def _five(array: Array) -> tuple[float, float, float, float, float]:
    """The first five entries, in registers: a store elsewhere cannot have changed them."""
    return array[0], array[1], array[2], array[3], array[4]


@compiled
def spread(particles: Particles, meshes: Array) -> None:
    """Add Q(g) = sum_i q_i W_i(g) to the meshes."""
    positions, reciprocals, strengths, (wrap_x, wrap_y, wrap_z), first, last = particles
    tables = np.empty((3, 3, 5), meshes.dtype)
    for f in range(len(positions)):
        mesh, q = meshes[f], strengths[f]
        for i in range(first, last):
            if q[i] == 0:
                continue
            cx, cy, cz = _locate(positions[f, i], reciprocals[f], mesh, tables, 0)
            z, w = _five(wrap_z[cz:]), _five(tables[2, 0])
            for j in range(5):
                plane, a = mesh[wrap_x[cx + j]], q[i] * tables[0, 0, j]
                for k in range(5):
                    row, b = plane[wrap_y[cy + k]], a * tables[1, 0, k]
                    for m in range(5):
                        row[z[m]] += b * w[m]


@compiled
def gather(
    particles: Particles,
    potentials: Array,
    everywhere: bool,
    values: Array,
    slopes: Array,
    moments: Array,
) -> None:
    """Derivatives of the energy for mesh potentials phi ``(F, nx, ny, nz)``.

    Values ``(F, N)`` become dE/dq_i = sum_g W_i phi, slopes ``(F, N, 3)`` dE/dx_i = R g_i, with
    g_i = q_i sum_g (dW_i/ds) phi; dE/dR = sum_i x_i g_i^T is added to the moments ``(F, 3, 3)`` in
    float64. Particles without strength are left out unless ``everywhere``.
    """
    positions, reciprocals, strengths, (wrap_x, wrap_y, wrap_z), first, last = particles
    tables = np.empty((3, 3, 5), potentials.dtype)
    zero = potentials.dtype.type(0)
    for f in range(len(positions)):
        phi, r, q = potentials[f], reciprocals[f], strengths[f]
        for i in range(first, last):
            if q[i] == 0 and not everywhere:
                continue
            position = positions[f, i]
            cx, cy, cz = _locate(position, r, phi, tables, 1)
            z, w, d = _five(wrap_z[cz:]), _five(tables[2, 0]), _five(tables[2, 1])
            p = px = py = pz = zero
            for j in range(5):
                plane = phi[wrap_x[cx + j]]
                t = ty = tz = zero
                for k in range(5):
                    row = plane[wrap_y[cy + k]]
                    s = sz = zero
                    for m in range(5):
                        s += w[m] * row[z[m]]
                        sz += d[m] * row[z[m]]
                    t += tables[1, 0, k] * s
                    ty += tables[1, 1, k] * s
                    tz += tables[1, 0, k] * sz
                p += tables[0, 0, j] * t
                px += tables[0, 1, j] * t
                py += tables[0, 0, j] * ty
                pz += tables[0, 0, j] * tz
            values[f, i] = p
            g = (np.float64(q[i] * px), np.float64(q[i] * py), np.float64(q[i] * pz))
            for b in range(3):
                slopes[f, i, b] = r[b, 0] * g[0] + r[b, 1] * g[1] + r[b, 2] * g[2]
                for a in range(3):
                    moments[f, b, a] += position[b] * g[a]


@compiled
def _move(
    tables: Array, position: Array, shift: Array, reciprocal: Array, turn: Array, derivatives: int
) -> None:
    """Put changes of the weights to ``tables[:, 2]``, of their derivatives to ``tables[:, 3]``."""
    for axis in range(3):
        # ds = dx R + x dR
        ds = 0.0
        for b in range(3):
            ds += shift[b] * reciprocal[b, axis] + position[b] * turn[b, axis]
        for k in range(5):
            if derivatives == 2:
                tables[axis, 3, k] = ds * tables[axis, 2, k]
            tables[axis, 2, k] = ds * tables[axis, 1, k]


@compiled
def spread_tangent(particles: Particles, motion: Motion, meshes: Array, changes: Array) -> None:
    """Add Q to the meshes, and dQ(g) = sum_i dq_i W_i(g) + q_i dW_i(g) to the changes."""
    positions, reciprocals, strengths, (wrap_x, wrap_y, wrap_z), first, last = particles
    shifts, turns, charges = motion
    tables = np.empty((3, 4, 5), meshes.dtype)
    for f in range(len(positions)):
        mesh, change = meshes[f], changes[f]
        for i in range(first, last):
            q, dq = strengths[f, i], charges[f, i]
            if q == 0 and dq == 0:
                continue
            cx, cy, cz = _locate(positions[f, i], reciprocals[f], mesh, tables, 1)
            _move(tables, positions[f, i], shifts[f, i], reciprocals[f], turns[f], 1)
            wx, wy, wz = tables[0, 0], tables[1, 0], _five(tables[2, 0])
            dwx, dwy, dwz = tables[0, 2], tables[1, 2], _five(tables[2, 2])
            z = _five(wrap_z[cz:])
            for j in range(5):
                x = wrap_x[cx + j]
                for k in range(5):
                    y = wrap_y[cy + k]
                    row, drow = mesh[x, y], change[x, y]
                    b = q * wx[j] * wy[k]
                    db = dq * wx[j] * wy[k] + q * (dwx[j] * wy[k] + wx[j] * dwy[k])
                    for m in range(5):
                        row[z[m]] += b * wz[m]
                        drow[z[m]] += db * wz[m] + b * dwz[m]


@compiled
def gather_tangent(
    particles: Particles,
    motion: Motion,
    potentials: Array,
    changes: Array,
    values: Array,
    slopes: Array,
    moments: Array,
) -> None:
    """Changes of what `gather` finds, when the mesh potentials phi change by dphi, too.

    Results are as there, but for all particles, and the moments are ``(2, F, 3, 3)``: first those
    of `gather`, then their changes. d(dE/dx) = dR g + R dg; d(dE/dR) = sum_i dx g^T + x dg^T.
    """
    positions, reciprocals, strengths, (wrap_x, wrap_y, wrap_z), first, last = particles
    shifts, turns, charges = motion
    tables = np.empty((3, 4, 5), potentials.dtype)
    zero = potentials.dtype.type(0)
    for f in range(len(positions)):
        phi, change, r, turn = potentials[f], changes[f], reciprocals[f], turns[f]
        for i in range(first, last):
            position, shift, q, dq = positions[f, i], shifts[f, i], strengths[f, i], charges[f, i]
            cx, cy, cz = _locate(position, r, phi, tables, 2)
            _move(tables, position, shift, r, turn, 2)
            # w, w' and their changes, on each axis; what follows is `gather` by the product rule.
            w, v, dw, dv = tables[:, 0], tables[:, 1], tables[:, 2], tables[:, 3]
            px = py = pz = dp = dpx = dpy = dpz = zero
            for j in range(5):
                x = wrap_x[cx + j]
                t = ty = tz = dt = dty = dtz = zero
                for k in range(5):
                    y = wrap_y[cy + k]
                    row, drow = phi[x, y], change[x, y]
                    s = sz = ds = dsz = zero
                    for m in range(5):
                        z = wrap_z[cz + m]
                        s += w[2, m] * row[z]
                        sz += v[2, m] * row[z]
                        ds += dw[2, m] * row[z] + w[2, m] * drow[z]
                        dsz += dv[2, m] * row[z] + v[2, m] * drow[z]
                    t += w[1, k] * s
                    ty += v[1, k] * s
                    tz += w[1, k] * sz
                    dt += dw[1, k] * s + w[1, k] * ds
                    dty += dv[1, k] * s + v[1, k] * ds
                    dtz += dw[1, k] * sz + w[1, k] * dsz
                px += v[0, j] * t
                py += w[0, j] * ty
                pz += w[0, j] * tz
                dp += dw[0, j] * t + w[0, j] * dt
                dpx += dv[0, j] * t + v[0, j] * dt
                dpy += dw[0, j] * ty + w[0, j] * dty
                dpz += dw[0, j] * tz + w[0, j] * dtz
            values[f, i] = dp
            g = (np.float64(q * px), np.float64(q * py), np.float64(q * pz))
            dg = (dq * px + q * dpx, dq * py + q * dpy, dq * pz + q * dpz)
            for b in range(3):
                slope = 0.0
                for a in range(3):
                    slope += turn[b, a] * g[a] + r[b, a] * dg[a]
                    moments[0, f, b, a] += position[b] * g[a]
                    moments[1, f, b, a] += shift[b] * g[a] + position[b] * np.float64(dg[a])
                slopes[f, i, b] = slope
