"""ASE's calculators to torch and back, neural potentials and modules to ASE and back."""

from __future__ import annotations

import mdgraft
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase_systems import (
    LATTICES,
    ROTATIONS,
    argon,
    close,
    numerical_forces,
    numerical_stress,
    shaken,
    turned,
)
from mdgraft import InvalidInputError
from mdgraft.neural import MessagePassingNetwork, neural_potential
from mdgraft_ase import MDGraftCalculator


def there_and_back():
    """Structures with calculators of ASE's own, cells and periodic directions of all kinds."""
    slab = fcc111("Cu", (2, 2, 2), vacuum=5, periodic=False)
    slab.pbc = [True, True, False]
    odd = bulk("Cu") * (2, 1, 1)
    odd.cell[[0, 1]] = odd.cell[[1, 0]]
    odd.pbc = [True, False, True]
    smooth = LennardJones(sigma=3.4, epsilon=0.01, rc=8, smooth=True)
    return {
        "primitive cell": (bulk("Ar", "fcc", 5.3), smooth),
        "alloy": (
            Atoms("CuAu", positions=[[0, 0, 0], [2, 0, 1.8]], cell=[4, 4, 3.9], pbc=1),
            EMT(),
        ),
        "slab": (slab, EMT()),
        "left-handed": (odd, MorsePotential(epsilon=0.3, r0=2.5)),
        "molecule": (molecule("CH3CH2OH"), EMT()),
    }


@pytest.mark.parametrize("name", there_and_back())
def test_a_calculator_comes_back_from_torch(name):
    theirs, calculator = there_and_back()[name]
    shaken(theirs)
    ours = theirs.copy()
    theirs.calc = calculator
    ours.calc = MDGraftCalculator(mdgraft.graft(theirs))
    close(ours.get_potential_energy(), theirs.get_potential_energy(), 1e-11)
    close(ours.get_forces(), theirs.get_forces(), 1e-10)
    # Morse had neither of these before ASE 3.24.
    offered = calculator.implemented_properties
    if "energies" in offered:
        close(ours.get_potential_energies(), theirs.get_potential_energies(), 1e-10)
    if "stress" in offered and abs(ours.cell.volume) > 0:
        close(ours.get_stress(), theirs.get_stress(), 1e-10)
    assert mdgraft.graft(ours) is ours.calc.potential


def test_a_calculator_that_ase_evaluates():
    theirs = shaken(bulk("Cu", cubic=True))
    theirs.calc = EMT()
    ours = theirs.copy()
    ours.calc = MDGraftCalculator(mdgraft.graft(theirs, route="host"))
    assert set(ours.calc.potential.routes.values()) == {"host"}
    close(ours.get_forces(), theirs.get_forces(), 1e-10)
    close(ours.get_stress(), theirs.get_stress(), 1e-9)


def test_periodic_directions_are_those_of_the_graft():
    atoms = there_and_back()["slab"][0]
    atoms.calc = EMT()
    atoms.calc = MDGraftCalculator(mdgraft.graft(atoms))
    atoms.pbc = True
    with pytest.raises(InvalidInputError, match=r"the potential has \[True, True, False\].*graft"):
        atoms.get_forces()


def test_what_has_a_calculator_needs_no_graft_before():
    theirs = shaken(bulk("Cu", cubic=True))
    theirs.calc = EMT()
    ours = theirs.copy()
    ours.calc = MDGraftCalculator(theirs)
    close(ours.get_forces(), theirs.get_forces(), 1e-10)


def ethanol(pbc):
    atoms = shaken(molecule("CH3CH2OH"))
    if any(pbc):
        atoms.cell = [[0, 4.0, 1.0], [4.2, 0, 0], [0, 0.5, 25.0]]
        atoms.pbc = pbc
    return atoms


@pytest.mark.parametrize("pbc", [(False,) * 3, (True, True, False), (True,) * 3])
def test_neural_potentials(pbc):
    atoms = ethanol(pbc)
    network = MessagePassingNetwork([1, 6, 8], 0.45, channels=8)
    atoms.calc = MDGraftCalculator(neural_potential(network, atoms.numbers, pbc=pbc))
    numerical = numerical_forces(atoms, 1e-4, [0, 5])
    close(atoms.get_forces()[[0, 5]], numerical, 1e-6)
    assert np.abs(atoms.get_forces()).max() > 1e-4
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())
    if any(pbc):
        close(atoms.get_stress(), numerical_stress(atoms), 1e-6)
    before = atoms.get_potential_energy()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    assert atoms.get_potential_energy() != before


class Spring(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, positions, box):
        return self.k * ((positions[1] - positions[0]).norm() - 0.1).square()


def test_a_module_comes_back_with_its_graph():
    atoms = Atoms("H2", positions=[[0, 0, 0], [1.3, 0, 0]])
    atoms.calc = MDGraftCalculator(Spring())
    potential = mdgraft.graft(atoms)
    assert set(potential.routes.values()) == {"native"}
    energy = potential(*atoms.calc.inputs(atoms))
    assert energy.item() == pytest.approx(3 * 0.03**2)
    energy.backward()
    (k,) = potential.parameters()
    assert k.grad.item() == pytest.approx(0.03**2)


def test_a_module_in_another_frame_is_not_unwrapped():
    case = argon()
    atoms = turned(case.atoms(), LATTICES["left-handed"], ROTATIONS["turned"])
    calculator = MDGraftCalculator(lambda x, h: case.potential(x, h), reduced_cell=True)
    with pytest.raises(InvalidInputError, match=r"call it with MDGraftCalculator.inputs"):
        calculator.as_torch_module(atoms)
