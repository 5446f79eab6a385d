"""OpenMM Systems as users of ASE have them, small, and the truth about them."""

from __future__ import annotations

import dataclasses
import functools

import ase
import force_examples
import mdgraft
import mdgraft_ase
import numpy as np
import openmm
import pytest
from ase import units
from openmm import app
from scipy.spatial.transform import Rotation
from test_whole_systems import dipeptide

KJ = units.kJ / units.mol
# The smallest number beside which a relative tolerance makes sense [eV/Angstrom].
TINY = 1e-11

#: The same lattice by other vectors, one of them left-handed.
LATTICES = {
    "reduced": np.eye(3),
    "another order of the plane": np.array([[1, 0, 0], [1, 1, 0], [-2, 3, 1]]),
    "left-handed": np.array([[1, 0, 0], [0, 1, 0], [1, -2, -1]]),
}
ROTATIONS = {
    "upright": np.eye(3),
    "turned": Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix(),
}


@dataclasses.dataclass
class Case:
    """A System with positions [nm] and box vectors [nm]."""

    system: openmm.System
    positions: np.ndarray
    topology: app.Topology | None = None

    @property
    def box(self):
        return np.array([v._value for v in self.system.getDefaultPeriodicBoxVectors()])

    @property
    def periodic(self):
        return self.system.usesPeriodicBoundaryConditions()

    @functools.cached_property
    def potential(self):
        return mdgraft.graft(self.system)

    def atoms(self, **options):
        return mdgraft_ase.atoms_from_openmm(
            self.system, self.positions, topology=self.topology, **options
        )

    def truth(self, positions=None):
        """Energy [eV] and forces [eV/Angstrom] by OpenMM's Reference platform."""
        platform = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(self.system, openmm.VerletIntegrator(0.001), platform)
        context.setPositions(self.positions if positions is None else positions)
        context.computeVirtualSites()
        state = context.getState(energy=True, forces=True)
        forces = np.array(state.getForces(asNumpy=True)._value)
        return state.getPotentialEnergy()._value * KJ, forces * KJ / units.nm


def close(found, wanted, rtol):
    assert found == pytest.approx(wanted, rel=rtol, abs=rtol * np.abs(wanted).max() + TINY)


def turned(atoms, lattice, rotation):
    """The same crystal by other vectors in another frame."""
    moved = atoms.copy()
    moved.positions = atoms.positions @ rotation
    moved.cell = lattice @ atoms.cell.array @ rotation
    return moved


def argon(n=3, a=0.54, cutoff=0.7):
    """Face-centred cubic argon, smooth at the cutoff, with a dispersion correction."""
    system, force = openmm.System(), openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(cutoff)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.75 * cutoff)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    cells = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    positions = ((cells + basis) * a).reshape(-1, 3)
    for _ in positions:
        system.addParticle(39.948)
        force.addParticle(0.0, 0.34, 0.996)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*(n * a * np.eye(3)))
    return Case(system, positions)


@functools.cache
def water(model="tip3p", xml="amber14/tip3p.xml"):
    """Flexible water with particle-mesh Ewald so fine that nothing jumps at the cutoff."""
    field = app.ForceField(xml)
    modeller = app.Modeller(app.Topology(), [])
    modeller.addSolvent(field, model=model, boxSize=openmm.Vec3(1.45, 1.5, 1.55))
    system = field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.7, rigidWater=False
    )
    (force,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setPMEParameters(6.5, 36, 36, 36)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.55)
    return Case(system, np.array(modeller.positions._value, float), modeller.topology)


def rigid_four_site_water():
    """Four-site water: virtual sites, and constraints."""
    case = water("tip4pew", "amber14/tip4pew.xml")
    field = app.ForceField("amber14/tip4pew.xml")
    system = field.createSystem(case.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.7)
    return Case(system, case.positions, case.topology)


@functools.cache
def peptide():
    """Alanine dipeptide in vacuum, every bond flexible."""
    topology, positions = dipeptide()
    system = app.ForceField("amber14-all.xml").createSystem(topology)
    return Case(system, np.array(positions._value, float), topology)


