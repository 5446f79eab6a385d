"""CustomTorsionForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.custom.bonds import CustomBonded

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.forces._custom import global_names, item_names, item_parameters, item_rows


class CustomTorsionConverter(AbstractConverter):
    """CustomTorsionForce <-> CustomBonded."""

    def read(self, force: openmm.CustomTorsionForce, host: Host) -> CustomBonded:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Torsion")
        rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        n_particles = host.system.getNumParticles()
        return CustomBonded(
            force.getEnergyFunction(),
            checked_indices(name, rows, *range(4), n_particles=n_particles),
            item_parameters(force, names, [row[4] for row in rows]),
            global_names=global_names(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomTorsionForce) -> None:
        """Set per-torsion parameters."""
        rows = item_rows(values, item_names(force, "Torsion"), force.getNumTorsions())
        for i, row in enumerate(rows):
            *particles, _ = force.getTorsionParameters(i)
            force.setTorsionParameters(i, *particles, row.tolist())
