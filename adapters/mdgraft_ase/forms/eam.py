"""`ase.calculators.eam.EAM`, with functions that are splines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.eam import EmbeddedAtom
from scipy.interpolate import UnivariateSpline

from mdgraft_ase._settings import forget
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

# What coefficients and knots are measured in, by family.
_UNITS = {
    "embedded_energy": (EV, 1.0),
    "electron_density": (1.0, ANGSTROM),
    "phi": (EV, ANGSTROM),
    "d": (np.sqrt(EV) / ANGSTROM, ANGSTROM),
    "q": (np.sqrt(EV) / ANGSTROM**2, ANGSTROM),
}


class EAMForm(AbstractForm):
    """Forms eam, alloy, fs and adp; parameters are B-spline coefficients of each function."""

    by_element = True
    defining = (
        "calculate_energy",
        "calculate_forces",
        "update",
        "adp_dipole",
        "adp_quadrupole",
        "angular_forces",
    )

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        symbols = _symbols(calculator, atoms)
        functions = _functions(calculator, symbols)
        knots: dict[str, torch.Tensor] = {}
        coefficients: dict[str, torch.Tensor] = {}
        degrees: dict[str, int] = {}
        names: dict[str, dict[tuple[int, ...], str]] = {}
        for family, members in functions.items():
            of_coefficients, of_knots = _UNITS[family]
            names[family] = {}
            for member, (name, function) in members.items():
                t, c, degree = _spline(name, function)
                names[family][member] = name
                knots[name], degrees[name] = number(t, of_knots), degree
                coefficients[name] = number(c, of_coefficients)
        return EmbeddedAtom(
            elements=torch.tensor([symbols.index(symbol) for symbol in atoms.symbols]),
            functions=names,
            knots=knots,
            coefficients=coefficients,
            degrees=degrees,
            cutoff=float(calculator.cutoff) * ANGSTROM,
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
        symbols = _symbols(calculator, atoms)
        rows = [list(calculator.elements).index(symbol) for symbol in symbols]
        for family, members in _functions(calculator, symbols).items():
            table = getattr(calculator, family)
            slopes = getattr(calculator, f"d_{family}")
            made: dict[str, Any] = {}
            for member, (name, function) in members.items():
                if name not in changed:
                    continue
                if name not in made:
                    t, _, degree = _spline(name, function)
                    made[name] = _from_tck(t, values[name] / _UNITS[family][0], degree)
                place = _place(calculator, family, tuple(rows[k] for k in member))
                table[place] = made[name]
                slopes[place] = calculator.deriv(made[name])
        forget(calculator)


def _symbols(calculator: Any, atoms: ase.Atoms) -> list[str]:
    known = list(calculator.elements)
    present = [symbol for symbol in known if symbol in set(atoms.symbols)]
    unknown = sorted(set(atoms.symbols) - set(known))
    if unknown:
        raise InvalidInputError(
            f"host_object: this EAM has no functions for {', '.join(unknown)}; it knows "
            f"{', '.join(known)}"
        )
    return present


def _functions(
    calculator: Any, symbols: list[str]
) -> dict[str, dict[tuple[int, ...], tuple[str, Any]]]:
    """Functions by family and by elements, the atom's own first, each with its name."""
    if calculator.form not in ("eam", "alloy", "fs", "adp"):
        raise UnsupportedForceError(f"EAM: the form {calculator.form!r} is not known")
    rows = [list(calculator.elements).index(symbol) for symbol in symbols]
    found: dict[str, dict[tuple[int, ...], tuple[str, Any]]] = {
        "embedded_energy": {
            (i,): (f"embedded_energy_{s}", calculator.embedded_energy[rows[i]])
            for i, s in enumerate(symbols)
        }
    }
    families = ["electron_density", "phi", *(("d", "q") if calculator.form == "adp" else ())]
    for family in families:
        table = getattr(calculator, family)
        named: dict[int, str] = {}
        members: dict[tuple[int, ...], tuple[str, Any]] = {}
        for i, j in itertools.product(range(len(symbols)), repeat=2):
            place = _place(calculator, family, (rows[i], rows[j]))
            pair: tuple[str, ...] = (symbols[i], symbols[j])
            if family == "electron_density":
                # It belongs to the neighbour, and then to the atom that feels it.
                pair = pair[::-1] if calculator.form == "fs" else (symbols[j],)
            name = named.setdefault(id(table[place]), "_".join((family, *pair)))
            members[i, j] = (name, table[place])
        found[family] = members
    return found


def _place(calculator: Any, family: str, rows: tuple[int, ...]) -> Any:
    """Where the function of an atom's and a neighbour's element stands in its table."""
    if family == "embedded_energy":
        return rows[0]
    if family == "electron_density":
        return rows[::-1] if calculator.form == "fs" else rows[1]
    return rows


def _spline(name: str, function: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Knots, coefficients and degree."""
    if not isinstance(function, UnivariateSpline):
        raise UnsupportedForceError(
            f"EAM: {name} is a {type(function).__name__}, and only splines have a torch form"
        )
    own: Any = function
    t, c, degree = own._eval_args
    if getattr(function, "ext", 0) not in (0, "extrapolate"):
        raise UnsupportedForceError(f"EAM: {name} is a spline that does not extrapolate")
    return np.asarray(t), np.asarray(c)[: len(t) - degree - 1], int(degree)


def _from_tck(t: np.ndarray, c: np.ndarray, degree: int) -> Any:
    made: Any = UnivariateSpline
    return made._from_tck((t, np.concatenate([c, np.zeros(degree + 1)]), degree))
