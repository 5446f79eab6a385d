"""The influence function of smooth particle-mesh Ewald sums, and loops over its modes."""

from __future__ import annotations

import enum
import functools
import math

import numpy as np
import torch

from mdgraft._units import COULOMB
from mdgraft.kernels.fused.spreading import Array, compiled
from mdgraft.kernels.pme import moduli

Axes = tuple[Array, Array, Array]


class Interaction(enum.IntEnum):
    """What the mesh sums."""

    #: Of charges [e], as `pme_coulomb`.
    COULOMB = 0
    #: Of geometric coefficients [kJ^(1/2) mol^(-1/2) nm^3], as `pme_dispersion`.
    DISPERSION = 1


def mesh_setting(
    kind: int, alpha: float, grid: tuple[int, int, int], r: Array, v: float
) -> tuple[int, float, float, Array, Axes]:
    """Arguments of the loops over modes: kind, alpha, C / V, R^T R, 1 / B by axis."""
    factor = COULOMB / math.pi if kind == Interaction.COULOMB else -(math.pi**1.5) / 3
    bx, by, bz = (1 / moduli(n) for n in grid)
    return kind, alpha, factor / v if v else math.nan, r.T @ r, (bx, by, bz)


@functools.lru_cache(maxsize=8)
def mesh_influence(
    kind: int,
    alpha: float,
    grid: tuple[int, int, int],
    r: bytes,
    v: float,
    dtype: torch.dtype,
) -> Array:
    """The influence; those of the last few boxes are kept, as a box often stays the same."""
    out: Array = torch.empty(grid[0], grid[1], grid[2] // 2 + 1, dtype=dtype).numpy()
    fill_influence(*mesh_setting(kind, alpha, grid, np.frombuffer(r).reshape(3, 3), v), out)
    return out


@compiled
def _mode(kind: int, alpha: float, t: float) -> tuple[float, float, float]:
    """I(t) and its first two derivatives, for t = m^2."""
    a = (math.pi / alpha) ** 2
    decay = math.exp(-a * t)
    if kind == 0:
        # exp(-a t)/t
        if t == 0:
            return 0.0, 0.0, 0.0
        inverse = 1 / t
        value = decay * inverse
        return value, -value * (a + inverse), value * ((a + inverse) ** 2 + inverse * inverse)
    # 2 pi^(7/2) t^(3/2) erfc(b) + exp(-b^2) (alpha^3 - 2 alpha pi^2 t), with b^2 = a t
    root, p = math.sqrt(t), math.pi**3.5
    tail = math.erfc(math.sqrt(a) * root)
    value = 2 * p * t * root * tail + decay * (alpha**3 - 2 * alpha * math.pi**2 * t)
    slope = 3 * p * root * tail - 3 * alpha * math.pi**2 * decay
    # The curvature diverges at the origin, which no box moves.
    return value, slope, 1.5 * p * tail / root if t > 0 else 0.0


@compiled
def _wave(i: int, n: int, mirror: int) -> int:
    """Wave number of a point of the spectrum: -n/2 at the Nyquist frequency, or its mirror n/2."""
    return i if 2 * i < n or (mirror and 2 * i == n) else i - n


@compiled
def _square(m: tuple[int, int, int], matrix: Array) -> float:
    total = 0.0
    for a in range(3):
        for b in range(3):
            total += matrix[a, b] * m[a] * m[b]
    return total


@compiled
def _add_square(m: tuple[int, int, int], weight: float, matrix: Array) -> None:
    for a in range(3):
        for b in range(3):
            matrix[a, b] += weight * m[a] * m[b]


# In the spectrum of a real mesh the conjugate of a Nyquist frequency is at the same point, with
# a wave number of the other sign, which is another vector of a triclinic box. Both count half.
@compiled
def _share(i: int, j: int, k: int, n: tuple[int, int, int], mirror: int) -> float:
    if 2 * i == n[0] or 2 * j == n[1] or 2 * k == n[2]:
        return 0.5
    return 0.0 if mirror else 1.0


@compiled
def fill_influence(
    kind: int, alpha: float, factor: float, metric: Array, axes: Axes, out: Array
) -> None:
    """Write G to ``(nx, ny, nz // 2 + 1)``."""
    nx, ny, nz = len(axes[0]), len(axes[1]), len(axes[2])
    for i in range(nx):
        for j in range(ny):
            for k in range(nz // 2 + 1):
                g = 0.0
                for mirror in range(2):
                    share = _share(i, j, k, (nx, ny, nz), mirror)
                    if share > 0:
                        m = _wave(i, nx, mirror), _wave(j, ny, mirror), _wave(k, nz, mirror)
                        g += share * _mode(kind, alpha, _square(m, metric))[0]
                out[i, j, k] = factor * axes[0][i] * axes[1][j] * axes[2][k] * g


@compiled
def weigh_modes(spectrum: Array, influence: Array, nz: int, inverse: bool) -> float:
    """Energy of a spectrum F(Q), which becomes G F(Q) if it is to be transformed back."""
    total = 0.0
    for i in range(spectrum.shape[0]):
        for j in range(spectrum.shape[1]):
            row, g = spectrum[i, j], influence[i, j]
            # Half of the energy of conjugates is that of one of them.
            energy = 0.0
            for k in range(len(row)):
                energy += np.float64(g[k]) * (row[k].real ** 2 + row[k].imag ** 2)
            last = len(row) - 1
            energy -= 0.5 * g[0] * (row[0].real ** 2 + row[0].imag ** 2)
            if nz % 2 == 0:
                energy -= 0.5 * g[last] * (row[last].real ** 2 + row[last].imag ** 2)
            total += energy
            if inverse:
                for k in range(len(row)):
                    row[k] *= g[k]
    return total


@compiled
def virial(
    kind: int,
    alpha: float,
    factor: float,
    metric: Array,
    axes: Axes,
    spectrum: Array,
    sums: Array,
) -> None:
    """Add sum_m dG/dt |F(Q)|^2 m m^T, which is S in dE/dR = R S at a constant mesh."""
    nx, ny, nz = len(axes[0]), len(axes[1]), len(axes[2])
    for i in range(nx):
        for j in range(ny):
            for k in range(nz // 2 + 1):
                q = spectrum[i, j, k]
                pair = 1.0 if k == 0 or 2 * k == nz else 2.0
                power = pair * (np.float64(q.real) ** 2 + np.float64(q.imag) ** 2)
                power *= factor * axes[0][i] * axes[1][j] * axes[2][k]
                for mirror in range(2):
                    share = _share(i, j, k, (nx, ny, nz), mirror)
                    if share > 0:
                        m = _wave(i, nx, mirror), _wave(j, ny, mirror), _wave(k, nz, mirror)
                        slope = _mode(kind, alpha, _square(m, metric))[1]
                        _add_square(m, share * slope * power, sums)


@compiled
def weigh_tangent(
    kind: int,
    alpha: float,
    factor: float,
    metric: Array,
    axes: Axes,
    change: Array,
    growth: float,
    spectrum: Array,
    dspectrum: Array,
    sums: Array,
    dsums: Array,
) -> tuple[float, float]:
    """Energy and its change, when F(Q), the metric by ``change`` and ln V by ``growth`` change.

    The spectrum becomes G F(Q) and its change that of G F(Q); the sums are those of `virial` and
    their changes.
    """
    nx, ny, nz = len(axes[0]), len(axes[1]), len(axes[2])
    energy = denergy = 0.0
    for i in range(nx):
        for j in range(ny):
            for k in range(nz // 2 + 1):
                q, dq = spectrum[i, j, k], dspectrum[i, j, k]
                pair = 1.0 if k == 0 or 2 * k == nz else 2.0
                power = pair * (np.float64(q.real) ** 2 + np.float64(q.imag) ** 2)
                dpower = 2 * pair * (np.float64(q.real) * dq.real + np.float64(q.imag) * dq.imag)
                scale = factor * axes[0][i] * axes[1][j] * axes[2][k]
                g = dg = 0.0
                for mirror in range(2):
                    share = scale * _share(i, j, k, (nx, ny, nz), mirror)
                    if share != 0:
                        m = _wave(i, nx, mirror), _wave(j, ny, mirror), _wave(k, nz, mirror)
                        value, slope, curve = _mode(kind, alpha, _square(m, metric))
                        dt = _square(m, change)
                        g += share * value
                        dg += share * (slope * dt - value * growth)
                        _add_square(m, share * slope * power, sums)
                        dslope = curve * dt - slope * growth
                        _add_square(m, share * (dslope * power + slope * dpower), dsums)
                energy += 0.5 * g * power
                denergy += 0.5 * (dg * power + g * dpower)
                spectrum[i, j, k] = g * q
                dspectrum[i, j, k] = dg * q + g * dq
    return energy, denergy
