"""AmoebaTorsionTorsionForce."""

from __future__ import annotations

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.amoeba.torsion_torsion import TABLES, AmoebaTorsionTorsion

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    indices,
)


class AmoebaTorsionTorsionConverter(AbstractConverter):
    """AmoebaTorsionTorsionForce <-> AmoebaTorsionTorsion."""

    polynomial = frozenset(TABLES)

    def read(self, force: openmm.AmoebaTorsionTorsionForce, host: Host) -> AmoebaTorsionTorsion:
        """Build the term; derivatives that a grid came without are OpenMM's own."""
        name, n = force.getName(), host.system.getNumParticles()
        rows = [force.getTorsionTorsionParameters(i) for i in range(force.getNumTorsionTorsions())]
        chain = checked_indices(name, rows, 0, 1, 2, 3, 4, n_particles=n)
        check = indices(rows, 5)
        wrong = ((check < -1) | (check >= n)).flatten()
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise InvalidInputError(
                f"{name}: torsion {row} has the chirality check particle {int(check[row])}, but "
                f"indices reach only from -1, for none, to {n - 1}"
            )
        grids = _grids(force)
        starts = [grid[0, 0, :2] for grid in grids]
        widths = [(grid[-1, -1, :2] - grid[0, 0, :2]) / (len(grid) - 1) for grid in grids]
        flat = [grid.reshape(-1, 6) for grid in grids] or [np.empty((0, 6))]
        tables = torch.tensor(np.concatenate(flat))
        return AmoebaTorsionTorsion(
            torch.cat([chain, check], dim=-1),
            checked_indices(name, rows, 6, n_particles=len(grids)).squeeze(-1),
            [len(grid) for grid in grids],
            torch.tensor(np.array(starts).reshape(-1, 2)),
            torch.tensor(np.array(widths).reshape(-1, 2)),
            {key: tables[:, 2 + k].clone() for k, key in enumerate(TABLES)},
            periodic=force.usesPeriodicBoundaryConditions(),
        )

    def write(self, values: Values, force: openmm.AmoebaTorsionTorsionForce) -> None:
        """Set the grids with all derivatives."""
        start = 0
        for i, grid in enumerate(_grids(force)):
            points = slice(start, start + grid.shape[0] ** 2)
            start = points.stop
            for k, key in enumerate(TABLES):
                grid[:, :, 2 + k] = values[key][points].reshape(grid.shape[:2])
            force.setTorsionTorsionGrid(i, grid.tolist())

    def structural(self, values: Values, force: openmm.AmoebaTorsionTorsionForce) -> list[str]:
        """Any change at all: this class has no ``updateParametersInContext``."""
        grids = [grid.reshape(-1, 6) for grid in _grids(force)] or [np.empty((0, 6))]
        present = np.concatenate(grids)
        return [
            key
            for k, key in enumerate(TABLES)
            if not np.array_equal(values[key], present[:, 2 + k])
        ]


def _grids(force: openmm.AmoebaTorsionTorsionForce) -> list[np.ndarray]:
    """All grids ``(size, size, 6)``."""
    grids = []
    for i in range(force.getNumTorsionTorsionGrids()):
        grid = np.array(force.getTorsionTorsionGrid(i), dtype=np.float64)
        if grid.ndim != 3 or grid.shape[0] != grid.shape[1] or grid.shape[0] < 2:
            raise InvalidInputError(
                f"{force.getName()}: grid {i} has the shape {grid.shape}, wanted as many points "
                "along one angle as along the other, and at least 2"
            )
        for axis, angles in enumerate((grid[:, :, 0], grid[:, :, 1].T)):
            wanted = np.linspace(angles[0, 0], angles[-1, 0], len(grid))
            if angles[0, 0] >= angles[-1, 0] or np.abs(angles - wanted[:, None]).max() > 1e-4:
                raise InvalidInputError(
                    f"{force.getName()}: angle {axis + 1} of grid {i} must grow in equal steps "
                    "along one axis and stay the same along the other"
                )
        grids.append(grid)
    return grids
