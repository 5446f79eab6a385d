"""MDGraftCalculator in ASE's algorithms, with answers that are known in closed form."""

from __future__ import annotations

import importlib

import numpy as np
import openmm
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms, FixBondLengths
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.nptberendsen import NPTBerendsen
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch, MDMin
from ase.phonons import Phonons
from ase.stress import voigt_6_to_full_3x3_stress
from ase.thermochemistry import HarmonicThermo
from ase.vibrations import Vibrations
from ase_systems import KJ, argon, as_atoms, diatomic, peptide, rigid_four_site_water, water
from mdgraft import graft
from mdgraft_ase import MDGraftCalculator

# ASE before 3.24 leaves its null file open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*/dev/null:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*/dev/null:pytest.PytestUnraisableExceptionWarning"),
]


def heated(atoms, temperature, seed):
    """Momenta of a temperature [K]; the total is zero."""
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)[:, None]
    momenta = np.random.default_rng(seed).normal(size=(len(atoms), 3)) * spread
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    return atoms


def trimer():
    """Three Lennard-Jones particles without a cutoff: an equilateral triangle of three bonds."""
    system, force = openmm.System(), openmm.NonbondedForce()
    for _ in range(3):
        system.addParticle(39.948)
        force.addParticle(0.0, 0.34, 0.996)
    system.addForce(force)
    atoms = Atoms("Ar3", positions=[[0, 0, 0], [3.6, 0.3, 0], [1.9, 3.4, 0.4]])
    atoms.calc = MDGraftCalculator(graft(system))
    return atoms


@pytest.mark.parametrize("optimizer", [BFGS, FIRE, LBFGS, BFGSLineSearch, MDMin])
def test_relaxation(optimizer):
    atoms = trimer()
    assert optimizer(atoms, logfile=None).run(fmax=1e-5, steps=400)
    sides = atoms.get_all_distances()[np.triu_indices(3, 1)]
    assert sides == pytest.approx(3.4 * 2 ** (1 / 6), rel=1e-4)
    assert atoms.get_potential_energy() == pytest.approx(-3 * 0.996 * KJ, rel=1e-7)


#: Sums over a face-centred cubic lattice, and its cohesive energy and nearest distance.
A6, A12 = 14.45392, 12.13188


# Strains of argon in units that make them about as stiff as displacements.
CELL_FILTERS = {
    "Frechet": lambda atoms: FrechetCellFilter(atoms, exp_cell_factor=20.0),
    "unit cell": lambda atoms: UnitCellFilter(atoms, cell_factor=20.0),
    "strain": StrainFilter,
}


