"""The interface of a form: how one class of calculators is read into a term and written back."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import ase
import numpy as np
import torch
from mdgraft.potentials import AbstractTerm
from torch import Tensor

# By which a calculator is asked; a subclass that replaces one may give something else.
_PROPERTIES = ("calculate", "get_property", "get_potential_energy", "get_forces", "get_stress")


class AbstractForm(abc.ABC):
    """Reads and writes the parameters of one class of calculators. It has no state."""

    #: Methods that define the energy, beside those of every calculator; a subclass that replaces
    #: one has a formula of its own.
    defining: tuple[str, ...] = ()
    #: Whether parameters or their places depend on the elements, so that others make no sense.
    by_element = False

    @abc.abstractmethod
    def read(self, calculator: Any, atoms: ase.Atoms) -> AbstractTerm:
        """The term, in double precision on the CPU.

        Raises
        ------
        UnsupportedForceError
            If this calculator's options have no torch form.
        InvalidInputError
            If the calculator cannot evaluate these atoms.
        """

    @abc.abstractmethod
    def write(
        self,
        calculator: Any,
        atoms: ase.Atoms,
        values: Mapping[str, np.ndarray],
        changed: frozenset[str],
    ) -> None:
        """Set parameters.

        Parameters
        ----------
        calculator
            Of this form's class.
        atoms
            What the potential was grafted for.
        values
            All parameters by name, in nm and kJ/mol.
        changed
            Those that differ from what the calculator has; only these are to be set.
        """

    def check(self, calculator: Any, changed: frozenset[str]) -> None:
        """Raise `ParameterMismatchError` if the calculator has no place for a changed value."""
        return

    def applies(self, calculator: Any, cls: type) -> bool:
        """Whether a calculator computes what ``cls`` itself would compute."""
        return not any(
            getattr(type(calculator), name) is not getattr(cls, name) or name in vars(calculator)
            for name in (*_PROPERTIES, *self.defining)
        )


def number(value: Any, unit: float = 1.0) -> Tensor:
    """A number or array as a double-precision tensor, times a unit."""
    return torch.as_tensor(np.asarray(value, dtype=np.float64) * unit)
