"""What in a force acts within a set of particles: taken out, or alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import openmm
from mdgraft import InvalidInputError, UnsupportedForceError

from mdgraft_openmm._copies import faithful_copy
from mdgraft_openmm.forces import WITHOUT_ENERGY

#: Elements of serialised forces that list interactions, and of what kind each one is.
_LISTS = {
    "HarmonicBondForce": ("Bonds", "bond"),
    "CustomBondForce": ("Bonds", "bond"),
    "HarmonicAngleForce": ("Angles", "angle"),
    "CustomAngleForce": ("Angles", "angle"),
    "PeriodicTorsionForce": ("Torsions", "torsion"),
    "RBTorsionForce": ("Torsions", "torsion"),
    "CustomTorsionForce": ("Torsions", "torsion"),
    "CMAPTorsionForce": ("Torsions", "cmap"),
    "CustomCompoundBondForce": ("Bonds", "compound"),
    "AmoebaTorsionTorsionForce": ("TorsionTorsion", "compound"),
}
#: They act on particles one by one, or on the box.
_ALONE = ("CustomExternalForce", "CustomVolumeForce")
_PARTICLE = re.compile(r"[pab]\d+")

#: Tells of a kind of interaction and its particles whether the region's model describes it.
Inside = Callable[[str, Sequence[int]], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Particles whose interactions among themselves a model describes.

    Attributes
    ----------
    particles
        The particles.
    bonds
        Pairs of particles with a chemical bond, inside and across the border; None if not known.
    capped
        Whether link atoms close bonds across the border, so that the model describes angles and
        torsions which reach over it.
    """

    particles: frozenset[int]
    bonds: frozenset[frozenset[int]] | None
    capped: bool

    def crossing(self) -> list[tuple[int, int]]:
        """Bonds across the border, the particle inside first."""
        found = []
        for bond in sorted(map(sorted, self.bonds or ())):
            inside = [p for p in bond if p in self.particles]
            outside = [p for p in bond if p not in self.particles]
            if len(inside) == 1 and len(outside) == 1:
                found.append((inside[0], outside[0]))
        return found

    def holds(self, kind: str, particles: Sequence[int]) -> bool:
        """Whether the model describes an interaction.

        Without link atoms: if all particles are inside. With them as well an angle whose middle is
        inside and whose ends are there or bonded to the region; a torsion whose axis, or centre if
        it is improper, is inside; a map of two such torsions.
        """
        if all(p in self.particles for p in particles):
            return True
        if not self.capped or not any(p in self.particles for p in particles):
            return False
        near = self.particles | {outer for _, outer in self.crossing()}
        if kind == "angle":
            first, middle, last = particles
            return first in near and middle in self.particles and last in near
        if kind == "torsion":
            return all(p in self.particles for p in self._axis(particles))
        if kind == "cmap":
            inner = {*particles[1:3], *particles[5:7]}
            return inner <= self.particles and set(particles) <= near
        return False

    def _axis(self, particles: Sequence[int]) -> Sequence[int]:
        """Particles of a torsion that say where it belongs: its axis or its centre."""
        bonds = self.bonds or frozenset()

        def bonded(i: int, j: int) -> bool:
            return frozenset((particles[i], particles[j])) in bonds

        if bonded(0, 1) and bonded(1, 2) and bonded(2, 3):
            return particles[1:3]
        for centre in range(4):
            if all(bonded(centre, other) for other in range(4) if other != centre):
                return [particles[centre]]
        raise InvalidInputError(
            f"system: the torsion of particles {list(particles)} crosses the border of the region, "
            "but is neither along bonds nor around one particle; remove it, or pass "
            "link_atoms=False to leave it to the force field"
        )


def separable(force: openmm.Force) -> bool:
    """Whether interactions within a region can be taken out of the force."""
    name = type(force).__name__
    return name in _LISTS or isinstance(force, openmm.NonbondedForce | openmm.CustomNonbondedForce)


def check_separable(system: openmm.System, region: Region, keep: Collection[str]) -> None:
    """Raise for forces with interactions inside the region that nothing can take out.

    Raises
    ------
    InvalidInputError
        If a name in ``keep`` is that of no force.
    UnsupportedForceError
        With the names of all such forces.
    """
    names = {force.getName() for force in system.getForces()}
    unknown = set(keep) - names
    if unknown:
        raise InvalidInputError(f"keep: no force {sorted(unknown)}; there are {sorted(names)}")
    stuck = [
        f"{force.getName()} ({type(force).__name__})"
        for force in system.getForces()
        if force.getName() not in keep
        and not separable(force)
        and _reaches(force, region.particles)
    ]
    if stuck:
        raise UnsupportedForceError(
            f"system: {', '.join(stuck)} acts within the region, and what it does there cannot be "
            "told apart from the rest; remove it from the System, or name it in keep=, which "
            "leaves it as it is beside the model"
        )


