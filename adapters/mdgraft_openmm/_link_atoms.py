"""Hydrogens that close bonds across the border of a region, as virtual sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import openmm
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft._units import plain

from mdgraft_openmm._separation import exclude

#: Single-bond covalent radii [nm] of Pyykko and Atsumi, Chem. Eur. J. 15, 186 (2009).
_RADII = {
    1: 0.032,
    5: 0.085,
    6: 0.075,
    7: 0.071,
    8: 0.063,
    9: 0.064,
    14: 0.116,
    15: 0.111,
    16: 0.103,
    17: 0.099,
    32: 0.121,
    33: 0.121,
    34: 0.116,
    35: 0.114,
    50: 0.140,
    52: 0.136,
    53: 0.133,
}


def add_link_atoms(
    system: openmm.System,
    crossing: Sequence[tuple[int, int]],
    numbers: Mapping[int, int],
    distances: Mapping[tuple[int, int], Any] | None,
) -> list[int]:
    """Add one virtual site for each bond across the border, without interactions of its own.

    Parameters
    ----------
    system
        Is changed.
    crossing
        Bonds, the particle inside first.
    numbers
        Atomic numbers of particles inside.
    distances
        From the particle inside [nm], where not the sum of covalent radii.

    Returns
    -------
    list of int
        The new particles.

    Raises
    ------
    InvalidInputError
        If two bonds share the particle outside, or a distance is missing or makes no sense.
    UnsupportedForceError
        If a force wants parameters for them that nobody knows.
    """
    asked = {tuple(pair): plain(d, "nanometer") for pair, d in (distances or {}).items()}
    unknown = [pair for pair in asked if pair not in crossing]
    if unknown:
        raise InvalidInputError(
            f"link_distances: {unknown} are no bonds from inside to outside; there are "
            f"{list(crossing)}"
        )
    outside = [outer for _, outer in crossing]
    shared = sorted({p for p in outside if outside.count(p) > 1})
    if shared:
        raise InvalidInputError(
            f"atoms: particles {shared} are each bonded to several atoms of the region, so that "
            "link atoms would lie on top of each other; take them into the region as well"
        )
    added = []
    for inner, outer in crossing:
        distance = asked.get((inner, outer))
        if distance is None:
            if numbers[inner] not in _RADII:
                raise InvalidInputError(
                    f"link_distances: no covalent radius is known for element {numbers[inner]} of "
                    f"particle {inner}; pass link_distances={{({inner}, {outer}): ...}} in nm"
                )
            distance = _RADII[numbers[inner]] + _RADII[1]
        if not 0 < float(distance) < float("inf"):
            raise InvalidInputError(
                f"link_distances: got {distance} nm for {(inner, outer)}, wanted a positive number"
            )
        site = openmm.LocalCoordinatesSite(
            [inner, outer], [1.0, 0.0], [-1.0, 1.0], [0.0, 0.0], [float(distance), 0.0, 0.0]
        )
        index = system.addParticle(0.0)
        system.setVirtualSite(index, site)
        added.append(index)
    if added:
        _silence(system, added)
    return added


def _silence(system: openmm.System, added: Sequence[int]) -> None:
    """Give the new particles their place in every force that counts particles."""
    n_before = system.getNumParticles() - len(added)
    custom = any(isinstance(f, openmm.CustomNonbondedForce) for f in system.getForces())
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            for index in added:
                force.addParticle(0.0, 0.0, 0.0)
                # All forces with exclusions must agree on them.
                for other in range(index if custom else 0):
                    force.addException(other, index, 0.0, 0.0, 0.0)
        elif isinstance(force, openmm.CustomNonbondedForce):
            _spare_from_correction(force)
            for index in added:
                force.addParticle([0.0] * force.getNumPerParticleParameters())
                exclude(force, [(other, index) for other in range(index)])
        elif _counts(force, n_before):
            raise UnsupportedForceError(
                f"link_atoms: {force.getName()} ({type(force).__name__}) wants parameters for "
                "link atoms, which have none; pass link_atoms=False"
            )


def _spare_from_correction(force: openmm.CustomNonbondedForce) -> None:
    """Let particles to come count for nothing in a long-range correction.

    Exclusions do not reach it, and zeros may be the parameters of a kind of particle.
    """
    if not force.getUseLongRangeCorrection() or force.getNumInteractionGroups():
        return
    expression = force.getEnergyFunction()
    present = "present"
    while present in expression:
        present += "_"
    energy, *definitions = expression.split(";")
    force.setEnergyFunction(";".join([f"select({present}1*{present}2, {energy}, 0)", *definitions]))
    force.addPerParticleParameter(present)
    for i in range(force.getNumParticles()):
        force.setParticleParameters(i, [*force.getParticleParameters(i), 1.0])


def _counts(force: Any, n_particles: int) -> bool:
    """Whether a force, or one inside it, must have parameters for each particle of the System."""
    if isinstance(force, openmm.CustomCVForce):
        inner = (force.getCollectiveVariable(i) for i in range(force.getNumCollectiveVariables()))
        return any(_counts(variable, n_particles) for variable in inner)
    # Their lists may name all particles, but need not.
    if isinstance(force, openmm.CustomExternalForce | openmm.DrudeForce):
        return False
    count = getattr(force, "getNumParticles", getattr(force, "getNumMultipoles", int))
    return int(count()) == n_particles
