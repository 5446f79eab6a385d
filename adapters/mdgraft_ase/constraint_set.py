"""Constraints of Atoms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLengths, FixInternals
from mdgraft import InvalidInputError, UnsupportedHostError
from mdgraft.constraints import ConstraintSet

_NM = 0.1


def constraints(
    atoms: Atoms,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> ConstraintSet:
    """The distance constraints and masses of Atoms.

    Bond lengths of ``FixBondLengths`` (``FixBondLength`` makes one) and of ``FixInternals``, in
    this order; atoms of ``FixAtoms`` become massless, which keeps them where they are. Lengths
    that ASE takes from the present positions are taken from there. Vectors reach the nearest image
    in periodic directions, as ASE's do.

    Parameters
    ----------
    atoms
        The Atoms.
    dtype, device
        Where and in which precision to project.

    Returns
    -------
    ConstraintSet
        In nm and Da; it needs a ``box`` if the Atoms are periodic and a distance is constrained.

    Raises
    ------
    UnsupportedHostError
        If ``atoms`` is no Atoms object.
    InvalidInputError
        For constraints that are no distances (all are listed), or distances to fixed atoms.
    """
    if not isinstance(atoms, Atoms):
        raise UnsupportedHostError(
            f"atoms: got {type(atoms).__module__}.{type(atoms).__qualname__}, wanted ase.Atoms"
        )
    bonds: list[tuple[int, int, float | None, bool]] = []
    fixed: set[int] = set()
    refused: list[str] = []
    own: list[Any] = list(atoms.constraints)
    for constraint in own:
        if isinstance(constraint, FixAtoms):
            fixed |= {int(i) for i in constraint.index}
        elif isinstance(constraint, FixBondLengths):
            given = constraint.bondlengths
            lengths = [None] * len(constraint.pairs) if given is None else list(given)
            rows = zip(constraint.pairs.tolist(), lengths, strict=True)
            bonds += [(i, j, length, True) for (i, j), length in rows]
        elif isinstance(constraint, FixInternals):
            refused += [
                f"FixInternals.{name}"
                for name in ("angles", "dihedrals", "bondcombos")
                if getattr(constraint, name)
            ]
            bonds += [(i, j, length, constraint.mic) for length, (i, j) in constraint.bonds]
        else:
            refused.append(type(constraint).__name__)
    if refused:
        raise InvalidInputError(
            f"atoms: {', '.join(refused)} are no constraints of distances; supported are "
            "FixBondLengths, FixBondLength, the bonds of FixInternals, and FixAtoms. A linear "
            "triple is best described by one distance between its ends and a virtual site"
        )
    n = len(atoms)
    indices = [(_index(i, n), _index(j, n)) for i, j, _, _ in bonds]
    shared = sorted({i for pair in indices for i in pair} & {_index(i, n) for i in fixed})
    if shared:
        raise InvalidInputError(
            f"atoms: {shared[:10]} are fixed and also have a constrained distance, which ASE "
            "applies one after the other, so that neither holds; remove one of the constraints"
        )
    return ConstraintSet(
        torch.tensor(indices, dtype=torch.long).reshape(-1, 2),
        torch.from_numpy(_lengths(atoms, indices, bonds)),
        torch.from_numpy(_masses(atoms, fixed)),
        pbc=_periodicity(atoms, bonds),
    ).to(device=device, dtype=dtype)


def _index(i: Any, n: int) -> int:
    """Indices count from the end if they are negative, as everywhere in ASE."""
    if not -n <= int(i) < n:
        raise InvalidInputError(f"atoms: a constraint names atom {i}, but there are {n}")
    return int(i) % n


def _lengths(
    atoms: Any,
    indices: list[tuple[int, int]],
    bonds: list[tuple[int, int, float | None, bool]],
) -> np.ndarray:
    found = [
        atoms.get_distance(i, j, mic=mic) if length is None else float(length)
        for (i, j), (_, _, length, mic) in zip(indices, bonds, strict=True)
    ]
    return _NM * np.asarray(found, dtype=float)


def _masses(atoms: Atoms, fixed: set[int]) -> np.ndarray:
    masses: np.ndarray = atoms.get_masses().astype(float)
    masses[sorted(fixed)] = 0.0
    return masses


def _periodicity(
    atoms: Atoms, bonds: list[tuple[int, int, float | None, bool]]
) -> tuple[bool, bool, bool]:
    """Directions in which vectors reach the nearest image."""
    if not any(atoms.pbc) or not any(mic for *_, mic in bonds):
        return (False, False, False)
    if not all(mic for *_, mic in bonds):
        raise InvalidInputError(
            "atoms: some constraints take the nearest image and some do not; give FixInternals "
            "mic=True, as FixBondLengths has"
        )
    return (bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2]))
