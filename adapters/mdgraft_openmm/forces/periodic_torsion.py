"""PeriodicTorsionForce."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.bonded import PeriodicTorsion

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    column,
    indices,
)


class PeriodicTorsionConverter(AbstractConverter):
    """PeriodicTorsionForce <-> PeriodicTorsion."""

    polynomial = frozenset({"k"})

    def read(self, force: openmm.PeriodicTorsionForce, host: Host) -> PeriodicTorsion:
        """Build the term.

        Raises
        ------
        InvalidInputError
            For a periodicity below one, which no Context accepts, or a particle out of range.
        """
        n = host.system.getNumParticles()
        rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        periodicity = indices(rows, 4).squeeze(-1)
        for i in (periodicity < 1).nonzero().squeeze(-1).tolist():
            raise InvalidInputError(
                f"host_object: torsion {i} of {force.getName()} has periodicity "
                f"{int(periodicity[i])}, wanted at least 1"
            )
        return PeriodicTorsion(
            checked_indices(force.getName(), rows, 0, 1, 2, 3, n_particles=n),
            periodicity=periodicity,
            phase=column(rows, 5),
            k=column(rows, 6),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.PeriodicTorsionForce) -> None:
        """Set phases and force constants; periodicities stay."""
        for i in range(force.getNumTorsions()):
            *topology, _, _ = force.getTorsionParameters(i)
            force.setTorsionParameters(i, *topology, values["phase"][i], values["k"][i])