def example(force_class):
    """One of the examples of all Force classes."""
    system, positions, _ = force_examples.example(force_class)
    return Case(system, np.asarray(positions, float))


def triclinic_mixture():
    """Custom forces in a triclinic box."""
    rng = np.random.default_rng(3)
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([1.7, 0, 0], [0.5, 1.6, 0], [-0.4, 0.6, 1.5])
    pairs = openmm.CustomNonbondedForce("4*e*((s/r)^12-(s/r)^6); s=0.5*(s1+s2); e=sqrt(e1*e2)")
    pairs.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    pairs.setCutoffDistance(0.6)
    pairs.setUseSwitchingFunction(True)
    pairs.setSwitchingDistance(0.45)
    pairs.addPerParticleParameter("s")
    pairs.addPerParticleParameter("e")
    bonds = openmm.CustomBondForce("D*(1-exp(a*(r0-r)))^2")
    bonds.setUsesPeriodicBoundaryConditions(True)
    for name in ("D", "a", "r0"):
        bonds.addPerBondParameter(name)
    angles = openmm.CustomAngleForce("k*(theta-2)^2")
    angles.setUsesPeriodicBoundaryConditions(True)
    angles.addGlobalParameter("k", 25.0)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    box = np.array([v._value for v in system.getDefaultPeriodicBoxVectors()])
    positions = (grid / 3) @ box + rng.normal(0, 0.02, size=(27, 3))
    for i in range(27):
        system.addParticle(16.0)
        pairs.addParticle([rng.uniform(0.2, 0.26), rng.uniform(0.4, 1.0)])
        if i % 3:
            bonds.addBond(i - 1, i, [80.0, 3.0, 0.5])
        if i % 3 == 2:
            angles.addAngle(i - 2, i - 1, i, [])
    for force in (pairs, bonds, angles):
        system.addForce(force)
    return Case(system, positions + rng.normal(0, 3, size=3))


#: Systems whose energy is smooth, by name.
CASES = {
    "argon": argon,
    "water": water,
    "peptide": peptide,
    "triclinic mixture": triclinic_mixture,
    "implicit solvent": lambda: example(openmm.GBSAOBCForce),
    "many-particle": lambda: example(openmm.CustomManyParticleForce),
}


def shaken(atoms, size=0.05, seed=0):
    """Atoms away from symmetric places [Angstrom]."""
    atoms.positions += np.random.default_rng(seed).normal(0, size, size=atoms.positions.shape)
    return atoms


def diatomic(k=300000.0, length=0.11, masses=(12.0, 16.0)):
    """A harmonic bond: everything about it is known."""
    system, bond = openmm.System(), openmm.HarmonicBondForce()
    for mass in masses:
        system.addParticle(mass)
    bond.addBond(0, 1, length, k)
    system.addForce(bond)
    return Case(system, np.array([[0, 0, 0], [length, 0, 0]], float))


def as_atoms(case, calculator=None):
    atoms = case.atoms()
    atoms.calc = calculator or mdgraft_ase.MDGraftCalculator(case.potential)
    assert isinstance(atoms, ase.Atoms)
    return atoms


def numerical_forces(atoms, eps, iatoms):
    """Forces on some atoms by ASE's own differences."""
    try:
        from ase.calculators.fd import calculate_numerical_forces
    except ModuleNotFoundError:  # ASE before 3.24
        return atoms.calc.calculate_numerical_forces(atoms, d=eps)[iatoms]
    return calculate_numerical_forces(atoms, eps=eps, iatoms=iatoms)


def numerical_stress(atoms, eps=1e-6):
    """Stress by ASE's own differences."""
    try:
        from ase.calculators.fd import calculate_numerical_stress
    except ModuleNotFoundError:
        return atoms.calc.calculate_numerical_stress(atoms, d=eps)
    return calculate_numerical_stress(atoms, eps=eps)
