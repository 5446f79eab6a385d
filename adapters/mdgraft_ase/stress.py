"""Stress from the derivatives by positions and box."""

from __future__ import annotations

import ase
import numpy as np
import torch
from mdgraft import InvalidInputError, Potential
from mdgraft._types import BoxLike, PositionsLike
from torch import Tensor

from mdgraft_ase._units import ANGSTROM, EV, positions_and_box

# ASE's order: xx, yy, zz, yz, xz, xy.
_VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))


def stress_tensor(potential: Potential, positions: PositionsLike, box: BoxLike) -> Tensor:
    """Stress of each frame, itself differentiable.

    A strain e takes positions x to ``x (1 + e)`` and box vectors h, as rows, to ``h (1 + e)``::

        stress = (x^T dU/dx + h^T dU/dh) / V

    Parameters
    ----------
    potential
        A periodic one.
    positions
        ``(..., N, 3)`` [nm].
    box
        ``(..., 3, 3)`` [nm], with the leading shape of the positions.

    Returns
    -------
    Tensor
        ``(..., 3, 3)`` [kJ/mol/nm^3], made symmetric; positive where the system pulls together.

    Raises
    ------
    InvalidInputError
        If the potential is not periodic.
    """
    if not potential.periodic:
        raise InvalidInputError(
            "potential: is not periodic, so there is no volume that a stress refers to; its forces "
            "tell all"
        )
    x = torch.as_tensor(positions, dtype=potential.dtype, device=potential.device)
    h = torch.as_tensor(box, dtype=potential.dtype, device=potential.device)
    h = h.expand(*x.shape[:-2], 3, 3)
    by_positions, by_box = torch.func.grad(lambda p, c: potential(p, c).sum(), argnums=(0, 1))(x, h)
    strained = x.transpose(-1, -2) @ by_positions + h.transpose(-1, -2) @ by_box
    if potential.general_cell:
        symmetric = 0.5 * (strained + strained.transpose(-1, -2))
    else:
        # Of a reduced box some terms know six derivatives only, which make up the lower triangle.
        lower = torch.tril(strained)
        symmetric = lower + torch.tril(lower, diagonal=-1).transpose(-1, -2)
    result: Tensor = symmetric / torch.linalg.det(h).abs()[..., None, None]
    return result


def stress(potential: Potential, atoms: ase.Atoms, *, voigt: bool = True) -> np.ndarray:
    """Stress of a structure as ``atoms.get_stress()`` gives it, constraints left aside.

    Parameters
    ----------
    potential
        A periodic one for these atoms.
    atoms
        With three cell vectors.
    voigt
        Order xx, yy, zz, yz, xz, xy; otherwise the matrix.

    Returns
    -------
    numpy.ndarray
        ``(6,)`` or ``(3, 3)`` [eV/Angstrom^3].

    Raises
    ------
    InvalidInputError
        If the cell has no volume or the potential is not periodic.
    """
    if atoms.cell.rank < 3:
        raise InvalidInputError(
            f"atoms: the cell {atoms.cell.tolist()} has no volume that a stress could refer to; "
            "set all three vectors"
        )
    x, _ = positions_and_box(atoms)
    box = np.asarray(atoms.cell) * ANGSTROM
    with torch.no_grad():
        found = stress_tensor(potential, x, box).double().cpu().numpy()
    full = found / (EV / ANGSTROM**3)
    return full[_VOIGT] if voigt else full
