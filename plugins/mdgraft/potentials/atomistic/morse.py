"""The Morse potential over all images, smoothly cut off."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import DIMENSIONLESS, ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, shared_equally
from mdgraft.potentials.geometry import safe_norm


class Morse(AbstractAtomisticTerm):
    """``epsilon [exp(-2 rho0 (r/r0 - 1)) - 2 exp(-rho0 (r/r0 - 1))]`` times a cutoff function.

    The cutoff function is the smooth step ``6 s^5 - 15 s^4 + 10 s^3`` with s falling from one at
    ``rcut1 r0`` to zero at ``rcut2 r0``. A pair gives each of its particles half of its energy.
    P. M. Morse, Phys. Rev. 34, 57 (1929).

    Parameters
    ----------
    epsilon, r0
        ``()`` [kJ/mol], [nm].
    rho0, rcut1, rcut2
        ``()``, dimensionless.
    pbc
        Which box vectors are periods.
    """

    def __init__(
        self,
        *,
        epsilon: Tensor,
        rho0: Tensor,
        r0: Tensor,
        rcut1: Tensor,
        rcut2: Tensor,
        pbc: Periods,
    ) -> None:
        super().__init__(pbc=pbc)
        self.add_parameter("epsilon", epsilon, ENERGY)
        self.add_parameter("rho0", rho0, DIMENSIONLESS)
        self.add_parameter("r0", r0, NANOMETER)
        self.add_parameter("rcut1", rcut1, DIMENSIONLESS)
        self.add_parameter("rcut2", rcut2, DIMENSIONLESS)

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        r0 = values["r0"]
        inner, outer = values["rcut1"] * r0, values["rcut2"] * r0
        pairs = self.pairs(positions, box, outer, half=True)
        r = safe_norm(pairs.displacements(positions, box))
        inside = r < outer
        r = torch.where(inside, r, outer)
        decay = torch.exp(values["rho0"] * (1.0 - r / r0))
        energies = values["epsilon"] * decay * (decay - 2.0) * _smooth_step(r, inner, outer)
        return shared_equally(positions, pairs, torch.where(inside, energies, 0.0))


def _smooth_step(r: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    width = outer - inner
    sharp = width == 0
    s = 1.0 - (r - inner) / torch.where(sharp, 1.0, width)
    s = torch.where(sharp, 1.0, s.clamp(0.0, 1.0))
    return s**3 * (10.0 + s * (6.0 * s - 15.0))
