"""AmoebaWcaDispersionForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.amoeba.wca_dispersion import SCALARS, AmoebaWcaDispersion

from mdgraft_openmm._converter import AbstractConverter, Host, Values, column, number


class AmoebaWcaDispersionConverter(AbstractConverter):
    """AmoebaWcaDispersionForce <-> AmoebaWcaDispersion."""

    polynomial = frozenset({"awater", "slevy"})

    def read(self, force: openmm.AmoebaWcaDispersionForce, host: Host) -> AmoebaWcaDispersion:
        """Build the term."""
        n = host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{force.getName()}: has {force.getNumParticles()} particles, the System {n}"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        return AmoebaWcaDispersion(
            column(rows, 0),
            column(rows, 1),
            {
                key: torch.tensor(value, dtype=torch.float64)
                for key, value in _scalars(force).items()
            },
        )

    def write(self, values: Values, force: openmm.AmoebaWcaDispersionForce) -> None:
        """Set particles and the properties of water."""
        for i in range(force.getNumParticles()):
            force.setParticleParameters(i, values["radius"][i], values["epsilon"][i])
        for key in SCALARS:
            getattr(force, f"set{key.capitalize()}")(float(values[key]))

    def structural(self, values: Values, force: openmm.AmoebaWcaDispersionForce) -> list[str]:
        """Properties of water, which a live Context reads only when it is made."""
        return [key for key, old in _scalars(force).items() if float(values[key]) != old]


def _scalars(force: openmm.AmoebaWcaDispersionForce) -> dict[str, float]:
    return {key: number(getattr(force, f"get{key.capitalize()}")()) for key in SCALARS}
