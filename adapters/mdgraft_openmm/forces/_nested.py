"""What the converters of forces that contain other forces share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import openmm
from mdgraft import UnsupportedForceError
from mdgraft.potentials import AbstractTerm

from mdgraft_openmm._converter import AbstractConverter, Host, Values


def _converter(force: openmm.Force) -> AbstractConverter | None:
    # The table lists the converters that call this, so it cannot be imported before them.
    from mdgraft_openmm.forces import converter_of

    return converter_of(force)


def of_known_plugin(name: str) -> bool:
    """Whether a class that OpenMM does not have is one with a converter, imported here."""
    from mdgraft_openmm.forces import OF_PLUGINS

    return any(name == of and module in sys.modules for module, of in OF_PLUGINS)


def read_inner(owner: Any, forces: Mapping[str, openmm.Force], host: Host) -> dict[str, Any]:
    """Terms of the forces inside another.

    Raises
    ------
    UnsupportedForceError
        If some have no native form; it lists all.
    """
    missing = [
        f"{name} ({type(force).__name__})"
        for name, force in forces.items()
        if _converter(force) is None
    ]
    if missing:
        raise UnsupportedForceError(
            f"{owner.getName()}: no native torch form for {', '.join(missing)} inside it"
        )
    # The Context of the outer force knows no mesh parameters of inner ones.
    bare = Host(system=host.system)
    terms: dict[str, AbstractTerm] = {}
    for name, force in forces.items():
        converter = _converter(force)
        assert converter is not None
        terms[name] = converter.read(force, bare)
    return terms


def _of(values: Values, name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def write_inner(forces: Mapping[str, openmm.Force], values: Values) -> None:
    """Set the parameters of inner forces; ``forces`` go by the names that their terms have."""
    for name, force in forces.items():
        converter = _converter(force)
        if converter is not None:
            converter.write(_of(values, name), force)


def refused_inner(forces: Mapping[str, openmm.Force], values: Values) -> str | None:
    """What a Context would refuse of the parameters of inner forces."""
    for name, force in forces.items():
        converter = _converter(force)
        refused = converter.refused(_of(values, name), force) if converter else None
        if refused:
            return refused
    return None


def changed_inner(forces: Mapping[str, openmm.Force], values: Values) -> list[str]:
    """Inner forces whose parameters change; no live Context takes that over."""
    changed = []
    for name, force in forces.items():
        written = copy.deepcopy(force)
        write_inner({name: written}, values)
        before, after = map(openmm.XmlSerializer.serialize, (force, written))
        if before != after:
            changed.append(name)
    return changed


def inner_globals(forces: Mapping[str, openmm.Force]) -> dict[str, float]:
    """Global parameters of inner forces with their defaults."""
    found: dict[str, float] = {}
    for force in forces.values():
        converter = _converter(force)
        if converter is not None:
            found |= converter.global_defaults(force)
    return found


def set_inner_global(forces: Mapping[str, openmm.Force], name: str, value: float) -> None:
    """Declare a new default of a global parameter in every inner force that has it."""
    for force in forces.values():
        converter = _converter(force)
        if converter is not None:
            converter.set_global_default(force, name, value)
