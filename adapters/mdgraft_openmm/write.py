"""Writing a potential's parameters back into OpenMM objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, ParameterMismatchError, Potential
from mdgraft.potentials import AbstractTerm

from mdgraft_openmm._adapter import as_host, energy_forces, global_parameters, read_native
from mdgraft_openmm._converter import Host, declared_globals, global_key, set_declared_global
from mdgraft_openmm.forces import converter_of, known_converter


def write_parameters(potential: Potential, system_or_context: Any) -> None:
    """Write every parameter of a potential, ties included, back into OpenMM.

    A ``System`` gets new force parameters and new defaults of global parameters. A ``Context`` or
    ``Simulation`` has its System's forces updated, ``updateParametersInContext`` called and its
    global parameters set. A value that did not change is left as the host has it, so a round trip
    is exact in float32 too. Nothing is written if anything cannot be. OpenMM's dispersion
    correction sees the declared defaults of global parameters: when those of a ``System`` change,
    graft it again to follow.

    Parameters
    ----------
    potential
        A potential grafted from this System or from one with the same forces.
    system_or_context
        ``openmm.System``, ``Context`` or ``app.Simulation``.

    Raises
    ------
    InvalidInputError
        If ``potential`` is not one.
    ParameterMismatchError
        If forces, the particles that they act on or shapes do not match, a value is not finite or
        not allowed by OpenMM, or a live Context cannot take over a change (such as an exclusion
        that becomes an interaction).
    """
    host = as_host(system_or_context)
    if not isinstance(potential, Potential):
        raise InvalidInputError(
            f"potential: got {type(potential).__name__}, wanted what mdgraft.graft returns"
        )
    forces = energy_forces(host.system)
    _check_terms(potential, forces)
    own = {name: potential.term(name) for name in forces}
    new = {name: value.detach() for name, value in potential.values().items()}
    # Without the Context, which is asked for mesh parameters only.
    bare = Host(system=host.system)
    terms = {name: read_native(force, bare) for name, force in forces.items()}
    current = _host_values(terms)
    merged: dict[str, dict[str, np.ndarray]] = {}
    for name, force in forces.items():
        merged[name] = {
            key: _merge(f"{name}.{key}", old, new.get(f"{name}.{key}"))
            for key, old in current[name].items()
        }
        native = terms[name]
        if native is None:
            continue
        _check_topology(name, potential.term(name), native)
        converter = known_converter(force)
        refused = converter.refused(merged[name], force)
        if refused:
            raise ParameterMismatchError(
                f"{refused}. Clamp it, or train a transform that stays within, before writing"
            )
        if host.context is not None:
            _refuse_structural(name, converter.structural(merged[name], force))
    shared = {
        name: float(_merge(key, np.asarray(old), new.get(key)))
        for name, old in global_parameters(host, own).items()
        for key in [f"globals.{global_key(name)}"]
    }
    if host.context is None:
        _check_settable(forces, global_parameters(host, own), shared)

    for name, force in forces.items():
        changed = any(not np.array_equal(merged[name][k], v) for k, v in current[name].items())
        if changed:
            known_converter(force).write(merged[name], force)
    for name, force in forces.items():
        if terms[name] is not None:
            known_converter(force).settle(force, host.system)
        if host.context is not None:
            _update(name, force, host.context)
    for name, value in shared.items():
        if host.context is not None:
            host.context.setParameter(name, value)
        else:
            _set_default(forces, name, value)


def _check_terms(potential: Potential, forces: Mapping[str, openmm.Force]) -> None:
    if tuple(forces) != potential.term_names:
        raise ParameterMismatchError(
            f"system_or_context: has the forces {list(forces)}, the potential the terms "
            f"{list(potential.term_names)}; write into the System that was grafted or a copy of it"
        )


def _check_topology(name: str, term: AbstractTerm, host_term: AbstractTerm) -> None:
    lost = term.parameter_values().keys() - host_term.parameter_values().keys()
    theirs = dict(host_term.named_buffers())
    for key, buffer in term.named_buffers():
        # Integers and masks say what acts on what.
        if not buffer.is_floating_point():
            other = theirs.get(key)
            if other is None or not torch.equal(buffer.cpu(), other):
                lost.add(key)
    if lost:
        raise ParameterMismatchError(
            f"{name}: the host's force differs from the potential's term in {sorted(lost)}; write "
            "into the System that was grafted or a copy of it"
        )


def _host_values(terms: Mapping[str, AbstractTerm | None]) -> dict[str, dict[str, np.ndarray]]:
    """What the host holds now, by term and parameter."""
    return {
        name: {
            key: value.detach().numpy().astype(np.float64)
            for key, value in (term.parameter_values() if term is not None else {}).items()
        }
        for name, term in terms.items()
    }


def _merge(name: str, old: np.ndarray, new: torch.Tensor | None) -> np.ndarray:
    """The potential's values, except where they equal the host's in the potential's precision."""
    if new is None or tuple(new.shape) != old.shape:
        shape = None if new is None else tuple(new.shape)
        raise ParameterMismatchError(
            f"{name}: the potential has shape {shape}, the host {old.shape}; write into the System "
            "that was grafted or a copy of it"
        )
    values = new.cpu()
    if not bool(torch.isfinite(values).all()):
        raise ParameterMismatchError(f"{name}: holds NaN or infinity; nothing was written")
    rounded = torch.tensor(old, dtype=values.dtype)
    return np.where((rounded == values).numpy(), old, values.double().numpy())


def _refuse_structural(name: str, changes: list[str]) -> None:
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ParameterMismatchError(
            f"{name}: a live Context cannot take over changes of {', '.join(changes[:3])}{more}; "
            "write into the System, call context.reinitialize(preserveState=True), then write into "
            "the Context, which keeps its old global parameters"
        )


def _update(name: str, force: Any, context: openmm.Context) -> None:
    # Also when nothing changed: its System may have been written to since the Context was made.
    if not hasattr(force, "updateParametersInContext"):
        return
    try:
        force.updateParametersInContext(context)
    except openmm.OpenMMException as error:
        raise ParameterMismatchError(
            f"{name}: the live Context cannot take over its System's parameters ({error}); call "
            "context.reinitialize(preserveState=True), then write into it again"
        ) from error


def _check_settable(
    forces: Mapping[str, openmm.Force], old: Mapping[str, float], new: Mapping[str, float]
) -> None:
    """Raise for a changed default that no force of the System can declare."""
    for name, value in new.items():
        settable = any(name in _settable(force) for force in forces.values())
        if value != old[name] and not settable:
            raise ParameterMismatchError(
                f"globals.{global_key(name)}: its force has no setter for the default of {name!r}; "
                "write into a Context, which takes the value, or make the force anew"
            )


def _settable(force: openmm.Force) -> Collection[str]:
    converter = converter_of(force)
    return converter.settable_globals(force) if converter else declared_globals(force)


def _set_default(forces: Mapping[str, openmm.Force], name: str, value: float) -> None:
    """Declare a new default in every force that has this global parameter."""
    for force in forces.values():
        converter = converter_of(force)
        if converter is not None:
            converter.set_global_default(force, name, value)
        else:
            set_declared_global(force, name, value)
