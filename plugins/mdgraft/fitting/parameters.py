"""Trainable numbers, each shared by selected entries in one or several systems."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._errors import ConfigurationError, InvalidInputError
from mdgraft.fitting.config import ParameterConfig, SelectionConfig
from mdgraft.fitting.host import AbstractSimulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainable:
    """One number to be fitted.

    Attributes
    ----------
    name
        Its name; in each system's potential it is ``tied.<name>``.
    initial, lower, upper, scale
        Starting value, bounds and typical size, in ``unit``.
    unit
        The host's unit.
    systems
        Systems that depend on it.
    selected
        ``{"liquid": {"NonbondedForce.sigma": 200}}``: how many entries it controls.
    """

    name: str
    initial: float
    lower: float
    upper: float
    scale: float
    unit: str
    systems: tuple[str, ...]
    selected: Mapping[str, Mapping[str, int]]


def tie_parameters(
    configs: Mapping[str, ParameterConfig], simulations: Mapping[str, AbstractSimulation]
) -> list[Trainable]:
    """Tie the selected entries of every system's potential; freeze everything else.

    Raises
    ------
    ConfigurationError
        If a selection is empty or unknown, or entries that are to share one value differ and no
        initial value is given.
    """
    for simulation in simulations.values():
        if dict(simulation.potential.named_parameters()):
            simulation.potential.freeze("*")
    return [_tie(name, config, simulations) for name, config in configs.items()]


def _tie(
    name: str, config: ParameterConfig, simulations: Mapping[str, AbstractSimulation]
) -> Trainable:
    key = f"parameters.{name}"
    members: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    present: dict[str, float] = {}
    unit = ""
    for selection in config.select:
        systems = _systems(key, selection, simulations)
        for system in systems:
            simulation = simulations[system]
            index = _entries(key, selection, system, simulation)
            values = simulation.potential.values()[selection.parameter].detach().reshape(-1)
            unit = unit or simulation.potential.units[selection.parameter]
            if not len(index):
                continue
            factors = torch.full((len(index),), selection.factor, dtype=torch.float64)
            mine = members.setdefault(system, {})
            if selection.parameter in mine:
                old_index, old_factors = mine[selection.parameter]
                index, factors = torch.cat([old_index, index]), torch.cat([old_factors, factors])
                if len(set(index.tolist())) != len(index):
                    raise ConfigurationError(
                        f"{key}.select: entries of {selection.parameter} are selected twice in "
                        f"system {system!r}"
                    )
            mine[selection.parameter] = index, factors
            if selection.factor != 0:
                for value in (values[index] / factors).tolist():
                    present.setdefault(f"{value:.9g}", value)
    if not members:
        raise ConfigurationError(f"{key}.select: selects no entry in any system")
    initial = config.initial
    if initial is None:
        if len(present) != 1:
            listed = ", ".join(list(present)[:5])
            raise ConfigurationError(
                f"{key}.initial: is missing, and the selected entries differ in the files "
                f"({listed}); give the value that they shall share"
            )
        initial = next(iter(present.values()))
    lower, upper = config.bounds
    if not lower <= initial <= upper:
        raise ConfigurationError(
            f"{key}.bounds: the value in the files, {initial:g}, is outside [{lower:g}, {upper:g}]"
        )
    for system, mine in members.items():
        try:
            simulations[system].potential.tie(name, mine, value=initial)
        except InvalidInputError as error:
            raise ConfigurationError(f"{key}.select: system {system!r}: {error}") from error
    return Trainable(
        name=name,
        initial=initial,
        lower=lower,
        upper=upper,
        scale=config.scale or _scale(initial, lower, upper),
        unit=unit,
        systems=tuple(members),
        selected={s: {p: len(i) for p, (i, _) in mine.items()} for s, mine in members.items()},
    )


def _scale(initial: float, lower: float, upper: float) -> float:
    if initial != 0:
        return abs(initial)
    return upper - lower if math.isfinite(upper - lower) else 1.0


def _systems(
    key: str, selection: SelectionConfig, simulations: Mapping[str, AbstractSimulation]
) -> list[str]:
    known = {name: list(sim.potential.values()) for name, sim in simulations.items()}
    having = [name for name, names in known.items() if selection.parameter in names]
    if selection.systems is None:
        if not having:
            listed = "; ".join(f"{name} has {', '.join(names)}" for name, names in known.items())
            raise ConfigurationError(
                f"{key}.select: no system has a parameter {selection.parameter!r}; {listed}"
            )
        return having
    for name in selection.systems:
        if name not in having:
            raise ConfigurationError(
                f"{key}.select: system {name!r} has no parameter {selection.parameter!r}; it has "
                f"{', '.join(known[name])}"
            )
    return selection.systems


def _entries(
    key: str, selection: SelectionConfig, system: str, simulation: AbstractSimulation
) -> Tensor:
    """Flat indices of the selected entries."""
    potential = simulation.potential
    shape = potential.values()[selection.parameter].shape
    chosen = torch.ones(shape, dtype=torch.bool).reshape(-1)
    if selection.entries is not None:
        _in_range(f"{key}.select.entries", selection.entries, len(chosen), selection.parameter)
        listed = torch.zeros_like(chosen)
        listed[selection.entries] = True
        chosen &= listed
    by_particle = _particles(key, selection, system, simulation)
    if by_particle is not None:
        owners = _owners(key, selection.parameter, simulation)
        chosen &= by_particle[owners].all(dim=-1)
    return chosen.nonzero().reshape(-1)


def _particles(
    key: str, selection: SelectionConfig, system: str, simulation: AbstractSimulation
) -> Tensor | None:
    """Which particles qualify, ``(N,)``, or None when the selection does not ask."""
    n = simulation.potential.n_particles
    chosen: Tensor | None = None
    if selection.particles is not None:
        _in_range(f"{key}.select.particles", selection.particles, n, f"system {system!r}")
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[selection.particles] = True
    for criterion, source in (
        ("element", "elements"),
        ("atom_name", "atom_names"),
        ("residue_name", "residue_names"),
    ):
        wanted = getattr(selection, criterion)
        if wanted is None:
            continue
        if simulation.atoms is None:
            raise ConfigurationError(
                f"{key}.select.{criterion}: system {system!r} has no topology; add one to its "
                'files, such as topology = "structure.pdb"'
            )
        names = getattr(simulation.atoms, source)
        unknown = set(wanted) - set(names)
        if len(unknown) == len(set(wanted)) and selection.systems is not None:
            raise ConfigurationError(
                f"{key}.select.{criterion}: system {system!r} has no {sorted(unknown)}; it has "
                f"{sorted(set(names))}"
            )
        mask = torch.tensor([name in wanted for name in names], dtype=torch.bool)
        chosen = mask if chosen is None else chosen & mask
    return chosen


def _owners(key: str, parameter: str, simulation: AbstractSimulation) -> Tensor:
    """Particles that each entry belongs to, ``(entries, particles)``."""
    term_name, _, own = parameter.rpartition(".")
    potential = simulation.potential
    size = potential.values()[parameter].numel()
    if term_name in potential.term_names and "offset" not in own:
        buffer = "exceptions" if own.startswith("exception") else "particles"
        owners = getattr(potential.term(term_name), buffer, None)
        if isinstance(owners, Tensor):
            if owners.ndim == 2 and len(owners) == size:
                return owners
        elif size == potential.n_particles:
            return torch.arange(size)[:, None]
    raise ConfigurationError(
        f"{key}.select: {parameter} does not belong to particles in a way that can be selected "
        "by; use entries instead"
    )


def _in_range(key: str, indices: list[int], size: int, what: str) -> None:
    if indices and max(indices) >= size:
        raise ConfigurationError(f"{key}: got {max(indices)}, but {what} has {size} entries")
