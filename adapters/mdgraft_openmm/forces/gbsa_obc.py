"""GBSAOBCForce."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.obc import GeneralizedBornOBC

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    changed_scalars,
    checked_cutoff,
    column,
    scalar,
)

_PARTICLE = ("charge", "radius", "scaling_factor")
_SCALARS = {
    "solute_dielectric": "SoluteDielectric",
    "solvent_dielectric": "SolventDielectric",
    "surface_area_energy": "SurfaceAreaEnergy",
}


class GBSAOBCConverter(AbstractConverter):
    """GBSAOBCForce <-> GeneralizedBornOBC."""

    polynomial = frozenset({"charge", "surface_area_energy"})

    def read(self, force: openmm.GBSAOBCForce, host: Host) -> GeneralizedBornOBC:
        """Build the term."""
        n = host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{force.getName()}: has {force.getNumParticles()} particles, the System {n}"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        return GeneralizedBornOBC(
            *(column(rows, c) for c in range(3)),
            solute_dielectric=scalar(force.getSoluteDielectric()),
            solvent_dielectric=scalar(force.getSolventDielectric()),
            surface_area_energy=scalar(force.getSurfaceAreaEnergy()),
            cutoff=checked_cutoff(force, host),
            periodic=force.getNonbondedMethod() == force.CutoffPeriodic,
        )

    def write(self, values: Values, force: openmm.GBSAOBCForce) -> None:
        """Set particles, dielectrics and surface-area energy."""
        for i in range(force.getNumParticles()):
            force.setParticleParameters(i, *(values[key][i] for key in _PARTICLE))
        for key, name in _SCALARS.items():
            getattr(force, f"set{name}")(float(values[key]))

    def refused(self, values: Values, force: openmm.GBSAOBCForce) -> str | None:
        """Find what no Context accepts."""
        for key in ("radius", "scaling_factor"):
            if (values[key] <= 0).any():
                i = int(values[key].argmin())
                return (
                    f"{force.getName()}.{key}: entry {i} is {values[key][i]:g}; OpenMM accepts "
                    "only positive values"
                )
        return None

    def structural(self, values: Values, force: openmm.GBSAOBCForce) -> list[str]:
        """A live Context takes over the particles only."""
        return changed_scalars(values, force, _SCALARS)
