"""Energies and fields of charges, dipoles and quadrupoles, by pairs.

A quadrupole Q counts as Q : grad grad of a charge, a third of Buckingham's traceless one. Radial
factors k_n stand for those of 1/r: 1/r, 1/r^3, 3/r^5, 15/r^7, 105/r^9, damped, scaled or screened.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft.kernels.pairs import Pairs

Radial = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Multipoles of particles or of one particle of each pair.

    Attributes
    ----------
    charge, dipole, quadrupole
        ``(...)`` [e], ``(..., 3)`` [e nm], ``(..., 3, 3)`` traceless and symmetric [e nm^2].
    """

    charge: Tensor
    dipole: Tensor
    quadrupole: Tensor

    def at(self, pairs: Pairs, particles: Tensor) -> Moments:
        """Those of one particle of each pair."""
        dipole, quadrupole = (pairs.at(m, particles) for m in (self.dipole, self.quadrupole))
        return Moments(self.charge[particles], dipole, quadrupole)


def coulomb_radial(r_squared: Tensor, count: int) -> Radial:
    """Radial factors of 1/r."""
    inverse = 1 / r_squared
    factors = [torch.sqrt(inverse)]
    for n in range(1, count):
        factors.append((2 * n - 1) * factors[-1] * inverse)
    return tuple(factors)


def ewald_radial(r_squared: Tensor, count: int, alpha: float) -> Radial:
    """Radial factors of erfc(alpha r)/r."""
    inverse, r = 1 / r_squared, torch.sqrt(r_squared)
    gauss = torch.exp(-(alpha**2) * r_squared) / (math.sqrt(math.pi) * alpha)
    factors = [torch.erfc(alpha * r) / r]
    for n in range(1, count):
        factors.append(((2 * n - 1) * factors[-1] + (2 * alpha**2) ** n * gauss) * inverse)
    return tuple(factors)


def multipole_energy(i: Moments, j: Moments, r: Tensor, k: Radial) -> Tensor:
    """Interaction of two multipoles, ``r`` ``(..., 3)`` from the first to the second."""
    ri, rj = _dot(i.dipole, r), _dot(j.dipole, r)
    qi, qj = _times(i.quadrupole, r), _times(j.quadrupole, r)
    rri, rrj = _dot(qi, r), _dot(qj, r)
    both = (i.quadrupole * j.quadrupole).sum(dim=(-2, -1))
    energy = k[0] * i.charge * j.charge
    energy = energy + k[1] * (j.charge * ri - i.charge * rj + _dot(i.dipole, j.dipole))
    mixed = _dot(j.dipole, qi) - _dot(i.dipole, qj) + both
    energy = energy + k[2] * (j.charge * rri + i.charge * rrj - ri * rj + 2 * mixed)
    energy = energy + k[3] * (ri * rrj - rri * rj - 4 * _dot(qi, qj))
    return energy + k[4] * rri * rrj


def multipole_potential(source: Moments, r: Tensor, k: Radial) -> Tensor:
    """Potential of a multipole at ``r`` from it; ``k`` begins with the factor of 1/r."""
    q = _times(source.quadrupole, r)
    return k[0] * source.charge + k[1] * _dot(source.dipole, r) + k[2] * _dot(q, r)


def multipole_field(source: Moments, r: Tensor, k: Radial) -> Tensor:
    """Field of a multipole at ``r`` from it; ``k`` begins with the factor of 1/r^3."""
    q = _times(source.quadrupole, r)
    along = k[0] * source.charge + k[1] * _dot(source.dipole, r) + k[2] * _dot(q, r)
    return along[..., None] * r - k[0][..., None] * source.dipole - 2 * k[1][..., None] * q


def dipole_field(dipole: Tensor, r: Tensor, k: Radial) -> Tensor:
    """Field of a dipole at ``r`` from it; ``k`` begins with the factor of 1/r^3."""
    return (k[1] * _dot(dipole, r))[..., None] * r - k[0][..., None] * dipole


def both_ways(pairs: Pairs, at_first: Tensor, at_second: Tensor, like: Tensor) -> Tensor:
    """Sum over pairs of what each particle of a pair receives, shaped like the positions."""
    total = torch.zeros_like(like)
    return pairs.add_at(pairs.add_at(total, pairs.first, at_first), pairs.second, at_second)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Sums over an axis of three numbers are slow.
    (ax, ay, az), (bx, by, bz) = a.unbind(dim=-1), b.unbind(dim=-1)
    return ax * bx + ay * by + az * bz


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
