"""CustomExternalForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.custom.external import CustomExternal

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.forces._custom import global_names, item_names, item_parameters, item_rows


class CustomExternalConverter(AbstractConverter):
    """CustomExternalForce <-> CustomExternal."""

    def read(self, force: openmm.CustomExternalForce, host: Host) -> CustomExternal:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Particle")
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        particles = checked_indices(name, rows, 0, n_particles=host.system.getNumParticles())
        return CustomExternal(
            force.getEnergyFunction(),
            particles.squeeze(-1),
            item_parameters(force, names, [row[1] for row in rows]),
            global_names=global_names(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomExternalForce) -> None:
        """Set per-particle parameters."""
        rows = item_rows(values, item_names(force, "Particle"), force.getNumParticles())
        for i, row in enumerate(rows):
            force.setParticleParameters(i, force.getParticleParameters(i)[0], row.tolist())
