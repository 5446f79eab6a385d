"""RMSDForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.superposition import RMSD

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    particle_subset,
    reference_positions,
    vectors,
)


class RMSDConverter(AbstractConverter):
    """RMSDForce <-> RMSD."""

    def read(self, force: openmm.RMSDForce, host: Host) -> RMSD:
        """Build the term."""
        return RMSD(particle_subset(force, host), reference_positions(force, host))

    def write(self, values: Values, force: openmm.RMSDForce) -> None:
        """Set the reference positions."""
        force.setReferencePositions(vectors(values["reference_positions"]))
