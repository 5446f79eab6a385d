"""The Tersoff bond-order potential."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, per_particle
from mdgraft.potentials.geometry import safe_norm

#: Parameters of each triple of elements with their units.
PARAMETERS = {
    "gamma": DIMENSIONLESS,
    "lambda3": "/nanometer",
    "c": DIMENSIONLESS,
    "d": DIMENSIONLESS,
    "h": DIMENSIONLESS,
    "n": DIMENSIONLESS,
    "beta": DIMENSIONLESS,
    "lambda2": "/nanometer",
    "B": ENERGY,
    "R": NANOMETER,
    "D": NANOMETER,
    "lambda1": "/nanometer",
    "A": ENERGY,
}
# Beyond these exponents the exponential is a constant, as in LAMMPS.
_LARGEST = 69.0776
_HUGE = 1.0e30


class Tersoff(AbstractAtomisticTerm):
    """Bond energies that depend on the neighbours of both atoms, in the form that LAMMPS has.

    Over all bonds i-j, each in both directions, and with sums over the other neighbours k of i ::

        E        = 1/2 sum_ij fC(r_ij) [A exp(-lambda1 r_ij) - b_ij B exp(-lambda2 r_ij)]
        b_ij     = (1 + (beta zeta_ij)**n)**(-1/(2 n))
        zeta_ij  = sum_k fC(r_ik) g(theta_ijk) exp[(lambda3 (r_ij - r_ik))**m]
        g(theta) = gamma (1 + c**2/d**2 - c**2/(d**2 + (h - cos theta)**2))
        fC(r)    = 1 below R - D, 0 above R + D, (1 - sin(pi (r - R)/(2 D)))/2 in between

    Parameters of the bond are those of the elements (i, j, j), those of the angle of (i, j, k).
    J. Tersoff, Phys. Rev. B 37, 6991 (1988); 39, 5566 (1989). A bond gives each of its atoms half.

    Parameters
    ----------
    elements
        ``(N,)`` place of each particle's element.
    triples
        ``(elements, elements, elements)`` place of each triple among the parameters.
    parameters
        ``(triples,)`` each, see `PARAMETERS`.
    m
        ``(triples,)`` exponents, which are constants.
    pbc
        Which box vectors are periods.
    """

    elements: Tensor
    triples: Tensor
    m: Tensor

    def __init__(
        self,
        *,
        elements: Tensor,
        triples: Tensor,
        parameters: Mapping[str, Tensor],
        m: Tensor,
        pbc: Periods,
    ) -> None:
        super().__init__(pbc=pbc)
        self.register_buffer("elements", elements)
        self.register_buffer("triples", triples)
        self.register_buffer("m", m)
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
        reach = values["R"] + values["D"]
        pairs = self.pairs(positions, box, reach, half=False)
        vectors = pairs.displacements(positions, box)
        own, other = self.elements[pairs.first], self.elements[pairs.second]
        bond = self.triples[own, other, other]
        r = safe_norm(vectors)
        # Bonds of nothing but zeros stay finite whatever their length.
        r = torch.where(r < 2 * reach.amax(), r, 2 * reach.amax())

        group = pairs.frame * positions.shape[1] + pairs.first
        ij, ik = _others(group)
        angle = self.triples[own[ij], other[ij], other[ik]]
        within = _cutoff(r[ik], values["R"][angle], values["D"][angle])
        cosine = (vectors[ij] * vectors[ik]).sum(dim=-1) / (r[ij] * r[ik])
        c2, d2 = values["c"][angle] ** 2, values["d"][angle] ** 2
        bend = (values["h"][angle] - cosine) ** 2
        g = values["gamma"][angle] * (1.0 + c2 / d2 - c2 / (d2 + bend))
        decay = _exponential(values["lambda3"][angle] * (r[ij] - r[ik]), self.m[angle])
        zeta = torch.zeros_like(r).index_add(0, ij, within * g * decay)

        beta, n = values["beta"][bond], values["n"][bond]
        # Without neighbours the order is one, where a power of zero has no slope.
        crowded = zeta > 0
        raised = (beta * torch.where(crowded, zeta, 1.0)) ** n
        order = torch.where(crowded, (1.0 + raised) ** (-0.5 / n), 1.0)
        repulsion = values["A"][bond] * torch.exp(-values["lambda1"][bond] * r)
        attraction = values["B"][bond] * torch.exp(-values["lambda2"][bond] * r)
        energies = _cutoff(r, values["R"][bond], values["D"][bond])
        energies = 0.25 * energies * (repulsion - order * attraction)
        return per_particle(positions, pairs, pairs.first, energies) + per_particle(
            positions, pairs, pairs.second, energies
        )


def _others(group: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different entries of the same group."""
    order = torch.argsort(group)
    _, place, counts = torch.unique_consecutive(
        group[order], return_inverse=True, return_counts=True
    )
    size = counts[place]
    start = (counts.cumsum(0) - counts)[place]
    entries = torch.arange(group.shape[0], device=group.device)
    first = torch.repeat_interleave(entries, size)
    before = (size.cumsum(0) - size)[first]
    second = start[first] + torch.arange(first.shape[0], device=group.device) - before
    different = first != second
    return order[first[different]], order[second[different]]


def _cutoff(r: Tensor, middle: Tensor, width: Tensor) -> Tensor:
    angle = (0.5 * math.pi * (r - middle) / width).clamp(-0.5 * math.pi, 0.5 * math.pi)
    return 0.5 * (1.0 - torch.sin(angle))


def _exponential(x: Tensor, m: Tensor) -> Tensor:
    # The exponents of the literature as products, whose derivatives are all finite at zero.
    linear, cubic = m == 1, m == 3
    other = torch.where(linear | cubic, 1.0, x) ** m
    exponent = torch.where(linear, x, torch.where(cubic, x * x * x, other))
    inside = exponent.abs() <= _LARGEST
    found = torch.exp(torch.where(inside, exponent, 0.0))
    return torch.where(inside, found, torch.where(exponent > 0, _HUGE, 0.0))
