"""CMAPTorsionForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft.potentials.cmap import CMAPTorsion

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    indices,
    number,
)


class CMAPTorsionConverter(AbstractConverter):
    """CMAPTorsionForce <-> CMAPTorsion."""

    polynomial = frozenset({"energy"})

    def read(self, force: openmm.CMAPTorsionForce, host: Host) -> CMAPTorsion:
        """Build the term."""
        n = host.system.getNumParticles()
        rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        maps = [force.getMapParameters(m) for m in range(force.getNumMaps())]
        energy = [number(value) for _, values in maps for value in values]
        return CMAPTorsion(
            checked_indices(force.getName(), rows, 1, 2, 3, 4, 5, 6, 7, 8, n_particles=n),
            maps=indices(rows, 0).squeeze(-1),
            sizes=[size for size, _ in maps],
            energy=torch.tensor(energy, dtype=torch.float64),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.CMAPTorsionForce) -> None:
        """Set the energies of every map."""
        start = 0
        for m in range(force.getNumMaps()):
            size, _ = force.getMapParameters(m)
            force.setMapParameters(m, size, values["energy"][start : start + size**2].tolist())
            start += size**2
