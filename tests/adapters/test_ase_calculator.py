"""MDGraftCalculator against OpenMM, ASE's own differences and closed forms."""

from __future__ import annotations

import functools

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase_systems import (
    CASES,
    KJ,
    LATTICES,
    ROTATIONS,
    Case,
    argon,
    as_atoms,
    close,
    diatomic,
    numerical_forces,
    numerical_stress,
    shaken,
    triclinic_mixture,
    turned,
)
from mdgraft import (
    InvalidInputError,
    MissingBoxError,
    NonConservativeForceWarning,
    SimulationError,
)
from mdgraft.potentials import SelfConsistent
from mdgraft_ase import MDGraftCalculator
from mdgraft_ase._axes import Demands, described
from mdgraft_ase._cell import reduced_cell
from scipy.spatial.transform import Rotation
from test_random_systems import KINDS, lattice, random_system


@functools.cache
def shaken_case(name):
    case = CASES[name]()
    case.positions = shaken(Atoms(positions=case.positions), size=0.004).positions
    return case


# Against OpenMM -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_energy_and_forces_are_openmm_s(name):
    case = shaken_case(name)
    atoms = as_atoms(case)
    energy, forces = case.truth()
    close(atoms.get_potential_energy(), energy, 1e-6 if name == "water" else 1e-9)
    close(atoms.get_forces(), forces, 2e-6 if name == "water" else 1e-9)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


