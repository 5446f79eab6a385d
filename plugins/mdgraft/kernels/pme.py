"""Smooth particle-mesh Ewald sums for Coulomb (1/r) and dispersion (1/r^6) interactions.

Essmann et al., J. Chem. Phys. 103, 8577 (1995), with the fifth-order B-splines and the grid
conventions of OpenMM, so that the same alpha and grid give the same energy.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.periodic import reciprocal, volume

#: Order of the B-splines. Their second derivatives are continuous, so Hessians are too.
ORDER = 5


def spline(fraction: Tensor, derivative: int = 0) -> Tensor:
    """B-spline weights ``(..., ORDER)`` of the grid points at and after a position.

    Entry k is M_p(w + p - 1 - k), from M_p(u) = [u M_{p-1}(u) + (p - u) M_{p-1}(u - 1)]/(p - 1);
    derivatives in w follow from M_p'(u) = M_{p-1}(u) - M_{p-1}(u - 1).
    """
    w, zero = fraction, torch.zeros_like(fraction)
    weights = [1 - w, w]
    for p in range(3, ORDER - derivative + 1):
        lower = [zero, *weights, zero]
        weights = [
            ((w + p - 1 - k) * lower[k] + (1 + k - w) * lower[k + 1]) / (p - 1) for k in range(p)
        ]
    for _ in range(derivative):
        lower = [zero, *weights, zero]
        weights = [lower[k] - lower[k + 1] for k in range(len(weights) + 1)]
    return torch.stack(weights, dim=-1)


# The spline at the knots 4, 3, 2, 1, 0.
_KNOTS = np.array([1, 11, 11, 1, 0]) / 24


# An array, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=64)
def moduli(n: int) -> np.ndarray:
    """Squared moduli of the discrete Fourier transform of the spline, ``(n,)``."""
    wrapped = np.zeros(n)
    np.add.at(wrapped, np.arange(ORDER) % n, _KNOTS)
    squared: np.ndarray = np.abs(np.fft.fft(wrapped)) ** 2
    # An odd order vanishes at the Nyquist frequency of an even grid: interpolate there.
    for i in range(n):
        if squared[i] < 1e-7:
            squared[i] = 0.5 * (squared[i - 1] + squared[(i + 1) % n])
    return squared


def _spectrum(
    positions: Tensor, charges: Tensor, box: Tensor, grid: tuple[int, int, int]
) -> Tensor:
    """|FFT|^2 of the charges spread on the grid: ``(frames, *grid)``."""
    fraction, flat = place(positions, box, grid)
    wx, wy, wz = spline(fraction).unbind(dim=-2)
    spread = ((charges.unsqueeze(-1) * wx)[..., :, None, None] * wy[..., None, :, None]) * wz[
        ..., None, None, :
    ]
    transform = transformed(spread, flat, grid)
    result: Tensor = transform.real**2 + transform.imag**2
    return result


def place(
    positions: Tensor, box: Tensor, grid: tuple[int, int, int], *, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Where particles are on the grid, whose origin may be shifted by a fraction of the box.

    Returns
    -------
    tuple of Tensor
        Place within a cell of the grid ``(frames, N, 3)``, and indices of the grid points that
        count into the flattened grids of all frames ``(frames, N, ORDER, ORDER, ORDER)``.
    """
    size = torch.tensor(grid, device=positions.device)
    fractional = positions @ reciprocal(box) + shift
    scaled = (fractional - torch.floor(fractional.detach())) * size
    cell = torch.floor(scaled.detach())
    index = (cell.long().unsqueeze(-1) + torch.arange(ORDER, device=positions.device)) % size[
        :, None
    ]
    x, y, z = index.unbind(dim=-2)
    frame = torch.arange(positions.shape[0], device=positions.device).reshape(-1, 1, 1, 1, 1)
    flat = (frame * grid[0] + x[..., :, None, None]) * grid[1] + y[..., None, :, None]
    return scaled - cell, flat * grid[2] + z[..., None, None, :]


def transformed(spread: Tensor, flat: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Fourier transform ``(frames, *grid)`` of what particles put on grid points."""
    n_frames = spread.shape[0]
    # The transform of no frames at all is an error on some devices.
    n_meshes = max(n_frames, 1)
    density = torch.zeros(
        n_meshes * math.prod(grid), dtype=spread.dtype, device=spread.device
    ).index_add(0, flat.reshape(-1), spread.reshape(-1))
    transform: Tensor = torch.fft.fftn(density.reshape(n_meshes, *grid), dim=(-3, -2, -1))
    return transform[:n_frames]


def frequencies(box: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Squared reciprocal vectors m^2 ``(frames, *grid)`` and the product of spline moduli."""
    # OpenMM assigns the Nyquist frequency of an even grid to -n/2, as fftfreq does.
    index = [torch.fft.fftfreq(n, 1 / n, dtype=box.dtype, device=box.device) for n in grid]
    m = torch.stack(torch.meshgrid(*index, indexing="ij"), dim=-1)
    vectors = m @ reciprocal(box).transpose(-1, -2)[:, None, None]
    bx, by, bz = (torch.as_tensor(moduli(n), dtype=box.dtype, device=box.device) for n in grid)
    return (vectors * vectors).sum(dim=-1), bx[:, None, None] * by[:, None] * bz


def pme_coulomb(
    positions: Tensor, charges: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space Coulomb energy by smooth PME.

    E = 1/(2 pi V 4 pi eps0) sum_{m != 0} exp(-pi^2 m^2/alpha^2) / m^2 B(m) |F(Q)(m)|^2.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    charges
        ``(N,)`` [e].
    box
        ``(frames, 3, 3)`` [nm].
    alpha
        Splitting parameter [1/nm].
    grid
        Numbers of grid points along the three box vectors.

    Returns
    -------
    Tensor
        ``(frames,)`` [kJ/mol], self-interaction included.
    """
    m_squared, moduli = frequencies(box, grid)
    origin = torch.zeros(grid, dtype=torch.bool, device=box.device)
    origin[0, 0, 0] = True
    m_squared = torch.where(origin, 1.0, m_squared)
    influence = torch.exp(-((math.pi / alpha) ** 2) * m_squared) / (m_squared * moduli)
    influence = torch.where(origin, 0.0, influence)
    total = (influence * _spectrum(positions, charges, box, grid)).sum(dim=(-3, -2, -1))
    return COULOMB / (2 * math.pi * volume(box)) * total


def pme_dispersion(
    positions: Tensor, c6: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
) -> Tensor:
    """Reciprocal-space dispersion energy, -1/2 sum_ij c6_i c6_j / r^6, by smooth PME.

    Essmann et al. (1995), eq. 5.6; unlike for Coulomb the zero frequency counts.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    c6
        ``(N,)`` geometric coefficients, 2 sqrt(epsilon) sigma^3 [kJ^(1/2) mol^(-1/2) nm^3].
    box, alpha, grid
        As in `pme_coulomb`.

    Returns
    -------
    Tensor
        ``(frames,)`` [kJ/mol], self-interaction included.
    """
    m_squared, moduli = frequencies(box, grid)
    zero = m_squared == 0
    m = torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, m_squared)))
    b = math.pi / alpha * m
    influence = 2 * math.pi**3.5 * torch.erfc(b) * m * m_squared + torch.exp(-b * b) * (
        alpha**3 - 2 * alpha * math.pi**2 * m_squared
    )
    total = (influence / moduli * _spectrum(positions, c6, box, grid)).sum(dim=(-3, -2, -1))
    result: Tensor = -(math.pi**1.5) / (6 * volume(box)) * total
    return result
