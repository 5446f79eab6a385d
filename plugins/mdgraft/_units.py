"""Units and constants: OpenMM's unit system (nm, ps, Da, e, K, kJ/mol) everywhere inside."""

from __future__ import annotations

import sys
from typing import Any

#: Boltzmann constant [kJ/mol/K] (CODATA 2018, exact).
BOLTZMANN = 0.00831446261815324
#: Avogadro constant [1/mol] (exact).
AVOGADRO = 6.02214076e23
#: 1/(4 pi eps0) [kJ nm/mol/e^2], as OpenMM 8.4 to 8.6 compute it (CODATA 2018 permittivity).
COULOMB = 138.93545764438198
#: One bar times one cubic nanometre [kJ/mol].
BAR_NM3 = 0.0602214076
#: One dalton per cubic nanometre [kg/m^3].
DALTON_PER_NM3 = 1.66053906892

# The names of units follow OpenMM's own spelling.
NANOMETER = "nanometer"
RADIAN = "radian"
DIMENSIONLESS = "dimensionless"
CHARGE = "elementary charge"
CHARGE_SQUARED = "elementary charge**2"
ENERGY = "kilojoule/mole"
BOND_FORCE_CONSTANT = "kilojoule/(nanometer**2*mole)"
SURFACE_ENERGY = "kilojoule/(nanometer**2*mole)"
ANGLE_FORCE_CONSTANT = "kilojoule/(mole*radian**2)"


def plain(value: Any, wanted: str | None = None) -> Any:
    """Strip a unit-carrying quantity to a number in OpenMM's unit system.

    Plain numbers, arrays and tensors pass unchanged, so that no host needs to be imported here:
    a quantity knows its own conversion. An energy becomes kJ/mol, a length nm, a time ps. Lists of
    quantities, such as box vectors, are taken entry by entry. A quantity whose unit is not
    compatible with the one that is ``wanted`` raises `TypeError`.
    """
    if isinstance(value, (list, tuple)):
        return [plain(entry, wanted) for entry in value]
    if not hasattr(value, "value_in_unit_system"):
        return value
    unit_module = sys.modules["openmm.unit"]
    if wanted is not None and not value.unit.is_compatible(getattr(unit_module, wanted)):
        raise TypeError(f"its unit is {value.unit}, wanted one that converts to {wanted}")
    return value.value_in_unit_system(unit_module.md_unit_system)
