"""CustomBondForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.custom.bonds import CustomBonded

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.forces._custom import global_names, item_names, item_parameters, item_rows


class CustomBondConverter(AbstractConverter):
    """CustomBondForce <-> CustomBonded."""

    def read(self, force: openmm.CustomBondForce, host: Host) -> CustomBonded:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Bond")
        rows = [force.getBondParameters(i) for i in range(force.getNumBonds())]
        n_particles = host.system.getNumParticles()
        return CustomBonded(
            force.getEnergyFunction(),
            checked_indices(name, rows, *range(2), n_particles=n_particles),
            item_parameters(force, names, [row[2] for row in rows]),
            global_names=global_names(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomBondForce) -> None:
        """Set per-bond parameters."""
        rows = item_rows(values, item_names(force, "Bond"), force.getNumBonds())
        for i, row in enumerate(rows):
            *particles, _ = force.getBondParameters(i)
            force.setBondParameters(i, *particles, row.tolist())
