"""CustomManyParticleForce."""

from __future__ import annotations

import numpy as np
import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.many_particle import CustomManyParticle, SetRules

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_cutoff
from mdgraft_openmm.forces._custom import (
    checked_exclusions,
    global_names,
    item_names,
    item_parameters,
    item_rows,
    refused_tables,
    tables,
    write_tables,
)


class CustomManyParticleConverter(AbstractConverter):
    """CustomManyParticleForce <-> CustomManyParticle."""

    def read(self, force: openmm.CustomManyParticleForce, host: Host) -> CustomManyParticle:
        """Build the term."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        particles = [force.getParticleParameters(i) for i in range(n)]
        size = force.getNumParticlesPerSet()
        rules = SetRules(
            size=size,
            central=force.getPermutationMode() == force.UniqueCentralParticle,
            types=np.array([kind for _, kind in particles], dtype=np.int64),
            filters=tuple(frozenset(force.getTypeFilter(i)) for i in range(size)),
            exclusions=checked_exclusions(force, n).numpy(),
            cutoff=checked_cutoff(force, host),
        )
        return CustomManyParticle(
            force.getEnergyFunction(),
            item_parameters(force, item_names(force, "Particle"), [row for row, _ in particles]),
            rules=rules,
            periodic=force.getNonbondedMethod() == force.CutoffPeriodic,
            global_names=global_names(force),
            tables=tables(force),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomManyParticleForce) -> None:
        """Set per-particle parameters and tabulated functions."""
        names = item_names(force, "Particle")
        for i, row in enumerate(item_rows(values, names, force.getNumParticles())):
            kind = force.getParticleParameters(i)[1]
            force.setParticleParameters(i, row.tolist(), kind)
        write_tables(force, values, names)

    def refused(self, values: Values, force: openmm.CustomManyParticleForce) -> str | None:
        """Find periodic tables whose ends differ."""
        return refused_tables(force, values, item_names(force, "Particle"))
