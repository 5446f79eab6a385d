"""Where OpenMM itself is not right, so that a difference is no fault of the graft."""

from __future__ import annotations

import numpy as np
import openmm

from mdgraft_openmm._adapter import energy_forces
from mdgraft_openmm._converter import number
from mdgraft_openmm.virtual_sites import read_sites

#: Classes whose pairs come from the neighbour list of the Reference platform.
_WITH_NEIGHBOR_LIST = (
    "AmoebaVdwForce",
    "ConstantPotentialForce",
    "CustomGBForce",
    "CustomNonbondedForce",
    "NonbondedForce",
)


#: Relative precision of an integral that OpenMM computes with single-precision weights.
_LONG_RANGE = 1e-6
#: That of induced dipoles on a mesh, damped by exponentials of single precision, and iterated.
_INDUCED = 1e-5
#: That of the field which induces them, damped with a constant of single precision.
_INDUCING = 1e-7
#: That of forces on quadrupoles with a trace, which energies keep, relative to the trace; as seen.
_TRACED = 0.1


def precision(system: openmm.System) -> dict[str, float]:
    """Relative precision of the terms that the Reference platform does not compute in double."""
    found = {}
    for name, force in energy_forces(system).items():
        if isinstance(force, openmm.CustomNonbondedForce):
            if force.getUseLongRangeCorrection():
                found[name] = _LONG_RANGE
        elif isinstance(force, openmm.AmoebaMultipoleForce):
            direct = force.getPolarizationType() == openmm.AmoebaMultipoleForce.Direct
            iterated = force.getPolarizationType() == openmm.AmoebaMultipoleForce.Mutual
            mesh = force.getNonbondedMethod() == openmm.AmoebaMultipoleForce.PME
            if iterated or (mesh and not direct):
                found[name] = _INDUCED
            elif mesh:
                found[name] = _INDUCING
            traced = _TRACED * _relative_trace(force)
            if traced > max(found.get(name, 0.0), 1e-10):
                found[name] = traced
    return found


def remarks(system: openmm.System, box: np.ndarray) -> list[str]:
    """Remarks on a comparison with OpenMM's Reference platform (8.4 to 8.6) in this box [nm]."""
    found = [
        f"{name}: OpenMM itself computes it to about {size:g} only, so that no more is asked"
        for name, size in precision(system).items()
    ]
    for name, force in energy_forces(system).items():
        if isinstance(force, openmm.HippoNonbondedForce) and _stray_frames(force):
            found.append(
                f"{name}: for a frame of kind z-only without a particle x OpenMM's Reference "
                "platform reads a position that does not exist, so that its forces may be wrong "
                "and differ from Context to Context; its energy is right"
            )
        if _oblique_frames(force):
            found.append(
                f"{name}: in three-fold frames and in some z-bisect ones OpenMM's forces are not "
                "the gradient of its energy; the graft's are"
            )
    if not np.tril(box, -1).any():
        return found
    for name, force in energy_forces(system).items():
        if (
            type(force).__name__ in _WITH_NEIGHBOR_LIST
            and force.usesPeriodicBoundaryConditions()
            and min(box[1, 1], box[2, 2]) < 3 * number(force.getCutoffDistance())
        ):
            found.append(
                f"{name}: in a tilted box less than three cutoffs high OpenMM's Reference platform "
                "may overlook pairs; its CPU platform and a sum over all pairs do not"
            )
    sites = read_sites(system)
    if sites is not None and sites.periodic:
        found.append(
            "SymmetrySite: in a tilted box OpenMM's forces on the parents are not the gradient of "
            "its energy; the graft's are"
        )
    return found


def _oblique_frames(force: openmm.Force) -> bool:
    if isinstance(force, openmm.AmoebaMultipoleForce):
        kinds = {force.getMultipoleParameters(i)[3] for i in range(force.getNumMultipoles())}
    elif isinstance(force, openmm.HippoNonbondedForce):
        kinds = {force.getParticleParameters(i)[12] for i in range(force.getNumParticles())}
    else:
        return False
    return bool(kinds & {force.ThreeFold, force.ZBisect})


def _stray_frames(force: openmm.HippoNonbondedForce) -> bool:
    rows = (force.getParticleParameters(i)[12:] for i in range(force.getNumParticles()))
    return any(kind == force.ZOnly and x < 0 for kind, _, x, _ in rows)


def _relative_trace(force: openmm.AmoebaMultipoleForce) -> float:
    """The largest trace of a quadrupole, relative to the largest component of any."""
    rows = [force.getMultipoleParameters(i)[2] for i in range(force.getNumMultipoles())]
    moments = np.array([[number(x) for x in row] for row in rows]).reshape(-1, 3, 3)
    size = np.abs(moments).max(initial=0.0)
    trace = np.abs(np.trace(moments, axis1=1, axis2=2)).max(initial=0.0)
    return float(trace / size) if size else 0.0
