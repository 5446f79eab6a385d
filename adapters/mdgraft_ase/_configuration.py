"""Atoms as an energy function wants them, and its derivatives as ASE wants them."""

# ASE's methods have no annotations.
# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from mdgraft import InvalidInputError, MissingBoxError

from mdgraft_ase._axes import Demands, check_meshes, described
from mdgraft_ase._cell import ReducedCell, reduced_cell
from mdgraft_ase._energy import EnergyFunction
from mdgraft_ase._invariance import check_rotation
from mdgraft_ase._units import ANGSTROM, EV

# Volumes that are zero, beside the product of lengths.
_FLAT = 1e-9
# ASE's order: xx, yy, zz, yz, xz, xy.
_VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """Positions and box of Atoms.

    Attributes
    ----------
    positions
        ``(N, 3)`` [nm] of all particles.
    box
        ``(3, 3)`` [nm], or None where nothing is periodic.
    rows
        Which of the particles are atoms; None for all.
    reduced
        How the box follows from the cell; None where it is the cell.
    """

    positions: np.ndarray
    box: np.ndarray | None = None
    rows: np.ndarray | None = None
    reduced: ReducedCell | None = None

    def forces(self, gradient: np.ndarray) -> np.ndarray:
        """Forces ``(atoms, 3)`` [eV/Angstrom] from dU/dx ``(N, 3)`` [kJ/mol/nm]."""
        if self.reduced is not None:
            gradient = self.reduced.back(gradient)
        if self.rows is not None:
            gradient = gradient[self.rows]
        return gradient * (-ANGSTROM / EV)

    def stress(self, strain_gradient: np.ndarray, volume: float) -> np.ndarray:
        """Stress ``(6,)`` [eV/Angstrom^3] from the strain gradient [kJ/mol] and a volume."""
        if self.reduced is None:
            symmetric = 0.5 * (strain_gradient + strain_gradient.T)
        else:
            # A symmetric strain, and the rotation that makes the box lower triangular again, are
            # a lower triangular strain: the elements above the diagonal are not needed, and terms
            # that OpenMM evaluates do not have them.
            lower = np.tril(strain_gradient)
            symmetric = self.reduced.back_twice(lower + np.tril(lower, -1).T)
        return np.asarray(symmetric[_VOIGT] / (EV * volume))


class ConfigurationReader:
    """Reads Atoms for an energy function, and refuses those that do not fit.

    Parameters
    ----------
    energy
        Where configurations go.
    particles, reduced_cell, atomic_numbers
        See `MDGraftCalculator`.

    Raises
    ------
    InvalidInputError
        If ``particles`` or ``atomic_numbers`` make no sense.
    """

    def __init__(
        self,
        energy: EnergyFunction,
        *,
        particles: Any = None,
        reduced_cell: bool | None = None,
        atomic_numbers: Any = None,
    ) -> None:
        self._energy = energy
        self._reduces = energy.reduced if reduced_cell is None else bool(reduced_cell)
        self._numbers = _numbers(atomic_numbers)
        self._elements = energy.elements()
        #: Which of the particles are atoms; None for all.
        self.rows = _rows(particles, energy)
        self._last_key: tuple[bytes, bytes] | None = None
        self._last_box: tuple[np.ndarray | None, ReducedCell | None] = None, None
        self._rotation_checked = self._mesh_warned = False

    def read(self, atoms: Atoms) -> Configuration:
        """Positions and box of Atoms.

        Raises
        ------
        InvalidInputError
            If Atoms do not fit the potential, or their cell makes no sense.
        MissingBoxError
            If the cell lacks the vector of a periodic direction.
        """
        self._check_atoms(atoms)
        positions = atoms.positions * ANGSTROM
        if self.rows is not None:
            everything = np.zeros((self._energy.n_particles or 0, 3))
            everything[self.rows] = positions
            positions = everything
        key = atoms.cell.array.tobytes(), atoms.pbc.tobytes()
        if self._last_key != key:
            cell = self._cell(atoms)
            self._last_box = cell, self._reduced(cell)
            self._last_key = key
        cell, reduced = self._last_box
        if reduced is None:
            return Configuration(positions=positions, box=cell, rows=self.rows)
        positions = reduced.into(positions)
        potential = self._energy.potential
        if potential is not None and reduced.rotation is not None and not self._rotation_checked:
            check_rotation(potential, positions, reduced.box)
            self._rotation_checked = True
        return Configuration(positions=positions, box=reduced.box, rows=self.rows, reduced=reduced)

    def _reduced(self, cell: np.ndarray | None) -> ReducedCell | None:
        """The cell as OpenMM describes it, if the function wants that."""
        if cell is None or not self._reduces:
            return None
        potential = self._energy.potential
        if potential is None:
            return reduced_cell(cell)
        if getattr(potential._modules["sites"], "periodic", False):
            reduced = reduced_cell(cell)
            if not np.array_equal(reduced.lattice, np.eye(3)):
                raise InvalidInputError(
                    f"atoms.cell: {(cell / ANGSTROM).tolist()} must be reduced, but virtual sites "
                    "are defined in fractional coordinates of its vectors; give Atoms a reduced "
                    "cell"
                )
            return reduced
        reduced = described(cell, Demands.of(potential))
        if not self._mesh_warned:
            self._mesh_warned = check_meshes(potential, reduced.box)
        return reduced

    def _cell(self, atoms: Atoms) -> np.ndarray | None:
        """Cell vectors [nm], or None where nothing is periodic."""
        wanted, pbc = self._energy.pbc, tuple(bool(p) for p in atoms.pbc)
        if wanted is not None and pbc != wanted:
            raise InvalidInputError(
                f"atoms.pbc: got {list(pbc)}, the potential has {list(wanted)}; "
                + _advice(wanted, pbc)
            )
        if not any(pbc):
            return None
        lengths = np.linalg.norm(atoms.cell.array, axis=1)
        if not lengths[list(pbc)].all():
            raise MissingBoxError(
                f"atoms.cell: {atoms.cell.tolist()} lacks the vector of a periodic direction "
                f"(pbc {list(pbc)}); set it with atoms.set_cell(...)"
            )
        complete = atoms.cell.complete()
        if not abs(complete.volume) > _FLAT * complete.lengths().prod():
            raise InvalidInputError(
                f"atoms.cell: the vectors {atoms.cell.tolist()} span no volume; wanted three "
                "linearly independent ones"
            )
        return np.asarray(complete.array) * ANGSTROM

    def _check_atoms(self, atoms: Atoms) -> None:
        n, numbers = self._energy.n_particles, self._numbers
        if self.rows is not None:
            n = len(self.rows)
        if n is not None and len(atoms) != n:
            total, sites = self._energy.n_particles or 0, self._energy.sites()
            hint = ""
            if len(sites) and self.rows is None and len(atoms) == total - len(sites):
                hint = '; particles="real" if the virtual sites are left out'
            raise InvalidInputError(
                f"atoms: got {len(atoms)} atoms, the potential is one of {n} particles{hint}"
            )
        if numbers is None:
            self._check_elements(atoms)
            return
        if self.rows is not None and len(numbers) != n:
            numbers = numbers[self.rows]
        if not np.array_equal(numbers, atoms.numbers):
            if len(numbers) != len(atoms):
                raise InvalidInputError(
                    f"atoms: got {len(atoms)} atoms, atomic_numbers has {len(numbers)}"
                )
            first = int(np.flatnonzero(numbers != atoms.numbers)[0])
            raise InvalidInputError(
                f"atoms: atom {first} is {atoms.symbols[first]} (number {atoms.numbers[first]}), "
                f"atomic_numbers has {numbers[first]} there; are the atoms in another order?"
            )

    def _check_elements(self, atoms: Atoms) -> None:
        """Refuse elements other than those that terms were made for; X stands for any."""
        wanted = self._elements if self.rows is None else self._elements[self.rows]
        if not len(wanted):
            return
        others = np.flatnonzero((wanted != atoms.numbers) & (wanted >= 0) & (atoms.numbers != 0))
        if len(others):
            k = int(others[0])
            raise InvalidInputError(
                f"atoms: atom {k} is {atoms.symbols[k]}, but the potential was made for "
                f"{chemical_symbols[wanted[k]]} there; graft again for these atoms, or bring them "
                "into the order of those that were grafted"
            )


