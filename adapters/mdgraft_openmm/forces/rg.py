"""RGForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.superposition import RadiusOfGyration

from mdgraft_openmm._converter import AbstractConverter, Host, Values, particle_subset


class RGConverter(AbstractConverter):
    """RGForce <-> RadiusOfGyration."""

    def read(self, force: openmm.RGForce, host: Host) -> RadiusOfGyration:
        """Build the term."""
        return RadiusOfGyration(particle_subset(force, host))

    def write(self, values: Values, force: openmm.RGForce) -> None:
        """Nothing to set: the force has no parameters."""
