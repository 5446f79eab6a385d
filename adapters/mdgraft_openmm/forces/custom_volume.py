"""CustomVolumeForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.custom.external import CustomVolume

from mdgraft_openmm._converter import AbstractConverter, Host, Values
from mdgraft_openmm.forces._custom import global_names


class CustomVolumeConverter(AbstractConverter):
    """CustomVolumeForce <-> CustomVolume."""

    def read(self, force: openmm.CustomVolumeForce, host: Host) -> CustomVolume:
        """Build the term."""
        return CustomVolume(
            force.getEnergyFunction(),
            global_names=global_names(force),
            where=f"{force.getName()}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomVolumeForce) -> None:
        """Nothing to set: all its parameters are global."""