@pytest.mark.parametrize("route", ["native", "host"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("lattice", LATTICES)
def test_any_cell_of_a_lattice_will_do(lattice, rotation, route):
    case = shaken_case("triclinic mixture")
    calculator = MDGraftCalculator(mdgraft.graft(case.system, route=route))
    R = ROTATIONS[rotation]
    atoms = turned(case.atoms(), LATTICES[lattice], R)
    atoms.calc = calculator
    energy, forces = case.truth()
    close(atoms.get_potential_energy(), energy, 1e-9)
    close(atoms.get_forces(), forces @ R, 1e-8)
    upright = as_atoms(case).get_stress(voigt=False)
    close(atoms.get_stress(voigt=False), R.T @ upright @ R, 1e-9 if route == "native" else 1e-5)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("lattice", LATTICES)
@pytest.mark.parametrize("name", ["argon", "water", "triclinic mixture", "many-particle"])
def test_stress_is_ase_s_numerical_one(name, lattice, rotation):
    atoms = turned(shaken_case(name).atoms(), LATTICES[lattice], ROTATIONS[rotation])
    atoms.calc = MDGraftCalculator(shaken_case(name).potential)
    numerical = numerical_stress(atoms, eps=1e-6)
    # Rounding of energies [eV] over a difference of strains.
    rounding = 1e-14 * max(abs(atoms.get_potential_energy()), 1.0) / 1e-6 / atoms.get_volume()
    assert atoms.get_stress() == pytest.approx(numerical, rel=1e-5, abs=10 * rounding + 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_forces_are_ase_s_numerical_ones(name):
    atoms = as_atoms(shaken_case(name))
    chosen = [0, len(atoms) // 2]
    numerical = numerical_forces(atoms, eps=1e-5, iatoms=chosen)
    scale = np.abs(atoms.get_forces()).max()
    assert atoms.get_forces()[chosen] == pytest.approx(numerical, rel=1e-6, abs=1e-6 * scale)


def test_positions_outside_the_cell():
    case = shaken_case("triclinic mixture")
    atoms, moved = as_atoms(case), as_atoms(case)
    shifts = np.random.default_rng(1).integers(-3, 4, size=(9, 3)).repeat(3, axis=0)
    moved.positions += shifts @ atoms.cell.array
    close(moved.get_forces(), atoms.get_forces(), 1e-9)
    close(moved.get_stress(), atoms.get_stress(), 1e-9)


def test_of_single_precision():
    case = shaken_case("argon")
    single = as_atoms(case, MDGraftCalculator(mdgraft.graft(case.system, dtype=torch.float32)))
    double = as_atoms(case)
    close(single.get_potential_energy(), double.get_potential_energy(), 1e-5)
    close(single.get_forces(), double.get_forces(), 1e-4)
    close(single.get_stress(), double.get_stress(), 1e-4)
    assert single.get_forces().dtype == np.float64


@pytest.mark.gpu
def test_on_a_gpu():
    case = shaken_case("argon")
    on_gpu = as_atoms(case, MDGraftCalculator(case.system, device="cuda"))
    on_cpu = as_atoms(case)
    assert on_gpu.calc.potential.device.type == "cuda"
    close(on_gpu.get_forces(), on_cpu.get_forces(), 1e-9)
    close(on_gpu.get_stress(), on_cpu.get_stress(), 1e-9)
    assert on_gpu.get_potential_energy() == pytest.approx(on_cpu.get_potential_energy())


def test_without_terms():
    system = openmm.System()
    system.addParticle(1.0)
    atoms = Atoms("H", calculator=MDGraftCalculator(mdgraft.graft(system)))
    assert atoms.get_potential_energy() == 0.0
    assert atoms.get_forces().tolist() == [[0.0, 0.0, 0.0]]


# Cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_reduced_cells(seed):
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * rng.uniform(0.2, 5, size=(3, 1))
    found = reduced_cell(cell)
    box = found.box
    assert np.triu(box, 1).any() == 0 and (np.diagonal(box) > 0).all()
    for row, column in ((2, 1), (2, 0), (1, 0)):
        assert abs(box[row, column]) <= 0.500002 * box[column, column]
    assert found.lattice == pytest.approx(np.round(found.lattice))
    assert abs(np.linalg.det(found.lattice)) == pytest.approx(1)
    assert found.rotation @ found.rotation.T == pytest.approx(np.eye(3), abs=1e-14)
    assert np.linalg.det(found.rotation) == pytest.approx(1)
    scale = np.abs(found.lattice).max() * np.abs(cell).max()
    assert found.back(box) == pytest.approx(found.lattice @ cell, abs=1e-13 * scale)
    again = reduced_cell(box)
    assert again.rotation is None and (again.box == box).all()


def test_the_description_of_a_lattice_does_not_flicker():
    # Rounding on either side of a half must not change the box vectors, and with them a mesh.
    boxes = [
        reduced_cell(np.array([[2.0, 0, 0], [s * (1 + e), 1.7, 0], [0, 0, 3]])).box[1, 0]
        for s in (1.0, -1.0)
        for e in (-1e-9, 1e-9)
    ]
    assert boxes == pytest.approx([1, 1, -1, -1])


@pytest.mark.parametrize("seed", range(5))
def test_a_description_with_room(seed):
    rng = np.random.default_rng(seed)
    cubic = 2 * np.eye(3)
    change = np.eye(3)
    for _ in range(4):
        i, j = rng.choice(3, size=2, replace=False)
        change[i] += rng.integers(-3, 4) * change[j]
    cell = change[rng.permutation(3)] @ cubic @ ROTATIONS["turned"]
    found = described(cell, Demands(cutoff=1.0, points=np.zeros((0, 3)), fixed=False))
    assert found.box == pytest.approx(cubic, abs=1e-12)
    assert found.back(found.box) == pytest.approx(found.lattice @ cell, abs=1e-9)


def test_a_box_that_openmm_takes_is_left_alone():
    # Half of it may be more than a description with more room would have between images.
    box = np.array([[2.0, 0, 0], [0, 2.0, 0], [1.0, 1.0, 1.42]])
    found = described(box, Demands(cutoff=0.7, points=np.zeros((0, 3)), fixed=False))
    assert (found.box == box).all() and found.rotation is None


def test_short_vectors_are_found():
    # The lattice has room for the cutoff; these vectors, reduced in this order, do not.
    atoms = as_atoms(argon())
    wanted = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    atoms.cell = np.array([[2, 1, 0], [5, 3, 0], [0, 0, 1]]) @ atoms.cell.array
    assert reduced_cell(atoms.cell.array).box.diagonal().min() < 10
    close(atoms.get_potential_energy(), wanted[0], 1e-10)
    close(atoms.get_forces(), wanted[1], 1e-10)
    close(atoms.get_stress(), wanted[2], 1e-10)


def elongated(method):
    """Two charges in a long box with Ewald sums."""
    system, force = openmm.System(), openmm.NonbondedForce()
    system.setDefaultPeriodicBoxVectors([6, 0, 0], [0, 2, 0], [0, 0, 2.5])
    force.setNonbondedMethod(getattr(openmm.NonbondedForce, method))
    force.setCutoffDistance(0.9)
    for q in (1.0, -1.0):
        system.addParticle(1.0)
        force.addParticle(q, 0.3, 0.1)
    system.addForce(force)
    atoms = Atoms("H2", positions=[[1, 2, 3], [4, 5, 6]], cell=[60, 20, 25], pbc=True)
    atoms.calc = MDGraftCalculator(mdgraft.graft(system))
    return atoms


@pytest.mark.parametrize("method", ["PME", "LJPME", "Ewald"])
@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0], [2, 1, 0]])
def test_a_mesh_follows_its_axis(method, order):
    atoms = elongated(method)
    wanted = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    # The same crystal with its vectors in another order, and with one of them skewed.
    atoms.cell = atoms.cell.array[order]
    atoms.cell[0] += 2 * atoms.cell[1]
    close(atoms.get_potential_energy(), wanted[0], 1e-10)
    close(atoms.get_forces(), wanted[1], 1e-10)
    close(atoms.get_stress(), wanted[2], 1e-10)


def test_a_mesh_for_another_box():
    atoms = elongated("PME")
    atoms.cell = [60.5, 20.5, 25.5]
    atoms.get_forces()
    atoms.cell = [20, 20, 120]
    with pytest.warns(mdgraft.MDGraftWarning, match="chosen for another box"):
        atoms.get_forces()
    atoms.cell = [20, 20, 121]
    # Once is enough.
    atoms.get_forces()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_random_systems_in_random_cells(kind, seed):
    rng = np.random.default_rng(seed)
    system, _ = random_system(kind, seed)
    # Well within half of the box, where images are beyond doubt, and then anywhere.
    case = Case(system, 0.55 * lattice() + rng.normal(size=3))
    if not case.periodic:
        return
    cell, rotation = np.eye(3), Rotation.random(random_state=seed).as_matrix()
    for _ in range(3):
        i, j = rng.choice(3, size=2, replace=False)
        cell[i] += rng.integers(-2, 3) * cell[j]
    atoms = turned(case.atoms(), rng.permutation(cell), rotation)
    atoms.calc = MDGraftCalculator(case.potential)
    if kind == "custom_gb":
        # It has x and y in it.
        with pytest.raises(InvalidInputError, match="CustomGBForce depends on directions"):
            atoms.get_forces()
        return
    energy, forces = case.truth()
    # Where there is a mesh, its accuracy.
    rtol = 1e-4 if kind == "nonbonded" else 1e-9
    close(atoms.get_potential_energy(), energy, rtol)
    close(atoms.get_forces(), forces @ rotation, rtol)
    close(atoms.get_stress(), numerical_stress(atoms), 1e-6)


def test_left_handed_cells_are_no_mirror_images():
    # A chiral energy: the sign of a dihedral.
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([3, 0, 0], [0, 3, 0], [0, 0, 3])
    torsion = openmm.PeriodicTorsionForce()
    torsion.addTorsion(0, 1, 2, 3, 1, np.pi / 2, 10.0)
    torsion.setUsesPeriodicBoundaryConditions(True)
    for _ in range(4):
        system.addParticle(12.0)
    system.addForce(torsion)
    positions = [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0.5, 0.8]]
    atoms = Atoms("C4", positions=positions, cell=np.diag([30, 30, 30]), pbc=True)
    atoms.calc = MDGraftCalculator(mdgraft.graft(system))
    right = atoms.get_potential_energy()
    atoms.set_cell(np.diag([30, 30, -30]))
    assert atoms.get_potential_energy() == pytest.approx(right, abs=1e-12)
    atoms.set_cell(np.array([[0, 30, 0], [30, 0, 0], [0, 0, 30]]))
    assert atoms.get_potential_energy() == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_an_external_field_has_a_direction(rotation):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0, 2, 0], [0, 0, 2])
    field = openmm.CustomExternalForce("k*periodicdistance(x,0,0,0,0,0)^2")
    field.addGlobalParameter("k", 3.0)
    for i in range(2):
        system.addParticle(12.0)
        field.addParticle(i, [])
    system.addForce(field)
    atoms = Atoms("C2", positions=[[1, 2, 3], [4, 5, 6]], cell=[20, 20, 20], pbc=True)
    atoms = turned(atoms, np.eye(3), ROTATIONS[rotation])
    atoms.calc = MDGraftCalculator(mdgraft.graft(system))
    if rotation == "upright":
        assert atoms.get_potential_energy() == pytest.approx(3.0 * 0.17 * KJ)
        close(atoms.get_stress(), stress_of_lower_strains(atoms), 1e-6)
        return
    with pytest.raises(InvalidInputError, match="CustomExternalForce depends on directions"):
        atoms.get_potential_energy()


