"""Bonded terms: harmonic bonds and angles, periodic and Ryckaert-Bellemans torsions."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from mdgraft.potentials.item_term import ItemTerm, cell_of

if TYPE_CHECKING:
    from mdgraft.kernels.fused.tuples import TupleFormula


class HarmonicBond(ItemTerm):
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

    quantities = ("length", "k")

    def __init__(self, particles: Tensor, length: Tensor, k: Tensor, *, periodic: bool) -> None:
        super().__init__(particles, periodic=periodic)
        self.add_parameter("length", length, NANOMETER)
        self.add_parameter("k", k, BOND_FORCE_CONSTANT)

    @staticmethod
    def formula() -> TupleFormula:
        """The energy of an item."""
        from mdgraft.potentials.bonded_formulas import HARMONIC_BOND

        return HARMONIC_BOND

    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol] by plain torch operations."""
        length, k = quantities
        r = geometry.distance(positions, cell_of(box), *self.particles.unbind(-1))
        return (0.5 * k * (r - length) ** 2).sum(dim=-1)


class HarmonicAngle(ItemTerm):
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

    quantities = ("angle", "k")

    def __init__(self, particles: Tensor, angle: Tensor, k: Tensor, *, periodic: bool) -> None:
        super().__init__(particles, periodic=periodic)
        self.add_parameter("angle", angle, RADIAN)
        self.add_parameter("k", k, ANGLE_FORCE_CONSTANT)

    @staticmethod
    def formula() -> TupleFormula:
        """The energy of an item."""
        from mdgraft.potentials.bonded_formulas import HARMONIC_ANGLE

        return HARMONIC_ANGLE

    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol] by plain torch operations."""
        angle, k = quantities
        squared = geometry.squared_angle_deviation(positions, cell_of(box), self.particles, angle)
        return (0.5 * k * squared).sum(dim=-1)


class PeriodicTorsion(ItemTerm):
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

    quantities = ("periodicity", "phase", "k")
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
        super().__init__(particles, periodic=periodic)
        self.register_buffer("periodicity", periodicity)
        self.add_parameter("phase", phase, RADIAN)
        self.add_parameter("k", k, ENERGY)

    @staticmethod
    def formula() -> TupleFormula:
        """The energy of an item."""
        from mdgraft.potentials.bonded_formulas import PERIODIC_TORSION

        return PERIODIC_TORSION

    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol] by plain torch operations."""
        periodicity, phase, k = quantities
        phi = geometry.dihedral(positions, cell_of(box), self.particles)
        wave = torch.cos(periodicity * phi - phase)
        return (k * (1.0 + wave)).sum(dim=-1)


class RBTorsion(ItemTerm):
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

    quantities = ("c0", "c1", "c2", "c3", "c4", "c5")

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
        super().__init__(particles, periodic=periodic)
        for n, coefficient in enumerate((c0, c1, c2, c3, c4, c5)):
            self.add_parameter(f"c{n}", coefficient, ENERGY)

    @staticmethod
    def formula() -> TupleFormula:
        """The energy of an item."""
        from mdgraft.potentials.bonded_formulas import RB_TORSION

        return RB_TORSION

    def plain(self, positions: Tensor, box: Tensor, *quantities: Tensor) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol] by plain torch operations."""
        coefficients = quantities
        cos_psi = -torch.cos(geometry.dihedral(positions, cell_of(box), self.particles))
        energy = coefficients[5]
        for n in (4, 3, 2, 1, 0):
            energy = coefficients[n] + cos_psi * energy
        return energy.sum(dim=-1)
