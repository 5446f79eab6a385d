"""`ase.calculators.morse.MorsePotential`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
from ase.neighborlist import neighbor_list
from mdgraft import UnsupportedForceError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.morse import Morse

from mdgraft_ase._settings import change_setting
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

_UNITS = {"epsilon": EV, "rho0": 1.0, "r0": ANGSTROM, "rcut1": 1.0, "rcut2": 1.0}


class MorseForm(AbstractForm):
    """Its parameters are the calculator's: epsilon, rho0, r0, rcut1 and rcut2."""

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        if getattr(calculator, "neighbor_list", neighbor_list) is not neighbor_list:
            raise UnsupportedForceError(
                "MorsePotential: has a neighbor_list of its own, which may leave pairs out"
            )
        given = {name: number(calculator.parameters[name], unit) for name, unit in _UNITS.items()}
        return Morse(**given, pbc=periods(atoms))

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        for name in changed:
            change_setting(calculator, name, float(values[name] / _UNITS[name]))