def stress_of_lower_strains(atoms):
    """The stress of an upright cell whose energy has a direction: lower triangular strains."""
    found = np.zeros((3, 3))
    for i in range(3):
        for j in range(i + 1):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += sign * 1e-5
                moved = atoms.copy()
                moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                moved.calc = MDGraftCalculator(atoms.calc.potential)
                energies.append(moved.get_potential_energy())
            found[i, j] = found[j, i] = (energies[0] - energies[1]) / 2e-5 / atoms.get_volume()
    return full_3x3_to_voigt_6_stress(found)


def test_a_volume_force_has_no_direction():
    # It depends on elements of the box in reduced form, whatever frame Atoms are in.
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0, 2, 0], [0, 0, 2])
    system.addForce(openmm.CustomVolumeForce("3*v+bx^2"))
    system.addParticle(1.0)
    atoms = Atoms("H", cell=[[0, 20, 0], [20, 3, 0], [0, 0, 20]], pbc=True)
    atoms.calc = MDGraftCalculator(mdgraft.graft(system))
    assert atoms.get_potential_energy() == pytest.approx((3 * 8 + 0.3**2) * KJ)
    close(atoms.get_stress(), numerical_stress(atoms), 1e-6)


# Periodicity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("periodic", "pbc", "cell", "error", "message"),
    [
        (True, False, [16.2] * 3, InvalidInputError, r"got \[False, False, False\].*atoms.pbc = T"),
        (True, [1, 1, 0], [16.2] * 3, InvalidInputError, "slab.*vacuum"),
        (True, True, None, MissingBoxError, "lacks the vector"),
        (True, True, [16.2, 16.2, 0], MissingBoxError, "lacks the vector"),
        (False, True, [16.2] * 3, InvalidInputError, "knows no periodic images"),
        (True, True, [[1, 0, 0], [2, 0, 0], [0, 0, 1]], InvalidInputError, "span no volume"),
        (True, True, [1.0, 20, 20], mdgraft.BoxTooSmallError, "cutoff"),
    ],
)
def test_periodicity_must_fit(periodic, pbc, cell, error, message):
    atoms = as_atoms(argon() if periodic else diatomic())
    atoms.pbc, atoms.cell = pbc, np.zeros((3, 3)) if cell is None else cell
    with pytest.raises(error, match=message):
        atoms.get_forces()


