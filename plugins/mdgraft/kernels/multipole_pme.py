"""Smooth particle-mesh Ewald sums of charges, dipoles and quadrupoles.

C. Sagui, L. G. Pedersen and T. A. Darden, J. Chem. Phys. 120, 73 (2004), with the B-splines of
`mdgraft.kernels.pme` and, as in Tinker and OpenMM's AMOEBA, their moduli corrected for the least
squared error.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.periodic import reciprocal, volume
from mdgraft.kernels.pme import ORDER, frequencies, place, spline, transformed

_IMAGES = 50


# An array, since a tensor made inside a torch.func transform must not outlive it.
@functools.lru_cache(maxsize=64)
def _correction(n: int) -> np.ndarray:
    """Squared factor of the moduli for the least squared error, ``(n,)``."""
    # OpenMM takes the middle of an odd grid for negative.
    index = np.arange(n)[:, None]
    k = np.where(index + 1 > n // 2, index - n, index) / n
    images = np.concatenate([np.arange(1, _IMAGES + 1), -np.arange(1, _IMAGES + 1)])
    ratio = k / (k + images)
    first = 1 + (ratio**ORDER).sum(axis=1)
    second = 1 + (ratio ** (2 * ORDER)).sum(axis=1)
    squared: np.ndarray = (second / first) ** 2
    return squared


class MultipoleMesh:
    """Reciprocal space for multipoles at given positions.

    A set of multipoles is a spectrum; energies are a symmetric bilinear form of two spectra.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    box
        ``(frames, 3, 3)`` [nm].
    alpha
        Splitting parameter [1/nm].
    grid
        Numbers of grid points along the three box vectors.
    """

    def __init__(
        self, positions: Tensor, box: Tensor, *, alpha: float, grid: tuple[int, int, int]
    ) -> None:
        self._grid = grid
        # OpenMM's origin, which matters where the number of points is odd.
        fraction, self._flat = place(positions, box, grid, shift=0.5)
        self._splines = [spline(fraction, derivative) for derivative in range(3)]
        size = torch.tensor(grid, dtype=positions.dtype, device=positions.device)
        # Derivatives of places on the grid in Cartesian coordinates, (frames, 3, 3).
        self._jacobian = reciprocal(box) * size

        m_squared, moduli = frequencies(box, grid)
        cx, cy, cz = (torch.as_tensor(_correction(n)).to(moduli) for n in grid)
        moduli = moduli * (cx[:, None, None] * cy[:, None] * cz)
        origin = m_squared.detach() == 0
        m_squared = torch.where(origin, 1.0, m_squared)
        influence = torch.exp(-((math.pi / alpha) ** 2) * m_squared) / (m_squared * moduli)
        scale = COULOMB / (math.pi * volume(box))
        self._influence = torch.where(origin, 0.0, influence) * scale[:, None, None, None]

    def spread(
        self, charge: Tensor | None, dipole: Tensor, quadrupole: Tensor | None = None
    ) -> Tensor:
        """Spectrum of multipoles, q + d.grad + Q:grad grad of a charge at each site.

        Parameters
        ----------
        charge
            ``(N,)`` [e], or None for none.
        dipole
            ``(frames, N, 3)`` [e nm].
        quadrupole
            ``(frames, N, 3, 3)`` symmetric [e nm^2], or None.

        Returns
        -------
        Tensor
            ``(frames, *grid)``, complex.
        """
        d = torch.einsum("fna,fak->fnk", dipole, self._jacobian)
        (x0, y0, z0), (x1, y1, z1) = (w.unbind(dim=-2) for w in self._splines[:2])

        def outer(weight: Tensor | float, x: Tensor, y: Tensor) -> Tensor:
            product = x.unsqueeze(-1) * y.unsqueeze(-2)
            return product * weight[..., None, None] if isinstance(weight, Tensor) else product

        plane = outer(1.0, x0, y0)
        flat = outer(d[..., 0], x1, y0) + outer(d[..., 1], x0, y1)
        if charge is not None:
            flat = flat + charge[..., None, None] * plane
        tilted = d[..., 2, None, None] * plane
        steep: Tensor | None = None
        if quadrupole is not None:
            x2, y2, z2 = self._splines[2].unbind(dim=-2)
            q = self._jacobian.transpose(-1, -2)[:, None] @ quadrupole @ self._jacobian[:, None]
            flat = flat + outer(q[..., 0, 0], x2, y0) + outer(q[..., 1, 1], x0, y2)
            flat = flat + outer(2 * q[..., 0, 1], x1, y1)
            tilted = tilted + outer(2 * q[..., 0, 2], x1, y0) + outer(2 * q[..., 1, 2], x0, y1)
            steep = (q[..., 2, 2, None, None] * plane).unsqueeze(-1) * z2[..., None, None, :]
        total = flat.unsqueeze(-1) * z0[..., None, None, :]
        total = total + tilted.unsqueeze(-1) * z1[..., None, None, :]
        total = total if steep is None else total + steep
        return transformed(total, self._flat, self._grid)

    def energy(self, first: Tensor, second: Tensor) -> Tensor:
        """Interaction of two sets ``(frames,)`` [kJ/mol]; half of it with itself is its energy."""
        product = first.real * second.real + first.imag * second.imag
        return (self._influence * product).sum(dim=(-3, -2, -1))

    def field(self, spectrum: Tensor) -> Tensor:
        """Minus the gradient of a set's potential at the sites ``(frames, N, 3)`` [kJ/mol/nm/e]."""
        n_points = math.prod(self._grid)
        potential = torch.fft.ifftn(self._influence * spectrum, dim=(-3, -2, -1)).real * n_points
        values = potential.reshape(-1)[self._flat]
        (x0, y0, z0), (x1, y1, z1) = (w.unbind(dim=-2) for w in self._splines[:2])

        def contract(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return torch.einsum("fnxyz,fnx,fny,fnz->fn", values, x, y, z)

        slopes = (contract(x1, y0, z0), contract(x0, y1, z0), contract(x0, y0, z1))
        return -torch.einsum("fnk,fak->fna", torch.stack(slopes, dim=-1), self._jacobian)
