"""What a System holds fixed while its integrators move particles."""

from __future__ import annotations

import openmm
from mdgraft import InvalidInputError
from mdgraft.potentials.held import Held

from mdgraft_openmm._converter import number


def held_by(system: openmm.System) -> Held | None:
    """Constrained distances, and particles that stay where they are; None where there are none.

    Particles without mass stay, but for virtual sites, which follow others.
    """
    rows = [system.getConstraintParameters(k) for k in constraint_indices(system)]
    pinned = [
        i
        for i in range(system.getNumParticles())
        if not number(system.getParticleMass(i)) and not system.isVirtualSite(i)
    ]
    return Held.of([(i, j) for i, j, _ in rows], [number(d) for _, _, d in rows], pinned)


def constraint_indices(system: openmm.System) -> list[int]:
    """Which constraints of a System have an effect: all but those between massless particles.

    Raises
    ------
    InvalidInputError
        If a constraint names particles that do not exist.
    """
    n = system.getNumParticles()
    kept = []
    for k in range(system.getNumConstraints()):
        i, j, _ = system.getConstraintParameters(k)
        if not (0 <= i < n and 0 <= j < n):
            raise InvalidInputError(
                f"host_object: constraint {k} connects particles {i} and {j}, but the System has "
                f"{n}"
            )
        if number(system.getParticleMass(i)) or number(system.getParticleMass(j)):
            kept.append(k)
    return kept
