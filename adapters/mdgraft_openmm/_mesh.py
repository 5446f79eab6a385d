"""Mesh parameters of Ewald sums, as OpenMM chooses them."""

from __future__ import annotations

import math
from typing import Any

import openmm
from mdgraft import InvalidInputError

from mdgraft_openmm._converter import Host, number


def box_lengths(host: Host) -> tuple[float, float, float]:
    """Diagonal of the System's default box [nm]."""
    vectors = host.system.getDefaultPeriodicBoxVectors()
    return number(vectors[0][0]), number(vectors[1][1]), number(vectors[2][2])


def mesh_parameters(
    force: Any, host: Host, kind: str = "PME"
) -> tuple[float, tuple[int, int, int]]:
    """Alpha and grid: the Context's own, those set by the user, or from the tolerance.

    From the tolerance: alpha = sqrt(-ln 2 tol) / cutoff and 2 alpha L / (3 tol^(1/5)) grid points,
    half as many for dispersion, at least 6.

    Parameters
    ----------
    force
        Has an Ewald error tolerance.
    host
        Where it is from.
    kind
        ``"PME"``, or ``"LJPME"`` or ``"DPME"`` for dispersion.
    """
    name, cutoff = force.getName(), number(force.getCutoffDistance())
    lengths = box_lengths(host)
    if not 0 < cutoff <= 0.5 * min(lengths):
        raise InvalidInputError(
            f"{name}: has a cutoff of {cutoff:g} nm, which must be positive and at most half of "
            f"the shortest default box length, {min(lengths):g} nm"
        )
    if host.context is not None:
        if host.context.getPlatform().getName() == "CPU":
            # This platform settles its mesh when it first computes an energy, and not before.
            try:
                host.context.getState(energy=True)
            except openmm.OpenMMException as error:
                raise InvalidInputError(
                    f"host_object: the Context cannot compute its mesh parameters yet ({error}); "
                    "set its positions first, or graft its System"
                ) from error
        alpha, *grid = getattr(force, f"get{kind}ParametersInContext")(host.context)
    else:
        alpha, *grid = getattr(force, f"get{kind}Parameters")()
    alpha = number(alpha)
    if alpha == 0 or grid[0] == 0:
        tolerance = force.getEwaldErrorTolerance()
        if not 0 < tolerance < 0.5:
            raise InvalidInputError(
                f"{name}: has an Ewald error tolerance of {tolerance:g}, which must lie between 0 "
                "and 0.5"
            )
        alpha = math.sqrt(-math.log(2 * tolerance)) / cutoff
        density = (2 if kind == "PME" else 1) * alpha / (3 * tolerance**0.2)
        grid = [max(6, math.ceil(density * length)) for length in lengths]
    return alpha, (int(grid[0]), int(grid[1]), int(grid[2]))