def test_stress_of_an_open_system():
    # As ASE's own calculators: the virial over the volume of the cell, if there is one.
    atoms = as_atoms(diatomic())
    atoms.positions[1, 0] += 0.1
    atoms.set_cell([10, 10, 10])
    assert atoms.get_stress() == pytest.approx(numerical_stress(atoms), abs=1e-9)
    atoms.set_cell([10, 10, 0])
    with pytest.raises(PropertyNotImplementedError, match="has no volume"):
        atoms.get_stress()


def slab(pbc, box):
    """Lennard-Jones as a hand-made module that sees the cell as it is."""
    sigma, epsilon, rc = 3.4, 0.01, 7.0

    def energy(x, h):
        total = x.new_zeros(())
        for i in range(-2, 3):
            for j in range(-2, 3):
                if (i or j) and not any(pbc):
                    continue
                shift = 0.0 if h is None else (i * h[0] + j * h[1]) * 10
                d = (10 * x[None] + shift - 10 * x[:, None]).reshape(-1, 3)
                r2 = (d**2).sum(-1)
                r2 = r2[(r2 > 1e-6) & (r2 < rc**2)]
                s6 = (sigma**2 / r2) ** 3
                e0 = 4 * epsilon * ((sigma / rc) ** 12 - (sigma / rc) ** 6)
                total = total + 0.5 * (4 * epsilon * (s6**2 - s6) - e0).sum()
        return total / KJ

    return energy, LennardJones(sigma=sigma, epsilon=epsilon, rc=rc)


