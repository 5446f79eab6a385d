"""`ase.calculators.lj.LennardJones`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.lennard_jones import LennardJones

from mdgraft_ase._settings import change_setting
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

_UNITS = {"epsilon": EV, "sigma": ANGSTROM, "rc": ANGSTROM, "ro": ANGSTROM}


class LennardJonesForm(AbstractForm):
    """Its parameters are the calculator's: epsilon, sigma, rc and, if it is smooth, ro."""

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        given = {name: number(calculator.parameters[name], _UNITS[name]) for name in _UNITS}
        if not calculator.parameters["smooth"]:
            del given["ro"]
        return LennardJones(
            epsilon=given["epsilon"],
            sigma=given["sigma"],
            rc=given["rc"],
            ro=given.get("ro"),
            pbc=periods(atoms),
        )

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
