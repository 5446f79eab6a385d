"""Units of length and energy that models compute in."""

from __future__ import annotations

import dataclasses
import math

from mdgraft._errors import InvalidInputError

#: Lengths [nm]; the Bohr radius is that of CODATA 2018.
LENGTHS = {
    "nm": 1.0,
    "nanometer": 1.0,
    "angstrom": 0.1,
    "bohr": 0.0529177210903,
}
#: Energies [kJ/mol]; electronvolt and hartree are those of CODATA 2018.
ENERGIES = {
    "kj/mol": 1.0,
    "kilojoule/mole": 1.0,
    "kcal/mol": 4.184,
    "kilocalorie/mole": 4.184,
    "ev": 96.48533212331,
    "electronvolt": 96.48533212331,
    "mev": 0.09648533212331,
    "hartree": 2625.4996394799,
}


@dataclasses.dataclass(frozen=True)
class ModelUnits:
    """Units of a model.

    Attributes
    ----------
    length
        ``"nm"``, ``"angstrom"``, ``"bohr"``, or the unit's size in nm.
    energy
        ``"kJ/mol"``, ``"kcal/mol"``, ``"eV"``, ``"meV"``, ``"hartree"``, or its size in kJ/mol.

    Raises
    ------
    InvalidInputError
        For a name that is not known or a size that is not positive.
    """

    length: str | float = "nm"
    energy: str | float = "kJ/mol"

    def __post_init__(self) -> None:
        _size("length", self.length, LENGTHS, "nm")
        _size("energy", self.energy, ENERGIES, "kJ/mol")

    @property
    def nanometers(self) -> float:
        """The unit of length [nm]."""
        return _size("length", self.length, LENGTHS, "nm")

    @property
    def kilojoules(self) -> float:
        """The unit of energy [kJ/mol]."""
        return _size("energy", self.energy, ENERGIES, "kJ/mol")


def _size(what: str, unit: str | float, known: dict[str, float], ours: str) -> float:
    if isinstance(unit, str):
        if unit.lower() not in known:
            raise InvalidInputError(
                f"{what}: got {unit!r}, wanted one of {sorted(known)}, or the size of the unit in "
                f"{ours} as a number"
            )
        return known[unit.lower()]
    size = float(unit)
    if not (math.isfinite(size) and size > 0):
        raise InvalidInputError(f"{what}: got a unit of {unit} {ours}, wanted a positive number")
    return size
