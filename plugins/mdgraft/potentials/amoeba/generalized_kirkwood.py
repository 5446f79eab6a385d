"""Generalized Kirkwood solvation of multipoles and of the dipoles that they induce."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import COULOMB, DIMENSIONLESS, NANOMETER, SURFACE_ENERGY
from mdgraft.kernels.pairs import Pairs
from mdgraft.potentials.amoeba.interactions import Moments
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.term import AbstractTerm

#: Of the distance at which the reaction field of two sites takes its form at contact.
_REACH = 2.455
#: Largest effective radius [nm].
_LARGEST = 3.0
_VOLUME = 4 * math.pi / 3

#: Parameters of particles and single numbers, with their units.
PARTICLE = {
    "radius": NANOMETER,
    "scaling_factor": DIMENSIONLESS,
    "descreen_radius": NANOMETER,
}
SCALARS = {
    "solvent_dielectric": DIMENSIONLESS,
    "solute_dielectric": DIMENSIONLESS,
    "dielectric_offset": NANOMETER,
    "descreen_offset": NANOMETER,
    "probe_radius": NANOMETER,
    "surface_area_factor": SURFACE_ENERGY,
}


@dataclasses.dataclass(frozen=True)
class Solvation:
    """Constants of the model.

    Attributes
    ----------
    cavity
        Whether the energy of the cavity counts.
    tanh
        Whether the integral over the solute is rescaled, by parameters ``tanh_parameters``.
    """

    cavity: bool = True
    tanh: bool = False


class GeneralizedKirkwood(AbstractTerm):
    """Parameters of an implicit solvent, whose energy is part of that of the multipoles.

    The multipoles' term borrows these values: induced dipoles feel the reaction field, so that the
    energies cannot be told apart. The energy of this term is zero, as OpenMM has it.

    Parameters
    ----------
    parameters
        By the names in `PARTICLE` ``(N,)`` and `SCALARS` ``()``, and ``tanh_parameters`` ``(3,)``
        with rescaling.
    solvation
        Constants of the model.
    """

    def __init__(self, parameters: Mapping[str, Tensor], solvation: Solvation) -> None:
        super().__init__()
        self.solvation = solvation
        for name, unit in (PARTICLE | SCALARS).items():
            self.add_parameter(name, parameters[name], unit)
        if solvation.tanh:
            self.add_parameter("tanh_parameters", parameters["tanh_parameters"], DIMENSIONLESS)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Zero for each frame ``(frames,)``."""
        return 0.0 * positions.sum(dim=(-2, -1))


@dataclasses.dataclass(frozen=True)
class ReactionField:
    """Radial factors of the reaction field, of pairs or of each site with itself.

    ``a[l]`` stands for the factor of 1/r^(2l+1) that a moment of order l has in Coulomb's law;
    ``b`` and ``c`` are what -1/r d/dr makes of it, once and twice.
    """

    a: tuple[Tensor, Tensor, Tensor]
    b: tuple[Tensor, Tensor, Tensor]
    c: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, r_squared: Tensor, product: Tensor, dielectric: Tensor) -> ReactionField:
        """Factors at distances, for products of effective radii."""
        decay = torch.exp(-r_squared / (_REACH * product))
        f = torch.rsqrt(r_squared + product * decay)
        w, v = 1 - decay / _REACH, 2 * decay / (_REACH**2 * product)
        # Weights of charges, dipoles and quadrupoles: (l + 1)(1 - e)/(l + (l + 1) e).
        d0, d1, d2 = (
            COULOMB * (n + 1) * (1 - dielectric) / (n + (n + 1) * dielectric) for n in range(3)
        )
        f3, f5, f7, f9 = f**3, f**5, f**7, f**9
        return cls(
            (d0 * f, d1 * f3, 3 * d2 * f5),
            (d0 * f3 * w, 3 * d1 * f5 * w, 15 * d2 * f7 * w),
            (
                d0 * (3 * f5 * w * w - f3 * v),
                d1 * (15 * f7 * w * w - 3 * f5 * v),
                d2 * (105 * f9 * w * w - 15 * f7 * v),
            ),
        )

    def energy(self, source: Moments, other: Moments, r: Tensor) -> Tensor:
        """Energy of ``other`` at ``r`` in the reaction potential of ``source``."""
        a, b, c = self.a, self.b, self.c
        q, s = _times(source.quadrupole, r), _dot(source.dipole, r)
        p, t = _times(other.quadrupole, r), _dot(other.dipole, r)
        u, trace = _dot(q, r), _trace(other.quadrupole)
        potential = source.charge * a[0] + s * a[1] + u * a[2]
        slope = source.charge * b[0] + s * b[1] + u * b[2]
        curvature = source.charge * c[0] + s * c[1] + u * c[2]
        energy = other.charge * potential - t * slope
        energy = energy + _dot(source.dipole, other.dipole) * a[1]
        energy = energy + 2 * _dot(other.dipole, q) * a[2]
        energy = energy - trace * slope + _dot(p, r) * curvature
        energy = energy - 2 * _dot(source.dipole, p) * b[1] - 4 * _dot(q, p) * b[2]
        both = (source.quadrupole * other.quadrupole).sum(dim=(-2, -1))
        return energy + 2 * both * a[2]

    def field(self, source: Moments, r: Tensor) -> Tensor:
        """Field at ``r``, the mean of both ways to let a dipole interact with ``source``."""
        a, b, c = self.a, self.b, self.c
        q, s = _times(source.quadrupole, r), _dot(source.dipole, r)
        u, trace = _dot(q, r), _trace(source.quadrupole)
        along = 0.5 * (
            source.charge * (b[0] + a[1]) + 2 * s * b[1] + u * (b[2] + c[1]) - trace * b[1]
        )
        field = along[..., None] * r - a[1][..., None] * source.dipole
        return field - (a[2] + b[1])[..., None] * q

    def of_dipoles(self) -> tuple[Tensor, Tensor]:
        """The two factors that induced dipoles need."""
        return self.a[1], self.b[1]


