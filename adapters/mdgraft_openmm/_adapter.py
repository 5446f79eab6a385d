"""From an OpenMM System, Context or Simulation to a Potential."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, Potential, UnsupportedForceError, UnsupportedHostError
from mdgraft.potentials import AbstractTerm, is_reserved

from mdgraft_openmm._converter import Host, global_key, number
from mdgraft_openmm.forces import CONVERTERS, WITHOUT_ENERGY
from mdgraft_openmm.virtual_sites import read_sites


def as_host(host_object: Any) -> Host:
    """Resolve a System, Context or Simulation."""
    if isinstance(host_object, openmm.System):
        return Host(system=host_object)
    context = getattr(host_object, "context", host_object)
    if isinstance(context, openmm.Context):
        return Host(system=context.getSystem(), context=context)
    raise UnsupportedHostError(
        f"host_object: got {type(host_object).__module__}.{type(host_object).__qualname__}, "
        "wanted an openmm.System, Context or app.Simulation"
    )


def energy_forces(system: openmm.System) -> dict[str, openmm.Force]:
    """The forces that contribute energy, by the names that their terms have.

    A term is named after ``force.getName()``; when a name repeats, later ones get ``_1``, ``_2``.
    So do names that a Potential uses itself. Dots become underscores: they separate modules.
    """
    named: dict[str, openmm.Force] = {}
    for force in system.getForces():
        if type(force).__name__ in WITHOUT_ENERGY:
            continue
        base = (force.getName() or type(force).__name__).replace(".", "_")
        name, repeat = base, 0
        while name in named or is_reserved(name):
            repeat += 1
            name = f"{base}_{repeat}"
        named[name] = force
    return named


def global_parameters(host: Host) -> dict[str, float]:
    """Global parameters of the native forces: the Context's values, or the declared defaults."""
    found: dict[str, float] = {}
    for force in energy_forces(host.system).values():
        for i in range(getattr(force, "getNumGlobalParameters", lambda: 0)()):
            name = force.getGlobalParameterName(i)
            default = number(force.getGlobalParameterDefaultValue(i))
            if host.context is not None:
                found[name] = number(host.context.getParameter(name))
            elif found.setdefault(name, default) != default:
                raise InvalidInputError(
                    f"host_object: forces declare different defaults for the global parameter "
                    f"{name!r}, {found[name]:g} and {default:g}; OpenMM refuses that too"
                )
    keys: dict[str, str] = {}
    for name in found:
        other = keys.setdefault(global_key(name), name)
        if other != name:
            raise InvalidInputError(
                f"host_object: the global parameters {other!r} and {name!r} would both be "
                f"'globals.{global_key(name)}'; rename one"
            )
    return found


def graft(host_object: Any, *, dtype: torch.dtype, device: torch.device | str) -> Potential:
    """Build the potential; see `mdgraft.graft`."""
    host = as_host(host_object)
    if not host.system.getNumParticles():
        raise InvalidInputError("host_object: the System has no particles; add some first")
    forces = energy_forces(host.system)
    unsupported = {n: f for n, f in forces.items() if type(f) not in CONVERTERS}
    if unsupported:
        listed = ", ".join(f"{n} ({type(f).__name__})" for n, f in unsupported.items())
        raise UnsupportedForceError(
            f"host_object: no native torch form for {listed}. Native are "
            f"{', '.join(sorted(cls.__name__ for cls in CONVERTERS))}. Until the others can be "
            "evaluated by OpenMM inside the graph, graft a copy of the System without them "
            "(copy.deepcopy(system), then system.removeForce(index)) and add their energies and "
            "forces from a Context of their own"
        )
    terms: dict[str, AbstractTerm] = {
        name: CONVERTERS[type(force)].read(force, host) for name, force in forces.items()
    }
    for name, term in terms.items():
        _check_parameters(name, term, forces[name])
    potential = Potential(
        terms,
        n_particles=host.system.getNumParticles(),
        global_parameters={
            global_key(name): torch.tensor(value, dtype=torch.float64)
            for name, value in global_parameters(host).items()
        },
        sites=read_sites(host.system),
    )
    return potential.to(dtype=dtype, device=device)


def _check_parameters(name: str, term: AbstractTerm, force: openmm.Force) -> None:
    """Raise for parameters that no Context accepts or that are not numbers."""
    values = {key: value.detach().numpy() for key, value in term.parameter_values().items()}
    for key, numbers in values.items():
        if not np.isfinite(numbers).all():
            entry = np.flatnonzero(~np.isfinite(numbers))[0]
            raise InvalidInputError(
                f"host_object: {name}.{key} holds NaN or infinity at entry {entry}; correct the "
                "force's parameters"
            )
    refused = CONVERTERS[type(force)].refused(values, force)
    if refused:
        raise InvalidInputError(f"host_object: {refused}. Correct the force's parameters")
