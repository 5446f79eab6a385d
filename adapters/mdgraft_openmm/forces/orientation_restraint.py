"""OrientationRestraintForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.superposition import OrientationRestraint

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    particle_subset,
    reference_positions,
    scalar,
    vectors,
)


class OrientationRestraintConverter(AbstractConverter):
    """OrientationRestraintForce <-> OrientationRestraint."""

    polynomial = frozenset({"k"})

    def read(self, force: openmm.OrientationRestraintForce, host: Host) -> OrientationRestraint:
        """Build the term."""
        return OrientationRestraint(
            particle_subset(force, host), scalar(force.getK()), reference_positions(force, host)
        )

    def write(self, values: Values, force: openmm.OrientationRestraintForce) -> None:
        """Set the force constant and the reference positions."""
        force.setK(float(values["k"]))
        force.setReferencePositions(vectors(values["reference_positions"]))
