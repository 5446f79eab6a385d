"""Harmonic forms around a reference structure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import BOND_FORCE_CONSTANT, ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods
from mdgraft.potentials.term import AbstractTerm


class CartesianHessian(AbstractTerm):
    """``ref_energy + (x - x0).H.(x - x0) / 2`` with the symmetric part of H.

    It is not invariant to rotations, nor to translations unless H is.

    Parameters
    ----------
    ref_positions
        x0, ``(N, 3)`` [nm].
    hessian_x
        H, ``(3 N, 3 N)`` [kJ/mol/nm^2].
    ref_energy
        ``()`` [kJ/mol].
    periodic
        Whether a box is expected, although the energy does not depend on it.
    """

    general_cell = True

    def __init__(
        self,
        *,
        ref_positions: Tensor,
        hessian_x: Tensor,
        ref_energy: Tensor,
        periodic: bool = False,
    ) -> None:
        super().__init__(periodic=periodic)
        self.add_parameter("ref_positions", ref_positions, NANOMETER)
        self.add_parameter("hessian_x", hessian_x, BOND_FORCE_CONSTANT)
        self.add_parameter("ref_energy", ref_energy, ENERGY)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        change = (positions - values["ref_positions"]).flatten(-2)
        energy = 0.5 * torch.einsum("fi,ij,fj->f", change, values["hessian_x"], change)
        return values["ref_energy"] + energy


class Springs(AbstractAtomisticTerm):
    """``k/2 (r - r0)**2`` of each particle: the Einstein crystal.

    Parameters
    ----------
    ideal_positions
        r0, ``(N, 3)`` [nm].
    k
        ``()`` [kJ/mol/nm^2].
    pbc
        Which box vectors are periods; the energy depends on none.
    """

    def __init__(self, *, ideal_positions: Tensor, k: Tensor, pbc: Periods) -> None:
        super().__init__(pbc=pbc)
        self.add_parameter("ideal_positions", ideal_positions, NANOMETER)
        self.add_parameter("k", k, BOND_FORCE_CONSTANT)

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        change = positions - values["ideal_positions"]
        return 0.5 * values["k"] * (change * change).sum(dim=-1)
