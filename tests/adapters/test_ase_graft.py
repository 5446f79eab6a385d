"""Grafts of ASE's classical calculators: values, derivatives and structures of every kind."""

from __future__ import annotations

import copy

import mdgraft
import mdgraft_ase
import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.calculators import emt
from ase.calculators.fd import calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.constraints import FixAtoms, Hookean
from ase.filters import FrechetCellFilter
from ase.mep import DimerControl, MinModeAtoms
from ase_graft_cases import CALCULATORS, STRUCTURES, random_structure, structure, with_calculator
from mdgraft.ensembles.frame_derivatives import frame_derivatives
from mdgraft.testing import check_potential, finite_difference
from mdgraft_ase._units import ANGSTROM, EV

EVERY = [(c, s) for c in CALCULATORS for s in STRUCTURES]
# The classical formulas agree to rounding; with ASE's own sums it is a little more.
RTOL = 1e-10


def _scale(forces: np.ndarray) -> float:
    return max(float(np.abs(forces).max(initial=0.0)), 1.0)


@pytest.mark.parametrize("route", ["native", "host"])
@pytest.mark.parametrize(("calculator", "structure_name"), EVERY)
def test_energy_forces_and_stress_are_those_of_ase(
    calculator: str, structure_name: str, route: str
) -> None:
    atoms = with_calculator(structure_name, calculator)
    potential = mdgraft.graft(atoms, route=route)
    assert set(potential.routes.values()) == {route}
    x, h = mdgraft_ase.positions_and_box(atoms)
    assert (h is not None) == bool(atoms.pbc.any()) == potential.periodic
    energy = float(potential(x, h).detach()) / EV
    forces = potential.forces(x, h).detach().numpy() / (EV / ANGSTROM)
    wanted = atoms.get_potential_energy()
    assert energy == pytest.approx(wanted, rel=RTOL, abs=1e-12)
    np.testing.assert_allclose(
        forces, atoms.get_forces(), rtol=0, atol=RTOL * _scale(atoms.get_forces())
    )
    if potential.periodic and atoms.cell.rank == 3:
        stress = mdgraft_ase.stress(potential, atoms)
        np.testing.assert_allclose(stress, atoms.get_stress(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_random_cells_and_periods(seed: int) -> None:
    atoms = random_structure(seed)
    for make in CALCULATORS.values():
        atoms.calc = make()
        potential = mdgraft.graft(atoms, route="native")
        x, h = mdgraft_ase.positions_and_box(atoms)
        energy, forces = atoms.get_potential_energy() * EV, atoms.get_forces() * EV / ANGSTROM
        assert float(potential(x, h).detach()) == pytest.approx(energy, rel=RTOL, abs=1e-8)
        found = potential.forces(x, h).detach().numpy()
        np.testing.assert_allclose(found, forces, rtol=0, atol=RTOL * _scale(forces))
        if h is not None:
            wanted = atoms.get_stress()
            atol = RTOL * max(1e-2, float(np.abs(wanted).max()))
            np.testing.assert_allclose(mdgraft_ase.stress(potential, atoms), wanted, 0, atol)


@pytest.mark.parametrize("calculator", ["lj smooth", "morse", "emt"])
@pytest.mark.parametrize("structure_name", ["skewed_alloy", "left_handed", "slab", "wire"])
def test_stress_is_what_strains_do(calculator: str, structure_name: str) -> None:
    atoms = with_calculator(structure_name, calculator)
    stress = mdgraft_ase.stress(mdgraft.graft(atoms), atoms)
    numerical = calculate_numerical_stress(atoms, eps=1e-5)
    np.testing.assert_allclose(stress, numerical, rtol=1e-5, atol=1e-8)


def test_stress_of_frames_is_differentiable() -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj smooth")
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    frames = torch.stack([x, 1.01 * x + 0.1]), torch.stack([h, 1.01 * h])
    found = mdgraft_ase.stress_tensor(potential, *frames)
    assert found.shape == (2, 3, 3)
    for f in range(2):
        moved = atoms.copy()
        moved.set_cell(frames[1][f].numpy() / ANGSTROM)
        moved.positions = frames[0][f].numpy() / ANGSTROM
        moved.calc = CALCULATORS["lj smooth"]()
        wanted = moved.get_stress(voigt=False) * EV / ANGSTROM**3
        np.testing.assert_allclose(found[f].detach(), wanted, rtol=1e-9, atol=1e-9)
    sigma = potential.get_parameter("LennardJones.sigma")
    (slope,) = torch.autograd.grad(found[1, 0, 1], sigma)

    def entry(t: float) -> float:
        with torch.no_grad():
            sigma.add_(t)
            value = float(mdgraft_ase.stress_tensor(potential, *frames)[1, 0, 1])
            sigma.sub_(t)
        return value

    truth = finite_difference(entry, step=1e-4)
    assert float(slope) == pytest.approx(truth.value, rel=1e-7, abs=10 * truth.error)


@pytest.mark.parametrize("route", ["native", "host"])
def test_stress_of_a_potential_that_knows_six_box_derivatives(route: str) -> None:
    system, force = (
        openmm.System(),
        openmm.CustomNonbondedForce("2 * (0.3 / r)^6 * (1 - r / 0.9)^3"),
    )
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.9)
    x = np.random.default_rng(3).uniform(0, 2, size=(8, 3))
    box = np.array([[2.0, 0.0, 0.0], [0.3, 2.2, 0.0], [-0.4, 0.5, 2.1]])
    for _ in x:
        system.addParticle(1.0)
        force.addParticle()
    system.setDefaultPeriodicBoxVectors(*box)
    system.addForce(force)
    potential = mdgraft.graft(system, route=route)
    found = mdgraft_ase.stress_tensor(potential, x, box)
    for i, j in ((0, 0), (1, 0), (2, 1), (2, 0)):

        def energy(t: float, i: int = i, j: int = j) -> float:
            # A strain in the lower triangle keeps the box one of OpenMM's.
            strain = np.eye(3)
            strain[i, j] += t
            return float(potential(x @ strain, box @ strain).detach())

        truth = finite_difference(energy, step=1e-3)
        wanted = truth.value / np.linalg.det(box)
        assert float(found[i, j]) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert float(found[j, i]) == float(found[i, j])


@pytest.mark.parametrize("calculator", CALCULATORS)
@pytest.mark.parametrize("structure_name", ["skewed_alloy", "wire", "ethanol", "single_atom"])
def test_energies_of_atoms(calculator: str, structure_name: str) -> None:
    atoms = with_calculator(structure_name, calculator)
    potential = mdgraft.graft(atoms)
    (name,) = potential.term_names
    x, h = mdgraft_ase.positions_and_box(atoms)
    found = potential.term(name).particle_energies(
        x[None], None if h is None else h[None], potential.term(name).parameter_values(), {}
    )
    wanted = atoms.get_potential_energies() * EV
    np.testing.assert_allclose(found[0].detach(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("calculator", ["lj smooth", "morse", "emt", "emt asap"])
@pytest.mark.parametrize(
    "structure_name", ["two_in_a_primitive_cell", "skewed_alloy", "slab", "wire", "cluster"]
)
def test_consistent_with_itself(calculator: str, structure_name: str) -> None:
    atoms = with_calculator(structure_name, calculator)
    check_potential(mdgraft.graft(atoms), *mdgraft_ase.positions_and_box(atoms))


@pytest.mark.parametrize("calculator", ["lj smooth", "morse", "emt"])
def test_any_orientation_and_choice_of_cell(calculator: str) -> None:
    atoms = with_calculator("skewed_alloy", calculator)
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    assert h is not None
    energy, forces = potential(x, h).detach(), potential.forces(x, h)
    turn, _ = torch.linalg.qr(
        torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    )
    other = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]).double()
    moved, cell = x @ turn + 0.3, other @ h @ turn
    torch.testing.assert_close(potential(moved, cell).detach(), energy, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(potential.forces(moved, cell), forces @ turn, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("route", ["native", "host"])
@pytest.mark.parametrize("calculator", ["lj", "lj smooth", "morse"])
def test_derivatives_by_parameters(calculator: str, route: str) -> None:
    # With a sharp cutoff differences are only true where no pair is about to cross it.
    periodic = "two_in_a_primitive_cell"
    atoms = with_calculator("cluster" if calculator == "lj" else periodic, calculator)
    potential = mdgraft.graft(atoms, route=route)
    x, h = mdgraft_ase.positions_and_box(atoms)
    names, parameters = zip(*potential.named_parameters(), strict=True)
    assert len(names) == {"lj": 3, "lj smooth": 4, "morse": 5}[calculator]
    gradients = torch.autograd.grad(potential(x, h), parameters)
    native = mdgraft.graft(atoms, route="native")
    for name, gradient in zip(names, gradients, strict=True):
        own = name.partition(".")[2]
        size = float(atoms.calc.parameters[own])

        def energy(t: float, own: str = own, size: float = size) -> float:
            other = copy.deepcopy(atoms.calc)
            other.set(**{own: size * (1 + t)})
            other.reset()
            return float(other.get_potential_energy(atoms)) * EV

        truth = finite_difference(energy, step=1e-3)
        unit = float(dict(native.named_parameters())[name].detach()) if route == "native" else size
        found = float(gradient) * unit
        assert found == pytest.approx(truth.value, rel=1e-6, abs=10 * truth.error + 1e-7)


@pytest.mark.parametrize("calculator", ["emt", "emt asap"])
@pytest.mark.parametrize("structure_name", ["skewed_alloy", "ethanol"])
def test_derivatives_by_the_table_of_emt(
    calculator: str, structure_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = with_calculator(structure_name, calculator)
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    gradients = torch.autograd.grad(potential(x, h), list(potential.parameters()))
    values = dict(potential.named_parameters())
    symbols = [s for _, s in sorted({(a.number, a.symbol) for a in atoms})]
    columns = ("E0", "s0", "V0", "eta2", "kappa", "lambda", "n0")
    for name, gradient in zip(values, gradients, strict=True):
        column = columns.index(name.removeprefix("EMT."))
        for place, symbol in enumerate(symbols):

            def energy(t: float, symbol: str = symbol, column: int = column) -> float:
                row = list(emt.parameters[symbol])
                row[column] *= 1 + t
                with monkeypatch.context() as patch:
                    patch.setitem(emt.parameters, symbol, tuple(row))
                    other = CALCULATORS[calculator]()
                    return float(other.get_potential_energy(atoms)) * EV

            truth = finite_difference(energy, step=1e-4)
            found = float(gradient[place] * values[name][place].detach())
            assert found == pytest.approx(truth.value, rel=1e-6, abs=10 * truth.error + 1e-7)


def test_an_absent_element_can_set_the_cutoff_of_emt() -> None:
    # Silver is the largest of the table: without it the cutoff belongs to it all the same.
    atoms = with_calculator("cluster", "emt")
    potential = mdgraft.graft(atoms)
    assert potential.term("EMT").largest_other == pytest.approx(3.01 * 0.0529177, rel=1e-5)
    atoms.numbers[0] = 47
    atoms.calc = emt.EMT()
    assert mdgraft.graft(atoms).term("EMT").largest_other < 3.01 * 0.0529177


@pytest.mark.parametrize("inner", [2.2, 2.3])
def test_a_sharp_and_an_inverted_cutoff_of_morse(inner: float) -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj")
    atoms.calc = MorsePotential(epsilon=0.4, r0=2.5, rcut1=inner, rcut2=2.2)
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    assert bool(torch.isfinite(potential.forces(x, h)).all())
    if inner == 2.2:
        # ASE divides by the width; a very small one has the same energy.
        atoms.calc = MorsePotential(epsilon=0.4, r0=2.5, rcut1=inner - 1e-9, rcut2=2.2)
    energy = atoms.get_potential_energy() * EV
    assert float(potential(x, h).detach()) == pytest.approx(energy, rel=1e-10)


def test_units() -> None:
    assert pytest.approx(96.48533212, rel=1e-7) == EV
    assert pytest.approx(0.1, rel=1e-15) == ANGSTROM
    units = mdgraft.graft(with_calculator("cluster", "emt")).units
    assert units["EMT.n0"] == "/nanometer**3"
    assert mdgraft.graft(with_calculator("cluster", "lj")).units == {
        "LennardJones.epsilon": "kilojoule/mole",
        "LennardJones.sigma": "nanometer",
        "LennardJones.rc": "nanometer",
    }


@pytest.mark.parametrize("calculator", ["lj smooth", "emt"])
def test_third_derivatives(calculator: str) -> None:
    atoms = with_calculator("two_in_a_primitive_cell", calculator)
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    assert h is not None
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()

    def slope(t: torch.Tensor, order: int) -> torch.Tensor:
        if order == 0:
            return potential(x + t * direction, h)
        return torch.func.grad(lambda s: slope(s, order - 1))(t)

    zero = torch.zeros((), dtype=torch.float64)
    third = float(slope(zero, 3).detach())
    truth = finite_difference(
        lambda t: float(slope(torch.tensor(t, dtype=torch.float64), 2).detach()), step=1e-4
    )
    assert third == pytest.approx(truth.value, rel=1e-5, abs=10 * truth.error)


def test_parameters_are_mapped_by_vmap() -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj")
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    cutoffs = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)

    def energy(rc: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(potential, {"LennardJones.rc": rc}, (x, h))

    mapped = torch.func.vmap(energy)(cutoffs)
    single = torch.stack([energy(rc) for rc in cutoffs])
    torch.testing.assert_close(mapped, single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), -0.5])
def test_a_cutoff_that_is_none_is_refused(value: float) -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj")
    potential = mdgraft.graft(atoms)
    with torch.no_grad():
        potential.term("LennardJones").rc.fill_(value)
    with pytest.raises(mdgraft.InvalidInputError, match="cutoff: LennardJones has one of"):
        potential(*mdgraft_ase.positions_and_box(atoms))


@pytest.mark.parametrize("route", ["native", "host"])
def test_derivatives_of_every_frame(route: str) -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj smooth")
    potential = mdgraft.graft(atoms, route=route)
    x, h = mdgraft_ase.positions_and_box(atoms)
    frames = mdgraft.Frames(
        positions=torch.stack([x, x + 0.001, 1.01 * x]), box=torch.stack([h, 1.02 * h, h])
    )
    names = ["LennardJones.epsilon", "LennardJones.sigma"]
    found = frame_derivatives(potential, frames, names)
    for f in range(3):
        inputs = frames.positions[f], frames.box[f]
        energy = potential(*inputs)
        gradients = torch.autograd.grad(energy, [potential.get_parameter(n) for n in names])
        torch.testing.assert_close(found.energies[f], energy.detach())
        torch.testing.assert_close(found.forces[f], potential.forces(*inputs), rtol=1e-9, atol=1e-7)
        torch.testing.assert_close(found.gradients[f], torch.stack(gradients))


def test_single_precision_and_the_calculator_itself() -> None:
    atoms = with_calculator("skewed_alloy", "emt")
    atoms.get_potential_energy()
    potential = mdgraft.graft(atoms.calc, dtype=torch.float32)
    assert potential.dtype == torch.float32
    x, h = mdgraft_ase.positions_and_box(atoms, dtype=torch.float32)
    assert float(potential(x, h).detach()) == pytest.approx(
        atoms.get_potential_energy() * EV, rel=1e-4
    )


@pytest.mark.parametrize("route", ["native", "host"])
def test_constraints_play_no_part(route: str) -> None:
    atoms = with_calculator("cluster", "emt")
    free = atoms.get_forces()
    energy = atoms.get_potential_energy()
    atoms.set_constraint([FixAtoms([0, 1]), Hookean(2, 3, k=5.0, rt=1.0)])
    potential = mdgraft.graft(atoms, route=route)
    x, h = mdgraft_ase.positions_and_box(atoms)
    np.testing.assert_allclose(
        potential.forces(x, h).detach().numpy(), free * EV / ANGSTROM, atol=1e-8
    )
    assert float(potential(x, h).detach()) == pytest.approx(energy * EV, rel=1e-12)
    assert len(atoms.constraints) == 2


def _without_calculator() -> Atoms:
    return structure("cluster")


def _flat_cell() -> Atoms:
    atoms = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=[[3, 0, 0], [6, 0, 0], [0, 0, 3]], pbc=True)
    atoms.calc = LennardJones()
    return atoms


def _no_vector() -> Atoms:
    atoms = Atoms("Cu2", [[0, 0, 0], [2, 0, 0]], cell=[[3, 0, 0], [0, 3, 0], [0, 0, 0]])
    atoms.pbc = True
    atoms.calc = LennardJones()
    return atoms


def _nan() -> Atoms:
    atoms = Atoms("Cu2", [[0, 0, 0], [np.nan, 0, 0]])
    atoms.calc = LennardJones()
    return atoms


def _empty() -> Atoms:
    atoms = Atoms()
    atoms.calc = LennardJones()
    return atoms


def _unknown_element() -> Atoms:
    atoms = Atoms("U")
    atoms.calc = emt.EMT()
    return atoms


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without_calculator, "no calculator; set atoms.calc"),
        (LennardJones, "has no atoms yet; pass Atoms"),
        (_flat_cell, "spans no volume"),
        (_no_vector, "direction 2 is periodic but has no cell vector"),
        (_nan, "NaN or infinity"),
        (_empty, "are empty"),
        (lambda: FrechetCellFilter(with_calculator("slab", "emt")), "pass the atoms inside"),
        (_unknown_element, "no parameters for U; it knows Al, Cu"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(make())  # type: ignore[operator]


def test_other_objects_of_ase_are_refused() -> None:
    with pytest.raises(mdgraft.UnsupportedHostError, match="wanted ase.Atoms with a calculator"):
        mdgraft.graft(FixAtoms([0]))
    saddle = MinModeAtoms(with_calculator("cluster", "lj"), DimerControl(logfile=None))
    with pytest.raises(mdgraft.InvalidInputError, match="MinModeAtoms is a view of atoms"):
        mdgraft.graft(saddle)


def test_routes_are_checked() -> None:
    atoms = with_calculator("cluster", "lj")
    with pytest.raises(mdgraft.InvalidInputError, match="'LJ' matches no term; there are"):
        mdgraft.graft(atoms, route={"LJ": "host"})
    with pytest.raises(mdgraft.InvalidInputError, match="wanted 'auto', 'native', 'host'"):
        mdgraft.graft(atoms, route="torch")


def test_a_missing_box_and_a_stress_without_volume_are_refused() -> None:
    atoms = with_calculator("slab_without_third_vector", "lj")
    potential = mdgraft.graft(atoms)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    with pytest.raises(mdgraft.MissingBoxError, match="this potential is periodic"):
        potential(x)
    with pytest.raises(mdgraft.InvalidInputError, match="no volume"):
        mdgraft_ase.stress(potential, atoms)
    alone = with_calculator("cluster", "lj")
    alone.set_cell([9, 9, 9])
    with pytest.raises(mdgraft.InvalidInputError, match="is not periodic"):
        mdgraft_ase.stress(mdgraft.graft(alone), alone)
