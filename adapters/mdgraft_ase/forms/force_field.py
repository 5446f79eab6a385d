"""`ase.calculators.ff.ForceField`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.bonded_lists import KINDS, BondedLists

from mdgraft_ase._settings import forget
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

_PLACES = ("atomi", "atomj", "atomk", "atoml")
# What a parameter is measured in, by kind and name; where nothing is said, in eV or radian.
_UNITS = {
    ("morse", "alpha"): 1.0 / ANGSTROM,
    ("morse", "r0"): ANGSTROM,
    ("bond", "k"): EV / ANGSTROM**2,
    ("bond", "b0"): ANGSTROM,
    ("vdw", "Aij"): EV * ANGSTROM**12,
    ("vdw", "Bij"): EV * ANGSTROM**6,
    ("coulomb", "chargeij"): EV * ANGSTROM,
}
_NO_ENERGY = ("a0", "d0", "n")


class ForceFieldForm(AbstractForm):
    """Lists of morses, bonds, angles, dihedrals, vdws and coulombs, by their formula.

    Scalings that only preconditioners use (alpha and rref of bonds, angles and dihedrals) have no
    part in the energy. A dihedral of exactly zero or pi has the limit of its neighbourhood.
    """

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        cell = np.asarray(atoms.cell)
        if not abs(np.linalg.det(cell)) > 0:
            raise InvalidInputError(
                "host_object: ForceField looks for nearest images whatever atoms.pbc says, and "
                "wants a cell with a volume; set one that is larger than the molecule"
            )
        items = _items(calculator)
        return BondedLists(
            particles={
                kind: torch.tensor(
                    [[getattr(item, p) for p in _PLACES[: KINDS[kind][0]]] for item in members]
                )
                for kind, members in items.items()
            },
            parameters={
                kind: {
                    name: number([getattr(item, name) for item in members], _unit(kind, name))
                    for name in KINDS[kind][1]
                }
                for kind, members in items.items()
            },
            periodic=any(periods(atoms)),
            cell=number(cell, ANGSTROM),
        )

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        for kind, members in _items(calculator).items():
            for name in KINDS[kind][1]:
                if f"{kind}_{name}" in changed:
                    new = values[f"{kind}_{name}"] / _unit(kind, name)
                    for item, value in zip(members, new, strict=True):
                        setattr(item, name, float(value))
        forget(calculator)


def _unit(kind: str, name: str) -> float:
    return _UNITS.get((kind, name), 1.0 if name in _NO_ENERGY else EV)


def _items(calculator: Any) -> dict[str, list[Any]]:
    """Interactions by kind; kinds without any are left out."""
    angles, dihedrals = calculator.angles, calculator.dihedrals
    found = {
        "morse": list(calculator.morses),
        "bond": list(calculator.bonds),
        "angle": [item for item in angles if not item.cos],
        "cosine_angle": [item for item in angles if item.cos],
        "dihedral": [item for item in dihedrals if item.d0 is None],
        "harmonic_dihedral": [d for d in dihedrals if d.d0 is not None and d.n is None],
        "periodic_dihedral": [d for d in dihedrals if d.d0 is not None and d.n is not None],
        "vdw": list(calculator.vdws),
        "coulomb": list(calculator.coulombs),
    }
    return {kind: members for kind, members in found.items() if members}
