"""CustomCompoundBondForce."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.compound_bond import CustomCompoundBond

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices
from mdgraft_openmm.forces._custom import (
    global_names,
    item_names,
    item_parameters,
    item_rows,
    refused_tables,
    tables,
    write_tables,
)


class CustomCompoundBondConverter(AbstractConverter):
    """CustomCompoundBondForce <-> CustomCompoundBond."""

    def read(self, force: openmm.CustomCompoundBondForce, host: Host) -> CustomCompoundBond:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Bond")
        bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
        size = force.getNumParticlesPerBond()
        for i, (particles, _) in enumerate(bonds):
            if len(particles) != size:
                raise InvalidInputError(
                    f"{name}: bond {i} has {len(particles)} particles, wanted {size}"
                )
        rows = [particles for particles, _ in bonds]
        n_particles = host.system.getNumParticles()
        return CustomCompoundBond(
            force.getEnergyFunction(),
            checked_indices(name, rows, *range(size), n_particles=n_particles),
            item_parameters(force, names, [parameters for _, parameters in bonds]),
            global_names=global_names(force),
            tables=tables(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomCompoundBondForce) -> None:
        """Set per-bond parameters and tabulated functions."""
        names = item_names(force, "Bond")
        for i, row in enumerate(item_rows(values, names, force.getNumBonds())):
            force.setBondParameters(i, force.getBondParameters(i)[0], row.tolist())
        write_tables(force, values, names)

    def refused(self, values: Values, force: openmm.CustomCompoundBondForce) -> str | None:
        """Find periodic tables whose ends differ."""
        return refused_tables(force, values, item_names(force, "Bond"))
