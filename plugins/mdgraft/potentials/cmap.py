"""Torsion correction maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import ENERGY
from mdgraft.potentials import geometry
from mdgraft.potentials.term import AbstractTerm


# An array, since a tensor made inside a torch.func transform must not outlive it.
@functools.cache
def spline_slopes(size: int) -> np.ndarray:
    """Matrix from ``size`` values on a periodic unit grid to the slopes of their cubic spline.

    The spline's continuous second derivative asks for
    ``slope[i-1] + 4 slope[i] + slope[i+1] = 3 (value[i+1] - value[i-1])``.
    """
    identity = np.eye(size)
    after, before = np.roll(identity, 1, axis=1), np.roll(identity, -1, axis=1)
    slopes: np.ndarray = np.linalg.solve(before + 4.0 * identity + after, 3.0 * (after - before))
    return slopes


def hermite(t: Tensor) -> tuple[Tensor, Tensor]:
    """Cubic Hermite weights of the values and of the slopes at 0 and 1, each ``(..., 2)``."""
    s = 1.0 - t
    return (
        torch.stack([s * s * (1.0 + 2.0 * t), t * t * (3.0 - 2.0 * t)], dim=-1),
        torch.stack([s * s * t, -t * t * s], dim=-1),
    )


class CMAPTorsion(AbstractTerm):
    """Energies tabulated over two dihedrals, interpolated by periodic bicubic splines.

    The spline is a constant linear map of the tabulated energies, so that derivatives in them are
    exact to every order; in the dihedrals it is twice continuously differentiable.

    Parameters
    ----------
    particles
        ``(torsions, 8)`` particle indices, four for the first dihedral and four for the second.
    maps
        ``(torsions,)`` the map that each torsion uses.
    sizes
        Grid points along each axis of each map, at least 2.
    energy
        ``(sum of sizes^2,)`` [kJ/mol]: all maps one after the other. The energy of a map of size
        n at ``(2 pi i / n, 2 pi j / n)`` is its element ``i + n j``.
    periodic
        Whether bond vectors are those of the nearest periodic images.

    Raises
    ------
    InvalidInputError
        If sizes, map indices and energies disagree.

    References
    ----------
    A. D. MacKerell, M. Feig and C. L. Brooks, J. Comput. Chem. 25, 1400 (2004).
    """

    replays = True

    particles: Tensor
    #: ``(torsions,)`` where each torsion's map begins, and its size.
    start: Tensor
    size: Tensor

    def __init__(
        self,
        particles: Tensor,
        maps: Tensor,
        sizes: Sequence[int],
        energy: Tensor,
        *,
        periodic: bool,
    ) -> None:
        super().__init__(periodic=periodic)
        if any(size < 2 for size in sizes):
            raise InvalidInputError(
                f"sizes: got {list(sizes)}; a periodic spline needs at least 2 points an axis"
            )
        n_values = sum(size * size for size in sizes)
        if energy.shape != (n_values,):
            raise InvalidInputError(
                f"energy: got shape {tuple(energy.shape)}, wanted ({n_values},) "
                f"for maps of sizes {list(sizes)}"
            )
        if maps.numel() and not 0 <= int(maps.min()) <= int(maps.max()) < len(sizes):
            raise InvalidInputError(
                f"maps: indices reach from {int(maps.min())} to {int(maps.max())}, "
                f"there are {len(sizes)} maps"
            )
        size = torch.as_tensor(list(sizes), dtype=torch.long)
        start = torch.cumsum(size * size, dim=0) - size * size
        self.register_buffer("particles", particles)
        self.register_buffer("start", start[maps])
        self.register_buffer("size", size[maps])
        self.add_parameter("energy", energy, ENERGY)

        # Maps of one size are processed together; "order" undoes the grouping.
        self._sizes = tuple(sorted(set(sizes)))
        members = []
        for n in self._sizes:
            chosen = (size == n).nonzero().squeeze(-1)
            span = torch.arange(n * n)
            # Rows of a grid run over the second dihedral, columns over the first.
            grids = (start[chosen][:, None] + span).reshape(-1, n, n)
            members.append(grids.reshape(-1))
            self.register_buffer(f"_grids_{n}", grids, persistent=False)
            self.register_buffer(f"_slopes_{n}", torch.tensor(spline_slopes(n)), persistent=False)
        order = torch.argsort(torch.cat(members)) if members else torch.empty(0, dtype=torch.long)
        self.register_buffer("_order", order, persistent=False)

    def _tables(self, energy: Tensor) -> Tensor:
        """Values, slopes along each axis and cross slopes ``(2, 2, grid points)``, unit grid.

        The first axis tells whether the slope along the first dihedral is taken, the second axis
        whether the one along the second.
        """
        parts = []
        for n in self._sizes:
            value = energy[self.get_buffer(f"_grids_{n}")]
            slopes = self.get_buffer(f"_slopes_{n}")
            first, second = value @ slopes.mT, slopes @ value
            both = second @ slopes.mT
            parts.append(torch.stack([value, second, first, both]).reshape(2, 2, -1))
        return torch.cat(parts, dim=-1)[..., self.get_buffer("_order")]

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        if not self._sizes:
            return 0.0 * positions.sum(dim=(-2, -1))
        corners, weights = [], []
        for particles in (self.particles[:, :4], self.particles[:, 4:]):
            phi = geometry.dihedral(positions, box, particles)
            place = torch.remainder(phi, 2.0 * math.pi) / (2.0 * math.pi) * self.size
            cell = torch.minimum(torch.floor(place.detach()).long(), self.size - 1)
            corners.append(torch.stack([cell, (cell + 1) % self.size], dim=-1))
            weights.append(torch.stack(hermite(place - cell), dim=-2))
        # (frames, torsions, corner of the first axis, corner of the second)
        index = corners[0].unsqueeze(-1) + (self.size[:, None] * corners[1]).unsqueeze(-2)
        patch = self._tables(values["energy"])[..., self.start[:, None, None] + index]
        return torch.einsum("ftai,ftbj,abftij->f", *weights, patch)
