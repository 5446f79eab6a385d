"""From an ASE calculator, or Atoms with one, to a Potential."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.filters import Filter
from mdgraft import (
    InvalidInputError,
    MDGraftWarning,
    Potential,
    UnsupportedForceError,
    UnsupportedHostError,
)
from mdgraft._graft import chosen_routes
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.atomistic.module import ModuleTerm
from mdgraft.potentials.external import ExternalTerm

from mdgraft_ase._engine import CalculatorEngine
from mdgraft_ase._held import held_by
from mdgraft_ase._parts import parts
from mdgraft_ase._units import periods
from mdgraft_ase.forms import form_of
from mdgraft_ase.torch_calculators import NotUnwrappedError, unwrapped


def graft(
    host_object: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    route: str | Mapping[str, str] = "auto",
) -> Potential:
    """Build the potential; see `mdgraft.graft`.

    Parameters
    ----------
    host_object
        ``ase.Atoms`` with a calculator, or a calculator that has seen its atoms.
    dtype, device, route
        As for `mdgraft.graft`.

    Raises
    ------
    InvalidInputError
        If a calculator or atoms are missing, or the structure makes no sense.
    UnsupportedForceError
        If the native route is asked for and calculators have no torch form; it lists all.
    SimulationError
        If a calculator that the host evaluates fails.
    """
    atoms, calculator = as_host(host_object)
    summands = parts(calculator, atoms)
    routes = chosen_routes(summands, route)
    own = own_potential(calculator)
    if own is not None and "host" not in routes.values():
        return _holding(_as_it_is(own, atoms, dtype, device), atoms)
    terms: dict[str, AbstractTerm] = {}
    taken: dict[str, str] = {}
    missing: list[str] = []
    for name, part in summands.items():
        try:
            term = _term(name, part.calculator, part.atoms, routes[name], dtype, device)
        except UnsupportedForceError as error:
            missing.append(f"{name} ({error})")
            continue
        taken[name] = "host" if isinstance(term, ExternalTerm) else "native"
        terms[name] = part.wrapped(term)
    if missing:
        raise UnsupportedForceError(
            f"route: no native torch form for {', '.join(missing)}; leave the route to 'auto', or "
            "ask for 'host', to have ASE evaluate them inside the graph"
        )
    potential = Potential(terms, n_particles=len(atoms), routes=taken)
    return _holding(potential.to(dtype=dtype, device=device), atoms)


def as_host(host_object: Any) -> tuple[ase.Atoms, Any]:
    """Atoms, and the calculator attached to them or given."""
    if isinstance(host_object, Filter):
        raise InvalidInputError(
            f"host_object: {type(host_object).__name__} is a view of atoms; pass the atoms inside, "
            "such as filter.atoms"
        )
    if isinstance(host_object, ase.Atoms):
        atoms, calculator = host_object, host_object.calc
        if calculator is None:
            raise InvalidInputError(
                "host_object: these Atoms have no calculator; set atoms.calc first"
            )
    elif hasattr(host_object, "get_positions"):
        raise InvalidInputError(
            f"host_object: {type(host_object).__name__} is a view of atoms, or of many; pass the "
            "ase.Atoms inside"
        )
    elif isinstance(host_object, BaseCalculator) or hasattr(host_object, "get_potential_energy"):
        calculator, seen = host_object, getattr(host_object, "atoms", None)
        if not isinstance(seen, ase.Atoms):
            raise InvalidInputError(
                f"host_object: this {type(host_object).__name__} has no atoms yet; pass Atoms that "
                "it is attached to (atoms.calc = calculator) instead"
            )
        atoms = seen
    else:
        raise UnsupportedHostError(
            f"host_object: got {type(host_object).__module__}.{type(host_object).__qualname__}, "
            "wanted ase.Atoms with a calculator, or a calculator"
        )
    if not len(atoms):
        raise InvalidInputError("host_object: the Atoms are empty; add some first")
    if not np.isfinite(atoms.positions).all() or not np.isfinite(np.asarray(atoms.cell)).all():
        raise InvalidInputError("host_object: positions or cell of the Atoms hold NaN or infinity")
    cell = np.asarray(atoms.cell)
    lost = [axis for axis in range(3) if atoms.pbc[axis] and not cell[axis].any()]
    if lost:
        raise InvalidInputError(
            f"host_object: direction {lost[0]} is periodic but has no cell vector; set the cell, "
            "or atoms.pbc to False there"
        )
    if atoms.pbc.any():
        complete = np.asarray(atoms.cell.complete())
        if not abs(np.linalg.det(complete)) > 1e-9 * np.linalg.norm(complete, axis=1).prod():
            raise InvalidInputError(
                f"host_object: the cell {cell.tolist()} spans no volume; set linearly independent "
                "vectors"
            )
    return atoms, calculator


def own_potential(calculator: Any) -> Potential | None:
    """The potential inside a calculator that was made from one."""
    potential = getattr(calculator, "potential", None)
    return potential if isinstance(potential, Potential) else None


def _as_it_is(
    potential: Potential, atoms: ase.Atoms, dtype: torch.dtype, device: torch.device | str
) -> Potential:
    """A potential of our own; the very same unless precision or device differ."""
    if potential.n_particles != len(atoms):
        raise InvalidInputError(
            f"host_object: its potential has {potential.n_particles} particles, there are "
            f"{len(atoms)} atoms; pass the potential itself"
        )
    if potential.dtype == dtype and potential.device == torch.device(device):
        return potential
    return copy.deepcopy(potential).to(dtype=dtype, device=device)


def _holding(potential: Potential, atoms: ase.Atoms) -> Potential:
    """A potential that knows what constraints hold; the very same if there are none."""
    held = held_by(atoms)
    if held is None:
        return potential
    known = copy.copy(potential)
    known.held = held
    return known


def _term(
    name: str,
    calculator: Any,
    atoms: ase.Atoms,
    route: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> AbstractTerm:
    """One calculator's term by the route asked for."""
    reason = "its class has none"
    if route != "host":
        own = own_potential(calculator)
        if own is not None:
            return _inner(own, atoms)
        form = form_of(calculator)
        if form is not None:
            try:
                term = form.read(calculator, atoms)
                return _made_for(term, atoms) if form.by_element else term
            except UnsupportedForceError as error:
                reason = str(error)
        else:
            try:
                model = unwrapped(calculator, atoms, dtype, device)
            except NotUnwrappedError as error:
                reason = str(error)
                if route != "native":
                    warnings.warn(
                        f"{name}: {reason}; ASE evaluates it inside the graph instead",
                        MDGraftWarning,
                        stacklevel=2,
                    )
            else:
                if model is not None:
                    return model
    if route == "native":
        raise UnsupportedForceError(reason)
    return host_term(atoms, calculator)


