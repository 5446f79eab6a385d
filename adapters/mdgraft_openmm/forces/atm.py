"""ATMForce."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft.potentials.alchemical_transfer import AlchemicalTransfer

from mdgraft_openmm._classes import known_class
from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    declared_globals,
    set_declared_global,
)
from mdgraft_openmm._copies import foreign_classes
from mdgraft_openmm.forces import _nested
from mdgraft_openmm.forces._custom import global_names

_DISPLACEMENTS = ("displacement0", "displacement1")


class ATMConverter(AbstractConverter):
    """ATMForce <-> AlchemicalTransfer."""

    def read(self, force: openmm.ATMForce, host: Host) -> AlchemicalTransfer:
        """Build the term and those of the forces inside."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        try:
            foreign = _foreign(force)
        except openmm.OpenMMException as error:
            raise UnsupportedForceError(f"{name}: cannot be copied ({error})") from error
        if foreign:
            raise UnsupportedForceError(
                f"{name}: no native torch form for {', '.join(foreign)} inside it"
            )
        fixed, destinations, origins = _transformations(force)
        if destinations.max(initial=-1) >= n or origins.max(initial=-1) >= n:
            raise InvalidInputError(f"{name}: a particle is displaced by one that does not exist")
        return AlchemicalTransfer(
            force.getEnergyFunction(),
            _nested.read_inner(force, _forces(force), host),
            displacement0=torch.tensor(fixed[:, 0]),
            displacement1=torch.tensor(fixed[:, 1]),
            destinations=torch.tensor(destinations),
            origins=torch.tensor(origins),
            global_names=global_names(force),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.ATMForce) -> None:
        """Set fixed displacements; `refused` sees to it that nothing else changes."""
        fixed, _, _ = _transformations(force)
        for i in range(force.getNumParticles()):
            if isinstance(force.getParticleTransformation(i), openmm.FixedDisplacement):
                d0, d1 = (values[key][i] for key in _DISPLACEMENTS)
                if not np.array_equal(fixed[i], [d0, d1]):
                    new = openmm.FixedDisplacement(openmm.Vec3(*d1), openmm.Vec3(*d0))
                    force.setParticleTransformation(i, new)

    def refused(self, values: Values, force: openmm.ATMForce) -> str | None:
        """Find displacements that a particle cannot have, and changes of the forces inside."""
        changed = _nested.changed_inner(_forces(force), values)
        hidden = (
            f"{force.getName()}: parameters of {', '.join(changed)} differ, but OpenMM gives no "
            "access to the forces inside an ATMForce; make a new one"
        )
        return _misplaced(values, force) or (hidden if changed else None)

    def rebuilt(self, values: Values, force: openmm.ATMForce) -> openmm.ATMForce | None:
        """One that holds other forces, unless these are refused."""
        inner = _forces(force)
        if _misplaced(values, force) or _nested.refused_inner(inner, values):
            return None
        _nested.write_inner(inner, values)
        root = ElementTree.fromstring(openmm.XmlSerializer.serialize(force))
        for node, new in zip(root.iterfind("Forces/Force"), inner.values(), strict=True):
            node[:] = [ElementTree.fromstring(openmm.XmlSerializer.serialize(new))]
        made = openmm.XmlSerializer.deserialize(ElementTree.tostring(root, encoding="unicode"))
        self.write(values, made)
        return made

    def global_defaults(self, force: openmm.ATMForce) -> dict[str, float]:
        """Those of the forces inside too; the force's own win."""
        return _nested.inner_globals(_forces(force)) | declared_globals(force)

    def set_global_default(self, force: openmm.ATMForce, name: str, value: float) -> None:
        """Declare it here; the force's own default hides those of the forces inside."""
        if name in declared_globals(force):
            set_declared_global(force, name, value)


def _misplaced(values: Values, force: openmm.ATMForce) -> str | None:
    """Displacements that a particle cannot have."""
    for i in range(force.getNumParticles()):
        own = isinstance(force.getParticleTransformation(i), openmm.FixedDisplacement)
        if not own and any(values[key][i].any() for key in _DISPLACEMENTS):
            return (
                f"{force.getName()}.displacement0, displacement1: particle {i} is displaced by "
                "other particles, so that its entries must be zero"
            )
    return None


def _foreign(force: openmm.ATMForce) -> list[str]:
    """Classes inside that are neither OpenMM's nor known, so that a copy may end the process."""
    return [name for name in foreign_classes(force) if not _nested.of_known_plugin(name)]


def _forces(force: openmm.ATMForce) -> dict[str, Any]:
    """The forces inside, or copies, by the names of their terms; repeats get ``_1``, ``_2``."""
    found: dict[str, Any] = {}
    for i in range(force.getNumForces()):
        inner = known_class(force.getForce(i))
        if type(inner) is openmm.Force:
            # The getter gives a bare Force; a copy through XML knows its class.
            inner = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(inner))
        base = inner.getName().replace(".", "_") or type(inner).__name__
        name, repeat = base, 0
        while name in found:
            repeat += 1
            name = f"{base}_{repeat}"
        found[name] = inner
    return found


def _transformations(force: openmm.ATMForce) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fixed displacements ``(N, 2, 3)``, destinations and origins ``(N, 2)`` of both states."""
    n = force.getNumParticles()
    fixed = np.zeros((n, 2, 3))
    destinations, origins = np.full((n, 2), -1), np.full((n, 2), -1)
    for i in range(n):
        kind = force.getParticleTransformation(i)
        if isinstance(kind, openmm.FixedDisplacement):
            fixed[i] = [
                _vector(kind.getFixedDisplacement0()),
                _vector(kind.getFixedDisplacement1()),
            ]
        else:
            destinations[i] = kind.getDestinationParticle0(), kind.getDestinationParticle1()
            origins[i] = kind.getOriginParticle0(), kind.getOriginParticle1()
    return fixed, destinations, origins


def _vector(value: Any) -> list[float]:
    return [float(x) for x in getattr(value, "_value", value)]
