"""CustomAngleForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.custom.bonds import CustomBonded

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.forces._custom import global_names, item_names, item_parameters, item_rows


class CustomAngleConverter(AbstractConverter):
    """CustomAngleForce <-> CustomBonded."""

    def read(self, force: openmm.CustomAngleForce, host: Host) -> CustomBonded:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Angle")
        rows = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        n_particles = host.system.getNumParticles()
        return CustomBonded(
            force.getEnergyFunction(),
            checked_indices(name, rows, *range(3), n_particles=n_particles),
            item_parameters(force, names, [row[3] for row in rows]),
            global_names=global_names(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomAngleForce) -> None:
        """Set per-angle parameters."""
        rows = item_rows(values, item_names(force, "Angle"), force.getNumAngles())
        for i, row in enumerate(rows):
            *particles, _ = force.getAngleParameters(i)
            force.setAngleParameters(i, *particles, row.tolist())
