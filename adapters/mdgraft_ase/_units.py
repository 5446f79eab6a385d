"""Between ASE's units (Angstrom, eV) and ours (nm, kJ/mol), and structures in ours."""

from __future__ import annotations

import ase
import numpy as np
import torch
from ase import units
from torch import Tensor

#: One Angstrom [nm].
ANGSTROM = 1.0 / units.nm
#: One eV [kJ/mol], by the constants that ASE uses.
EV = units.mol / units.kJ


def periods(atoms: ase.Atoms) -> tuple[bool, bool, bool]:
    """Which cell vectors are periods."""
    a, b, c = (bool(periodic) for periodic in atoms.pbc)
    return a, b, c


def positions_and_box(
    atoms: ase.Atoms, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Positions and box of a structure as a potential takes them.

    Parameters
    ----------
    atoms
        The structure. Cell vectors that are missing because they are no periods are completed.
    dtype, device
        Of the tensors.

    Returns
    -------
    tuple
        ``(N, 3)`` [nm], and ``(3, 3)`` [nm] or None if nothing is periodic.
    """
    positions = torch.as_tensor(atoms.positions * ANGSTROM, dtype=dtype, device=device)
    if not any(periods(atoms)):
        return positions, None
    cell = np.asarray(atoms.cell.complete()) * ANGSTROM
    return positions, torch.as_tensor(cell, dtype=dtype, device=device)
