"""Observables: callables that give each frame a number."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, MissingBoxError
from mdgraft._units import BAR_NM3, DALTON_PER_NM3
from mdgraft.frames import Frames
from mdgraft.kernels.periodic import volume
from mdgraft.potentials import Potential


def _volume(frames: Frames, name: str) -> Tensor:
    if frames.box is None:
        raise MissingBoxError(f"frames: have no box, which {name} needs; pass frames with boxes")
    return volume(frames.box)


@dataclasses.dataclass(frozen=True)
class Volume:
    """Volume of the box [nm^3]."""

    def __call__(self, frames: Frames) -> Tensor:
        """Map frames to ``(F,)``."""
        return _volume(frames, "Volume")


@dataclasses.dataclass(frozen=True)
class Density:
    """Mass density [kg/m^3].

    Parameters
    ----------
    total_mass
        Mass of all particles in the box [Da].
    """

    total_mass: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.total_mass) and self.total_mass > 0):
            raise InvalidInputError(
                f"total_mass: got {self.total_mass!r}, wanted the positive mass of the box in Da"
            )

    def __call__(self, frames: Frames) -> Tensor:
        """Map frames to ``(F,)``."""
        return self.total_mass * DALTON_PER_NM3 / _volume(frames, "Density")


@dataclasses.dataclass(frozen=True)
class PotentialEnergy:
    """Potential energy [kJ/mol], which depends on the parameters explicitly.

    Parameters
    ----------
    potential
        Its energy is returned; usually the ensemble's own.
    n_molecules
        The energy is divided by this number, for a property per mole of molecules.
    """

    potential: Potential
    n_molecules: int = 1

    def __post_init__(self) -> None:
        _check_molecules(self.n_molecules)

    def __call__(self, frames: Frames) -> Tensor:
        """Map frames to ``(F,)``."""
        energy: Tensor = self.potential(frames.positions, frames.box)
        return energy / self.n_molecules


@dataclasses.dataclass(frozen=True)
class Enthalpy:
    """Configurational enthalpy ``U + P V`` [kJ/mol]; kinetic energy is left out.

    Parameters
    ----------
    potential
        Its energy is U.
    pressure
        P [bar].
    n_molecules
        The enthalpy is divided by this number.
    """

    potential: Potential
    pressure: float
    n_molecules: int = 1

    def __post_init__(self) -> None:
        _check_molecules(self.n_molecules)
        if not math.isfinite(self.pressure):
            raise InvalidInputError(f"pressure: got {self.pressure!r}, wanted a number in bar")

    def __call__(self, frames: Frames) -> Tensor:
        """Map frames to ``(F,)``."""
        energy: Tensor = self.potential(frames.positions, frames.box)
        work = self.pressure * BAR_NM3 * _volume(frames, "Enthalpy").to(energy.dtype)
        return (energy + work) / self.n_molecules


@dataclasses.dataclass(frozen=True)
class Stack:
    """Several observables side by side, along a new last axis.

    Parameters
    ----------
    observables
        Callables that each map F frames to ``(F,)`` or to the same ``(F, ...)``.
    """

    observables: tuple[object, ...]

    def __post_init__(self) -> None:
        if not self.observables:
            raise InvalidInputError("observables: got none, wanted at least one callable")

    def __call__(self, frames: Frames) -> Tensor:
        """Map frames to ``(F, ..., K)`` for K observables."""
        columns = [observable(frames).double() for observable in self.observables]  # type: ignore[operator]
        return torch.stack(columns, dim=-1)


def _check_molecules(n_molecules: int) -> None:
    if n_molecules < 1:
        raise InvalidInputError(f"n_molecules: got {n_molecules}, wanted at least 1")
