"""HippoNonbondedForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.amoeba.frames import Axes
from mdgraft.potentials.hippo.term import SCALES, Hippo, HippoSettings

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    changed_scalars,
    checked_indices,
    column,
    indices,
    number,
    scalar,
)
from mdgraft_openmm._mesh import mesh_parameters
from mdgraft_openmm.forces.amoeba_multipole import local_axes, refused_moments

_TRACE = 1e-5
# In OpenMM's order, after the charge and the multipoles.
_PARTICLE = (
    "core_charge",
    "alpha",
    "epsilon",
    "damping",
    "c6",
    "pauli_k",
    "pauli_q",
    "pauli_alpha",
    "polarizability",
)


class HippoNonbondedConverter(AbstractConverter):
    """HippoNonbondedForce <-> Hippo."""

    polynomial = frozenset(
        {"charge", "core_charge", "dipole", "epsilon", "c6", "pauli_k", "pauli_q"}
        | {f"exception_{name}_scale" for name in SCALES}
    )

    def read(self, force: openmm.HippoNonbondedForce, host: Host) -> Hippo:
        """Build the term with the host's own meshes."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        dipole = [[number(x) for x in row[1]] for row in rows]
        quadrupole = [[number(x) for x in row[2]] for row in rows]
        parameters = {"charge": column(rows, 0)}
        parameters["dipole"] = torch.tensor(dipole, dtype=torch.float64).reshape(n, 3)
        parameters["quadrupole"] = torch.tensor(quadrupole, dtype=torch.float64).reshape(n, 3, 3)
        parameters |= {key: column(rows, 3 + k) for k, key in enumerate(_PARTICLE)}
        exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        pairs = checked_indices(name, exceptions, 0, 1, n_particles=n)
        if len(torch.unique(pairs.sort(dim=-1).values, dim=0)) != len(pairs):
            raise InvalidInputError(f"{name}: two particles have more than one exception")
        axes = indices(rows, 12, 13, 14, 15)
        local_axes(name, axes)
        # The Reference platform never looks whether a centre is chiral.
        axes[axes[:, 0] == Axes.Z_THEN_X, 3] = -1
        ewald = force.getNonbondedMethod() == force.PME
        return Hippo(
            parameters,
            axes=local_axes(name, axes),
            exceptions=pairs,
            scales={key: column(exceptions, 2 + k) for k, key in enumerate(SCALES)},
            settings=_settings(force, host, ewald=ewald),
            switching_distance=scalar(force.getSwitchingDistance()) if ewald else None,
        )

    def write(self, values: Values, force: openmm.HippoNonbondedForce) -> None:
        """Set particles, exceptions and the switching distance."""
        for i in range(force.getNumParticles()):
            force.setParticleParameters(
                i,
                values["charge"][i],
                values["dipole"][i].tolist(),
                values["quadrupole"][i].reshape(9).tolist(),
                *(values[key][i] for key in _PARTICLE),
                *force.getParticleParameters(i)[12:],
            )
        for i in range(force.getNumExceptions()):
            first, second, *_ = force.getExceptionParameters(i)
            row = (values[f"exception_{key}_scale"][i] for key in SCALES)
            force.setExceptionParameters(i, first, second, *row)
        if "switching_distance" in values:
            force.setSwitchingDistance(float(values["switching_distance"]))

    def refused(self, values: Values, force: openmm.HippoNonbondedForce) -> str | None:
        """Find what no Context accepts."""
        return refused_moments(values, force.getName(), _TRACE)

    def structural(self, values: Values, force: openmm.HippoNonbondedForce) -> list[str]:
        """Not every platform takes over the switching distance."""
        if "switching_distance" not in values:
            return []
        return changed_scalars(values, force, {"switching_distance": "SwitchingDistance"})


def _settings(force: openmm.HippoNonbondedForce, host: Host, *, ewald: bool) -> HippoSettings:
    coefficients = tuple(map(float, force.getExtrapolationCoefficients()))
    if not ewald:
        return HippoSettings(extrapolation=coefficients)
    alpha, grid = mesh_parameters(force, host)
    dispersion_alpha, dispersion_grid = mesh_parameters(force, host, "DPME")
    return HippoSettings(
        extrapolation=coefficients,
        cutoff=number(force.getCutoffDistance()),
        alpha=alpha,
        grid=grid,
        dispersion_alpha=dispersion_alpha,
        dispersion_grid=dispersion_grid,
    )
