"""CustomGBForce."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.gb import Computation, CustomGB, Step
from mdgraft.potentials.nonbonded import Method

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_cutoff
from mdgraft_openmm.forces._custom import (
    checked_exclusions,
    global_names,
    item_names,
    refused_tables,
    tables,
)
from mdgraft_openmm.forces.custom_nonbonded import particle_parameters, write_particles

_METHODS = {
    openmm.CustomGBForce.NoCutoff: Method.NO_CUTOFF,
    openmm.CustomGBForce.CutoffNonPeriodic: Method.CUTOFF_NON_PERIODIC,
    openmm.CustomGBForce.CutoffPeriodic: Method.CUTOFF_PERIODIC,
}
_COMPUTATIONS = {
    openmm.CustomGBForce.SingleParticle: Computation.SINGLE_PARTICLE,
    openmm.CustomGBForce.ParticlePair: Computation.PARTICLE_PAIR,
    openmm.CustomGBForce.ParticlePairNoExclusions: Computation.PARTICLE_PAIR_NO_EXCLUSIONS,
}


class CustomGBConverter(AbstractConverter):
    """CustomGBForce <-> CustomGB."""

    def read(self, force: openmm.CustomGBForce, host: Host) -> CustomGB:
        """Build the term."""
        n, method = host.system.getNumParticles(), _METHODS[force.getNonbondedMethod()]
        computed = [
            force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())
        ]
        energies = [force.getEnergyTermParameters(i) for i in range(force.getNumEnergyTerms())]
        steps = [
            Step(name=row[0], expression=row[1], computation=_COMPUTATIONS[row[2]])
            for row in computed
        ]
        for i, step in enumerate(steps):
            if (step.computation is Computation.SINGLE_PARTICLE) != (i > 0):
                wanted = "single particles" if i else "pairs of particles"
                raise InvalidInputError(
                    f"{force.getName()}: computed value {i}, {step.name!r}, has the type "
                    f"{step.computation.name}; OpenMM wants the first one to be of pairs and all "
                    f"others of single particles, so make it one of {wanted}"
                )
        return CustomGB(
            particle_parameters(force, n),
            n_particles=n,
            computed_values=steps,
            energy_terms=[
                Step(expression=row[0], computation=_COMPUTATIONS[row[1]]) for row in energies
            ],
            exclusions=checked_exclusions(force, n),
            method=method,
            cutoff=checked_cutoff(force, host),
            global_names=global_names(force),
            tables=tables(force),
            where=force.getName(),
        )

    def refused(self, values: Values, force: openmm.CustomGBForce) -> str | None:
        """Find periodic tables whose ends differ."""
        return refused_tables(force, values, item_names(force, "Particle"))

    def write(self, values: Values, force: openmm.CustomGBForce) -> None:
        """Set particles and tables."""
        write_particles(values, force)
