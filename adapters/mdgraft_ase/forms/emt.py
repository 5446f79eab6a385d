"""`ase.calculators.emt.EMT`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from ase import units
from ase.calculators import emt
from ase.data import chemical_symbols
from mdgraft import InvalidInputError, ParameterMismatchError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.emt import EffectiveMedium

from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

# In the order of ASE's table, which counts lengths in Bohr.
_BOHR = units.Bohr * ANGSTROM
_UNITS = {
    "E0": EV,
    "s0": _BOHR,
    "V0": EV,
    "eta2": 1.0 / _BOHR,
    "kappa": 1.0 / _BOHR,
    "lambda": 1.0 / _BOHR,
    "n0": 1.0 / _BOHR**3,
}


class EMTForm(AbstractForm):
    """One entry of each parameter for each element, by atomic number.

    The cutoff follows the largest ``s0`` of ASE's table or, with ``asap_cutoff``, of the elements
    present, and is differentiated like everything else.
    """

    by_element = True
    defining = (
        "initialize",
        "_calc_cutoff",
        "_calc_gammas",
        "_get_neighbors",
        "_calc_theta",
        "_calc_dsigma1",
        "_calc_dsigma2",
        "_calc_e_c_a2",
        "_calc_efs_a1",
    )

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        numbers, places = np.unique(atoms.numbers, return_inverse=True)
        symbols = [chemical_symbols[z] for z in numbers]
        unknown = [symbol for symbol in symbols if symbol not in emt.parameters]
        if unknown:
            raise InvalidInputError(
                f"host_object: ASE's EMT has no parameters for {', '.join(unknown)}; it knows "
                f"{', '.join(emt.parameters)}"
            )
        table = np.array([emt.parameters[symbol] for symbol in symbols])
        asap = bool(calculator.parameters["asap_cutoff"])
        absent = [p[1] for symbol, p in emt.parameters.items() if symbol not in symbols]
        return EffectiveMedium(
            elements=torch.as_tensor(places),
            parameters={
                name: number(column, unit)
                for column, (name, unit) in zip(table.T, _UNITS.items(), strict=True)
            },
            largest_other=0.0 if asap else max(absent, default=0.0) * _BOHR,
            reach=(1.045, 0.0) if asap else (1.0, 0.5 * ANGSTROM),
            pbc=periods(atoms),
        )

    def check(self, calculator: Any, changed: frozenset[str]) -> None:
        """Refuse any change."""
        if changed:
            raise ParameterMismatchError(
                f"EMT.{min(changed)}: all EMT calculators of ASE share one table of parameters, so "
                "none of them can have its own; run the potential itself, through "
                "mdgraft_ase.MDGraftCalculator"
            )

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        raise NotImplementedError("check refuses every change")
