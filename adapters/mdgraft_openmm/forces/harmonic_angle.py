"""HarmonicAngleForce."""

from __future__ import annotations

import math

import openmm
from mdgraft.potentials.bonded import HarmonicAngle

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices, column


class HarmonicAngleConverter(AbstractConverter):
    """HarmonicAngleForce <-> HarmonicAngle."""

    polynomial = frozenset({"angle", "k"})

    def read(self, force: openmm.HarmonicAngleForce, host: Host) -> HarmonicAngle:
        """Build the term."""
        n = host.system.getNumParticles()
        rows = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        return HarmonicAngle(
            checked_indices(force.getName(), rows, 0, 1, 2, n_particles=n),
            angle=column(rows, 3),
            k=column(rows, 4),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.HarmonicAngleForce) -> None:
        """Set angles and force constants."""
        for i in range(force.getNumAngles()):
            p1, p2, p3, _, _ = force.getAngleParameters(i)
            force.setAngleParameters(i, p1, p2, p3, values["angle"][i], values["k"][i])

    def refused(self, values: Values, force: openmm.HarmonicAngleForce) -> str | None:
        """Find angles that no Context accepts."""
        # The slack is OpenMM's own.
        outside = (values["angle"] < 0.0) | (values["angle"] > 1.000001 * math.pi)
        if not outside.any():
            return None
        i = int(outside.argmax())
        return (
            f"{force.getName()}.angle: entry {i} is {values['angle'][i]:g} radian; OpenMM accepts "
            "only angles from 0 to pi"
        )
