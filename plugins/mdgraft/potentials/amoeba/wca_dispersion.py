"""Dispersion between a solute and implicit water in AMOEBA's WCA partition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.kernels.pairs import all_pairs
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.pair_forms import root_epsilon
from mdgraft.potentials.term import AbstractTerm

#: Scalar parameters, with units.
SCALARS = {
    "epso": ENERGY,
    "epsh": ENERGY,
    "rmino": NANOMETER,
    "rminh": NANOMETER,
    "awater": "nanometer**-3",
    "shctd": DIMENSIONLESS,
    "dispoff": NANOMETER,
    "slevy": DIMENSIONLESS,
}


class AmoebaWcaDispersion(AbstractTerm):
    r"""Attraction of water that fills the space around a solute without its other atoms.

    The attractive WCA part of the buffered 14-7 potential, u(x) = -epsilon up to the minimum and
    epsilon (R^14/x^14 - 2 R^7/x^7) beyond it, is integrated over all space farther than
    R/2 + dispoff from an atom, for the oxygen and two hydrogens of water, times
    slevy awater. For each other atom the part within its radius times shctd is taken out.
    epsilon = 4 e e_w/(sqrt e + sqrt e_w)^2 and R = 2 (r^3 + r_w^3)/(r^2 + r_w^2) mix parameters of
    atom and water.

    Parameters
    ----------
    radius, epsilon
        ``(N,)`` [nm], [kJ/mol]. An atom without either has no integral over the whole space.
    scalars
        Values ``()`` of `SCALARS`: well depths and minimum distances of water's oxygen and
        hydrogen, the number density of water, the scale of radii, the start of the integral, and
        the scale of the whole.

    References
    ----------
    M. J. Schnieders and J. W. Ponder, J. Chem. Theory Comput. 3, 2083 (2007).
    """

    # Empty: no pair is excluded.
    excluded: Tensor

    def __init__(self, radius: Tensor, epsilon: Tensor, scalars: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("excluded", torch.zeros(0, dtype=torch.long), persistent=False)
        self.add_parameter("radius", radius, NANOMETER)
        self.add_parameter("epsilon", epsilon, ENERGY)
        for name, unit in SCALARS.items():
            self.add_parameter(name, scalars[name], unit)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        pairs = all_pairs(positions.shape[1], self.excluded)
        r = safe_norm(pairs.displacements(positions, None))
        # Each atom shields the other.
        i = torch.cat([pairs.first, pairs.second])
        j = torch.cat([pairs.second, pairs.first])
        r = torch.cat([r, r], dim=-1)
        shield = values["radius"] * values["shctd"]
        whole = hidden = torch.zeros_like(positions[:, 0, 0])
        for site, count in (("o", 1.0), ("h", 2.0)):
            depth, minimum = _mix(
                values["radius"], values["epsilon"], values[f"rmin{site}"], values[f"eps{site}"]
            )
            start = 0.5 * minimum + values["dispoff"]
            present = (values["epsilon"] > 0) & (values["radius"] > 0)
            whole = (
                whole + count * torch.where(present, depth * _outside(start, minimum), 0.0).sum()
            )
            inside = depth[i] * _inside(r, start[i], shield[j], minimum[i])
            hidden = hidden + count * inside.sum(dim=-1)
        return values["slevy"] * values["awater"] * (whole - hidden)


def _mix(
    radius: Tensor, epsilon: Tensor, water_radius: Tensor, water_epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """Well depths and minimum distances of atoms with a site of water."""
    roots = root_epsilon(epsilon) + root_epsilon(water_epsilon)
    zero = roots == 0
    depth = 4 * water_epsilon * epsilon / torch.where(zero, 1.0, roots) ** 2
    squares = water_radius**2 + radius**2
    return depth, 2 * (water_radius**3 + radius**3) / squares


def _outside(start: Tensor, minimum: Tensor) -> Tensor:
    """Integral of u/epsilon over all space farther than ``start`` [nm^3]."""
    flat = -4 * math.pi / 3 * (minimum**3 - start**3) - 18 * math.pi / 11 * minimum**3
    ratio = (minimum / start) ** 7
    steep = 2 * math.pi * start**3 * ratio * (2 * ratio - 11) / 11
    return torch.where(start < minimum, flat, steep)


def _inside(r: Tensor, start: Tensor, shield: Tensor, minimum: Tensor) -> Tensor:
    """Integral of u/epsilon over the part of a sphere at ``r`` farther than ``start`` [nm^3]."""
    near, far = r - shield, r + shield
    lower = torch.where(start > near, start, near)
    # Up to the minimum u is constant.
    upper = torch.where(far < minimum, far, minimum)
    difference = r * r - shield * shield

    def constant(x: Tensor) -> Tensor:
        return x * x * (3 * x * x - 8 * r * x + 6 * difference)

    flat = -math.pi / (12 * r) * (constant(lower) - constant(upper))

    # Beyond it, two powers of the distance.
    begin = torch.where(lower > minimum, lower, minimum)

    def attraction(x: Tensor) -> Tensor:
        return (minimum / x) ** 7 * x * x * (15 * r * x - 10 * x * x - 6 * difference)

    def repulsion(x: Tensor) -> Tensor:
        return (minimum / x) ** 14 * x * x * (120 * r * x - 66 * x * x - 55 * difference)

    steep = (repulsion(begin) - repulsion(far)) / 22 - 2 * (attraction(begin) - attraction(far))
    steep = math.pi / (30 * r) * steep
    energy = torch.where(lower < minimum, flat, 0.0) + torch.where(far > minimum, steep, 0.0)
    return torch.where(start < far, energy, 0.0)
