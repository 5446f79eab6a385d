"""The class of a force, where OpenMM does not tell it."""

from __future__ import annotations

from typing import Any

import openmm


def known_class(force: openmm.Force) -> Any:
    """The force as an object of its own class, where the module of a plug-in knows it.

    Of a class that another module defines OpenMM returns bare Forces.
    """
    for cls in openmm.Force.__subclasses__() if type(force) is openmm.Force else ():
        if hasattr(cls, "cast") and hasattr(cls, "isinstance") and cls.isinstance(force):
            found = cls.cast(force)
            # Else the force would end with the object that was given.
            if force.thisown:
                force.thisown, found.thisown = False, True
            return found
    return force
