"""What turns one class of OpenMM Force into a term and back."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import BoxTooSmallError, InvalidInputError
from mdgraft.potentials import AbstractTerm
from torch import Tensor

Values = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """Where a Force comes from.

    Attributes
    ----------
    system
        The System that holds the force.
    context
        The Context that it runs in, or None.
    """

    system: openmm.System
    context: openmm.Context | None = None


class AbstractConverter(abc.ABC):
    """Translates one Force class. Stateless; numbers are in OpenMM's unit system."""

    #: Parameters in each entry of which the energy is a polynomial of at most the fourth degree.
    polynomial: frozenset[str] = frozenset()
    #: Parameters whose derivative at zero is defined as zero where there is none, as of a root.
    flat_at_zero: frozenset[str] = frozenset()

    @abc.abstractmethod
    def read(self, force: Any, host: Host) -> AbstractTerm:
        """Build the term, in double precision on the CPU."""

    @abc.abstractmethod
    def write(self, values: Values, force: Any) -> None:
        """Set the force's parameters to ``values``, one float64 array for each parameter."""

    def refused(self, values: Values, force: Any) -> str | None:
        """Describe a value that no Context accepts, or return None."""
        return None

    def rebuilt(self, values: Values, force: Any) -> Any | None:
        """A new force with ``values``, if no setter reaches what `refused` says is out of reach."""
        return None

    def settle(self, force: Any, system: openmm.System) -> None:
        """Bring in line what must equal parameters of other forces, after all are written."""
        return None

    def structural(self, values: Values, force: Any) -> list[str]:
        """Name the changes in ``values`` that ``updateParametersInContext`` cannot take over."""
        return []

    def global_defaults(self, force: Any) -> dict[str, float]:
        """Declared defaults of the global parameters that the force adds to a Context."""
        return declared_globals(force)

    def settable_globals(self, force: Any) -> Collection[str]:
        """Names of the global parameters whose default `set_global_default` can declare anew."""
        return self.global_defaults(force).keys()

    def set_global_default(self, force: Any, name: str, value: float) -> None:
        """Declare a new default of a global parameter, if the force has it."""
        set_declared_global(force, name, value)


def declared_globals(force: Any) -> dict[str, float]:
    """Global parameters that a Force lists, with their declared defaults."""
    return {
        force.getGlobalParameterName(i): number(force.getGlobalParameterDefaultValue(i))
        for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)())
    }


def set_declared_global(force: Any, name: str, value: float) -> None:
    """Declare a new default of a global parameter that a Force lists."""
    for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)()):
        if force.getGlobalParameterName(i) == name:
            force.setGlobalParameterDefaultValue(i, value)


def number(quantity: Any) -> float:
    """A Quantity or number as a float in OpenMM's unit system."""
    # Quantities from getters already are in that system, so their bare number is the value.
    return float(getattr(quantity, "_value", quantity))


def scalar(quantity: Any) -> Tensor:
    """A Quantity or number as a float64 tensor of shape ``()``."""
    return torch.tensor(number(quantity), dtype=torch.float64)


def changed_scalars(values: Values, force: Any, getters: Mapping[str, str]) -> list[str]:
    """Parameters of shape ``()`` that differ from the force's own.

    ``getters`` maps parameters to what follows ``get`` in the name of the method.
    """
    return [
        key
        for key, name in getters.items()
        if float(values[key]) != number(getattr(force, f"get{name}")())
    ]


def checked_cutoff(force: Any, host: Host) -> float:
    """The cutoff [nm] of a force that knows NoCutoff; infinite where there is none."""
    method = force.getNonbondedMethod()
    if method == force.NoCutoff:
        return math.inf
    cutoff = number(force.getCutoffDistance())
    if not cutoff > 0:
        raise InvalidInputError(
            f"{force.getName()}: has a cutoff of {cutoff:g} nm, which must be positive"
        )
    vectors = host.system.getDefaultPeriodicBoxVectors()
    shortest = min(number(vectors[d][d]) for d in range(3))
    if method == force.CutoffPeriodic and cutoff > 0.5 * shortest:
        raise BoxTooSmallError(
            f"{force.getName()}: has a cutoff of {cutoff:g} nm, but half of the default box is "
            f"{0.5 * shortest:g} nm; use a larger box or a shorter cutoff"
        )
    return cutoff


def vectors(array: np.ndarray) -> list[openmm.Vec3]:
    """Rows ``(n, 3)`` as OpenMM takes positions."""
    return [openmm.Vec3(*map(float, row)) for row in array]


def particle_subset(force: Any, host: Host) -> Tensor:
    """Particles that a force acts on; none named means all."""
    n_particles = host.system.getNumParticles()
    rows = [(p,) for p in force.getParticles()] or [(p,) for p in range(n_particles)]
    picked = checked_indices(force.getName(), rows, 0, n_particles=n_particles).squeeze(-1)
    if len(set(picked.tolist())) != len(picked):
        raise InvalidInputError(f"{force.getName()}: a particle is named twice")
    return picked


def reference_positions(force: Any, host: Host) -> Tensor:
    """Reference positions ``(N, 3)`` of a force."""
    rows = [[number(x) for x in row] for row in force.getReferencePositions()]
    if len(rows) != host.system.getNumParticles():
        raise InvalidInputError(
            f"{force.getName()}: has {len(rows)} reference positions, wanted one for each of the "
            f"System's {host.system.getNumParticles()} particles"
        )
    return torch.tensor(rows, dtype=torch.float64)


def global_key(name: str) -> str:
    """What a Potential calls a global parameter: dots separate modules, and no name is empty."""
    return name.replace(".", "_") or "_"


def column(rows: list[tuple[Any, ...]], index: int) -> Tensor:
    """One entry of each row as a float64 tensor."""
    return torch.tensor([number(row[index]) for row in rows], dtype=torch.float64)


def indices(rows: list[tuple[Any, ...]], *columns: int) -> Tensor:
    """Integer entries of each row as an int64 tensor ``(rows, columns)``."""
    picked = [[int(row[c]) for c in columns] for row in rows]
    return torch.tensor(picked, dtype=torch.long).reshape(-1, len(columns))


def checked_indices(
    force: str, rows: list[tuple[Any, ...]], *columns: int, n_particles: int
) -> Tensor:
    """Like `indices`, but raise for one that is out of range."""
    picked = indices(rows, *columns)
    outside = ((picked < 0) | (picked >= n_particles)).any(dim=-1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise InvalidInputError(
            f"{force}: entry {row} refers to {picked[row].tolist()}, but indices reach only from "
            f"0 to {n_particles - 1}"
        )
    return picked