def host_term(
    atoms: ase.Atoms, calculator: Any, *, settings: Collection[str] | None = None
) -> AbstractTerm:
    """A term that the calculator itself evaluates, with its numerical parameters.

    Their names, or None for all that have an effect.
    """
    engine = CalculatorEngine(atoms, calculator, settings=settings)
    parameters = engine.parameters
    term = ExternalTerm(
        engine,
        {key: torch.as_tensor(value) for key, value in parameters.items()},
        units=dict.fromkeys(parameters, "as the calculator has it"),
        periodic=any(periods(atoms)),
    )
    term.general_cell = True
    return _made_for(term, atoms)


def _made_for(term: AbstractTerm, atoms: ase.Atoms) -> AbstractTerm:
    """Have a term know its elements, so that a calculator can refuse others."""
    term.register_buffer("atomic_numbers", torch.as_tensor(atoms.numbers), persistent=False)
    return term


class WithoutBox(torch.nn.Module):
    """A potential without periods among others that have some."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, positions: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
        energy: torch.Tensor = self.potential(positions, None)
        return energy


def _inner(potential: Potential, atoms: ase.Atoms) -> ModuleTerm:
    """A potential of our own as one term of a sum."""
    if potential.n_particles != len(atoms):
        raise InvalidInputError(
            f"host_object: a potential in the sum has {potential.n_particles} particles, there are "
            f"{len(atoms)} atoms"
        )
    if not potential.periodic:
        inner = WithoutBox(potential)
        units = {f"potential.{key}": unit for key, unit in potential.units.items()}
        return ModuleTerm(inner, length=1.0, energy=1.0, pbc=periods(atoms), units=units)
    return ModuleTerm(
        potential,
        length=1.0,
        energy=1.0,
        pbc=periods(atoms),
        units=potential.units,
        general_cell=potential.general_cell,
    )
