"""LCPOForce."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.lcpo import LCPO

from mdgraft_openmm._converter import AbstractConverter, Host, Values, column, scalar

_PARTICLE = ("radius", "p1", "p2", "p3", "p4")


class LCPOConverter(AbstractConverter):
    """LCPOForce <-> LCPO."""

    polynomial = frozenset({"p1", "p2", "p3", "p4", "surface_tension"})
    # Particles without a radius take no part.
    flat_at_zero = frozenset({"radius"})

    def read(self, force: openmm.LCPOForce, host: Host) -> LCPO:
        """Build the term."""
        n = host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{force.getName()}: has {force.getNumParticles()} particles, the System {n}"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        return LCPO(
            *(column(rows, c) for c in range(5)),
            surface_tension=scalar(force.getSurfaceTension()),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.LCPOForce) -> None:
        """Set particles and surface tension."""
        for i in range(force.getNumParticles()):
            force.setParticleParameters(i, *(values[key][i] for key in _PARTICLE))
        force.setSurfaceTension(float(values["surface_tension"]))

    def refused(self, values: Values, force: openmm.LCPOForce) -> str | None:
        """Find radii that no Context accepts."""
        if not (values["radius"] < 0).any():
            return None
        i = int(values["radius"].argmin())
        return f"{force.getName()}.radius: entry {i} is {values['radius'][i]:g} nm, below zero"
