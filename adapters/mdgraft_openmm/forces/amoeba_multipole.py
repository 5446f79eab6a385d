"""AmoebaMultipoleForce."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.amoeba.frames import Axes, LocalAxes
from mdgraft.potentials.amoeba.generalized_kirkwood import Solvation
from mdgraft.potentials.amoeba.multipole import (
    Multipoles,
    MultipoleSettings,
    Polarization,
    ScaledPairs,
)

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    column,
    indices,
    number,
)
from mdgraft_openmm._mesh import mesh_parameters
from mdgraft_openmm.forces.amoeba_generalized_kirkwood import AmoebaGeneralizedKirkwoodConverter

_POLARIZATION = {
    openmm.AmoebaMultipoleForce.Direct: Polarization.DIRECT,
    openmm.AmoebaMultipoleForce.Mutual: Polarization.MUTUAL,
    openmm.AmoebaMultipoleForce.Extrapolated: Polarization.EXTRAPOLATED,
}
# What OpenMM takes for granted by Covalent12 to Covalent15, and PolarizationCovalent11 to 14.
_PERMANENT, _P, _D = (0.0, 0.0, 0.4, 0.8), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0)
_TRACE = 1e-5


class AmoebaMultipoleConverter(AbstractConverter):
    """AmoebaMultipoleForce <-> Multipoles."""

    polynomial = frozenset({"charge", "dipole"})

    def read(self, force: openmm.AmoebaMultipoleForce, host: Host) -> Multipoles:
        """Build the term with the host's own mesh."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumMultipoles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumMultipoles()} multipoles, the System {n} particles"
            )
        rows = [force.getMultipoleParameters(i) for i in range(n)]
        dipole = [[number(x) for x in row[1]] for row in rows]
        quadrupole = [[number(x) for x in row[2]] for row in rows]
        return Multipoles(
            column(rows, 0),
            torch.tensor(dipole, dtype=torch.float64).reshape(n, 3),
            torch.tensor(quadrupole, dtype=torch.float64).reshape(n, 3, 3),
            column(rows, 7),
            column(rows, 8),
            column(rows, 9),
            axes=local_axes(name, indices(rows, 3, 4, 5, 6)),
            scaled=_scaled(force, n),
            settings=_settings(force, host),
            solvent=_solvent(host),
        )

    def write(self, values: Values, force: openmm.AmoebaMultipoleForce) -> None:
        """Set all parameters."""
        for i in range(force.getNumMultipoles()):
            axes = force.getMultipoleParameters(i)[3:7]
            force.setMultipoleParameters(
                i,
                values["charge"][i],
                values["dipole"][i].tolist(),
                values["quadrupole"][i].reshape(9).tolist(),
                *axes,
                values["thole"][i],
                values["damping_factor"][i],
                values["polarizability"][i],
            )

    def refused(self, values: Values, force: openmm.AmoebaMultipoleForce) -> str | None:
        """Find what no Context accepts."""
        return refused_moments(values, force.getName(), _TRACE)


def refused_moments(values: Values, name: str, tolerance: float) -> str | None:
    """Find quadrupoles that are not traceless and symmetric, and negative polarizabilities."""
    quadrupole = values["quadrupole"]
    trace = np.abs(np.trace(quadrupole, axis1=-2, axis2=-1))
    skew = np.abs(quadrupole - quadrupole.swapaxes(-1, -2)).max(axis=(-2, -1), initial=0.0)
    for what, size in (("a trace of", trace), ("an antisymmetric part of", skew)):
        if (size > tolerance).any():
            i = int(size.argmax())
            return (
                f"{name}.quadrupole: entry {i} has {what} {size[i]:g} e nm^2; OpenMM accepts only "
                f"traceless symmetric ones, to {tolerance:g}"
            )
    if (values["polarizability"] < 0).any():
        i = int(values["polarizability"].argmin())
        return (
            f"{name}.polarizability: entry {i} is {values['polarizability'][i]:g}; wanted values "
            "that are not negative"
        )
    return None


def local_axes(name: str, table: torch.Tensor) -> LocalAxes:
    """Frames from kinds and the particles z, x and y.

    Raises
    ------
    InvalidInputError
        If a kind does not exist, or a particle that it needs.
    """
    n = len(table)
    needed = {Axes.Z_THEN_X: 2, Axes.BISECTOR: 2, Axes.Z_BISECT: 3, Axes.THREE_FOLD: 3}
    needed |= {Axes.Z_ONLY: 1, Axes.NONE: 0}
    for i, (kind, *particles) in enumerate(table.tolist()):
        if kind not in needed:
            raise InvalidInputError(f"{name}: particle {i} has the unknown axis type {kind}")
        wanted = particles[: needed[Axes(kind)]]
        if any(not 0 <= p < n for p in wanted) or any(p >= n for p in particles):
            raise InvalidInputError(
                f"{name}: the frame of particle {i} is given by the particles {particles}, of "
                f"which its axis type needs the first {len(wanted)}"
            )
    return LocalAxes(*table.unbind(-1))


def _scaled(force: openmm.AmoebaMultipoleForce, n: int) -> ScaledPairs:
    """Scale factors of pairs, from the maps of the particle with the lower index."""
    found: dict[int, list[float]] = {}
    for i in range(n):
        maps: Any = force.getCovalentMaps(i)
        group = set(maps[4])
        for kind, others in enumerate(maps):
            for j in others:
                if j <= i:
                    continue
                scale = found.setdefault(i * n + j, [1.0, 1.0, 1.0])
                if kind < 4:
                    scale[0] = _PERMANENT[kind]
                    # Half within a polarization group.
                    scale[2] = (0.5 if kind == 2 and j in group else 1.0) * _P[kind]
                else:
                    scale[1] = _D[kind - 4]
    keys = sorted(found)
    scales = torch.tensor([found[key] for key in keys], dtype=torch.float64).reshape(-1, 3)
    return ScaledPairs(torch.tensor(keys, dtype=torch.long), scales)


def _solvent(host: Host) -> tuple[str, Solvation] | None:
    """Name and constants of the implicit solvent in the System."""
    # The table of converters lists this one, so it cannot be imported before it.
    from mdgraft_openmm._adapter import energy_forces

    for name, force in energy_forces(host.system).items():
        if isinstance(force, openmm.AmoebaGeneralizedKirkwoodForce):
            term = AmoebaGeneralizedKirkwoodConverter().read(force, host)
            return name, term.solvation
    return None


def _settings(force: openmm.AmoebaMultipoleForce, host: Host) -> MultipoleSettings:
    kind = _POLARIZATION[force.getPolarizationType()]
    ewald = force.getNonbondedMethod() == force.PME
    alpha, grid = mesh_parameters(force, host) if ewald else (None, None)
    return MultipoleSettings(
        polarization=kind,
        extrapolation=tuple(map(float, force.getExtrapolationCoefficients())),
        cutoff=number(force.getCutoffDistance()) if ewald else math.inf,
        alpha=alpha,
        grid=grid,
    )
