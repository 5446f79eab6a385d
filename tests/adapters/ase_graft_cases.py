"""Structures and calculators that grafts from ASE are tried on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential


def _rattled(atoms: Atoms, seed: int, size: float = 0.08) -> Atoms:
    atoms.positions += np.random.default_rng(seed).normal(size=(len(atoms), 3)) * size
    return atoms


def primitive_cell() -> Atoms:
    """One atom in a cell much smaller than any cutoff."""
    return bulk("Cu")


def two_in_a_primitive_cell() -> Atoms:
    return _rattled(bulk("Cu") * (2, 1, 1), 1)


def skewed_alloy() -> Atoms:
    atoms = _rattled(bulk("Cu") * (2, 2, 1), 2)
    atoms.numbers[:2] = 79
    atoms.numbers[2] = 28
    strain = np.eye(3) + 0.08 * np.random.default_rng(2).normal(size=(3, 3))
    atoms.set_cell(np.asarray(atoms.cell) @ strain, scale_atoms=True)
    return atoms


def left_handed() -> Atoms:
    atoms = _rattled(bulk("Al") * (2, 1, 1), 3)
    atoms.set_cell(np.asarray(atoms.cell)[[1, 0, 2]])
    return atoms


def atoms_outside() -> Atoms:
    atoms = _rattled(bulk("Cu", cubic=True), 4)
    atoms.positions += [[30.0, -21.0, 7.0], [0, 0, 0], [-11.0, 0, 50.0], [0.1, 0.2, 0.3]]
    return atoms


def slab() -> Atoms:
    """Periodic in two directions, with a vacuum in the third."""
    return _rattled(fcc111("Al", (2, 1, 3), vacuum=6.0), 5)


def slab_without_third_vector() -> Atoms:
    atoms = _rattled(fcc111("Cu", (1, 2, 2), vacuum=6.0), 6)
    cell = np.asarray(atoms.cell).copy()
    cell[2] = 0.0
    atoms.set_cell(cell)
    return atoms


def wire() -> Atoms:
    atoms = Atoms("Au3", [[0.0, 0.0, 0.0], [0.3, 2.6, 0.2], [1.9, 1.3, 1.0]], pbc=(0, 1, 0))
    atoms.set_cell([[9.0, 0.3, 0.0], [1.0, 4.4, 0.5], [0.0, 0.7, 8.0]])
    return atoms


def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


def cluster() -> Atoms:
    return _rattled(bulk("Cu", cubic=True) * (2, 1, 1), 7, 0.1)[:7]


def single_atom() -> Atoms:
    return Atoms("Pt")


def random_structure(seed: int) -> Atoms:
    """Up to six atoms anywhere in and out of a random cell, periodic in random directions."""
    random = np.random.default_rng(seed)
    while True:
        cell = np.diag(random.uniform(2.5, 8.0, 3))
        cell += random.normal(size=(3, 3)) * random.choice([0.0, 0.5, 2.0])
        if abs(np.linalg.det(cell)) > 25.0:
            break
    atoms = Atoms(cell=cell, pbc=random.integers(0, 2, 3))
    for _ in range(60):
        # Images of one atom may be close, but no two atoms are.
        more = atoms + Atoms(
            random.choice(["Cu", "Au", "Al", "O"]), [random.uniform(-1, 2, 3) @ cell]
        )
        if len(more) == 1 or more.get_all_distances(mic=True)[-1, :-1].min() > 1.7:
            atoms = more
        if len(atoms) == random.integers(1, 7):
            break
    return atoms


STRUCTURES: dict[str, Callable[[], Atoms]] = {
    f.__name__: f
    for f in (
        primitive_cell,
        two_in_a_primitive_cell,
        skewed_alloy,
        left_handed,
        atoms_outside,
        slab,
        slab_without_third_vector,
        wire,
        ethanol,
        cluster,
        single_atom,
    )
}
STRUCTURES["cluster"] = lambda: Atoms(cluster().symbols, cluster().positions)

CALCULATORS: dict[str, Callable[[], object]] = {
    "lj": lambda: LennardJones(sigma=2.2, epsilon=0.3, rc=5.7),
    "lj default": lambda: LennardJones(sigma=1.3, epsilon=0.3),
    "lj smooth": lambda: LennardJones(sigma=2.2, epsilon=0.3, rc=6.1, ro=4.0, smooth=True),
    "lj late onset": lambda: LennardJones(sigma=2.2, epsilon=0.3, rc=5.0, ro=5.5, smooth=True),
    "morse": lambda: MorsePotential(epsilon=0.4, r0=2.5, rho0=5.0),
    "morse long": lambda: MorsePotential(epsilon=0.4, r0=2.5, rho0=4.0, rcut1=1.2, rcut2=2.9),
    "emt": lambda: EMT(),
    "emt asap": lambda: EMT(asap_cutoff=True),
}


def structure(name: str) -> Atoms:
    return STRUCTURES[name]()


def with_calculator(structure_name: str, calculator_name: str) -> Atoms:
    atoms = structure(structure_name)
    atoms.calc = CALCULATORS[calculator_name]()
    return atoms
