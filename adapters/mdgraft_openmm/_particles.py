"""Checks of the particles that a force or site names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdgraft import InvalidInputError
from mdgraft_openmm._converter import Host, indices


def particles(force: Any, host: Host, rows: list[tuple[Any, ...]], *columns: int) -> Tensor:
    """Particle indices in each row as an int64 tensor ``(rows, columns)``.

    Raises
    ------
    InvalidInputError
        If an index lies outside of the system.
    """
    found = indices(rows, *columns)
    n_particles = host.system.getNumParticles()
    wrong = ((found < 0) | (found >= n_particles)).nonzero()
    if len(wrong):
        row, entry = wrong[0].tolist()
        raise InvalidInputError(
            f"host_object: interaction {row} of {force.getName()} names particle "
            f"{int(found[row, entry])}, but the System has {n_particles} particles"
        )
    return found
