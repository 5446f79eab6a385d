"""Nonbonded interactions within a region, as they are in the whole System."""

from __future__ import annotations

from collections.abc import Collection

import openmm
from mdgraft import UnsupportedForceError
from mdgraft._units import COULOMB

from mdgraft_openmm._converter import Host, number
from mdgraft_openmm._mesh import mesh_parameters

_LENNARD_JONES = "4*epsilon*((sigma/r)^12-(sigma/r)^6)"
#: OpenMM's switching function of x = (r - switch)/(cutoff - switch).
_SWITCH = "(1+x^3*(-10+x*(15-6*x)))"


def internal_nonbonded(
    force: openmm.NonbondedForce, particles: Collection[int], system: openmm.System
) -> openmm.CustomBondForce:
    """The energy that exceptions without interaction take out of a `NonbondedForce`, by pairs.

    Exceptions have plain Coulomb and Lennard-Jones energies; other pairs have those of the method:
    a reaction field, a switched cutoff, and under Ewald sums, whose reciprocal part a pair keeps
    beyond the cutoff, ``erf(alpha r)/r`` there.

    Raises
    ------
    UnsupportedForceError
        For Ewald sums of dispersion, or parameters that depend on global ones.
    """
    name = force.getName()
    method = force.getNonbondedMethod()
    if method == openmm.NonbondedForce.LJPME:
        raise UnsupportedForceError(
            f"interpolate: {name} sums dispersion on a mesh (LJPME), which cannot be told apart by "
            "pairs; use PME"
        )
    offsets = [
        force.getParticleParameterOffset(i)[1]
        for i in range(force.getNumParticleParameterOffsets())
    ]
    exceptions = {
        frozenset(p): (i, q, s, e)
        for i in range(force.getNumExceptions())
        for *p, q, s, e in [force.getExceptionParameters(i)]
    }
    offset_exceptions = {
        force.getExceptionParameterOffset(i)[1]
        for i in range(force.getNumExceptionParameterOffsets())
    }
    inside = sorted(particles)
    if set(offsets) & set(inside) or any(
        i in offset_exceptions and pair <= set(inside) for pair, (i, *_) in exceptions.items()
    ):
        raise UnsupportedForceError(
            f"interpolate: {name} has parameters within the region that depend on global ones; "
            "set them as they shall be, and remove the offsets"
        )
    found = openmm.CustomBondForce(_expression(force, system))
    found.setName(f"{name}_within")
    found.setUsesPeriodicBoundaryConditions(force.usesPeriodicBoundaryConditions())
    for parameter in ("charge_product", "sigma", "epsilon", "plain"):
        found.addPerBondParameter(parameter)
    rows = {i: [number(x) for x in force.getParticleParameters(i)] for i in inside}
    for k, i in enumerate(inside):
        for j in inside[:k]:
            own = exceptions.get(frozenset((i, j)))
            if own is not None:
                charge, sigma, epsilon = (number(x) for x in own[1:])
            else:
                (q1, s1, e1), (q2, s2, e2) = rows[i], rows[j]
                charge, sigma, epsilon = q1 * q2, 0.5 * (s1 + s2), (e1 * e2) ** 0.5
            if charge != 0 or epsilon != 0:
                found.addBond(i, j, [charge, sigma, epsilon, float(own is not None)])
    return found


def _expression(force: openmm.NonbondedForce, system: openmm.System) -> str:
    """Energy of a pair of particles at a distance r."""
    method = force.getNonbondedMethod()
    coulomb = f"{COULOMB!r}*charge_product"
    bare = f"{coulomb}/r+{_LENNARD_JONES}"
    if method == openmm.NonbondedForce.NoCutoff:
        return f"{bare}+0*plain"
    cutoff = number(force.getCutoffDistance())
    near = f"step({cutoff!r}-r)"
    lennard_jones = f"{near}*{_LENNARD_JONES}"
    x = ""
    if force.getUseSwitchingFunction():
        start = number(force.getSwitchingDistance())
        lennard_jones += f"*select(step(r-{start!r}), {_SWITCH}, 1)"
        x = f"; x=(r-{start!r})/{cutoff - start!r}"
    if method in (openmm.NonbondedForce.Ewald, openmm.NonbondedForce.PME):
        alpha, _ = mesh_parameters(force, Host(system=system))
        electrostatic = f"{coulomb}*select({near}, 1, erf({alpha!r}*r))/r"
    else:
        dielectric = force.getReactionFieldDielectric()
        k = (dielectric - 1) / (2 * dielectric + 1) / cutoff**3
        c = 3 * dielectric / (2 * dielectric + 1) / cutoff
        electrostatic = f"{near}*{coulomb}*(1/r+{k!r}*r^2-{c!r})"
    return f"select(plain, {bare}, {electrostatic}+{lennard_jones}){x}"
