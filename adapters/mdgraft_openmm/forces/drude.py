"""DrudeForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.drude import Drude

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    column,
    indices,
)

_PARTICLE = ("charge", "polarizability", "aniso12", "aniso34")


class DrudeConverter(AbstractConverter):
    """DrudeForce <-> Drude."""

    polynomial = frozenset({"charge"})

    def read(self, force: openmm.DrudeForce, host: Host) -> Drude:
        """Build the term."""
        name, n = force.getName(), host.system.getNumParticles()
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        pairs = [force.getScreenedPairParameters(i) for i in range(force.getNumScreenedPairs())]
        bound = checked_indices(name, rows, 0, 1, n_particles=n)
        axes = indices(rows, 2, 3, 4)
        outside = ((axes < -1) | (axes >= n)).any(dim=-1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise InvalidInputError(
                f"{name}: oscillator {row} has the axis particles {axes[row].tolist()}, but "
                f"indices reach only from -1, for none, to {n - 1}"
            )
        used, counts = torch.unique(bound, return_counts=True)
        if bool((counts > 1).any()):
            raise InvalidInputError(
                f"{name}: particle {int(used[counts > 1][0])} belongs to more than one oscillator"
            )
        screened = checked_indices(name, pairs, 0, 1, n_particles=len(rows))
        _, counts = torch.unique(screened.sort(dim=-1).values, dim=0, return_counts=True)
        if bool((counts > 1).any()):
            raise InvalidInputError(f"{name}: two oscillators have more than one screened pair")
        return Drude(
            torch.cat([bound, axes], dim=-1),
            *(column(rows, c) for c in (5, 6, 7, 8)),
            pairs=screened,
            thole=column(pairs, 2),
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.DrudeForce) -> None:
        """Set charges, polarizabilities, anisotropies and screening factors."""
        for i in range(force.getNumParticles()):
            particles = force.getParticleParameters(i)[:5]
            force.setParticleParameters(i, *particles, *(values[key][i] for key in _PARTICLE))
        for i in range(force.getNumScreenedPairs()):
            first, second, _ = force.getScreenedPairParameters(i)
            force.setScreenedPairParameters(i, first, second, values["thole"][i])


def drude_particles(system: openmm.System) -> list[int]:
    """Drude particles of a System in ascending order, as `SelfConsistent` takes them.

    Parameters
    ----------
    system
        Any System; without a DrudeForce the list is empty.

    Returns
    -------
    list of int
        Particle indices.
    """
    forces = [force for force in system.getForces() if isinstance(force, openmm.DrudeForce)]
    return sorted(
        int(force.getParticleParameters(i)[0])
        for force in forces
        for i in range(force.getNumParticles())
    )