def effective_radii(
    positions: Tensor, pairs: Pairs, values: Mapping[str, Tensor], solvation: Solvation
) -> Tensor:
    """Effective radii ``(frames, N)`` [nm] by Grycuk's integral of r^-6 over the solute.

    T. Grycuk, J. Chem. Phys. 119, 4817 (2003); rescaling: R. A. Corrigan et al., J. Chem. Phys.
    159, 054102 (2023).
    """
    radius, descreen = values["radius"], values["descreen_radius"]
    start = torch.maximum(radius, descreen) + values["descreen_offset"]
    sphere = descreen * values["scaling_factor"]
    r = safe_norm(pairs.displacements(positions, None))
    i, j = pairs.first, pairs.second
    total = positions.new_zeros(positions.shape[:2])
    total = pairs.add_at(total, i, _hidden(r, start[i], sphere[j]))
    total = pairs.add_at(total, j, _hidden(r, start[j], sphere[i]))
    integral = _VOLUME * total

    positive = radius > 0
    cubed = torch.where(positive, radius, 1.0) ** 3
    if solvation.tanh:
        beta = values["tanh_parameters"]
        x = cubed * integral
        size = _VOLUME * (1 / cubed - _LARGEST**-3)
        integral = size * torch.tanh(beta[0] * x - beta[1] * x**2 + beta[2] * x**3)
    rest = (_VOLUME / cubed - integral) / _VOLUME
    bounded = rest <= 0
    found = torch.where(bounded, 1.0, rest) ** (-1 / 3)
    found = torch.where(bounded, _LARGEST, torch.maximum(found, radius).clamp(max=_LARGEST))
    return torch.where(positive, found, _LARGEST)


def _hidden(r: Tensor, start: Tensor, sphere: Tensor) -> Tensor:
    """What a sphere at distance ``r`` takes from the integral beyond ``start``."""
    counts = (start > 0) & (sphere > 0) & (start <= r + sphere) & (r > 0)
    r, start, sphere = (torch.where(counts, x, 1.0) for x in (r, start, sphere))
    engulfed = start + r < sphere
    upper = r + sphere
    lower = torch.where(r < start + sphere, start.expand_as(r), r - sphere)
    lower = torch.where(engulfed, sphere - r, lower)

    def antiderivative(x: Tensor) -> Tensor:
        return (3 * (r * r - sphere * sphere) + 6 * x * x - 8 * x * r) / (x**4 * r)

    term = (antiderivative(upper) - antiderivative(lower)) / 16
    inner = torch.where(engulfed, lower, 1.0)
    term = term - torch.where(engulfed, inner**-3 - start**-3, 0.0)
    return torch.where(counts, term, 0.0)


def cavity_energy(values: Mapping[str, Tensor], born: Tensor) -> Tensor:
    """Energy of making a cavity, by the effective radii ``(frames, N)``."""
    radius = values["radius"] + values["dielectric_offset"]
    area = (radius + values["probe_radius"]) ** 2 * (radius / born) ** 6
    return -values["surface_area_factor"] / 6 * area.sum(dim=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector.unsqueeze(-2)).sum(dim=-1)


def _trace(matrix: Tensor) -> Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).sum(dim=-1)
