"""HarmonicBondForce."""

from __future__ import annotations

import openmm
from mdgraft.potentials.bonded import HarmonicBond

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices, column


class HarmonicBondConverter(AbstractConverter):
    """HarmonicBondForce <-> HarmonicBond."""

    polynomial = frozenset({"length", "k"})

    def read(self, force: openmm.HarmonicBondForce, host: Host) -> HarmonicBond:
        """Build the term."""
        rows = [force.getBondParameters(i) for i in range(force.getNumBonds())]
        return HarmonicBond(
            checked_indices(force.getName(), rows, 0, 1, n_particles=host.system.getNumParticles()),
            length=column(rows, 2),
            k=column(rows, 3),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.HarmonicBondForce) -> None:
        """Set lengths and force constants."""
        for i in range(force.getNumBonds()):
            p1, p2, _, _ = force.getBondParameters(i)
            force.setBondParameters(i, p1, p2, values["length"][i], values["k"][i])

    def refused(self, values: Values, force: openmm.HarmonicBondForce) -> str | None:
        """Find lengths that no Context accepts."""
        if not (values["length"] < 0.0).any():
            return None
        i = int(values["length"].argmin())
        return (
            f"{force.getName()}.length: entry {i} is {values['length'][i]:g} nm; OpenMM accepts "
            "only lengths that are not negative"
        )
