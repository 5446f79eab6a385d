"""Calculators that ASE evaluates inside the graph."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, ClassVar

import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import (
    BaseCalculator,
    CalculationFailed,
    Calculator,
    FileIOCalculator,
    PropertyNotImplementedError,
    all_changes,
)
from ase.calculators.harmonic import HarmonicCalculator, HarmonicForceField
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from ase_graft_cases import with_calculator
from mdgraft.testing import check_potential
from mdgraft_ase._units import ANGSTROM, EV


class Pairs(Calculator):
    """Springs between neighbours, in the way of an old calculator; counts what it is asked."""

    implemented_properties: ClassVar = ["energy", "forces"]
    default_parameters: ClassVar = {"k": 2.0, "lengths": [2.4, 2.6], "unused": 3.0, "steps": 5}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls = 0

    def calculate(
        self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        i, _, d, vectors = neighbor_list("ijdD", self.atoms, 3.4)
        size = float(np.mean(self.parameters["lengths"]))
        x = np.clip(3.4 - d, 0.0, None)
        slope = self.parameters["k"] * ((d - size) * x**2 - (d - size) ** 2 * x)
        self.results["energy"] = 0.25 * self.parameters["k"] * np.sum((d - size) ** 2 * x**2)
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, (slope / d)[:, None] * vectors)
        self.results["forces"] = forces


class EnergyOnly(Pairs):
    implemented_properties: ClassVar = ["energy"]


class Single(Pairs):
    """Rounds as a model in single precision does."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.results = {k: np.asarray(v, dtype=np.float32) for k, v in self.results.items()}


