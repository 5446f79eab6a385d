"""Effective medium theory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, per_particle
from mdgraft.potentials.geometry import safe_norm

#: Distance of nearest neighbours in fcc over the Wigner-Seitz radius, as ASE rounds it.
BETA = 1.809
#: Parameters of each element with their units.
PARAMETERS = {
    "E0": ENERGY,
    "s0": NANOMETER,
    "V0": ENERGY,
    "eta2": "/nanometer",
    "kappa": "/nanometer",
    "lambda": "/nanometer",
    "n0": "/nanometer**3",
}
# The cutoff function has this value at the distance of fourth neighbours.
_AT_FOURTH = 1e-4
# Neighbours of the first three shells in fcc.
_SHELLS = ((12.0, 1.0), (6.0, math.sqrt(2.0)), (24.0, math.sqrt(3.0)))


class EffectiveMedium(AbstractAtomisticTerm):
    """The effective medium potential of Jacobsen, Stoltze and Norskov, Surf. Sci. 366, 394 (1996).

    With ``w(r) = 1/(1 + exp(a (r - rc)))`` and the sums over neighbours j of each atom i ::

        sigma1_i = sum_j  (n0_j/n0_i) exp(-eta2_j (r_ij - beta s0_j)) w(r_ij)
        ds_i     = -ln(sigma1_i / (12 gamma1_i)) / (beta eta2_i)
        E_i      = E0_i [(1 + lambda_i ds_i) exp(-lambda_i ds_i) - 1]
                   + 6 V0_i exp(-kappa_i ds_i)
                   - sum_j V0_i/(2 gamma2_i) (n0_j/n0_i) exp(-kappa_j (r_ij/beta - s0_j)) w(r_ij)

    where the last sum is shared with the mirrored one of its neighbours. ``rc`` is the mean of the
    distances of third and fourth neighbours in an fcc crystal of the largest element considered,
    and gamma1 and gamma2 are the sums over three shells of neighbours in the perfect crystal.

    Parameters
    ----------
    elements
        ``(N,)`` place of each particle's element among the parameters.
    parameters
        ``(elements,)`` each, see `PARAMETERS`.
    largest_other
        Largest ``s0`` [nm] among elements that are considered though absent; 0 for none.
    reach
        Neighbours are counted up to ``reach[0] * rc + reach[1]`` [nm].
    pbc
        Which box vectors are periods.
    """

    elements: Tensor

    def __init__(
        self,
        *,
        elements: Tensor,
        parameters: Mapping[str, Tensor],
        largest_other: float,
        reach: tuple[float, float],
        pbc: Periods,
    ) -> None:
        super().__init__(pbc=pbc)
        self.register_buffer("elements", elements)
        self.largest_other = largest_other
        self.reach = reach
        for name, unit in PARAMETERS.items():
            self.add_parameter(name, parameters[name], unit)

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        e0, s0, v0, eta2, kappa, lambda_, n0 = (values[key] for key in PARAMETERS)
        shortest = BETA * s0.amax().clamp(min=self.largest_other)
        rc, fourth = 0.5 * (math.sqrt(3.0) + 2.0) * shortest, 2.0 * shortest
        slope = math.log(1.0 / _AT_FOURTH - 1.0) / (fourth - rc)
        gamma1 = torch.zeros_like(s0)
        gamma2 = torch.zeros_like(s0)
        for n, ratio in _SHELLS:
            r = ratio * BETA * s0
            x = n / 12.0 * _fermi(r, rc, slope)
            gamma1 = gamma1 + x * torch.exp(-eta2 * (r - BETA * s0))
            gamma2 = gamma2 + x * torch.exp(-kappa / BETA * (r - BETA * s0))

        cutoff = self.reach[0] * rc + self.reach[1]
        pairs = self.pairs(positions, box, cutoff, half=False)
        r = safe_norm(pairs.displacements(positions, box))
        inside = r < cutoff
        r = torch.where(inside, r, cutoff)
        i, j = self.elements[pairs.first], self.elements[pairs.second]
        weight = torch.where(inside, n0[j] / n0[i] * _fermi(r, rc, slope), 0.0)
        density = torch.exp(-eta2[j] * (r - BETA * s0[j])) * weight
        sigma1 = per_particle(positions, pairs, pairs.first, density)
        overlap = torch.exp(-kappa[j] * (r / BETA - s0[j])) * weight
        overlap = -0.5 * (v0 / gamma2)[i] * overlap
        # Both atoms have half of what either sees of the other.
        pair = per_particle(positions, pairs, pairs.first, 0.5 * overlap) + per_particle(
            positions, pairs, pairs.second, 0.5 * overlap
        )

        own = self.elements
        bound = sigma1 > 0
        reduced = torch.where(bound, sigma1, 1.0) / (12.0 * gamma1[own])
        ds = -torch.log(reduced) / (BETA * eta2[own])
        cohesive = e0[own] * (1.0 + lambda_[own] * ds) * torch.exp(-lambda_[own] * ds)
        atomic = cohesive + 6.0 * v0[own] * torch.exp(-kappa[own] * ds)
        return torch.where(bound, atomic, 0.0) + pair - e0[own]


def _fermi(r: Tensor, rc: Tensor, slope: Tensor) -> Tensor:
    return torch.sigmoid(-slope * (r - rc))
