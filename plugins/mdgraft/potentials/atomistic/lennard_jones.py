"""The Lennard-Jones potential over all images, shifted or smoothly cut off."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, shared_equally


class LennardJones(AbstractAtomisticTerm):
    """``4 epsilon [(sigma/r)**12 - (sigma/r)**6]`` between all pairs within ``rc``.

    Without an onset each pair energy is shifted to be zero at ``rc``. With one it is multiplied by
    ``(rc^2 - r^2)^2 (rc^2 + 2 r^2 - 3 ro^2) / (rc^2 - ro^2)^3`` beyond ``ro``, as in HOOMD-blue,
    Comput. Mater. Sci. 173, 109363 (2020). A pair gives each of its particles half of its energy.

    Parameters
    ----------
    epsilon, sigma, rc
        ``()`` [kJ/mol], [nm], [nm].
    ro
        Onset of the smooth cutoff ``()`` [nm], or None for the shifted form.
    pbc
        Which box vectors are periods.
    """

    def __init__(
        self, *, epsilon: Tensor, sigma: Tensor, rc: Tensor, ro: Tensor | None, pbc: Periods
    ) -> None:
        super().__init__(pbc=pbc)
        self.smooth = ro is not None
        self.add_parameter("epsilon", epsilon, ENERGY)
        self.add_parameter("sigma", sigma, NANOMETER)
        self.add_parameter("rc", rc, NANOMETER)
        if ro is not None:
            self.add_parameter("ro", ro, NANOMETER)

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        epsilon, sigma, rc = (values[key] for key in ("epsilon", "sigma", "rc"))
        pairs = self.pairs(positions, box, rc, half=True)
        vectors = pairs.displacements(positions, box)
        r2 = (vectors * vectors).sum(dim=-1)
        inside = r2 < rc * rc
        r2 = torch.where(inside, r2, rc * rc)
        energies = _pair_energy(epsilon, sigma, r2)
        if self.smooth:
            energies = energies * _smooth(r2, values["ro"] * values["ro"], rc * rc)
        else:
            energies = energies - _pair_energy(epsilon, sigma, rc * rc)
        return shared_equally(positions, pairs, torch.where(inside, energies, 0.0))


def _pair_energy(epsilon: Tensor, sigma: Tensor, r2: Tensor) -> Tensor:
    x = (sigma * sigma / r2) ** 3
    return 4.0 * epsilon * x * (x - 1.0)


def _smooth(r2: Tensor, ro2: Tensor, rc2: Tensor) -> Tensor:
    """One below the onset, zero at the cutoff; all arguments are squared distances."""
    range_ = rc2 - ro2
    # An onset beyond the cutoff switches nothing; what it divides by is then of no account.
    inner = (r2 < ro2) | (range_ <= 0)
    factor = (rc2 - r2) ** 2 * (rc2 + 2.0 * r2 - 3.0 * ro2)
    return torch.where(inner, 1.0, factor / torch.where(range_ > 0, range_, 1.0) ** 3)
