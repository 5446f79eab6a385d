"""The calculators of `ase.calculators.harmonic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
from ase.calculators.harmonic import HarmonicForceField
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.harmonic import CartesianHessian, Springs

from mdgraft_ase._settings import forget
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number


class HarmonicForm(AbstractForm):
    """A `HarmonicForceField` that is harmonic in Cartesian coordinates.

    ``hessian_x`` is the Hessian that is used, after whatever internal coordinates, constraints and
    thresholds have removed from the one given. Where internal coordinates are evaluated for each
    structure they are functions of the user's that torch cannot see.
    """

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        field = calculator.harmonicforcefield
        if (
            type(field).get_energy_forces is not HarmonicForceField.get_energy_forces
            or "get_energy_forces" in vars(field)
        ):
            raise UnsupportedForceError("HarmonicForceField: has a formula of its own")
        if not field.parameters["cartesian"] or field.parameters["variable_orientation"]:
            raise UnsupportedForceError(
                "HarmonicForceField: evaluates internal coordinates, which are the user's functions"
            )
        if field.x0.size != 3 * len(atoms):
            raise InvalidInputError(
                f"host_object: HarmonicForceField is made for {field.x0.size // 3} atoms, there "
                f"are {len(atoms)}"
            )
        return CartesianHessian(
            ref_positions=number(field.x0.reshape(-1, 3), ANGSTROM),
            hessian_x=number(field.hessian_x, EV / ANGSTROM**2),
            ref_energy=number(field.parameters["ref_energy"], EV),
            periodic=any(periods(atoms)),
        )

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        field = calculator.harmonicforcefield
        if "hessian_x" in changed:
            hessian = values["hessian_x"] / (EV / ANGSTROM**2)
            # The energy takes the symmetric part, ASE's forces what is there.
            field._hessian_x = 0.5 * (hessian + hessian.T)
        if "ref_positions" in changed:
            field.x0 = (values["ref_positions"] / ANGSTROM).ravel()
        if "ref_energy" in changed:
            field.parameters["ref_energy"] = float(values["ref_energy"] / EV)
        forget(calculator)


class SpringForm(AbstractForm):
    """A `SpringCalculator`: ideal_positions and k."""

    defining = ("compute_energy_and_forces",)

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        ideal = np.asarray(calculator.ideal_positions, dtype=np.float64)
        if ideal.shape != atoms.positions.shape or np.ndim(calculator.k):
            raise InvalidInputError(
                f"host_object: SpringCalculator has ideal positions of shape {ideal.shape} and k "
                f"of shape {np.shape(calculator.k)}, wanted {atoms.positions.shape} and one number"
            )
        return Springs(
            ideal_positions=number(ideal, ANGSTROM),
            k=number(calculator.k, EV / ANGSTROM**2),
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
        if "ideal_positions" in changed:
            calculator.ideal_positions = values["ideal_positions"] / ANGSTROM
        if "k" in changed:
            calculator.k = float(values["k"] / (EV / ANGSTROM**2))
        forget(calculator)
