"""Copies of Systems and Forces with the settings that OpenMM's serialisation forgets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar
from xml.etree import ElementTree

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


def foreign_classes(force: openmm.Force) -> list[str]:
    """Names of classes, of the force or of forces inside it, that are not OpenMM's own.

    A plug-in that was built for another version may end the process where it is asked for a copy.
    """
    known = type(force) is not openmm.Force and type(force).__module__.split(".")[0] == "openmm"
    if known and not isinstance(force, openmm.CustomCVForce | openmm.ATMForce):
        return []
    root = ElementTree.fromstring(openmm.XmlSerializer.serialize(force))
    names = {node.get("type", "Force") for node in root.iter("Force") if node.attrib}
    return sorted(name for name in names if not hasattr(openmm, name))


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
