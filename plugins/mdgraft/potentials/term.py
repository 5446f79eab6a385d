"""The interface of an energy term."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AbstractTerm(nn.Module, abc.ABC):
    """One term of a potential: named parameters and an energy for a batch of frames.

    A term holds topology in buffers and numbers that can be trained in parameters. Its `forward`
    is a pure function of the *values* it is handed, so that a `Potential` can tie, replace or
    batch them; it must be differentiable to every order in positions, box and values. A term that
    shares its energy among particles may say so by a method ``particle_energies`` with the
    arguments of `forward` and a result ``(frames, N)``.
    """

    #: Whether the energy depends on the box.
    periodic: bool
    #: Whether any cell with a volume will do, rather than OpenMM's reduced form alone.
    general_cell: bool = False
    #: Whether nothing but tensors and public attributes decides what it computes, so that an
    #: evaluation on a GPU may be recorded and replayed with other numbers. What is stored in a list
    #: or dictionary that an attribute names must stay as it is. Subclasses outside of mdgraft have
    #: to say so again.
    replays: bool = False
    #: How often a public attribute has been set.
    _changes: int = 0
    #: Names of other terms whose values this one gets as well, as ``<term>.<parameter>``.
    borrows: tuple[str, ...] = ()

    def __init__(self, *, periodic: bool = False) -> None:
        super().__init__()
        self.periodic = periodic
        self.units: dict[str, str] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_") and name != "training":
            self.__dict__["_changes"] = self._changes + 1

    def add_parameter(self, name: str, value: Tensor, unit: str) -> None:
        """Register a trainable parameter under the host's name for it."""
        # nn.Module refuses names such as "type" or "training", which hosts may well use.
        self._parameters[name] = nn.Parameter(torch.as_tensor(value))
        self.units[name] = unit

    def add_term(self, name: str, term: AbstractTerm) -> None:
        """Register a term that this one contains; its parameters become ``<name>.<parameter>``."""
        self._modules[name] = term
        self.units |= {f"{name}.{key}": unit for key, unit in term.units.items()}

    def inner_terms(self) -> dict[str, AbstractTerm]:
        """Terms that this one contains, by name."""
        return {k: term for k, term in self._modules.items() if isinstance(term, AbstractTerm)}

    def inner_values(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values among ``values`` that belong to the term contained under this name."""
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    def parameter_values(self) -> dict[str, Tensor]:
        """The term's own parameters by name, then those of the terms that it contains."""
        values: dict[str, Tensor] = {k: v for k, v in self._parameters.items() if v is not None}
        for name, term in self.inner_terms().items():
            inner = term.parameter_values()
            values |= {f"{name}.{key}": value for key, value in inner.items()}
        return values

    @property
    def framewise(self) -> bool:
        """Whether `torch.vmap` over frames costs about what a batch of frames costs."""
        return False

    @property
    def collects(self) -> bool:
        """Whether its kernels tell all about a frame, see `mdgraft.kernels.pieces.collected`.

        Not so where a kernel's input depends on the frame and on parameters at the same time.
        """
        return self.framewise

    @abc.abstractmethod
    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame.

        Parameters
        ----------
        positions
            ``(frames, N, 3)`` [nm].
        box
            ``(frames, 3, 3)`` [nm]; None unless the term is periodic.
        values
            This term's parameters by name.
        global_values
            The potential's global parameters by name.

        Returns
        -------
        Tensor
            ``(frames,)`` [kJ/mol].
        """
