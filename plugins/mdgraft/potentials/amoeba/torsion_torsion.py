"""Energies of AMOEBA tabulated over two consecutive dihedrals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._units import ENERGY
from mdgraft.potentials import geometry
from mdgraft.potentials.cmap import hermite
from mdgraft.potentials.term import AbstractTerm

#: Tables, each ``(sum of sizes^2,)``, with units.
TABLES = {
    "energy": ENERGY,
    "de_dx": "kilojoule/(mole*degree)",
    "de_dy": "kilojoule/(mole*degree)",
    "de_dxy": "kilojoule/(mole*degree**2)",
}


class AmoebaTorsionTorsion(AbstractTerm):
    """Bicubic interpolation of tabulated energies over the dihedrals 1-2-3-4 and 2-3-4-5.

    Values and slopes at the four corners of a grid cell determine the polynomial in it, so that
    the energy is once continuously differentiable; second derivatives may jump at grid lines.
    Where the centre, particle 3, has its substituents in the negative sense (the triple product of
    the vectors from it to the check particle, 2 and 4), both dihedrals change sign. With three
    consecutive particles in line there is no energy, as in OpenMM.

    As in OpenMM, too, the cell is found as if every grid spanned 360 degrees, so that one that
    spans less is extrapolated from the wrong cells.

    Parameters
    ----------
    particles
        ``(torsions, 6)`` indices: five particles, then the one that decides on the sense, or -1.
    grids
        ``(torsions,)`` the grid that each torsion uses.
    sizes
        Points along each axis of each grid.
    starts, widths
        ``(grids, 2)`` first angle and cell width along each axis [degree].
    tables
        Values of `TABLES` by name: energy and its derivatives, all grids one after the other, each
        with the second angle varying fastest.
    periodic
        Whether bond vectors are those of the nearest periodic images.

    References
    ----------
    W. H. Press et al., Numerical Recipes, section 3.6 (1992).
    """

    particles: Tensor
    grids: Tensor
    sizes: Tensor
    offsets: Tensor
    starts: Tensor
    widths: Tensor

    def __init__(
        self,
        particles: Tensor,
        grids: Tensor,
        sizes: Sequence[int],
        starts: Tensor,
        widths: Tensor,
        tables: Mapping[str, Tensor],
        *,
        periodic: bool,
    ) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self.register_buffer("grids", grids)
        size = torch.tensor(list(sizes), dtype=torch.long)
        self.register_buffer("sizes", size)
        self.register_buffer("offsets", torch.cumsum(size**2, 0) - size**2, persistent=False)
        self.register_buffer("starts", starts)
        self.register_buffer("widths", widths)
        for name, unit in TABLES.items():
            self.add_parameter(name, tables[name], unit)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        chain, check = self.particles[:, :5], self.particles[:, 5]
        degrees = [
            180 / math.pi * geometry.dihedral(positions, box, chain[:, first : first + 4])
            for first in (0, 1)
        ]
        sense = self._sense(positions, box, check)
        angles = torch.stack(degrees, dim=-1) * sense.unsqueeze(-1)

        size = self.sizes[self.grids]
        width = self.widths[self.grids]
        beyond = angles - self.starts[self.grids]
        scaled = beyond / width
        # Rounded up just before the next cell.
        place = beyond.detach() * (size.unsqueeze(-1) - 1) / 360 + 1e-6
        last = (size - 2).unsqueeze(-1)
        cell = torch.floor(place).long().clamp(min=0).minimum(last)
        value, slope = hermite(scaled - cell)
        # The four corners of the cell, ``(frames, torsions, 2, 2)``.
        step = torch.arange(2, device=positions.device)
        row = (cell[..., 0, None] + step) * size[:, None]
        point = row[..., :, None] + (cell[..., 1, None] + step)[..., None, :]
        point = point + self.offsets[self.grids][:, None, None]

        slope = slope * width.unsqueeze(-1)
        x, y = ((value[..., d, :], slope[..., d, :]) for d in (0, 1))
        energy = torch.zeros_like(scaled[..., 0])
        for name, along_x, along_y in zip(
            TABLES, (x[0], x[1], x[0], x[1]), (y[0], y[0], y[1], y[1]), strict=True
        ):
            weight = along_x[..., :, None] * along_y[..., None, :]
            energy = energy + (weight * values[name][point]).sum(dim=(-2, -1))
        return torch.where(self._in_line(positions, box, chain), 0.0, energy).sum(dim=-1)

    def _sense(self, positions: Tensor, box: Tensor | None, check: Tensor) -> Tensor:
        """1 or -1 for each torsion ``(frames, torsions)``."""
        centre = self.particles[:, 2]
        others = (check.clamp(min=0), self.particles[:, 1], self.particles[:, 3])
        a, b, d = (geometry.displacement(positions.detach(), box, centre, i) for i in others)
        product = (a * torch.linalg.cross(b, d)).sum(dim=-1).detach()
        return torch.where((product < 0) & (check >= 0), -1.0, 1.0).to(positions)

    def _in_line(self, positions: Tensor, box: Tensor | None, chain: Tensor) -> Tensor:
        """Whether three consecutive particles are collinear ``(frames, torsions)``."""
        bonds = [
            geometry.rescaled(
                geometry.displacement(positions.detach(), box, chain[:, k], chain[:, k + 1])
            )
            for k in range(4)
        ]
        bends = [geometry.vanishes(torch.linalg.cross(bonds[k], bonds[k + 1])) for k in range(3)]
        return bends[0] | bends[1] | bends[2]