class Uncopyable(Pairs):
    """Holds something that cannot be copied."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lock = threading.Lock()


class Minimal(BaseCalculator):
    """Without `set` and `reset`."""

    implemented_properties: ClassVar = ["energy", "forces"]

    def __init__(self, k: float = 1.5) -> None:
        super().__init__(parameters={"k": k})

    def calculate(self, atoms: Any, properties: Any, system_changes: Any) -> None:
        x = atoms.positions
        self.results = {
            "energy": self.parameters["k"] * float((x**4).sum()),
            "forces": -4 * self.parameters["k"] * x**3,
        }


class FreeEnergy(Pairs):
    """An energy extrapolated to zero width, and another that forces belong to."""

    implemented_properties: ClassVar = ["energy", "free_energy", "forces"]

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.results["free_energy"] = self.results["energy"]
        self.results["energy"] = self.results["energy"] + 7.0


class Failing(Pairs):
    def calculate(self, *args: Any, **kwargs: Any) -> None:
        raise CalculationFailed("SCF did not converge in 60 steps")


def _host(calculator: Any, name: str = "two_in_a_primitive_cell", **options: Any) -> Any:
    atoms = with_calculator(name, "lj")
    atoms.calc = calculator
    potential = mdgraft.graft(atoms, **options)
    return atoms, potential, *mdgraft_ase.positions_and_box(atoms)


@pytest.mark.parametrize("calculator", ["lj smooth", "morse", "emt"])
@pytest.mark.parametrize("structure_name", ["two_in_a_primitive_cell", "wire", "cluster"])
def test_the_host_route_agrees_with_the_native_one(calculator: str, structure_name: str) -> None:
    atoms = with_calculator(structure_name, calculator)
    x, h = mdgraft_ase.positions_and_box(atoms)
    random = torch.Generator().manual_seed(5)
    direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
    answers = []
    for route in ("native", "host"):
        potential = mdgraft.graft(atoms, route=route)
        inputs = [t.clone().requires_grad_(True) for t in (x, h) if t is not None]
        energy = potential(*inputs)
        first = torch.autograd.grad(energy, inputs, create_graph=True)
        second = torch.autograd.grad((first[0] * direction).sum(), inputs)
        answers.append([energy, *first, *second])
    for native, host in zip(*answers, strict=True):
        scale = max(1.0, float(native.detach().abs().max()))
        torch.testing.assert_close(host, native, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("calculator", ["lj smooth", "morse"])
def test_mixed_derivatives_by_parameters(calculator: str) -> None:
    atoms = with_calculator("two_in_a_primitive_cell", calculator)
    x, h = mdgraft_ase.positions_and_box(atoms)
    answers: list[dict[str, float]] = []
    for route in ("native", "host"):
        potential = mdgraft.graft(atoms, route=route)
        y = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(potential(y, h), y, create_graph=True)
        named = dict(potential.named_parameters())
        found = torch.autograd.grad((slope**2).sum(), list(named.values()))
        answers.append(
            {k: float(g * v.detach()) for (k, v), g in zip(named.items(), found, strict=True)}
        )
    native, host = answers
    assert native.keys() == host.keys()
    for name, value in native.items():
        assert host[name] == pytest.approx(value, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ["cluster", "slab_without_third_vector", "skewed_alloy"])
def test_consistent_with_itself(name: str) -> None:
    _, potential, x, h = _host(Pairs(), name)
    check_potential(potential, x, h, rtol=1e-4)


def test_forces_by_differences() -> None:
    _, exact, x, h = _host(Pairs())
    _, potential, *_ = _host(EnergyOnly())
    torch.testing.assert_close(potential.forces(x, h), exact.forces(x, h), rtol=1e-7, atol=1e-6)


def test_parameters_that_have_an_effect() -> None:
    atoms, potential, x, h = _host(Pairs())
    named = dict(potential.named_parameters())
    assert sorted(named) == ["Pairs.k", "Pairs.lengths"]
    assert potential.units["Pairs.k"] == "as the calculator has it"
    potential(x, h).backward()
    k, lengths = named["Pairs.k"], named["Pairs.lengths"]
    # The energy is linear in k, and depends on the mean of the lengths.
    energy = atoms.get_potential_energy() * EV
    assert float(k.grad) == pytest.approx(energy / 2.0, rel=1e-9)
    assert float(lengths.grad[0]) == pytest.approx(float(lengths.grad[1]), rel=1e-7)


def test_new_values_reach_the_copy_and_not_the_calculator() -> None:
    calculator = Pairs()
    atoms, potential, x, h = _host(calculator)
    before = atoms.get_potential_energy()
    with torch.no_grad():
        potential.term("Pairs").k.mul_(3.0)
    assert float(potential(x, h).detach()) == pytest.approx(3.0 * before * EV, rel=1e-12)
    assert calculator.parameters["k"] == 2.0
    assert atoms.get_potential_energy() == before
    mdgraft_ase.write_parameters(potential, atoms)
    assert calculator.parameters["k"] == pytest.approx(6.0)
    assert calculator.parameters["lengths"] == [2.4, 2.6]
    assert atoms.get_potential_energy() == pytest.approx(3.0 * before, rel=1e-12)


def test_a_calculator_without_the_parameter_is_refused() -> None:
    atoms, potential, *_ = _host(Pairs())
    other = EnergyOnly()
    other.__class__ = type("Pairs", (EnergyOnly,), {})
    del other.parameters["k"]
    with pytest.raises(mdgraft.ParameterMismatchError, match="Pairs.k: Pairs has no such"):
        mdgraft_ase.write_parameters(potential, _attached(atoms, other))


def test_a_calculator_without_set_and_reset() -> None:
    atoms = with_calculator("cluster", "lj")
    atoms.calc = Minimal()
    potential = mdgraft.graft(atoms)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    potential(x).backward()
    (k,) = potential.parameters()
    assert float(k.grad) == pytest.approx(float((x**4).sum()) * EV / ANGSTROM**4, rel=1e-9)


@pytest.mark.parametrize("cls", [Pairs, Uncopyable])
def test_atoms_and_calculator_stay_as_they_were(cls: type) -> None:
    calculator = cls()
    atoms, potential, x, h = _host(calculator)
    energy = atoms.get_potential_energy()
    before = atoms.copy()
    settings = copy.deepcopy(dict(calculator.parameters))
    with torch.no_grad():
        potential.term(cls.__name__).k.mul_(2.0)
        assert float(potential(x + 0.01, 1.1 * h)) != pytest.approx(energy * EV)
    assert dict(calculator.parameters) == settings
    assert np.array_equal(atoms.positions, before.positions)
    assert np.array_equal(atoms.cell, before.cell)
    assert atoms.calc is calculator
    assert atoms.get_potential_energy() == energy
    if cls is Pairs:
        calls = calculator.calls
        potential.forces(x, h)
        assert calculator.calls == calls


def test_what_cannot_be_copied_is_used_where_it_is() -> None:
    _, wanted, x, h = _host(Pairs())
    _, potential, *_ = _host(Uncopyable())
    torch.testing.assert_close(potential.forces(x, h), wanted.forces(x, h))
    torch.testing.assert_close(copy.deepcopy(potential)(x, h), wanted(x, h))


def test_copies_and_pickles() -> None:
    _, potential, x, h = _host(Pairs())
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert torch.equal(other(x, h), potential(x, h))


def test_a_batch_is_evaluated_once() -> None:
    _, potential, x, h = _host(Pairs())
    frames, cells = torch.stack([x, x + 0.01, x - 0.01]).requires_grad_(True), h.expand(3, 3, 3)
    calculator = potential.term("Pairs").engine._calculator
    calculator.calls = 0
    torch.autograd.grad(potential(frames, cells).sum(), frames)
    assert calculator.calls == 3


def test_energies_are_those_that_forces_belong_to() -> None:
    atoms, potential, x, h = _host(FreeEnergy())
    wanted = atoms.get_potential_energy(force_consistent=True)
    assert atoms.get_potential_energy() == pytest.approx(wanted + 7.0)
    assert float(potential(x, h).detach()) == pytest.approx(wanted * EV, rel=1e-12)


def test_single_precision_takes_larger_steps() -> None:
    calculator = Single()
    atoms = with_calculator("two_in_a_primitive_cell", "lj")
    atoms.calc = calculator
    atoms.get_potential_energy()
    potential = mdgraft.graft(atoms)
    x, h = mdgraft_ase.positions_and_box(atoms)
    exact = mdgraft.graft(_attached(atoms, Pairs()))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    products = [
        torch.autograd.functional.hvp(lambda y, p=p: p(y, h), x, direction)[1]
        for p in (potential, exact)
    ]
    scale = float(products[1].abs().max())
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=3e-3 * scale)


def _attached(atoms: Atoms, calculator: Any) -> Atoms:
    other = atoms.copy()
    other.calc = calculator
    return other


def test_failures_are_typed() -> None:
    atoms = with_calculator("cluster", "lj")
    atoms.calc = Failing()
    potential = mdgraft.graft(atoms)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    with pytest.raises(mdgraft.SimulationError, match=r"asked for .*SCF did not converge"):
        potential(x)


class Shaped(Calculator):
    """An energy as an array of one, and forces of a shape that is a parameter."""

    implemented_properties: ClassVar = ["energy", "forces"]
    default_parameters: ClassVar = {"shape": (2, 3)}

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.results = {"energy": np.array([2.0]), "forces": np.ones(self.parameters["shape"])}


def test_shapes_of_results() -> None:
    _, potential, x, h = _host(Shaped())
    assert float(potential(x, h).detach()) == pytest.approx(2 * EV)
    assert potential.forces(x, h).shape == (2, 3)
    _, potential, x, h = _host(Shaped(shape=(1, 3)))
    with pytest.raises(
        mdgraft.SimulationError, match=r"forces has shape \(1, 3\), wanted \(2, 3\)"
    ):
        potential(x, h)


def test_a_calculator_without_energy() -> None:
    class Nothing(Calculator):
        implemented_properties: ClassVar = ["dipole"]

        def calculate(self, *args: Any, **kwargs: Any) -> None:
            raise PropertyNotImplementedError

    atoms = with_calculator("cluster", "lj")
    atoms.calc = Nothing()
    with pytest.raises(mdgraft.SimulationError, match="gives no energy for this structure"):
        mdgraft.graft(atoms)(mdgraft_ase.positions_and_box(atoms)[0])


def test_stored_results_are_no_potential() -> None:
    atoms = with_calculator("cluster", "lj")
    stored = SinglePointCalculator(atoms, energy=1.0, forces=np.zeros((len(atoms), 3)))
    atoms.calc = stored
    potential = mdgraft.graft(atoms)
    x, _ = mdgraft_ase.positions_and_box(atoms)
    assert float(potential(x).detach()) == pytest.approx(EV)
    with pytest.raises(mdgraft.SimulationError, match="no energy for this structure"):
        potential(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def test_a_choice_of_parameters() -> None:
    atoms = with_calculator("two_in_a_primitive_cell", "lj")
    atoms.calc = Pairs()
    assert not list(mdgraft_ase.HostPotential(atoms).parameters())
    chosen = mdgraft_ase.HostPotential(atoms, parameters=["k"], dtype=torch.float32)
    assert [name for name, _ in chosen.named_parameters()] == ["Pairs.k"]
    assert chosen.dtype == torch.float32
    every = mdgraft_ase.HostPotential(atoms, parameters=None)
    assert sorted(name for name, _ in every.named_parameters()) == ["Pairs.k", "Pairs.lengths"]
    with pytest.raises(mdgraft.InvalidInputError, match="'steps' is no numerical parameter"):
        mdgraft_ase.HostPotential(atoms, parameters=["steps"])
    with pytest.raises(mdgraft.InvalidInputError, match="changes neither energy nor forces"):
        mdgraft_ase.HostPotential(atoms, parameters=["k", "unused"])


def test_third_derivatives_raise() -> None:
    _, potential, x, h = _host(Pairs())
    y = x.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(potential(y, h), y, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), y, create_graph=True)
    with pytest.raises(mdgraft.UnsupportedDerivativeError):
        torch.autograd.grad(second.sum(), y)


def test_programs_are_not_run_to_look_for_parameters() -> None:
    class Program(FileIOCalculator):
        implemented_properties: ClassVar = ["energy", "forces"]
        default_parameters: ClassVar = {"cutoff": 30.0}
        runs = 0

        def __init__(self) -> None:
            super().__init__(command="false")

        def calculate(self, *args: Any, **kwargs: Any) -> None:
            Program.runs += 1

    atoms = with_calculator("cluster", "lj")
    atoms.calc = Program()
    potential = mdgraft.graft(atoms)
    assert Program.runs == 0
    assert not list(potential.parameters())
    # Forces that are converged only so far need large displacements.
    assert potential.term("Program").engine.steps.positions == 1e-3


class OwnNeighbours(MorsePotential):
    pass


class Halved(LennardJones):
    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        for key in ("energy", "free_energy", "forces", "stress"):
            self.results[key] = 0.5 * self.results[key]


def test_a_subclass_with_a_formula_of_its_own_goes_by_the_host() -> None:
    atoms, potential, x, h = _host(Halved(sigma=2.2))
    assert potential.routes == {"Halved": "host"}
    energy = float(potential(x, h).detach())
    assert energy == pytest.approx(atoms.get_potential_energy() * EV, rel=1e-12)
    with pytest.raises(mdgraft.UnsupportedForceError, match="Halved"):
        mdgraft.graft(atoms, route="native")


def test_forces_of_ones_own_go_by_the_host() -> None:
    class Damped(LennardJones):
        def get_forces(self, atoms: Any = None) -> Any:
            return 0.5 * super().get_forces(atoms)

    atoms, potential, x, h = _host(Damped(sigma=2.2))
    assert potential.routes == {"Damped": "host"}
    forces = potential.forces(x, h).detach().numpy() / (EV / ANGSTROM)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=1e-12, atol=1e-12)


def test_a_subclass_without_one_is_native() -> None:
    _, potential, *_ = _host(OwnNeighbours())
    assert potential.routes == {"OwnNeighbours": "native"}


def test_neighbours_of_ones_own_go_by_the_host() -> None:
    def first_only(quantities: str, atoms: Atoms, cutoff: float) -> Any:
        i, j, d, vectors = neighbor_list("ijdD", atoms, cutoff)
        keep = (i == 0) | (j == 0)
        return i[keep], j[keep], d[keep], vectors[keep]

    atoms, potential, x, h = _host(MorsePotential(r0=2.5, neighbor_list=first_only))
    assert potential.routes == {"MorsePotential": "host"}
    energy = float(potential(x, h).detach())
    assert energy == pytest.approx(atoms.get_potential_energy() * EV, rel=1e-12)


def _distances(atoms: Atoms) -> np.ndarray:
    x = atoms.positions
    return np.array([np.linalg.norm(x[1] - x[0]), np.linalg.norm(x[2] - x[0])])


def _slopes(atoms: Atoms) -> np.ndarray:
    x = atoms.positions
    jacobian = np.zeros((2, 9))
    for row, j in enumerate((1, 2)):
        unit = (x[j] - x[0]) / np.linalg.norm(x[j] - x[0])
        jacobian[row, :3], jacobian[row, 3 * j : 3 * j + 3] = -unit, unit
    return jacobian


@pytest.mark.parametrize(
    ("internal", "cartesian", "turning"),
    [(False, True, False), (True, True, False), (True, False, False), (True, True, True)],
)
def test_harmonic_force_fields(internal: bool, cartesian: bool, turning: bool) -> None:
    reference = Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    matrix = np.random.default_rng(0).normal(size=(9, 9))
    functions = {"get_q_from_x": _distances, "get_jacobian": _slopes} if internal else {}
    field = HarmonicForceField(
        reference,
        matrix @ matrix.T,
        ref_energy=-3.0,
        cartesian=cartesian,
        variable_orientation=turning,
        **functions,
    )
    atoms = reference.copy()
    atoms.rattle(0.05, seed=1)
    atoms.calc = HarmonicCalculator(field)
    potential = mdgraft.graft(atoms)
    native = cartesian and not turning
    assert potential.routes == {"HarmonicCalculator": "native" if native else "host"}
    x, _ = mdgraft_ase.positions_and_box(atoms)
    assert float(potential(x).detach()) == pytest.approx(
        atoms.get_potential_energy() * EV, rel=1e-10
    )
    np.testing.assert_allclose(
        potential.forces(x).detach(), atoms.get_forces() * EV / ANGSTROM, atol=1e-7
    )
