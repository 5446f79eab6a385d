"""One file for each Force class, and the table that registers them."""

from __future__ import annotations

import openmm

from mdgraft_openmm._converter import AbstractConverter
from mdgraft_openmm.forces.cmap_torsion import CMAPTorsionConverter
from mdgraft_openmm.forces.harmonic_angle import HarmonicAngleConverter
from mdgraft_openmm.forces.harmonic_bond import HarmonicBondConverter
from mdgraft_openmm.forces.nonbonded import NonbondedConverter
from mdgraft_openmm.forces.periodic_torsion import PeriodicTorsionConverter
from mdgraft_openmm.forces.rb_torsion import RBTorsionConverter

#: Converters of the Force classes that have a native torch form.
CONVERTERS: dict[type[openmm.Force], AbstractConverter] = {
    openmm.CMAPTorsionForce: CMAPTorsionConverter(),
    openmm.HarmonicAngleForce: HarmonicAngleConverter(),
    openmm.HarmonicBondForce: HarmonicBondConverter(),
    openmm.NonbondedForce: NonbondedConverter(),
    openmm.PeriodicTorsionForce: PeriodicTorsionConverter(),
    openmm.RBTorsionForce: RBTorsionConverter(),
}

#: Forces that change positions, velocities or the box but add no energy.
WITHOUT_ENERGY: tuple[str, ...] = (
    "AndersenThermostat",
    "CMMotionRemover",
    "MonteCarloAnisotropicBarostat",
    "MonteCarloBarostat",
    "MonteCarloFlexibleBarostat",
    "MonteCarloMembraneBarostat",
    "RPMDMonteCarloBarostat",
)
