"""Force fields of ASE with tables, three-body terms, molecules and lists, and atoms for each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.acn import ACN, m_me
from ase.calculators.counterions import AtomicCounterIon
from ase.calculators.eam import EAM
from ase.calculators.ff import ForceField
from ase.calculators.tersoff import Tersoff, TersoffParameters
from ase.calculators.tip3p import TIP3P
from ase.calculators.tip4p import TIP4P
from ase.utils.ff import Angle, Bond, Coulomb, Dihedral, Morse, VdW
from scipy.interpolate import InterpolatedUnivariateSpline as Spline


def _rattled(atoms: Atoms, seed: int, size: float = 0.08) -> Atoms:
    atoms.positions += np.random.default_rng(seed).normal(size=(len(atoms), 3)) * size
    return atoms


# Tables ----------------------------------------------------------------------------------------


def _table(form: str) -> EAM:
    """Smooth functions of two elements, tabulated."""
    r, rho = np.linspace(0.5, 5.5, 60), np.linspace(0.0, 60.0, 50)
    fade = (1 - (r / 5.5) ** 2) ** 2

    def decay(height: float, rate: float) -> Spline:
        return Spline(r, height * np.exp(-rate * (r - 2.5)) * fade, k=3)

    functions = {
        "embedded_energy": np.array(
            [Spline(rho, -a * np.sqrt(rho + 0.1), k=3) for a in (1.0, 1.3)], dtype=object
        )
    }
    shape = (2, 2) if form == "fs" else (2,)
    density = np.empty(shape, dtype=object)
    for n, place in enumerate(np.ndindex(shape)):
        density[place] = decay(1.0 + 0.2 * n, 1.5 + 0.1 * n)
    functions["electron_density"] = density
    for name, height in (("phi", 0.5), ("d", 0.1), ("q", 0.05)):
        if name == "phi" or form == "adp":
            table = np.empty((2, 2), dtype=object)
            table[0, 0], table[1, 1] = decay(height, 3.0), decay(1.4 * height, 2.5)
            table[0, 1] = table[1, 0] = decay(0.8 * height, 2.0)
            functions[name] = table
    calculator = EAM(
        elements=["Al", "Ni"],
        form=form,
        cutoff=5.5,
        **functions,
        **{
            f"d_{name}": np.vectorize(lambda f: lambda x: f(x, 1), otypes=[object])(table)
            for name, table in functions.items()
        },
    )
    calculator.deriv = _derivative
    return calculator


def _derivative(function: Spline) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(x, 1)


def _alloy(form: str) -> Callable[[], Atoms]:
    def make() -> Atoms:
        atoms = _rattled(bulk("Al", cubic=True), 1)
        atoms.numbers[1:3] = 28
        atoms.calc = _table(form)
        return atoms

    return make


def nickel() -> Atoms:
    """One element of two, in a cell with one atom."""
    atoms = bulk("Ni") * (2, 1, 1)
    _rattled(atoms, 2)
    atoms.calc = _table("alloy")
    return atoms


# Bond orders -----------------------------------------------------------------------------------

_SILICON = TersoffParameters(
    3.0, 1.0, 1.3258, 4.8381, 2.0417, 0.0, 22.956, 0.33675, 1.3258, 95.373, 3.0, 0.2, 3.2394, 3264.7
)
_OTHER = TersoffParameters(
    1.0, 0.9, 1.1, 1.0e2, 1.6e1, -0.6, 0.787, 1.1e-2, 1.7, 471.0, 2.85, 0.15, 2.5, 1830.0
)


def _tersoff(symbols: str) -> Tersoff:
    first = symbols[:2]
    parameters = {}
    for a in {"Si", first}:
        for b in {"Si", first}:
            for c in {"Si", first}:
                parameters[a, b, c] = _SILICON if (a, b).count("Si") == 2 else _OTHER
    return Tersoff(parameters)


def silicon() -> Atoms:
    atoms = _rattled(bulk("Si"), 3)
    atoms.calc = _tersoff("Si")
    return atoms


def silicon_and_germanium() -> Atoms:
    atoms = _rattled(bulk("Si", cubic=True), 4)
    atoms.symbols[[1, 4, 5]] = "Ge"
    atoms.calc = _tersoff("Ge")
    return atoms


def silicon_dimer() -> Atoms:
    """Bonds without any neighbours."""
    atoms = Atoms("Si2", [[0, 0, 0], [0.3, 2.2, 0.4]])
    atoms.calc = _tersoff("Si")
    return atoms


# Molecules -------------------------------------------------------------------------------------


def _water(n: int, order: slice = slice(None), pbc: object = True) -> Atoms:
    random = np.random.default_rng(n)
    single = molecule("H2O")
    atoms = Atoms(cell=[11.0, 12.0, 11.5], pbc=pbc)
    for k in range(n):
        one = single.copy()
        one.rotate(random.uniform(0, 360), random.normal(size=3))
        one.positions += np.array([k % 3, k // 3 % 3, k // 9]) * 3.1 + random.uniform(-0.2, 0.2, 3)
        atoms += one[order]
    # Molecules that are anywhere, but whole.
    atoms.positions[3:6] += 2 * np.asarray(atoms.cell)[0]
    return atoms


def water() -> Atoms:
    atoms = _water(9)
    atoms.calc = TIP3P(rc=5.0)
    return atoms


def water_reversed_in_a_slab() -> Atoms:
    atoms = _water(8, slice(None, None, -1), (True, False, True))
    atoms.calc = TIP3P(rc=4.5, width=1.5)
    return atoms


def water_of_four_sites() -> Atoms:
    atoms = _water(9)
    atoms.calc = TIP4P(rc=5.2)
    return atoms


def acetonitrile() -> Atoms:
    random = np.random.default_rng(5)
    atoms = Atoms(cell=[13.0, 13.0, 13.0], pbc=True)
    for k in range(6):
        axis = random.normal(size=3)
        axis /= np.linalg.norm(axis)
        start = np.array([k % 2, k // 2 % 2, k // 4]) * 4.5 + 0.3 * random.normal(size=3)
        atoms += Atoms("C2N", [start, start + 1.458 * axis, start + 2.615 * axis])
    masses = atoms.get_masses()
    masses[::3] = m_me
    atoms.set_masses(masses)
    atoms.calc = ACN(rc=6.0)
    return atoms


def ions() -> Atoms:
    x = np.random.default_rng(6).uniform(0, 1, size=(5, 3)) * 2 + np.arange(5)[:, None] * 2.3
    atoms = Atoms("Na5", x, cell=[15.0, 16.0, 17.0], pbc=(True, True, False))
    atoms.calc = AtomicCounterIon(1.0, 0.0038, 2.8, rc=7.0)
    return atoms


# Lists -----------------------------------------------------------------------------------------


def _lists() -> ForceField:
    return ForceField(
        morses=[Morse(0, 1, 4.0, 2.0, 1.5)],
        bonds=[Bond(1, 2, 25.0, 1.4, alpha=[0.1], rref=[1.4]), Bond(0, 3, 30.0, 1.1)],
        angles=[Angle(0, 1, 2, 4.0, 1.9), Angle(3, 0, 1, 3.0, 1.8, cos=True)],
        dihedrals=[
            Dihedral(2, 1, 0, 3, 0.3),
            Dihedral(2, 1, 0, 4, 0.4, d0=2.0),
            Dihedral(2, 1, 0, 5, 0.2, d0=0.4, n=3),
        ],
        vdws=[VdW(2, 3, epsilonij=0.01, sigmaij=2.5), VdW(2, 4, Aij=900.0, Bij=20.0)],
        coulombs=[Coulomb(2, 5, chargei=0.3, chargej=-0.2), Coulomb(3, 4, chargeij=0.05)],
    )


def listed_molecule() -> Atoms:
    atoms = _rattled(molecule("CH3CH2OH"), 9)
    atoms.set_cell([8.0, 9.0, 10.0])
    atoms.calc = _lists()
    return atoms


def listed_crystal() -> Atoms:
    atoms = _rattled(molecule("CH3CH2OH"), 9)
    atoms.set_cell([[8.0, 1.0, -3.0], [0.0, 9.0, 2.0], [2.0, 0.0, 10.0]])
    atoms.pbc = (True, True, False)
    atoms.positions[4] += 2 * np.asarray(atoms.cell)[1] - np.asarray(atoms.cell)[2]
    atoms.calc = _lists()
    return atoms


CASES: dict[str, Callable[[], Atoms]] = {
    "eam alloy": _alloy("alloy"),
    "eam fs": _alloy("fs"),
    "eam adp": _alloy("adp"),
} | {
    f.__name__: f
    for f in (
        nickel,
        silicon,
        silicon_and_germanium,
        silicon_dimer,
        water,
        water_reversed_in_a_slab,
        water_of_four_sites,
        acetonitrile,
        ions,
        listed_molecule,
        listed_crystal,
    )
}
