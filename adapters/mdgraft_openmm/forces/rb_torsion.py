"""RBTorsionForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.bonded import RBTorsion

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices, column

_COEFFICIENTS = ("c0", "c1", "c2", "c3", "c4", "c5")


class RBTorsionConverter(AbstractConverter):
    """RBTorsionForce <-> RBTorsion."""

    polynomial = frozenset({"c0", "c1", "c2", "c3", "c4", "c5"})

    def read(self, force: openmm.RBTorsionForce, host: Host) -> RBTorsion:
        """Build the term."""
        n = host.system.getNumParticles()
        rows = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        return RBTorsion(
            checked_indices(force.getName(), rows, 0, 1, 2, 3, n_particles=n),
            *(column(rows, 4 + n) for n in range(len(_COEFFICIENTS))),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.RBTorsionForce) -> None:
        """Set the six coefficients of each torsion."""
        for i in range(force.getNumTorsions()):
            p1, p2, p3, p4, *_ = force.getTorsionParameters(i)
            coefficients = (values[name][i] for name in _COEFFICIENTS)
            force.setTorsionParameters(i, p1, p2, p3, p4, *coefficients)