def has_volume(atoms: Atoms) -> bool:
    """Whether the three vectors of the cell are there and linearly independent."""
    return bool(abs(atoms.cell.volume) > _FLAT * atoms.cell.lengths().prod())


def _advice(wanted: tuple[bool, ...], pbc: tuple[bool, ...]) -> str:
    if not any(wanted):
        return "it knows no periodic images: set atoms.pbc = False, or graft a periodic system"
    if all(wanted):
        return (
            "set atoms.pbc = True and a cell; for a slab or wire, one with enough vacuum along the "
            "directions that are not periodic"
        )
    return f"set atoms.pbc = {list(wanted)}, or graft again for the directions {list(pbc)}"


def _numbers(source: Any) -> np.ndarray | None:
    if source is None:
        return None
    if callable(getattr(source, "atoms", None)):
        source = [0 if a.element is None else a.element.atomic_number for a in source.atoms()]
    numbers = np.asarray(source)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise InvalidInputError(
            f"atomic_numbers: got {source!r}, wanted one whole number for each atom"
        )
    return numbers


def _rows(particles: Any, energy: EnergyFunction) -> np.ndarray | None:
    """Which particles the atoms are, or None for all."""
    if particles is None:
        return None
    n, sites = energy.n_particles, energy.sites()
    if n is None:
        raise InvalidInputError(
            "particles: a callable gets all atoms; only a Potential has particles beside them"
        )
    if isinstance(particles, str):
        if particles != "real":
            raise InvalidInputError(
                f"particles: got {particles!r}, wanted None, 'real' or a list of indices"
            )
        return np.setdiff1d(np.arange(n), sites)
    rows = np.asarray(particles)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or len(rows) == 0:
        raise InvalidInputError(
            f"particles: got {particles!r}, wanted None, 'real' or a list of indices"
        )
    if rows.min() < 0 or rows.max() >= n or len(np.unique(rows)) != len(rows):
        raise InvalidInputError(
            f"particles: wanted different indices from 0 to {n - 1}, got {rows.tolist()}"
        )
    left_out = np.setdiff1d(np.arange(n), [*rows, *sites])
    if len(left_out):
        raise InvalidInputError(
            f"particles: particle {left_out[0]} is left out, but it is not a virtual site, so the "
            "potential cannot place it; Atoms must hold it"
        )
    return rows
