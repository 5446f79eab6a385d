"""Rigid molecules: `ase.calculators.tip3p`, `tip4p`, `acn` and `counterions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
from ase import units
from ase.calculators import acn, tip3p, tip4p
from mdgraft import InvalidInputError, ParameterMismatchError, UnsupportedForceError
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.molecular import MolecularSites

from mdgraft_ase._settings import forget
from mdgraft_ase._units import ANGSTROM, EV, periods
from mdgraft_ase.forms.form import AbstractForm, number

_COULOMB = units.Hartree * units.Bohr * EV * ANGSTROM


class _MolecularForm(AbstractForm):
    """What these calculators have in common: a cutoff by molecules, in rectangular cells."""

    #: Parameters that a calculator can have its own values of; others are constants of ASE.
    own: tuple[str, ...] = ("rc", "width")

    def sites(
        self, calculator: Any, atoms: ase.Atoms
    ) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, float | None]:
        """Atoms of a molecule, reference atom, charges, sigmas, epsilons, and virtual offset."""
        raise NotImplementedError

    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term; see `AbstractForm.read`."""
        name = type(calculator).__name__
        if getattr(calculator, "pcpot", None):
            raise UnsupportedForceError(f"{name}: is embedded in point charges")
        cell = np.asarray(atoms.cell)
        lengths = cell.diagonal()
        narrow = atoms.pbc & (lengths < 2 * calculator.rc)
        if not np.array_equal(cell, np.diag(lengths)) or narrow.any():
            raise InvalidInputError(
                f"host_object: {name} wants a rectangular cell of at least two cutoffs of "
                f"{calculator.rc} Angstrom, got {cell.tolist()}; make the cell larger or rc shorter"
            )
        n_atoms, reference, charge, sigma, epsilon, offset = self.sites(calculator, atoms)
        return MolecularSites(
            charge=number(charge),
            sigma=number(sigma, ANGSTROM),
            epsilon=number(epsilon, EV),
            n_atoms=n_atoms,
            reference=reference,
            rc=number(calculator.rc, ANGSTROM),
            width=number(calculator.width, ANGSTROM),
            offset=None if offset is None else number(offset, ANGSTROM),
            coulomb=_COULOMB,
            pbc=periods(atoms),
        )

    def check(self, calculator: Any, changed: frozenset[str]) -> None:
        """Refuse changes of what is a constant of ASE."""
        fixed = changed - set(self.own)
        if fixed:
            name = type(calculator).__name__
            raise ParameterMismatchError(
                f"{name}.{min(fixed)}: is a constant of ASE, so that no {name} can have its own; "
                "run the potential itself, through mdgraft_ase.MDGraftCalculator"
            )

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        for name in changed & {"rc", "width"}:
            setattr(calculator, name, float(values[name] / ANGSTROM))
        forget(calculator)


class TIP3PForm(_MolecularForm):
    """Sequences O H H or H H O."""

    by_element = True

    def sites(
        self, calculator: Any, atoms: ase.Atoms
    ) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, float | None]:
        """See `_MolecularForm.sites`."""
        oxygen = 0 if atoms.numbers[0] == 8 else 2
        pattern = np.ones(3, dtype=int)
        pattern[oxygen] = 8
        _check_sequence("TIP3P", atoms, pattern)
        charge, epsilon = np.full(3, tip3p.qH), np.zeros(3)
        charge[oxygen] *= -2
        epsilon[oxygen] = tip3p.epsilon0
        return 3, oxygen, charge, np.full(3, tip3p.sigma0), epsilon, None


class TIP4PForm(_MolecularForm):
    """Sequence O H H; the fourth site is placed on the bisector."""

    by_element = True
    defining = ("energy_and_forces", "add_virtual_sites", "get_virtual_charges")

    def sites(
        self, calculator: Any, atoms: ase.Atoms
    ) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, float | None]:
        """See `_MolecularForm.sites`."""
        _check_sequence("TIP4P", atoms, np.array([8, 1, 1]))
        charge = np.array([0.0, tip4p.qH, tip4p.qH, -2 * tip4p.qH])
        epsilon = np.array([tip4p.epsilon0, 0.0, 0.0, 0.0])
        return 3, 0, charge, np.full(4, tip4p.sigma0), epsilon, 0.15


class ACNForm(_MolecularForm):
    """Sequences Me C N or N C Me of acetonitrile."""

    by_element = True
    defining = ("cutoff", "get_virtual_charges")

    def sites(
        self, calculator: Any, atoms: ase.Atoms
    ) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, float | None]:
        """See `_MolecularForm.sites`."""
        nitrogen = 0 if atoms.numbers[0] == 7 else 2
        numbers = atoms.numbers.reshape(-1, 3) if len(atoms) % 3 == 0 else np.zeros((1, 3))
        if (numbers[:, nitrogen] != 7).any() or (numbers[:, 1] != 6).any():
            raise InvalidInputError("host_object: ACN wants atoms in the sequence Me C N or N C Me")
        order = slice(None) if nitrogen == 2 else slice(None, None, -1)
        charge = np.array([acn.q_me, acn.q_c, acn.q_n])[order]
        sigma = np.array([acn.sigma_me, acn.sigma_c, acn.sigma_n])[order]
        epsilon = np.array([acn.epsilon_me, acn.epsilon_c, acn.epsilon_n])[order]
        return 3, 1, charge, sigma, epsilon, None


class CounterIonForm(_MolecularForm):
    """Equal ions of one atom each, whose charge, sigma and epsilon are the calculator's own."""

    own = ("charge", "sigma", "epsilon", "rc", "width")
    defining = ("get_virtual_charges",)

    def sites(
        self, calculator: Any, atoms: ase.Atoms
    ) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray, float | None]:
        """See `_MolecularForm.sites`."""
        columns = [np.atleast_1d(getattr(calculator, name)) for name in self.own[:3]]
        if calculator.sites_per_mol != 1 or any(column.shape != (1,) for column in columns):
            raise UnsupportedForceError("AtomicCounterIon: has ions of different kinds")
        charge, sigma, epsilon = columns
        return 1, 0, charge, sigma, epsilon, None

    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set what has changed."""
        unit = {"charge": 1.0, "sigma": ANGSTROM, "epsilon": EV}
        for name in changed & set(unit):
            present, value = getattr(calculator, name), values[name] / unit[name]
            setattr(calculator, name, value if np.ndim(present) else float(value[0]))
        super().write(calculator, atoms, values, changed)


def _check_sequence(name: str, atoms: ase.Atoms, pattern: np.ndarray) -> None:
    n = len(pattern)
    if len(atoms) % n or (atoms.numbers.reshape(-1, n) != pattern).any():
        raise InvalidInputError(
            f"host_object: {name} wants atoms in the sequence of numbers {pattern.tolist()}, got "
            f"{atoms.numbers[:6].tolist()}..."
        )
