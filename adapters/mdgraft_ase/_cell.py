"""ASE's cells in the form that OpenMM has: lower triangular and reduced."""

from __future__ import annotations

import dataclasses

import numpy as np

# Off-diagonal elements may reach half of the diagonal and, so that rounding does not turn one
# description of a hexagonal lattice into another from step to step, a little more.
_HALF = 0.5 + 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReducedCell:
    """A lattice and its axes as OpenMM describes them.

    Attributes
    ----------
    box
        ``(3, 3)`` box vectors as rows, lower triangular with a positive diagonal, reduced:
        ``box = lattice @ cell @ rotation``.
    rotation
        ``(3, 3)`` proper: positions become ``positions @ rotation``. None if nothing is rotated.
    lattice
        ``(3, 3)`` whole numbers of determinant 1 or -1: the same lattice by other vectors.
    """

    box: np.ndarray
    rotation: np.ndarray | None
    lattice: np.ndarray

    def into(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors ``(..., 3)`` from the frame of the cell to that of the box."""
        return vectors if self.rotation is None else vectors @ self.rotation

    def back(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors ``(..., 3)`` from the frame of the box to that of the cell."""
        return vectors if self.rotation is None else vectors @ self.rotation.T

    def back_twice(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor ``(3, 3)`` from the frame of the box to that of the cell."""
        return tensor if self.rotation is None else self.rotation @ tensor @ self.rotation.T


def reduced_cell(cell: np.ndarray) -> ReducedCell:
    """Rotate a cell with a volume to the standard form and reduce its lattice.

    A left-handed cell is described by the opposite of its third vector, not by a mirror image:
    a chiral molecule has another energy in the mirror. The order of the vectors is kept, since a
    mesh may be finer along one of them.

    Parameters
    ----------
    cell
        ``(3, 3)``, vectors as rows, in any unit.
    """
    lattice = np.eye(3)
    if np.linalg.det(cell) < 0:
        lattice[2, 2] = -1.0
    vectors = lattice @ cell
    rotation = None
    if np.triu(vectors, 1).any() or (np.diagonal(vectors) <= 0).any():
        # vectors = L Q with the transpose of a QR decomposition, signs such that L's diagonal
        # is positive; Q is then proper because the vectors are right-handed.
        q, r = np.linalg.qr(vectors.T)
        signs = np.sign(np.diagonal(r))
        rotation = q * signs
        vectors = np.tril(r.T * signs)
    else:
        vectors = vectors.copy()
    for row, column in ((2, 1), (2, 0), (1, 0)):
        ratio = vectors[row, column] / vectors[column, column]
        if abs(ratio) > _HALF:
            n = np.round(ratio)
            vectors[row] -= n * vectors[column]
            lattice[row] -= n * lattice[column]
    return ReducedCell(box=vectors, rotation=rotation, lattice=lattice)
