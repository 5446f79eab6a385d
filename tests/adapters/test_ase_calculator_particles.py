"""Which particles Atoms hold: virtual sites, masses, constraints, elements."""

from __future__ import annotations

import mdgraft
import mdgraft_ase
import numpy as np
import openmm
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import MixedCalculator, SumCalculator
from ase.calculators.qmmm import SimpleQMMM
from ase_systems import as_atoms, close, diatomic, rigid_four_site_water, water
from mdgraft import InvalidInputError
from mdgraft_ase import MDGraftCalculator

# Particles ------------------------------------------------------------------------------------


def test_atoms_without_virtual_sites():
    case = rigid_four_site_water()
    energy, forces = case.truth()
    sites = [i for i in range(len(forces)) if case.system.isVirtualSite(i)]
    real = np.setdiff1d(np.arange(len(forces)), sites)
    everything, atoms = case.atoms(particles="all"), case.atoms()
    assert len(atoms) == len(real) == 3 * len(sites)
    everything.calc = MDGraftCalculator(case.potential, atomic_numbers=case.topology)
    for particles in ("real", real, real.tolist()):
        atoms.calc = MDGraftCalculator(
            case.potential, particles=particles, atomic_numbers=case.topology
        )
        close(atoms.get_potential_energy(), energy, 1e-5)
        close(atoms.get_forces(), forces[real], 2e-4)
        close(atoms.get_forces(), everything.get_forces()[real], 1e-12)
        close(atoms.get_stress(), everything.get_stress(), 1e-12)
    everything.positions[sites] += 0.3
    assert everything.get_forces(apply_constraint=False)[sites].tolist() == [[0.0] * 3] * len(sites)
    close(everything.get_potential_energy(), atoms.get_potential_energy(), 1e-12)


@pytest.mark.parametrize(
    ("particles", "message"),
    [
        ("all", "wanted None, 'real' or a list"),
        ([0, 1, 1], "different indices"),
        ([0, 10**6], "different indices"),
        ([0.5], "list of indices"),
        ([], "list of indices"),
        ([0, 1], "particle 2 is left out, but it is not a virtual site"),
    ],
)
def test_particles_that_make_no_sense(particles, message):
    case = rigid_four_site_water()
    with pytest.raises(InvalidInputError, match=message):
        MDGraftCalculator(case.potential, particles=particles)


def test_particles_of_a_callable():
    with pytest.raises(InvalidInputError, match="a callable gets all atoms"):
        MDGraftCalculator(lambda x, h: x.sum(), particles="real")


def test_the_number_of_atoms():
    case = rigid_four_site_water()
    atoms = case.atoms()
    atoms.calc = MDGraftCalculator(case.potential)
    with pytest.raises(InvalidInputError, match=r'particles="real" if the virtual sites are left'):
        atoms.get_potential_energy()
    atoms = as_atoms(diatomic())
    del atoms[0]
    with pytest.raises(InvalidInputError, match="got 1 atoms, the potential is one of 2 particles"):
        atoms.get_potential_energy()


def test_the_elements():
    case = diatomic()
    atoms = as_atoms(case, MDGraftCalculator(case.potential, atomic_numbers=[6, 8]))
    atoms.numbers[:] = [6, 8]
    atoms.get_forces()
    atoms.numbers[:] = [8, 6]
    with pytest.raises(InvalidInputError, match=r"atom 0 is O \(number 8\).*another order"):
        atoms.get_forces()
    with pytest.raises(InvalidInputError, match="one whole number"):
        MDGraftCalculator(case.potential, atomic_numbers=["C", "O"])


