"""HarmonicAngleForce."""

from __future__ import annotations

import math

import openmm

from mdgraft import ParameterMismatchError
from mdgraft.potentials.bonded import HarmonicAngle
from mdgraft_openmm._converter import AbstractConverter, Host, Values, column
from mdgraft_openmm._particles import particles


class HarmonicAngleConverter(AbstractConverter):
    """HarmonicAngleForce <-> HarmonicAngle."""

    def read(self, force: openmm.HarmonicAngleForce, host: Host) -> HarmonicAngle:
        """Build the term."""
        rows = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        return HarmonicAngle(
            particles(force, host, rows, 0, 1, 2),
            angle=column(rows, 3),
            k=column(rows, 4),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.HarmonicAngleForce) -> None:
        """Set angles and force constants."""
        angles = values["angle"]
        for i in range(force.getNumAngles()):
            # A Context refuses others, with the same slack.
            if not 0.0 <= angles[i] <= 1.000001 * math.pi:
                raise ParameterMismatchError(
                    f"angle: entry {i} is {angles[i]:g} radian, but a HarmonicAngleForce takes "
                    "angles from 0 to pi; constrain the fit or fold the angle back"
                )
        for i in range(force.getNumAngles()):
            p1, p2, p3, _, _ = force.getAngleParameters(i)
            force.setAngleParameters(i, p1, p2, p3, angles[i], values["k"][i])
