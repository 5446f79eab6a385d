"""CustomNonbondedForce."""

from __future__ import annotations

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.base import parameter_keys
from mdgraft.potentials.custom.nonbonded import CustomNonbonded
from mdgraft.potentials.nonbonded import Method
from torch import Tensor

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_cutoff,
    global_key,
    number,
)
from mdgraft_openmm.forces._custom import (
    checked_exclusions,
    global_names,
    item_names,
    item_parameters,
    item_rows,
    refused_tables,
    tables,
    write_tables,
)

_METHODS = {
    openmm.CustomNonbondedForce.NoCutoff: Method.NO_CUTOFF,
    openmm.CustomNonbondedForce.CutoffNonPeriodic: Method.CUTOFF_NON_PERIODIC,
    openmm.CustomNonbondedForce.CutoffPeriodic: Method.CUTOFF_PERIODIC,
}


class CustomNonbondedConverter(AbstractConverter):
    """CustomNonbondedForce <-> CustomNonbonded."""

    def read(self, force: openmm.CustomNonbondedForce, host: Host) -> CustomNonbonded:
        """Build the term; the quadrature of its tail is settled for the present globals."""
        name, n = force.getName(), host.system.getNumParticles()
        parameters = particle_parameters(force, n)
        method = _METHODS[force.getNonbondedMethod()]
        cutoff = checked_cutoff(force, host)
        switching = None
        if force.getUseSwitchingFunction():
            distance = number(force.getSwitchingDistance())
            if not 0 <= distance < number(force.getCutoffDistance()):
                raise InvalidInputError(_switching_error(force, distance))
            # OpenMM checks it in any case, but uses it only with a cutoff.
            if method is not Method.NO_CUTOFF:
                switching = torch.tensor(distance, dtype=torch.float64)
        if force.getNumEnergyParameterDerivatives() and force.getNumComputedValues():
            raise InvalidInputError(
                f"{name}: declares energy parameter derivatives and computed values, which OpenMM "
                "refuses together; remove the derivatives, the graft gives them anyway"
            )
        computed = [
            force.getComputedValueParameters(i) for i in range(force.getNumComputedValues())
        ]
        term = CustomNonbonded(
            force.getEnergyFunction(),
            parameters,
            n_particles=n,
            exclusions=checked_exclusions(force, n),
            method=method,
            cutoff=cutoff,
            computed_values={row[0]: row[1] for row in computed},
            switching_distance=switching,
            long_range_correction=force.getUseLongRangeCorrection(),
            groups=_groups(force, n),
            global_names=global_names(force),
            tables=tables(force),
            where=name,
        )
        term.settle_quadrature(present_globals(force, self.global_defaults(force), host))
        return term

    def write(self, values: Values, force: openmm.CustomNonbondedForce) -> None:
        """Set particles, tables and the switching distance."""
        write_particles(values, force)
        key = _switching_key(force)
        if key in values:
            force.setSwitchingDistance(float(values[key]))

    def refused(self, values: Values, force: openmm.CustomNonbondedForce) -> str | None:
        """Find what no Context accepts."""
        key = _switching_key(force)
        if key in values and not 0 <= float(values[key]) < number(force.getCutoffDistance()):
            return _switching_error(force, float(values[key]))
        return refused_tables(force, values, item_names(force, "Particle"))

    def structural(self, values: Values, force: openmm.CustomNonbondedForce) -> list[str]:
        """Changes that no live Context takes over: see `AbstractConverter.structural`."""
        key = _switching_key(force)
        changed = key in values and float(values[key]) != number(force.getSwitchingDistance())
        return [key] if changed else []


def particle_parameters(force: openmm.Force, n_particles: int) -> dict[str, Tensor]:
    """Parameters ``(N,)`` of a force that has one entry for each particle."""
    if force.getNumParticles() != n_particles:
        raise InvalidInputError(
            f"{force.getName()}: has {force.getNumParticles()} particles, the System {n_particles}"
        )
    rows = [force.getParticleParameters(i) for i in range(n_particles)]
    return item_parameters(force, item_names(force, "Particle"), rows)


def write_particles(values: Values, force: openmm.Force) -> None:
    """Set per-particle parameters and tables."""
    names = item_names(force, "Particle")
    for i, row in enumerate(item_rows(values, names, force.getNumParticles()).tolist()):
        force.setParticleParameters(i, row)
    write_tables(force, values, names)


def present_globals(
    force: openmm.Force, defaults: dict[str, float], host: Host
) -> dict[str, Tensor]:
    """Global parameters as a term is handed them."""
    context = host.context
    return {
        global_key(name): torch.tensor(
            default if context is None else context.getParameter(name), dtype=torch.float64
        )
        for name, default in defaults.items()
    }


def _groups(
    force: openmm.CustomNonbondedForce, n_particles: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    groups = []
    for g in range(force.getNumInteractionGroups()):
        sets = []
        for s, members in enumerate(force.getInteractionGroupParameters(g)):
            chosen = np.unique(np.array(list(members), dtype=np.int64))
            outside = chosen[(chosen < 0) | (chosen >= n_particles)]
            if len(outside):
                raise InvalidInputError(
                    f"{force.getName()}: set {s + 1} of interaction group {g} holds particle "
                    f"{outside[0]}, but indices reach only from 0 to {n_particles - 1}"
                )
            sets.append(chosen)
        groups.append((sets[0], sets[1]))
    return groups


def _switching_key(force: openmm.CustomNonbondedForce) -> str:
    tabulated = (force.getTabulatedFunctionName(i) for i in range(force.getNumTabulatedFunctions()))
    names = [*item_names(force, "Particle"), *tabulated, "switching_distance"]
    return parameter_keys(names)[-1]


def _switching_error(force: openmm.CustomNonbondedForce, distance: float) -> str:
    return (
        f"{force.getName()}.switching_distance: {distance:g} nm is not between 0 and the cutoff, "
        f"{number(force.getCutoffDistance()):g} nm"
    )
