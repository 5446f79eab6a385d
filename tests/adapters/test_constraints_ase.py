"""Constraints of Atoms against ASE's own adjustments of positions and momenta."""

from __future__ import annotations

import mdgraft_ase
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixBondLengths,
    FixCom,
    FixInternals,
    FixLinearTriatomic,
    Hookean,
)
from mdgraft import InvalidInputError, MissingBoxError, UnsupportedHostError
from mdgraft.testing import finite_difference

NM = 0.1


def ring(**options):
    return FixBondLengths([(k, (k + 1) % 6) for k in range(6)], **options)


def across():
    """Water whose hydrogens lie in other cells, periodic in two directions."""
    atoms = molecule("H2O", cell=[[4, 0, 0], [1.5, 5, 0], [0, 0, 6]], pbc=(True, True, False))
    atoms.positions[1] += atoms.cell[0] - 2 * atoms.cell[1]
    atoms.positions[2] -= atoms.cell[0]
    return atoms


TRIANGLE = [(0, 1), (2, 0), (1, 2)]
CASES = {
    "water": lambda: (molecule("H2O"), [FixBondLengths(TRIANGLE)]),
    "bond": lambda: (molecule("CH4"), [FixBondLength(0, 3)]),
    "benzene": lambda: (molecule("C6H6"), [ring()]),
    "given lengths": lambda: (
        molecule("H2O"),
        [FixBondLengths(TRIANGLE, bondlengths=[0.98, 0.97, 1.5])],
    ),
    "two constraints": lambda: (molecule("CH4"), [FixBondLength(0, 1), FixBondLength(-5, 2)]),
    "beside fixed atoms": lambda: (molecule("C6H6"), [ring(), FixAtoms([6, -1])]),
    "periodic": lambda: (across(), [FixBondLengths(TRIANGLE)]),
}
each_case = pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))


def build(name):
    atoms, constraints = CASES[name]()
    atoms.set_constraint(constraints)
    c = mdgraft_ase.constraints(atoms)
    box = torch.tensor(NM * np.array(atoms.cell)) if c.periodic else None
    return atoms, c, box


def nanometres(positions):
    return torch.tensor(NM * positions)


@each_case
def test_positions(name):
    atoms, c, box = build(name)
    old = atoms.get_positions()
    new = old + 0.02 * np.random.default_rng(1).normal(size=old.shape)
    # ASE goes through its constraints once, one after the other.
    found = c.project_positions(nanometres(new), nanometres(old), box=box)
    fixed = (c.masses == 0).numpy()
    if name == "two constraints":
        # They share an atom: only a solution for both at once meets both.
        assert float(c.residuals(found, box=box).abs().max()) < 1e-13
        return
    atoms.set_positions(new)
    wanted = nanometres(atoms.get_positions())
    torch.testing.assert_close(found[~fixed], wanted[~fixed], atol=1e-12, rtol=0)


@each_case
def test_velocities(name):
    atoms, c, box = build(name)
    if name == "given lengths":
        atoms.set_positions(atoms.get_positions())
    old = atoms.get_positions()
    velocities = np.random.default_rng(2).normal(size=old.shape)
    v = torch.tensor(velocities)
    found = c.project_velocities(v, nanometres(old), box=box)
    if name == "two constraints":
        assert float(c.velocity_residuals(found, nanometres(old), box=box).abs().max()) < 1e-13
        return
    atoms.set_velocities(velocities)
    moving = (c.masses > 0).numpy()
    wanted = torch.tensor(atoms.get_velocities())
    torch.testing.assert_close(found[moving], wanted[moving], atol=1e-11, rtol=0)


@each_case
def test_derivative(name):
    atoms, c, box = build(name)
    old = nanometres(atoms.get_positions())
    random = torch.Generator().manual_seed(3)
    trial = old + 0.002 * torch.randn(old.shape, generator=random, dtype=torch.float64)
    seed = torch.randn(old.shape, generator=random, dtype=torch.float64)
    direction = torch.randn(old.shape, generator=random, dtype=torch.float64)

    def loss(x):
        return (seed * c.project_positions(x, old, box=box)).sum()

    gradient = torch.func.grad(loss)(trial)
    truth = finite_difference(lambda t: loss(trial + t * direction).numpy(), step=1e-3)
    assert float((gradient * direction).sum()) == pytest.approx(float(truth.value), abs=1e-9)


def test_internals():
    atoms = molecule("CH4")
    atoms.set_constraint(FixInternals(bonds=[[1.12, [0, 1]], [None, [0, 2]]]))
    c = mdgraft_ase.constraints(atoms)
    assert c.pairs.tolist() == [[0, 1], [0, 2]]
    assert c.lengths.tolist() == pytest.approx([0.112, NM * atoms.get_distance(0, 2)])
    assert not c.periodic
    atoms.set_cell([5, 5, 5])
    atoms.pbc = True
    assert not mdgraft_ase.constraints(atoms).periodic
    atoms.set_constraint(FixInternals(bonds=[[1.12, [0, 1]]], mic=True))
    assert mdgraft_ase.constraints(atoms).periodic
    atoms.set_constraint([FixInternals(bonds=[[1.12, [0, 1]]]), FixBondLength(0, 2)])
    with pytest.raises(InvalidInputError, match="some constraints take the nearest image"):
        mdgraft_ase.constraints(atoms)


def test_fixed_atoms_stay():
    atoms, c, _ = build("beside fixed atoms")
    assert (c.masses == 0).nonzero().squeeze(-1).tolist() == [6, 11]
    assert mdgraft_ase.constraints(atoms, dtype=torch.float32).dtype == torch.float32


def test_no_constraints():
    atoms = molecule("H2O")
    c = mdgraft_ase.constraints(atoms)
    assert c.n_constraints == 0
    assert c.masses.tolist() == pytest.approx(atoms.get_masses().tolist())


def test_what_is_refused():
    atoms = molecule("CO2")
    atoms.set_constraint([FixLinearTriatomic([(1, 0, 2)]), FixCom(), Hookean(0, 1, 5.0, 1.0)])
    with pytest.raises(InvalidInputError, match="FixLinearTriatomic, FixCom, Hookean are no"):
        mdgraft_ase.constraints(atoms)
    atoms.set_constraint(FixInternals(angles_deg=[[180.0, [1, 0, 2]]]))
    with pytest.raises(InvalidInputError, match=r"FixInternals.angles are no constraints"):
        mdgraft_ase.constraints(atoms)
    atoms.set_constraint([FixAtoms([0]), FixBondLength(0, 1)])
    with pytest.raises(InvalidInputError, match=r"atoms: \[0\] are fixed and also have"):
        mdgraft_ase.constraints(atoms)
    atoms.set_constraint(FixBondLengths([(0, 7)], bondlengths=[1.0]))
    with pytest.raises(InvalidInputError, match="names atom 7, but there are 3"):
        mdgraft_ase.constraints(atoms)
    with pytest.raises(UnsupportedHostError, match=r"atoms: got builtins.str, wanted ase.Atoms"):
        mdgraft_ase.constraints("CO2")
    _, c, box = build("periodic")
    x = torch.zeros(3, 3, dtype=torch.float64)
    assert box is not None
    with pytest.raises(MissingBoxError, match="box: got None"):
        c.project_positions(x)
