"""Systems to time, built from what ships with OpenMM."""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

DATA = Path(app.__file__).parent / "data"

# Alanine dipeptide without hydrogens, extended.
_ALANINE = """\
ATOM      1  CH3 ACE A   1       2.000   2.090   0.000  1.00  0.00           C
ATOM      2  C   ACE A   1       3.427   2.641   0.000  1.00  0.00           C
ATOM      3  O   ACE A   1       4.391   1.877   0.000  1.00  0.00           O
ATOM      4  N   ALA A   2       3.555   3.970   0.000  1.00  0.00           N
ATOM      5  CA  ALA A   2       4.853   4.614   0.000  1.00  0.00           C
ATOM      6  C   ALA A   2       5.713   4.221   1.232  1.00  0.00           C
ATOM      7  O   ALA A   2       6.430   5.060   1.780  1.00  0.00           O
ATOM      8  CB  ALA A   2       5.661   4.221  -1.232  1.00  0.00           C
ATOM      9  N   NME A   3       5.608   2.947   1.619  1.00  0.00           N
ATOM     10  C   NME A   3       6.370   2.430   2.740  1.00  0.00           C
END
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A system with a configuration.

    Attributes
    ----------
    system
        As users have it.
    positions
        ``(N, 3)`` [nm].
    box
        ``(3, 3)`` [nm], or None.
    """

    system: openmm.System
    positions: np.ndarray
    box: np.ndarray | None

    @property
    def n_atoms(self) -> int:
        """Number of particles."""
        return self.system.getNumParticles()


def _plain(quantity: object) -> np.ndarray:
    if unit.is_quantity(quantity):
        quantity = quantity.value_in_unit(unit.nanometer)
    return np.array(quantity, dtype=float)


def _case(system: openmm.System, positions: object) -> Case:
    box = None
    if system.usesPeriodicBoundaryConditions():
        box = np.array([_plain(row) for row in system.getDefaultPeriodicBoxVectors()])
    return Case(system, _plain(positions), box)


@functools.cache
def lennard_jones(n_side: int, corrected: bool = True) -> Case:
    """A switched Lennard-Jones fluid of argon-like atoms near a simple cubic lattice.

    It has OpenMM's dispersion correction, unless a peer has nothing to put beside that.
    """
    spacing, n = 0.365, n_side**3
    system, force = openmm.System(), openmm.NonbondedForce()
    system.addForce(force)
    length = n_side * spacing
    system.setDefaultPeriodicBoxVectors((length, 0, 0), (0, length, 0), (0, 0, length))
    for _ in range(n):
        system.addParticle(39.9)
        force.addParticle(0.0, 0.34, 0.996)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(1.0)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.9)
    force.setUseDispersionCorrection(corrected)
    lattice = np.stack(np.meshgrid(*[np.arange(n_side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    jitter = np.random.default_rng(0).normal(size=(n, 3)) * 0.02
    return _case(system, lattice * spacing + jitter)


@functools.cache
def water_3k() -> Case:
    """OpenMM's own box of 895 TIP3P molecules with PME."""
    pdb = app.PDBFile(str(DATA / "tip3p.pdb"))
    system = app.ForceField("tip3p.xml").createSystem(
        pdb.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9
    )
    return _case(system, pdb.positions)


@functools.cache
def water_box(n_molecules: int, rigid: bool, cutoff: float = 0.9) -> Case:
    """A box of TIP3P with PME, minimised."""
    field = app.ForceField("tip3p.xml")
    model = app.Modeller(app.Topology(), [])
    model.addSolvent(field, model="tip3p", numAdded=n_molecules)
    system = field.createSystem(
        model.topology, nonbondedMethod=app.PME, nonbondedCutoff=cutoff, rigidWater=rigid
    )
    return _minimised(_case(system, model.positions))


@functools.cache
def alanine(solvent: str) -> Case:
    """Alanine dipeptide, 22 atoms, in vacuum or in OBC2 (``"obc2"``)."""
    files = ["amber14/protein.ff14SB.xml"] + (["implicit/obc2.xml"] if solvent == "obc2" else [])
    field = app.ForceField(*files)
    pdb = app.PDBFile(io.StringIO(_ALANINE))
    model = app.Modeller(pdb.topology, pdb.positions)
    model.addHydrogens(field)
    system = field.createSystem(model.topology, nonbondedMethod=app.NoCutoff)
    return _minimised(_case(system, model.positions))


@functools.cache
def protein(quick: bool, cache: Path, pdb_file: Path | None = None) -> Case:
    """A protein in water with PME, of the size of the usual DHFR benchmark.

    OpenMM's package holds no DHFR, so villin is put into as many molecules of water as make about
    23,558 atoms, unless there is a PDB file of the solvated protein.

    Parameters
    ----------
    quick
        Take villin in the 8,867 atoms that ship.
    cache
        Folder that keeps what was built.
    pdb_file
        All atoms of another system, with its box.
    """
    field = app.ForceField("amber14/protein.ff14SB.xml", "amber14/tip3p.xml")
    options = {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.9, "constraints": app.HBonds}
    if pdb_file is not None or quick:
        pdb = app.PDBFile(str(pdb_file or DATA / "test.pdb"))
        return _minimised(_case(field.createSystem(pdb.topology, **options), pdb.positions), 20)
    system_file, positions_file = cache / "protein.xml", cache / "protein.npy"
    if not (system_file.exists() and positions_file.exists()):
        pdb = app.PDBFile(str(DATA / "test.pdb"))
        model = app.Modeller(pdb.topology, pdb.positions)
        model.delete([r for r in model.topology.residues() if r.name in ("HOH", "Cl")])
        model.addSolvent(field, model="tip3p", numAdded=7660)
        system = field.createSystem(model.topology, **options)
        built = _minimised(_case(system, model.positions), 50)
        cache.mkdir(parents=True, exist_ok=True)
        system_file.write_text(openmm.XmlSerializer.serialize(system), encoding="utf-8")
        np.save(positions_file, built.positions)
    system = openmm.XmlSerializer.deserialize(system_file.read_text(encoding="utf-8"))
    return _case(system, np.load(positions_file))


def _minimised(case: Case, iterations: int = 200) -> Case:
    context = openmm.Context(
        case.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU")
    )
    context.setPositions(case.positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=iterations)
    state = context.getState(positions=True)
    return dataclasses.replace(case, positions=state.getPositions(asNumpy=True)._value.copy())


@functools.lru_cache(maxsize=4)
def trajectory(case: Case, n_frames: int, stride: int, step: float = 0.001) -> np.ndarray:
    """Frames ``(F, N, 3)`` [nm] of a short run at 300 K, ``stride`` steps apart."""
    integrator = openmm.LangevinMiddleIntegrator(300, 5.0, step)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(case.system, integrator, openmm.Platform.getPlatformByName("CPU"))
    context.setPositions(case.positions)
    context.setVelocitiesToTemperature(300, 1)
    integrator.step(100)
    frames = []
    for _ in range(n_frames):
        integrator.step(stride)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value.copy())
    return np.stack(frames)
