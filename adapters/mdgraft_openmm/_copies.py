"""Copies of Systems and Forces with the settings that OpenMM's serialisation forgets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import openmm

_T = TypeVar("_T", openmm.System, openmm.Force)

# Class, getter and setter of each setting that is not serialised as of OpenMM 8.6.
_FORGOTTEN = (
    (
        openmm.DrudeForce,
        "usesPeriodicBoundaryConditions",
        "setUsesPeriodicBoundaryConditions",
    ),
    (openmm.AmoebaVdwForce, "getUseDispersionCorrection", "setUseDispersionCorrection"),
)


def faithful_copy(original: _T) -> _T:
    """A deep copy that keeps every setting."""
    copied = copy.deepcopy(original)
    restore_settings(copied, forgotten_settings(original))
    return copied


def forgotten_settings(original: openmm.System | openmm.Force) -> list[bool]:
    """What a copy, or a round trip through XML, would lose."""
    return [bool(getattr(force, getter)()) for force, getter, _ in _holders(original)]


def restore_settings(copied: openmm.System | openmm.Force, settings: list[bool]) -> None:
    """Set what `forgotten_settings` of the original returned."""
    for (force, _, setter), value in zip(_holders(copied), settings, strict=True):
        getattr(force, setter)(value)


def _holders(thing: Any) -> Iterator[tuple[Any, str, str]]:
    """Forces with such a setting, apart from those that others hold: OpenMM forgets theirs."""
    forces = thing.getForces() if isinstance(thing, openmm.System) else [thing]
    for force in forces:
        for kind, getter, setter in _FORGOTTEN:
            if isinstance(force, kind):
                yield force, getter, setter