@pytest.mark.parametrize("cell_filter", CELL_FILTERS)
def test_relaxation_of_a_cell(cell_filter):
    # With the dispersion correction a crystal of argon comes close to the full lattice sum.
    case = argon(n=4, a=0.54, cutoff=0.9)
    atoms = as_atoms(case)
    strain = np.array([[0.02, 0.01, 0], [0, -0.01, 0.005], [0, 0, 0.015]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    filtered = CELL_FILTERS[cell_filter](atoms)
    assert BFGS(filtered, logfile=None).run(fmax=0.02, steps=80)
    assert np.abs(atoms.get_stress()).max() < 1e-4
    lengths, angles = atoms.cell.lengths() / 4, atoms.cell.angles()
    distance = 3.4 * (2 * A12 / A6) ** (1 / 6)
    assert lengths == pytest.approx(np.sqrt(2) * distance, rel=3e-3)
    assert angles == pytest.approx(90, abs=0.05)
    energy = -0.996 * KJ * A6**2 / (2 * A12)
    assert atoms.get_potential_energy() / len(atoms) == pytest.approx(energy, rel=0.01)


def test_equation_of_state():
    atoms = as_atoms(argon(n=4, a=0.526, cutoff=0.9))
    cell, volumes, energies, pressures = atoms.cell.copy(), [], [], []
    for scale in np.linspace(0.985, 1.015, 7):
        atoms.set_cell(scale * cell, scale_atoms=True)
        volumes.append(atoms.get_volume())
        energies.append(atoms.get_potential_energy())
        pressures.append(-atoms.get_stress()[:3].mean())
    state = EquationOfState(volumes, energies, eos="birchmurnaghan")
    volume, _, modulus = state.fit()
    # Where the pressure is zero, and its slope there: independent of the energies.
    line = np.polynomial.Polynomial.fit(volumes, pressures, 5)
    assert line(volume) == pytest.approx(0, abs=2e-4 * modulus)
    assert modulus == pytest.approx(-volume * line.deriv()(volume), rel=0.02)


def test_vibrations_and_thermochemistry(tmp_path):
    k, masses = 300000.0, (12.0, 16.0)
    case = diatomic(k=k, masses=masses)
    atoms = as_atoms(case)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=1e-3)
    vibrations.run()
    energies = vibrations.get_energies()
    reduced = 1 / sum(1 / m for m in masses)
    per_square = KJ / units.nm**2
    wanted = units._hbar * np.sqrt(k * per_square / reduced * units._e / units._amu * 1e20)
    assert energies[-1].real == pytest.approx(wanted / units._e, rel=1e-5)
    assert np.abs(energies[:-1]).max() < 1e-3 * energies[-1].real
    thermo = HarmonicThermo([energies[-1].real], potentialenergy=atoms.get_potential_energy())
    assert thermo.get_ZPE_correction() == pytest.approx(0.5 * energies[-1].real)


def test_phonons_of_a_chain(tmp_path):
    # A chain of springs: omega(q) = 2 sqrt(k/m) |sin(q a / 2)|.
    n, k, mass, spacing = 6, 5000.0, 20.0, 0.3
    system, bonds = openmm.System(), openmm.HarmonicBondForce()
    bonds.setUsesPeriodicBoundaryConditions(True)
    for i in range(n):
        system.addParticle(mass)
        bonds.addBond(i, (i + 1) % n, spacing, k)
    system.addForce(bonds)
    system.setDefaultPeriodicBoxVectors([n * spacing, 0, 0], [0, 3, 0], [0, 0, 3])
    unit = Atoms("Ne", masses=[mass], cell=[10 * spacing, 30, 30], pbc=True)
    phonons = Phonons(
        unit,
        MDGraftCalculator(graft(system)),
        supercell=(n, 1, 1),
        delta=1e-4,
        name=str(tmp_path / "ph"),
    )
    phonons.run()
    phonons.read(acoustic=True)
    found = phonons.band_structure([[q, 0, 0] for q in (1 / 6, 1 / 3, 1 / 2)])[:, -1]
    stiffness = k * KJ / units.nm**2
    omega = 2 * np.sqrt(stiffness / mass) * np.sin(np.pi * np.array([1 / 6, 1 / 3, 1 / 2]))
    assert found == pytest.approx(omega * units._hbar * units.s / units._e, rel=1e-5)


def test_elastic_band():
    # A double well in the distance of two particles; the barrier is known.
    system = openmm.System()
    well = openmm.CustomBondForce("h*(((r-0.3)/0.1)^2-1)^2")
    well.addGlobalParameter("h", 40.0)
    well.addBond(0, 1, [])
    for _ in range(2):
        system.addParticle(12.0)
    system.addForce(well)
    potential = graft(system)
    images = [Atoms("C2", positions=[[0, 0, 0], [r, 0, 0]]) for r in (2, 2.4, 2.9, 3.5, 4)]
    for image in images:
        image.set_constraint(FixAtoms([0]))
        image.calc = MDGraftCalculator(potential)
    band = NEB(images, climb=True, method="improvedtangent")
    assert FIRE(band, logfile=None).run(fmax=1e-3, steps=300)
    energies = [image.get_potential_energy() for image in images]
    assert max(energies) == pytest.approx(40.0 * KJ, rel=1e-5)


@pytest.mark.parametrize("name", ["peptide", "water"])
def test_energy_is_conserved(name):
    atoms = as_atoms(peptide() if name == "peptide" else water())
    heated(atoms, 100, 1)
    dynamics = VelocityVerlet(atoms, 0.2 * units.fs)
    dynamics.run(20)
    totals, kinetic = [], []
    for _ in range(40):
        dynamics.run(1)
        totals.append(atoms.get_total_energy())
        kinetic.append(atoms.get_kinetic_energy())
    assert np.std(totals) < 0.01 * np.std(kinetic)


def test_forces_are_the_gradient_along_a_trajectory():
    # The work done equals the change of energy: nothing is left out by the cache.
    atoms = as_atoms(water())
    rng = np.random.default_rng(3)
    direction = rng.normal(size=atoms.positions.shape) * 1e-3
    start, work, energy = atoms.get_potential_energy(), 0.0, None
    for _ in range(4):
        # Simpson's rule.
        f = [atoms.get_forces()]
        for _ in range(2):
            atoms.positions += direction / 2
            f.append(atoms.get_forces())
        work += sum(w * (g * direction).sum() for w, g in zip((1, 4, 1), f, strict=True)) / 6
        energy = atoms.get_potential_energy()
    assert start - energy == pytest.approx(work, rel=1e-4)


@pytest.mark.parametrize("kind", ["Langevin", "NVT", "NPT", "MTK", "Melchionna"])
def test_dynamics_at_constant_temperature_and_pressure(kind):
    case = argon(n=3, a=0.55)
    atoms = as_atoms(case)
    # Half of it goes into the potential energy of the lattice.
    heated(atoms, 80, 5)
    step, temperature = 4 * units.fs, 40
    if kind == "Langevin":
        options = {"friction": 0.05 / units.fs, "fixcm": False, "rng": np.random.default_rng(5)}
        dynamics = Langevin(atoms, step, temperature_K=temperature, **options)
    elif kind == "NVT":
        dynamics = NVTBerendsen(atoms, step, temperature_K=temperature, taut=50 * units.fs)
    elif kind == "NPT":
        dynamics = NPTBerendsen(
            atoms,
            step,
            temperature_K=temperature,
            pressure_au=0.0,
            taut=50 * units.fs,
            taup=200 * units.fs,
            compressibility_au=0.05 / (units.GPa),
        )
    elif kind == "MTK":
        nose = pytest.importorskip("ase.md.nose_hoover_chain", reason="ASE before 3.24")
        if not hasattr(nose, "IsotropicMTKNPT"):
            pytest.skip("this ASE has no dynamics by Martyna, Tobias and Klein")
        dynamics = nose.IsotropicMTKNPT(
            atoms, step, temperature_K=temperature, pressure_au=0.0, tdamp=400, pdamp=4000
        )
    else:
        module = next(
            importlib.import_module(name)
            for name in ("ase.md.melchionna", "ase.md.npt")
            if importlib.util.find_spec(name)
        )
        cls = getattr(module, "MelchionnaNPT", None) or module.NPT
        dynamics = cls(
            atoms,
            step,
            temperature_K=temperature,
            externalstress=0.0,
            ttime=100 * units.fs,
            pfactor=1e4,
        )
    volume = atoms.get_volume()
    dynamics.run(100)
    # Thermostats swing.
    assert 0.4 < atoms.get_temperature() / temperature < 2.5
    if kind in ("NPT", "MTK", "Melchionna"):
        assert 0.8 < atoms.get_volume() / volume < 1.2 and atoms.get_volume() != volume
    fresh = atoms.copy()
    fresh.calc = MDGraftCalculator(case.potential)
    assert fresh.get_forces() == pytest.approx(atoms.get_forces(), abs=1e-12)


def test_rigid_water_by_ase_s_constraints():
    case = rigid_four_site_water()
    atoms = case.atoms(constraints=True)
    # A few molecules keep their shape; all of them would take ASE long.
    (lengths,) = atoms.constraints
    atoms.set_constraint(FixBondLengths(lengths.pairs[:12], bondlengths=lengths.bondlengths[:12]))
    atoms.calc = MDGraftCalculator(case.potential, particles="real")
    heated(atoms, 100, 2)
    VelocityVerlet(atoms, 0.5 * units.fs).run(5)
    found = [atoms.get_distance(i, j, mic=True) for i, j in lengths.pairs[:12]]
    assert found == pytest.approx(lengths.bondlengths[:12], rel=1e-9)


def test_optimisation_writes_a_trajectory(tmp_path):
    atoms = trimer()
    with BFGS(atoms, logfile=None, trajectory=str(tmp_path / "x.traj")) as optimizer:
        optimizer.run(fmax=1e-3)
    frames = read(tmp_path / "x.traj", ":")
    assert len(frames) > 3
    assert frames[-1].get_potential_energy() == atoms.get_potential_energy()


def test_ideal_gas_stress():
    atoms = as_atoms(argon())
    heated(atoms, 50, 1)
    plain, gas = (
        voigt_6_to_full_3x3_stress(atoms.get_stress(include_ideal_gas=on)) for on in (False, True)
    )
    momenta, masses = atoms.get_momenta(), atoms.get_masses()
    wanted = -np.einsum("ai,aj,a->ij", momenta, momenta, 1 / masses) / atoms.get_volume()
    assert gas - plain == pytest.approx(wanted, rel=1e-6, abs=1e-12)