@pytest.mark.parametrize("cell", ["complete", "without the third vector"])
def test_a_callable_in_two_periodic_directions(cell):
    third = [0, 0, 25] if cell == "complete" else [0, 0, 0]
    atoms = Atoms(
        "Ar4",
        positions=[[0, 0, 0], [3.7, 0.3, 0.2], [0, 3.8, 3.0], [3.6, 3.7, 0.4]],
        cell=[[0, 7.4, 0.5], [7.6, 0, 0], third],
        pbc=[True, True, False],
    )
    energy, reference = slab(atoms.pbc, atoms.cell)
    ours, theirs = atoms.copy(), atoms.copy()
    ours.calc, theirs.calc = MDGraftCalculator(energy), reference
    close(ours.get_potential_energy(), theirs.get_potential_energy(), 1e-12)
    close(ours.get_forces(), theirs.get_forces(), 1e-11)
    if cell == "complete":
        close(ours.get_stress(), theirs.get_stress(), 1e-10)


def test_a_callable_in_an_open_system():
    def energy(x, h):
        assert h is None
        return 50.0 * ((x[1] - x[0]).norm() - 0.2) ** 2

    atoms = Atoms("H2", positions=[[0, 0, 0], [2.5, 0, 0]], calculator=MDGraftCalculator(energy))
    assert atoms.get_potential_energy() == pytest.approx(50 * 0.05**2 * KJ)
    assert atoms.get_forces()[:, 0] == pytest.approx(np.array([1, -1]) * 5.0 * KJ / units.nm)


def test_a_callable_may_want_reduced_boxes():
    case = shaken_case("triclinic mixture")
    atoms = turned(case.atoms(), LATTICES["left-handed"], ROTATIONS["turned"])
    wanted = atoms.copy()
    wanted.calc = MDGraftCalculator(case.potential)

    def energy(x, h):
        return case.potential(x, h)

    atoms.calc = MDGraftCalculator(energy, reduced_cell=True)
    close(atoms.get_forces(), wanted.get_forces(), 1e-12)
    close(atoms.get_stress(), wanted.get_stress(), 1e-12)
    atoms.calc = MDGraftCalculator(energy)
    with pytest.raises(InvalidInputError, match="box: .* must be positive"):
        atoms.get_forces()


