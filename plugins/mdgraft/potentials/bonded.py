"""Bonded terms: harmonic bonds and angles, periodic and Ryckaert-Bellemans torsions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import (
    ANGLE_FORCE_CONSTANT,
    BOND_FORCE_CONSTANT,
    ENERGY,
    NANOMETER,
    RADIAN,
)
from mdgraft.potentials import geometry
from mdgraft.potentials.term import AbstractTerm


class HarmonicBond(AbstractTerm):
    """Harmonic bonds, ``E = k/2 (r - length)^2``.

    Parameters
    ----------
    particles
        ``(bonds, 2)`` particle indices.
    length
        ``(bonds,)`` [nm].
    k
        ``(bonds,)`` [kJ/mol/nm^2].
    periodic
        Whether distances are those of the nearest periodic images.
    """

    particles: Tensor

    def __init__(self, particles: Tensor, length: Tensor, k: Tensor, *, periodic: bool) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self.add_parameter("length", length, NANOMETER)
        self.add_parameter("k", k, BOND_FORCE_CONSTANT)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        r = geometry.distance(positions, box, *self.particles.unbind(-1))
        return (0.5 * values["k"] * (r - values["length"]) ** 2).sum(dim=-1)


class HarmonicAngle(AbstractTerm):
    """Harmonic angles, ``E = k/2 (theta - angle)^2``.

    Parameters
    ----------
    particles
        ``(angles, 3)`` particle indices; the second is the vertex.
    angle
        ``(angles,)`` [radian].
    k
        ``(angles,)`` [kJ/mol/radian^2].
    periodic
        Whether bond vectors are those of the nearest periodic images.
    """

    particles: Tensor

    def __init__(self, particles: Tensor, angle: Tensor, k: Tensor, *, periodic: bool) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self.add_parameter("angle", angle, RADIAN)
        self.add_parameter("k", k, ANGLE_FORCE_CONSTANT)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        squared = geometry.squared_angle_deviation(positions, box, self.particles, values["angle"])
        return (0.5 * values["k"] * squared).sum(dim=-1)


class PeriodicTorsion(AbstractTerm):
    """Periodic torsions, ``E = k (1 + cos(periodicity phi - phase))``, phi zero for cis.

    Parameters
    ----------
    particles
        ``(torsions, 4)`` particle indices.
    periodicity
        ``(torsions,)`` integers; a buffer, not a parameter.
    phase
        ``(torsions,)`` [radian].
    k
        ``(torsions,)`` [kJ/mol].
    periodic
        Whether bond vectors are those of the nearest periodic images.
    """

    particles: Tensor
    periodicity: Tensor

    def __init__(
        self,
        particles: Tensor,
        periodicity: Tensor,
        phase: Tensor,
        k: Tensor,
        *,
        periodic: bool,
    ) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        self.register_buffer("periodicity", periodicity)
        self.add_parameter("phase", phase, RADIAN)
        self.add_parameter("k", k, ENERGY)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        phi = geometry.dihedral(positions, box, self.particles)
        wave = torch.cos(self.periodicity * phi - values["phase"])
        return (values["k"] * (1.0 + wave)).sum(dim=-1)


class RBTorsion(AbstractTerm):
    """Ryckaert-Bellemans torsions, ``E = sum_n c_n cos(psi)^n`` with ``psi = phi - pi``.

    The dihedral phi is zero for cis, so psi is zero for trans.

    Parameters
    ----------
    particles
        ``(torsions, 4)`` particle indices.
    c0, c1, c2, c3, c4, c5
        ``(torsions,)`` each [kJ/mol].
    periodic
        Whether bond vectors are those of the nearest periodic images.

    References
    ----------
    J. P. Ryckaert and A. Bellemans, Chem. Phys. Lett. 30, 123 (1975).
    """

    particles: Tensor

    def __init__(
        self,
        particles: Tensor,
        c0: Tensor,
        c1: Tensor,
        c2: Tensor,
        c3: Tensor,
        c4: Tensor,
        c5: Tensor,
        *,
        periodic: bool,
    ) -> None:
        super().__init__(periodic=periodic)
        self.register_buffer("particles", particles)
        for n, coefficient in enumerate((c0, c1, c2, c3, c4, c5)):
            self.add_parameter(f"c{n}", coefficient, ENERGY)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        cos_psi = -torch.cos(geometry.dihedral(positions, box, self.particles))
        energy = values["c5"]
        for n in (4, 3, 2, 1, 0):
            energy = values[f"c{n}"] + cos_psi * energy
        return energy.sum(dim=-1)
