"""Rigid molecules of charged Lennard-Jones sites, cut off by molecules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import CHARGE, COULOMB, ENERGY, NANOMETER
from mdgraft.potentials.atomistic.base import AbstractAtomisticTerm, Periods, per_particle
from mdgraft.potentials.geometry import direction, safe_norm
from mdgraft.potentials.pair_forms import root_epsilon


class MolecularSites(AbstractAtomisticTerm):
    """Coulomb and Lennard-Jones energies between the sites of equal molecules.

    The energy of two molecules is multiplied by a smooth step of the distance between their
    reference atoms, which falls as ``1 - y^2 (3 - 2 y)`` with ``y = (r - rc + width)/width``.
    Within a molecule there is no energy. Lennard-Jones parameters are combined by the rules of
    Lorentz and Berthelot; a site with epsilon zero has none. The energy of two molecules is shared
    equally by their reference atoms.

    Parameters
    ----------
    charge, sigma, epsilon
        ``(sites,)`` of one molecule [e], [nm], [kJ/mol]; sites are its atoms in order and then, if
        there is one, the virtual site.
    n_atoms
        Atoms of one molecule; all of the system's consist of such molecules.
    reference
        Which atom of a molecule distances are measured from.
    rc, width
        ``()`` [nm].
    offset
        Distance [nm] from the first atom to a virtual site on the bisector of the other two; None
        without one.
    coulomb
        1/(4 pi eps0) [kJ nm/mol/e^2] as the host has it.
    pbc
        Which box vectors are periods.
    """

    def __init__(
        self,
        *,
        charge: Tensor,
        sigma: Tensor,
        epsilon: Tensor,
        n_atoms: int,
        reference: int,
        rc: Tensor,
        width: Tensor,
        pbc: Periods,
        offset: Tensor | None = None,
        coulomb: float = COULOMB,
    ) -> None:
        super().__init__(pbc=pbc)
        self.n_atoms, self.reference, self.coulomb = n_atoms, reference, coulomb
        self.add_parameter("charge", charge, CHARGE)
        self.add_parameter("sigma", sigma, NANOMETER)
        self.add_parameter("epsilon", epsilon, ENERGY)
        self.add_parameter("rc", rc, NANOMETER)
        self.add_parameter("width", width, NANOMETER)
        if offset is not None:
            self.add_parameter("offset", offset, NANOMETER)

    def particle_energies(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each particle ``(frames, N)`` [kJ/mol]."""
        n_frames, n_particles = positions.shape[:2]
        molecules = positions.reshape(n_frames, n_particles // self.n_atoms, self.n_atoms, 3)
        centres = molecules[:, :, self.reference]
        rc = values["rc"]
        pairs = self.pairs(centres, box, rc, half=True)
        apart = pairs.displacements(centres, box)
        r = safe_norm(apart)
        inside = r < rc
        y = ((r - rc) / values["width"] + 1.0).clamp(0.0, 1.0)
        weight = torch.where(inside, 1.0 - y * y * (3.0 - 2.0 * y), 0.0)

        sites = self._sites(molecules, values) - centres.unsqueeze(2)
        here, there = sites[pairs.frame, pairs.first], sites[pairs.frame, pairs.second]
        vectors = apart[:, None, None] + there.unsqueeze(1) - here.unsqueeze(2)
        r2 = (vectors * vectors).sum(dim=-1)
        r2 = torch.where(inside[:, None, None], r2, 1.0)
        charge, epsilon, sigma = (values[key] for key in ("charge", "epsilon", "sigma"))
        energies = self.coulomb * torch.outer(charge, charge) * torch.rsqrt(r2)
        depth = root_epsilon(epsilon)
        size = 0.5 * (sigma[:, None] + sigma)
        x = (size * size / r2) ** 3
        energies = energies + 4.0 * torch.outer(depth, depth) * x * (x - 1.0)
        shared = 0.5 * weight * energies.sum(dim=(-2, -1))
        by_molecule = per_particle(centres, pairs, pairs.first, shared) + per_particle(
            centres, pairs, pairs.second, shared
        )
        place = torch.arange(self.n_atoms, device=positions.device) == self.reference
        return (by_molecule.unsqueeze(-1) * place).reshape(n_frames, n_particles)

    def _sites(self, molecules: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Positions of the sites ``(frames, molecules, sites, 3)``."""
        if "offset" not in values:
            return molecules
        first, second, third = molecules.unbind(dim=2)
        bisector = direction(0.5 * (second + third) - first)
        site = first + values["offset"] * bisector
        return torch.cat([molecules, site.unsqueeze(2)], dim=2)
