"""`ase.calculators.tersoff.Tersoff`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.tersoff import PARAMETERS, Tersoff

from mdgraft_ase._settings import forget
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

_UNITS = {
    "lambda1": 1.0 / ANGSTROM,
    "lambda2": 1.0 / ANGSTROM,
    "lambda3": 1.0 / ANGSTROM,
    "A": EV,
    "B": EV,
    "R": ANGSTROM,
    "D": ANGSTROM,
}


class TersoffForm(AbstractForm):
    """One entry of each parameter for each triple of the elements present, in order of symbols."""

    by_element = True
    defining = (
        "_calc_atom_contribution",
        "_calc_bij",
        "_calc_zeta",
        "_calc_gijk",
        "_calc_fc",
        "_update_nl",
    )

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        symbols = sorted(set(atoms.symbols))
        triples = list(itertools.product(symbols, repeat=3))
        missing = [triple for triple in triples if triple not in calculator.parameters]
        if missing:
            raise InvalidInputError(
                f"host_object: this Tersoff has no parameters for {missing[0]}; it knows "
                f"{list(calculator.parameters)}"
            )
        rows = [calculator.parameters[triple] for triple in triples]
        n = len(symbols)
        return Tersoff(
            elements=torch.tensor([symbols.index(symbol) for symbol in atoms.symbols]),
            triples=torch.arange(n**3).reshape(n, n, n),
            parameters={
                name: number([getattr(row, name) for row in rows], _UNITS.get(name, 1.0))
                for name in PARAMETERS
            },
            m=number([row.m for row in rows]),
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
        triples = itertools.product(sorted(set(atoms.symbols)), repeat=3)
        for place, triple in enumerate(triples):
            # Triples may share one object, which then no longer suits all.
            calculator.parameters[triple] = dataclasses.replace(
                calculator.parameters[triple],
                **{name: float(values[name][place] / _UNITS.get(name, 1.0)) for name in changed},
            )
        forget(calculator)