class Chain(torch.nn.Module):
    """A module of single precision with a parameter, without any cell."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(40.0))

    def forward(self, positions, box):
        assert positions.dtype == torch.float32
        return self.k * ((positions[1:] - positions[:-1]).norm(dim=-1) - 0.3).square().sum()


def test_a_module_in_its_own_precision():
    atoms = Atoms("H3", positions=[[0, 0, 0], [3.5, 0, 0], [3.5, 2, 0]])
    module = Chain()
    atoms.calc = MDGraftCalculator(module)
    assert atoms.get_potential_energy() == pytest.approx(40 * (0.05**2 + 0.1**2) * KJ, rel=1e-5)
    atoms.get_forces()
    assert module.k.grad is None and module.k.requires_grad


def test_a_bound_method_has_the_precision_of_its_module():
    atoms = Atoms("H3", positions=[[0, 0, 0], [3.5, 0, 0], [3.5, 2, 0]])
    module = Chain()
    atoms.calc = MDGraftCalculator(module.forward)
    assert atoms.get_forces()[0, 0] == pytest.approx(4.0 * KJ / units.nm, rel=1e-5)


def test_what_wraps_a_potential_has_its_box():
    case = shaken_case("triclinic mixture")
    atoms = turned(case.atoms(), LATTICES["left-handed"], ROTATIONS["turned"])
    wanted = atoms.copy()
    wanted.calc = MDGraftCalculator(case.potential)
    atoms.calc = MDGraftCalculator(case.potential.forward)
    close(atoms.get_forces(), wanted.get_forces(), 1e-12)
    # What torch.compile makes of it, without the wait for the compiler.
    compiled = torch.nn.Module()
    compiled._orig_mod, compiled.forward = case.potential, case.potential.forward
    atoms.calc = MDGraftCalculator(compiled)
    close(atoms.get_forces(), wanted.get_forces(), 1e-12)


def test_relaxed_particles():
    # A potential that minimises over some particles: what wraps a potential has its box.
    case = argon()
    relaxed = SelfConsistent(case.potential, [0])
    atoms = turned(case.atoms(), LATTICES["left-handed"], ROTATIONS["turned"])
    atoms.positions[0] += 0.2
    atoms.calc = MDGraftCalculator(relaxed)
    forces = atoms.get_forces()
    assert np.abs(forces[0]).max() < 1e-6
    plain = atoms.copy()
    plain.calc = MDGraftCalculator(case.potential)
    assert atoms.get_potential_energy() < plain.get_potential_energy()


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x, h: x.sum().item(), "it returned float"),
        (lambda x, h: x.sum(dim=0), r"it returned \(3,\)"),
        (lambda x, h: x.detach().sum(), "has no graph"),
        (lambda x, h: torch.ones((), requires_grad=True) * x.detach().sum(), "does not depend on"),
    ],
)
def test_energies_that_are_none(energy, message):
    atoms = Atoms("H", calculator=MDGraftCalculator(energy))
    with pytest.raises(InvalidInputError, match=message):
        atoms.get_forces()


def _harmonic(x, h, detach):
    """Springs to a lattice that follows the box; parts may be cut off from the graph."""
    box = h.detach() if detach == "box" else h
    frozen = x[1:].detach() if detach == "positions" else x[1:]
    site = 0.25 * box.sum(dim=0)
    return 30 * (x[0] - site).square().sum() + 20 * (frozen - x[0]).square().sum()


@pytest.mark.parametrize(
    ("detach", "asked", "warns"),
    [
        (None, "stress", False),
        ("positions", "forces", True),
        ("positions", "stress", True),
        ("box", "forces", False),
        ("box", "stress", True),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_of_a_callable_are_checked_once(detach, asked, warns, dtype):
    atoms = Atoms("H3", positions=np.arange(9).reshape(3, 3), cell=[9, 10, 11], pbc=True)
    atoms.calc = MDGraftCalculator(functools.partial(_harmonic, detach=detach), dtype=dtype)
    get = {"forces": atoms.get_forces, "stress": atoms.get_stress}[asked]
    if warns:
        with pytest.warns(NonConservativeForceWarning, match="are not derivatives of its energy"):
            get()
    for _ in range(2):
        atoms.positions[0] += 0.1
        get()
    unchecked = atoms.copy()
    unchecked.calc = MDGraftCalculator(
        functools.partial(_harmonic, detach=detach), dtype=dtype, check=False
    )
    unchecked.get_stress()


@pytest.mark.parametrize("name", ["get_potential_energy", "get_forces"])
def test_nan_is_not_handed_on(name):
    atoms = Atoms("H2", calculator=MDGraftCalculator(lambda x, h: (x[0] - x[1]).sum() * np.nan))
    with pytest.raises(SimulationError, match="NaN"):
        getattr(atoms, name)()
    assert atoms.calc.results == {}


# Energies of particles -------------------------------------------------------------------------


class Shared(torch.nn.Module):
    def particle_energies(self, positions, box):
        return positions.square().sum(dim=-1)

    def forward(self, positions, box):
        return self.particle_energies(positions, box).sum()


def test_energies_of_particles():
    atoms = Atoms("H2", positions=[[1, 2, 3], [4, 5, 6]], calculator=MDGraftCalculator(Shared()))
    assert atoms.get_potential_energies() == pytest.approx(np.array([0.14, 0.77]) * KJ)
    assert atoms.get_potential_energy() == pytest.approx(0.91 * KJ)


def test_energies_of_particles_that_nothing_defines():
    atoms = as_atoms(diatomic())
    with pytest.raises(PropertyNotImplementedError, match="energies"):
        atoms.get_potential_energies()
    with pytest.raises(PropertyNotImplementedError, match="dipole"):
        atoms.calc.calculate(atoms, ["dipole"])


def test_a_system_needs_no_graft_before():
    case = shaken_case("triclinic mixture")
    atoms = as_atoms(case, MDGraftCalculator(case.system, route="host"))
    assert set(atoms.calc.potential.routes.values()) == {"host"}
    close(atoms.get_forces(), case.truth()[1], 1e-9)
    with pytest.raises(mdgraft.UnsupportedHostError, match="no adapter"):
        MDGraftCalculator(object())


def test_voigt_order():
    # One bond along each diagonal of a face, one sign of stress for each.
    case = triclinic_mixture()
    atoms = as_atoms(case)
    full = voigt_6_to_full_3x3_stress(atoms.get_stress())
    assert full == pytest.approx(atoms.get_stress(voigt=False))
    bond = as_atoms(diatomic())
    bond.set_cell([10, 10, 10])
    bond.positions[1] = [0, 0.9, 0.9]
    # Stretched: positive along the bond and in its shear, yz.
    assert (np.sign(np.round(bond.get_stress(), 9)) == [0, 1, 1, 1, 0, 0]).all()