@pytest.mark.parametrize(
    ("make", "route", "checked"),
    [
        (EMT, "native", [0, 1, 2, 3]),
        (EMT, "host", [0, 1, 2, 3]),
        (lambda: SumCalculator([EMT(), LennardJones()]), "native", [0, 1, 2, 3]),
        (lambda: MixedCalculator(LennardJones(), EMT(), 0.3, 0.7), "native", [0, 1, 2, 3]),
        (lambda: SimpleQMMM([3, 1], EMT(), LennardJones(), LennardJones()), "native", [1, 3]),
        (LennardJones, "native", []),
    ],
)
def test_elements_that_a_potential_was_made_for(make, route, checked):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = make()
    potential = mdgraft.graft(atoms, route=route)
    energy = atoms.get_potential_energy()
    for k in range(4):
        other = atoms.copy()
        other.calc = MDGraftCalculator(potential)
        other.numbers[k] = 47
        if k in checked:
            with pytest.raises(InvalidInputError, match=f"atom {k} is Ag, but .* for Cu there"):
                other.get_potential_energy()
        else:
            close(other.get_potential_energy(), energy, 1e-12)
        # An atom of no element, as a System without a topology has them.
        other.numbers[k] = 0
        close(other.get_potential_energy(), energy, 1e-12)


# Atoms from a System ---------------------------------------------------------------------------


def test_atoms_from_openmm():
    case = water()
    atoms = case.atoms()
    assert set(atoms.symbols) == {"O", "H"} and atoms.pbc.all()
    assert atoms.get_masses()[:3] == pytest.approx([15.99943, 1.007947, 1.007947])
    assert atoms.positions == pytest.approx(10 * case.positions)
    assert atoms.cell.lengths() == pytest.approx([14.5, 15, 15.5])
    assert atoms.get_array("atomtypes")[:3].tolist() == ["O", "H1", "H2"]
    assert set(atoms.get_array("residuenames")) == {"HOH"}
    assert atoms.get_array("residuenumbers")[3] == 2
    by_mass = mdgraft_ase.atoms_from_openmm(case.system, case.positions * openmm.unit.nanometer)
    assert (by_mass.numbers == atoms.numbers).all()
    box = 2 * np.eye(3)
    given = mdgraft_ase.atoms_from_openmm(case.system, case.positions, box=box)
    assert given.cell.array == pytest.approx(20 * np.eye(3))


def test_constraints_and_what_does_not_move():
    case = rigid_four_site_water()
    n = len(case.positions) // 4
    assert case.atoms().constraints == []
    atoms = case.atoms(constraints=True)
    (lengths,) = atoms.constraints
    assert len(lengths.pairs) == 3 * n
    i, j = lengths.pairs[4]
    wanted = next(
        d._value
        for a, b, d in map(case.system.getConstraintParameters, range(3 * n))
        if {a, b} == {i // 3 * 4 + i % 3, j // 3 * 4 + j % 3}
    )
    assert lengths.bondlengths[4] == pytest.approx(10 * wanted)
    fixed, lengths = case.atoms(particles="all", constraints=True).constraints
    assert fixed.index.tolist() == list(range(3, 4 * n, 4))
    assert lengths.pairs.max() == 4 * n - 2


def test_unknown_masses():
    system = openmm.System()
    for mass in (12.011, 3.024, 0.0, 4.0026):
        system.addParticle(mass)
    atoms = mdgraft_ase.atoms_from_openmm(system, np.zeros((4, 3)))
    assert list(atoms.symbols) == ["C", "X", "X", "He"]
    assert not atoms.pbc.any() and atoms.cell.rank == 0
    assert atoms.constraints[0].index.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((3, 3))}, r"positions: got shape \(3, 3\), wanted \(2, 3\)"),
        ({"positions": "here"}, "positions: cannot be read"),
        ({"particles": "some"}, "particles: got 'some'"),
        ({"topology": openmm.app.Topology()}, "topology: has 0 atoms, the System 2"),
        ({"system": 3}, r"system: got builtins\.int"),
    ],
)
def test_atoms_from_what_does_not_fit(change, message):
    given = {"system": diatomic().system, "positions": np.zeros((2, 3))} | change
    with pytest.raises(InvalidInputError, match=message):
        mdgraft_ase.atoms_from_openmm(**given)


def test_atoms_from_a_simulation():
    case = diatomic()
    context = openmm.Context(
        case.system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    assert len(mdgraft_ase.atoms_from_openmm(context, case.positions)) == 2