def _reaches(force: Any, particles: frozenset[int]) -> bool:
    """Whether a force may act within the region."""
    name = type(force).__name__
    if name in WITHOUT_ENERGY or name in _ALONE:
        return False
    if name in _LISTS:
        _, items = _items(force)
        return any(set(_particles(item)) & particles for item in items)
    if isinstance(force, openmm.CustomCVForce):
        inner = (force.getCollectiveVariable(i) for i in range(force.getNumCollectiveVariables()))
        return any(_reaches(variable, particles) for variable in inner)
    if isinstance(force, openmm.CustomCentroidBondForce):
        groups = [set(force.getGroupParameters(i)[0]) for i in range(force.getNumGroups())]
        bonds = (force.getBondParameters(i)[0] for i in range(force.getNumBonds()))
        return any(set().union(*(groups[g] for g in bond)) <= particles for bond in bonds)
    if hasattr(force, "getParticles"):
        chosen = set(force.getParticles())
        return not chosen or bool(chosen & particles)
    return True


def without(force: Any, region: Region) -> Any:
    """A copy of a force without what acts within the region."""
    if type(force).__name__ in _LISTS:
        return _filtered(force, lambda kind, p: not region.holds(kind, p))
    copied = faithful_copy(force)
    if isinstance(copied, openmm.NonbondedForce):
        _silence(copied, sorted(region.particles))
    elif isinstance(copied, openmm.CustomNonbondedForce):
        exclude(copied, _pairs(sorted(region.particles)))
    return copied


def only(force: Any, region: Region) -> Any | None:
    """A force of what acts within the region alone; None if that is nothing.

    Raises
    ------
    UnsupportedForceError
        For a `CustomNonbondedForce` with interaction groups of its own.
    """
    if type(force).__name__ in _LISTS:
        inner = _filtered(force, region.holds)
        return inner if _items(inner)[1] else None
    if isinstance(force, openmm.CustomNonbondedForce):
        if force.getNumInteractionGroups():
            raise UnsupportedForceError(
                f"interpolate: {force.getName()} has interaction groups, which cannot be limited "
                "to the region; interpolate without it"
            )
        inner = faithful_copy(force)
        inner.addInteractionGroup(region.particles, region.particles)
        # It is a property of the whole System, and stays where it was.
        inner.setUseLongRangeCorrection(False)
        return inner
    return None


def exclude(force: openmm.CustomNonbondedForce, pairs: Iterable[tuple[int, int]]) -> None:
    """Add exclusions, each once."""
    known = {frozenset(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())}
    for pair in pairs:
        if frozenset(pair) not in known:
            known.add(frozenset(pair))
            force.addExclusion(*pair)


def _silence(force: openmm.NonbondedForce, particles: Sequence[int]) -> None:
    """Turn every pair of particles into an exception without interaction."""
    silenced = {force.addException(i, j, 0.0, 1.0, 0.0, True) for i, j in _pairs(particles)}
    for k in range(force.getNumExceptionParameterOffsets()):
        parameter, exception, *_ = force.getExceptionParameterOffset(k)
        if exception in silenced:
            force.setExceptionParameterOffset(k, parameter, exception, 0.0, 0.0, 0.0)


def _pairs(particles: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for k, i in enumerate(particles) for j in particles[:k]]


def _filtered(force: Any, wanted: Inside) -> Any:
    """A copy of a force with those of its interactions that are wanted."""
    root, items = _items(force)
    name, kind = _LISTS[type(force).__name__]
    holder = root.find(name)
    if holder is not None:
        for item in items:
            if not wanted(kind, _particles(item)):
                holder.remove(item)
    return openmm.XmlSerializer.deserialize(ElementTree.tostring(root, encoding="unicode"))


def _items(force: Any) -> tuple[ElementTree.Element, list[ElementTree.Element]]:
    """A force as XML, and the elements that are its interactions."""
    root = ElementTree.fromstring(openmm.XmlSerializer.serialize(force))
    holder = root.find(_LISTS[type(force).__name__][0])
    return root, [] if holder is None else list(holder)


def _particles(item: ElementTree.Element) -> list[int]:
    """Particles of an interaction, in order."""
    return [int(value) for key, value in item.attrib.items() if _PARTICLE.fullmatch(key)]
