"""Forces of some particles, which no System takes that has fewer."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import openmm
from mdgraft import InvalidInputError

from mdgraft_openmm._classes import known_class


class _OfSome:
    """Compares particles with the System when the force is added to it.

    OpenMM compares them nowhere, and reads and writes memory beyond the System's before a force of
    Python is called, which then gets no more than its own particles. What it does ask for while a
    force is being added, before anything is changed, is whether Python owns it.
    """

    this: Any
    #: The largest index; none before it is known.
    last_particle = -1

    @property
    def thisown(self) -> bool:
        """Whether Python owns the force, as of every class of OpenMM."""
        asking = sys._getframe(1)
        system = asking.f_locals.get("self")
        if asking.f_code.co_name == "addForce" and isinstance(system, openmm.System):
            self._check(system.getNumParticles())
        return bool(self.this.own())

    @thisown.setter
    def thisown(self, value: bool) -> None:
        self.this.own(value)

    def __reduce__(self) -> tuple[Any, ...]:
        text, module = openmm.XmlSerializer.serialize(self), type(self).__mro__[2].__module__
        return _restored, (text, self.last_particle, module)

    def _check(self, n_particles: int) -> None:
        # A System without any is one that gets its forces first.
        if 0 < n_particles <= self.last_particle:
            raise InvalidInputError(
                f"particles: the force has particle {self.last_particle}, but the System has "
                f"{n_particles}, wanted indices from 0 to {n_particles - 1}; if the System is to "
                "have more, add its particles before this force"
            )


def _restored(text: str, last_particle: int, module: str) -> Any:
    """What a pickled force becomes."""
    # A plug-in's class can be read when its module is there.
    importlib.import_module(module)
    force: Any = known_class(openmm.XmlSerializer.deserialize(text))
    kind: Any = type(force)
    force.__class__ = of_some(kind)
    force.last_particle = last_particle
    return force


@functools.cache
def of_some(kind: Any) -> Any:
    """A Force class whose forces compare their ``last_particle`` with the System."""
    # It stays known by its name.
    return type(kind.__name__, (_OfSome, kind), {"__doc__": kind.__doc__})
