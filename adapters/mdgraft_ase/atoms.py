"""Atoms from an OpenMM System."""

# ASE's methods have no annotations.
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import ase.units
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLengths
from ase.data import atomic_masses_iupac2016
from mdgraft import InvalidInputError
from mdgraft._units import NANOMETER, plain

# [Da] within which a mass tells its element: below the distance of neighbours such as Co and Ni,
# above what force fields round to.
_SAME_MASS = 0.02


def atoms_from_openmm(
    system: Any,
    positions: Any,
    *,
    topology: Any = None,
    box: Any = None,
    particles: str = "real",
    constraints: bool = False,
) -> Atoms:
    """Atoms with the masses, the cell and, on request, the constraints of a System.

    Parameters
    ----------
    system
        ``openmm.System``; a ``Simulation`` or ``Context`` will do.
    positions
        ``(N, 3)`` of all particles [nm, or a quantity].
    topology
        ``openmm.app.Topology`` with the elements and names, which become the arrays
        ``atomtypes``, ``residuenames`` and ``residuenumbers`` as ASE's PDB reader has them.
        Without one, elements are told by masses, and ``X`` is what no element's mass fits, such as
        hydrogen that was made heavier.
    box
        ``(3, 3)`` box vectors as rows [nm, or a quantity]; by default the System's.
    particles
        ``"real"`` leaves virtual sites out, for a calculator with ``particles="real"``; ``"all"``
        keeps them, as atoms that do not move: forces on them are zero, and where they are makes
        no difference.
    constraints
        Whether the System's distance constraints become `ase.constraints.FixBondLengths`. Atoms
        without mass, which OpenMM does not move either, always become `FixAtoms`.

    Returns
    -------
    Atoms
        Periodic if the System is.

    Raises
    ------
    InvalidInputError
        If numbers of particles disagree, or an option makes no sense.
    """
    system = _system(system)
    n = system.getNumParticles()
    x = _numbers("positions", positions)
    if x.shape != (n, 3):
        raise InvalidInputError(
            f"positions: got shape {x.shape}, wanted ({n}, 3): those of all particles of the "
            "System, virtual sites included"
        )
    if particles not in ("real", "all"):
        raise InvalidInputError(f"particles: got {particles!r}, wanted 'real' or 'all'")
    masses = np.array([plain(system.getParticleMass(i)) for i in range(n)], dtype=float)
    site = np.array([system.isVirtualSite(i) for i in range(n)], dtype=bool)
    kept = np.flatnonzero(~site) if particles == "real" else np.arange(n)
    names = None if topology is None else list(topology.atoms())
    if names is not None and len(names) != n:
        raise InvalidInputError(
            f"topology: has {len(names)} atoms, the System {n} particles; a Modeller adds virtual "
            "sites with addExtraParticles"
        )
    numbers = [_number(masses[i], None if names is None else names[i]) for i in kept]
    atoms = Atoms(numbers=numbers, positions=x[kept] * ase.units.nm, masses=masses[kept])
    if system.usesPeriodicBoundaryConditions():
        vectors = system.getDefaultPeriodicBoxVectors() if box is None else box
        cell = _numbers("box", vectors)
        if cell.shape != (3, 3):
            raise InvalidInputError(
                f"box: got shape {cell.shape}, wanted (3, 3) with box vectors as rows"
            )
        atoms.set_cell(cell * ase.units.nm)
        atoms.pbc = True
    if names is not None:
        atoms.set_array("atomtypes", np.array([names[i].name for i in kept]))
        atoms.set_array("residuenames", np.array([names[i].residue.name for i in kept]))
        atoms.set_array("residuenumbers", np.array([names[i].residue.index + 1 for i in kept]))
    fixed: list[Any] = []
    if not masses[kept].all():
        fixed.append(FixAtoms(indices=np.flatnonzero(masses[kept] == 0)))
    if constraints and system.getNumConstraints():
        fixed.append(_bond_lengths(system, kept))
    atoms.set_constraint(fixed)
    return atoms


def _system(host: Any) -> Any:
    """The System of a System, Context or Simulation."""
    for candidate in (host, getattr(host, "system", None)):
        if hasattr(candidate, "getNumParticles"):
            return candidate
    if hasattr(host, "getSystem"):
        return host.getSystem()
    raise InvalidInputError(
        f"system: got {type(host).__module__}.{type(host).__qualname__}, wanted an openmm.System, "
        "Context or Simulation"
    )


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(plain(value, NANOMETER), dtype=float)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name}: cannot be read as numbers in nm ({error})") from error


def _number(mass: float, atom: Any) -> int:
    """Atomic number by the topology or, without one, by the mass."""
    if atom is not None:
        return 0 if atom.element is None else int(atom.element.atomic_number)
    differences = np.abs(atomic_masses_iupac2016[1:] - mass)
    nearest = int(differences.argmin())
    return nearest + 1 if differences[nearest] < _SAME_MASS else 0


def _bond_lengths(system: Any, kept: np.ndarray) -> FixBondLengths:
    row = {int(particle): k for k, particle in enumerate(kept)}
    found = [system.getConstraintParameters(k) for k in range(system.getNumConstraints())]
    pairs = [[row[i], row[j]] for i, j, _ in found]
    lengths = [plain(length) * ase.units.nm for _, _, length in found]
    return FixBondLengths(pairs, bondlengths=lengths)
