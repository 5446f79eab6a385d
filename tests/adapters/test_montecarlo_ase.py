"""Energies by ASE's calculators as Monte Carlo targets."""

import copy

import ase
import ase.build
import mdgraft
import mdgraft_ase
import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms, FixBondLengths
from mdgraft import InvalidInputError, MissingBoxError, WrongEnsembleError
from mdgraft._errors import SimulationError
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ChainState,
    Displacement,
    Metropolis,
    Mixture,
    Target,
    Translation,
)

F64 = torch.float64


def metal():
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.calc = EMT()
    return atoms


def slab():
    """Periodic along two of three directions."""
    atoms = ase.build.fcc111("Al", (2, 2, 2), vacuum=4.0)
    atoms.calc = EMT()
    return atoms


def cluster():
    atoms = ase.Atoms("Ar4", positions=[[0, 0, 0], [3.8, 0, 0], [0, 3.9, 0], [0, 0.1, 3.7]])
    atoms.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=12.0)
    return atoms


def mixed():
    atoms = cluster()
    atoms.calc = SumCalculator([atoms.calc, LennardJones(sigma=3.0, epsilon=0.005, rc=9.0)])
    return atoms


SYSTEMS = {"metal": metal, "slab": slab, "cluster": cluster, "sum": mixed}
each_system = pytest.mark.parametrize("name", SYSTEMS)


def start_of(atoms, n_chains=2, *, size=0.005):
    x, box = mdgraft_ase.positions_and_box(atoms)
    state = ChainState.replicate(n_chains, positions=x, box=box)
    noise = torch.randn(
        state.positions.shape, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    return state.replace(positions=state.positions + size * noise)


@each_system
def test_energies_and_forces_are_those_of_the_host(name):
    atoms = SYSTEMS[name]()
    energy, truth = mdgraft_ase.CalculatorEnergy(atoms), mdgraft_ase.HostPotential(atoms)
    state = start_of(atoms, 3)
    expected = truth(state.positions, state.box)
    torch.testing.assert_close(energy(state), expected, rtol=1e-12, atol=1e-9)
    found, forces = energy.energies_and_forces(state)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    wanted = truth.forces(state.positions, state.box)
    torch.testing.assert_close(forces, wanted, rtol=1e-10, atol=1e-8)


@each_system
def test_chains_are_those_of_the_potential(name):
    """Loops of compiled steps, against the potential that torch evaluates."""
    atoms = SYSTEMS[name]()
    moves = Mixture([Displacement(0.01), Translation(0.02, [range(len(atoms))])])
    runs = []
    for energy in (mdgraft_ase.CalculatorEnergy(atoms), mdgraft_ase.HostPotential(atoms)):
        chains = Metropolis(Target(energy, temperature=300.0), moves, start_of(atoms), seed=3)
        assert (chains._arrays() is not None) == (len(runs) == 0)
        runs.append(chains.sample(20))
    torch.testing.assert_close(runs[0].positions, runs[1].positions, rtol=0, atol=1e-12)
    torch.testing.assert_close(runs[0].energies, runs[1].energies, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("move", [MALA(0.01), HMC(0.01, 3)], ids=lambda m: m.name)
def test_moves_along_forces(move):
    atoms = cluster()
    chains = Metropolis(
        Target(mdgraft_ase.CalculatorEnergy(atoms), temperature=50.0), move, start_of(atoms), seed=1
    )
    samples = chains.sample(10)
    assert samples.energies.isfinite().all()
    assert (samples.positions[-1] != samples.positions[0]).any()


def test_each_chain_has_its_own_box():
    atoms = metal()
    state = start_of(atoms, 2)
    state = state.replace(box=state.box * torch.tensor([1.0, 1.02], dtype=F64)[:, None, None])
    energy = mdgraft_ase.CalculatorEnergy(atoms)
    expected = mdgraft.graft(atoms, route="host")(state.positions, state.box)
    torch.testing.assert_close(energy(state), expected, rtol=1e-12, atol=1e-9)
    assert energy(state).diff().abs() > 0.1


def test_the_atoms_stay_as_they_are():
    atoms = cluster()
    before, value = atoms.positions.copy(), atoms.get_potential_energy()
    chains = Metropolis(
        Target(mdgraft_ase.CalculatorEnergy(atoms), temperature=300.0),
        Displacement(0.05),
        start_of(atoms),
    )
    chains.sample(10)
    np.testing.assert_array_equal(atoms.positions, before)
    assert atoms.get_potential_energy() == value
    again = copy.deepcopy(chains)
    torch.testing.assert_close(again.sample(3).energies, chains.sample(3).energies)


@pytest.mark.parametrize(
    "constraint", [FixAtoms([0]), FixBondLengths([[0, 1]])], ids=lambda c: type(c).__name__
)
def test_moves_that_break_constraints_are_refused(constraint):
    atoms = cluster()
    atoms.set_constraint(constraint)
    target = Target(mdgraft_ase.CalculatorEnergy(atoms), temperature=300.0)
    start = start_of(atoms, size=0.0)
    with pytest.raises(WrongEnsembleError):
        Metropolis(target, Displacement(0.01), start)
    Metropolis(target, Displacement(0.01, particles=[2, 3]), start).sample(2)


class Failing(Calculator):
    """Works until it is far from where it started."""

    implemented_properties = ("energy",)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        distance = np.abs(atoms.positions[0]).max()
        if distance > 1.0:
            raise RuntimeError("did not converge")
        self.results = {"energy": 0.0}


def test_a_failure_leaves_the_last_state():
    atoms = ase.Atoms("H", positions=[[0.0, 0.0, 0.0]], calculator=Failing())
    chains = Metropolis(
        Target(mdgraft_ase.CalculatorEnergy(atoms), temperature=300.0),
        Displacement(0.05),
        ChainState.replicate(1, positions=torch.zeros(1, 3, dtype=F64)),
    )
    with pytest.raises(SimulationError, match="failed when asked for energy.*did not converge"):
        chains.sample(500)
    assert chains.state.positions.abs().max() <= 0.1


def test_arguments_that_make_no_sense():
    energy = mdgraft_ase.CalculatorEnergy(metal())
    with pytest.raises(MissingBoxError, match="state: has no box"):
        energy(ChainState.replicate(1, positions=torch.zeros(4, 3, dtype=F64)))
    with pytest.raises(InvalidInputError, match="state: has 2 particles, the atoms 4"):
        energy(ChainState.replicate(1, positions=torch.zeros(2, 3, dtype=F64)))
    with pytest.raises(InvalidInputError):
        mdgraft_ase.CalculatorEnergy(ase.Atoms("H"))
