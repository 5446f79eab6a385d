"""From an OpenMM System, Context or Simulation to a Potential."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, Potential, UnsupportedForceError, UnsupportedHostError
from mdgraft._graft import chosen_routes
from mdgraft.potentials import AbstractTerm, is_reserved
from mdgraft.potentials.amoeba.generalized_kirkwood import GeneralizedKirkwood
from mdgraft.potentials.external import ExternalTerm

from mdgraft_openmm._classes import known_class
from mdgraft_openmm._converter import Host, global_key, number
from mdgraft_openmm._engine import COMPANIONS, ForceEngine, index_of, uses_box
from mdgraft_openmm._held import held_by
from mdgraft_openmm.export.term import TorchTerm
from mdgraft_openmm.forces import WITHOUT_ENERGY, converter_of, known_converter
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
        named[name] = known_class(force)
    return named


def global_parameters(host: Host, terms: Mapping[str, AbstractTerm]) -> dict[str, float]:
    """Global parameters of the terms: the Context's values, or the declared defaults."""
    found: dict[str, float] = {}
    for name, force in energy_forces(host.system).items():
        for parameter, default in _declared(force, terms[name]).items():
            if host.context is not None:
                found[parameter] = number(host.context.getParameter(parameter))
            elif found.setdefault(parameter, default) != default:
                raise InvalidInputError(
                    f"host_object: forces declare different defaults for the global parameter "
                    f"{parameter!r}, {found[parameter]:g} and {default:g}; OpenMM refuses that too"
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


def _declared(force: Any, term: AbstractTerm) -> dict[str, float]:
    """Global parameters that a force adds to a Context, with their defaults."""
    if isinstance(term, ExternalTerm) and isinstance(term.engine, ForceEngine):
        return term.engine.global_defaults
    converter = converter_of(force)
    return converter.global_defaults(force) if converter is not None else {}


def read_native(force: openmm.Force, host: Host) -> AbstractTerm | None:
    """The native term of a force, or None if it has none."""
    converter = converter_of(force)
    try:
        return converter.read(force, host) if converter is not None else None
    except UnsupportedForceError:
        return None


def graft(
    host_object: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    route: str | Mapping[str, str] = "auto",
) -> Potential:
    """Build the potential; see `mdgraft.graft`."""
    host = as_host(host_object)
    terms = read_terms(host, route)
    potential = Potential(
        terms,
        n_particles=host.system.getNumParticles(),
        global_parameters={
            global_key(name): torch.tensor(value, dtype=torch.float64)
            for name, value in global_parameters(host, terms).items()
        },
        sites=read_sites(host.system),
        routes=_taken(terms),
    )
    potential.held = held_by(host.system)
    return potential.to(dtype=dtype, device=device)


def read_terms(host: Host, route: str | Mapping[str, str]) -> dict[str, AbstractTerm]:
    """One term for each force that has energy, by the route asked for.

    Raises
    ------
    InvalidInputError
        If the System or the route makes no sense.
    UnsupportedForceError
        If the native route is asked for and there is none; it lists all such forces.
    """
    if not host.system.getNumParticles():
        raise InvalidInputError("host_object: the System has no particles; add some first")
    forces = energy_forces(host.system)
    routes = chosen_routes(forces, route)
    _couple(forces, routes)
    terms: dict[str, AbstractTerm] = {}
    missing: list[str] = []
    for name, force in forces.items():
        native = read_native(force, host)
        if native is not None:
            _check_parameters(name, native, force)
        elif routes[name] == "native":
            missing.append(f"{name} ({type(force).__name__})")
            continue
        if native is None or (routes[name] == "host" and not _lends(native)):
            # The host knows no parameters of a module.
            native = host_term(host, force, None if isinstance(native, TorchTerm) else native)
        terms[name] = native
    if missing:
        raise UnsupportedForceError(
            f"route: no native torch form for {', '.join(missing)}; leave the route to "
            "'auto', or ask for 'host', to have OpenMM evaluate them inside the graph"
        )
    return terms


def _taken(terms: Mapping[str, AbstractTerm]) -> dict[str, str]:
    """The route of each term; parameters that a host's term borrows go with it."""
    hosted = {name for name, term in terms.items() if isinstance(term, ExternalTerm)}
    hosted |= {other for name in hosted for other in terms[name].borrows}
    return {name: "host" if name in hosted else "native" for name in terms}


def _couple(forces: Mapping[str, openmm.Force], routes: dict[str, str]) -> None:
    """Let forces whose energies cannot be told apart go the same way."""
    pair = [name for name, force in forces.items() if isinstance(force, COMPANIONS)]
    if len(pair) > 1 and any(routes[name] == "host" for name in pair):
        routes |= dict.fromkeys(pair, "host")


def _lends(term: AbstractTerm) -> bool:
    """Whether it only holds parameters, for a term that has its energy."""
    return isinstance(term, GeneralizedKirkwood)


def host_term(host: Host, force: openmm.Force, native: AbstractTerm | None) -> ExternalTerm:
    """A term that OpenMM evaluates, on the platform of the Context if there is one.

    It has the parameters of the ``native`` term; None leaves only global ones.
    """
    converter = converter_of(force) if native is not None else None
    values = native.parameter_values() if native is not None else {}
    borrows = native.borrows if native is not None else ()
    others = {name: energy_forces(host.system)[name] for name in borrows}
    lent = [
        f"{name}.{key}"
        for name, other in others.items()
        for key in known_converter(other).read(other, host).parameter_values()
    ]
    platform, properties = "Reference", {}
    if host.context is not None:
        used = host.context.getPlatform()
        platform = used.getName()
        properties = {
            name: used.getPropertyValue(host.context, name)
            for name in used.getPropertyNames()
            if name in _PROPERTIES
        }
    engine = ForceEngine(
        host.system,
        index_of(host.system, force),
        converter=converter,
        names=(*values, *lent),
        platform=platform,
        properties=properties,
        companions={name: known_converter(other) for name, other in others.items()},
    )
    return ExternalTerm(
        engine,
        {key: value.detach().clone() for key, value in values.items()},
        units=native.units if native is not None else {},
        global_names=tuple(map(global_key, engine.global_defaults)),
        periodic=native.periodic if native is not None else uses_box(force),
        borrows=borrows,
    )


#: Platform properties that a second Context can share.
_PROPERTIES = (
    "Precision",
    "DeviceIndex",
    "OpenCLPlatformIndex",
    "Threads",
    "DeterministicForces",
    "UseCpuPme",
)


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
    refused = known_converter(force).refused(values, force)
    if refused:
        raise InvalidInputError(f"host_object: {refused}. Correct the force's parameters")
