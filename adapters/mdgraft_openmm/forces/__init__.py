"""One file for each Force class, and the table that registers them."""

from __future__ import annotations

import openmm

from mdgraft_openmm._converter import AbstractConverter
from mdgraft_openmm.forces.amoeba_generalized_kirkwood import AmoebaGeneralizedKirkwoodConverter
from mdgraft_openmm.forces.amoeba_multipole import AmoebaMultipoleConverter
from mdgraft_openmm.forces.amoeba_torsion_torsion import AmoebaTorsionTorsionConverter
from mdgraft_openmm.forces.amoeba_vdw import AmoebaVdwConverter
from mdgraft_openmm.forces.amoeba_wca_dispersion import AmoebaWcaDispersionConverter
from mdgraft_openmm.forces.atm import ATMConverter
from mdgraft_openmm.forces.cmap_torsion import CMAPTorsionConverter
from mdgraft_openmm.forces.constant_potential import ConstantPotentialConverter
from mdgraft_openmm.forces.custom_angle import CustomAngleConverter
from mdgraft_openmm.forces.custom_bond import CustomBondConverter
from mdgraft_openmm.forces.custom_centroid_bond import CustomCentroidBondConverter
from mdgraft_openmm.forces.custom_compound_bond import CustomCompoundBondConverter
from mdgraft_openmm.forces.custom_cv import CustomCVConverter
from mdgraft_openmm.forces.custom_external import CustomExternalConverter
from mdgraft_openmm.forces.custom_gb import CustomGBConverter
from mdgraft_openmm.forces.custom_hbond import CustomHbondConverter
from mdgraft_openmm.forces.custom_many_particle import CustomManyParticleConverter
from mdgraft_openmm.forces.custom_nonbonded import CustomNonbondedConverter
from mdgraft_openmm.forces.custom_torsion import CustomTorsionConverter
from mdgraft_openmm.forces.custom_volume import CustomVolumeConverter
from mdgraft_openmm.forces.drude import DrudeConverter
from mdgraft_openmm.forces.gay_berne import GayBerneConverter
from mdgraft_openmm.forces.gbsa_obc import GBSAOBCConverter
from mdgraft_openmm.forces.harmonic_angle import HarmonicAngleConverter
from mdgraft_openmm.forces.harmonic_bond import HarmonicBondConverter
from mdgraft_openmm.forces.hippo_nonbonded import HippoNonbondedConverter
from mdgraft_openmm.forces.lcpo import LCPOConverter
from mdgraft_openmm.forces.nonbonded import NonbondedConverter
from mdgraft_openmm.forces.orientation_restraint import OrientationRestraintConverter
from mdgraft_openmm.forces.periodic_torsion import PeriodicTorsionConverter
from mdgraft_openmm.forces.python_force import PythonForceConverter
from mdgraft_openmm.forces.rb_torsion import RBTorsionConverter
from mdgraft_openmm.forces.rg import RGConverter
from mdgraft_openmm.forces.rmsd import RMSDConverter

# By name, since older versions of OpenMM lack some of the classes.
_CONVERTERS: dict[str, AbstractConverter] = {
    "ATMForce": ATMConverter(),
    "AmoebaGeneralizedKirkwoodForce": AmoebaGeneralizedKirkwoodConverter(),
    "AmoebaMultipoleForce": AmoebaMultipoleConverter(),
    "AmoebaTorsionTorsionForce": AmoebaTorsionTorsionConverter(),
    "AmoebaVdwForce": AmoebaVdwConverter(),
    "AmoebaWcaDispersionForce": AmoebaWcaDispersionConverter(),
    "CMAPTorsionForce": CMAPTorsionConverter(),
    "ConstantPotentialForce": ConstantPotentialConverter(),
    "CustomAngleForce": CustomAngleConverter(),
    "CustomBondForce": CustomBondConverter(),
    "CustomCVForce": CustomCVConverter(),
    "CustomCentroidBondForce": CustomCentroidBondConverter(),
    "CustomCompoundBondForce": CustomCompoundBondConverter(),
    "CustomExternalForce": CustomExternalConverter(),
    "CustomGBForce": CustomGBConverter(),
    "CustomHbondForce": CustomHbondConverter(),
    "CustomManyParticleForce": CustomManyParticleConverter(),
    "CustomNonbondedForce": CustomNonbondedConverter(),
    "CustomTorsionForce": CustomTorsionConverter(),
    "CustomVolumeForce": CustomVolumeConverter(),
    "DrudeForce": DrudeConverter(),
    "GBSAOBCForce": GBSAOBCConverter(),
    "GayBerneForce": GayBerneConverter(),
    "HarmonicAngleForce": HarmonicAngleConverter(),
    "HarmonicBondForce": HarmonicBondConverter(),
    "HippoNonbondedForce": HippoNonbondedConverter(),
    "LCPOForce": LCPOConverter(),
    "NonbondedForce": NonbondedConverter(),
    "OrientationRestraintForce": OrientationRestraintConverter(),
    "PeriodicTorsionForce": PeriodicTorsionConverter(),
    "PythonForce": PythonForceConverter(),
    "RBTorsionForce": RBTorsionConverter(),
    "RGForce": RGConverter(),
    "RMSDForce": RMSDConverter(),
}

#: Converters of the Force classes that have a native torch form.
CONVERTERS: dict[type[openmm.Force], AbstractConverter] = {
    getattr(openmm, name): converter
    for name, converter in _CONVERTERS.items()
    if hasattr(openmm, name)
}

#: Those of classes that plug-ins define, by the module and the name of the class.
OF_PLUGINS: dict[tuple[str, str], AbstractConverter] = {
    ("openmmtorch", "PythonTorchForce"): PythonForceConverter(),
}


def converter_of(force: openmm.Force) -> AbstractConverter | None:
    """The converter of a force; None if its class has no native torch form."""
    cls = type(force)
    return CONVERTERS.get(cls) or OF_PLUGINS.get((cls.__module__, cls.__name__))


def known_converter(force: openmm.Force) -> AbstractConverter:
    """The converter of a force that has been read by one."""
    found = converter_of(force)
    assert found is not None, type(force)
    return found


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
