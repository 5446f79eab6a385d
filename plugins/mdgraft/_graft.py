"""Finding the adapter that turns a host's object into a potential."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from mdgraft._errors import InvalidInputError, UnsupportedHostError
from mdgraft.potentials import Potential

_GROUP = "mdgraft.adapters"


def graft(
    host_object: Any,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    route: str | Mapping[str, str] = "auto",
) -> Potential:
    """Turn an object of a host package into a differentiable potential.

    Parameters
    ----------
    host_object
        For OpenMM a ``System``, ``Context`` or ``Simulation``. A ``Context`` also supplies the
        present values of global parameters and the PME settings it runs with. For ASE ``Atoms``
        with a calculator, or a calculator that has seen its atoms.
    dtype
        ``torch.float64`` or ``torch.float32``.
    device
        Where the potential computes.
    route
        How terms are evaluated: ``"native"`` in torch, ``"host"`` by the host inside the graph,
        ``"auto"`` natively where there is a torch form and by the host otherwise. A mapping from
        shell-style patterns of term names, such as ``{"NonbondedForce": "host"}``, chooses for
        each; what it does not match is ``"auto"``. `Potential.routes` tells what was chosen.

    Returns
    -------
    Potential
        A ``torch.nn.Module`` with one term for each force that contributes energy.

    Raises
    ------
    InvalidInputError
        For another ``dtype``, or a host object whose parameters are NaN, out of range or
        inconsistent.
    UnsupportedHostError
        If no installed adapter knows the object's class.
    UnsupportedForceError
        If the native route is asked for and forces have no native torch form; it lists all.
    """
    if dtype not in (torch.float64, torch.float32):
        raise InvalidInputError(f"dtype: got {dtype!r}, wanted torch.float64 or torch.float32")
    # A user's subclass lives in another module, so every base class is asked.
    packages = dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(host_object).__mro__)
    available = entry_points(group=_GROUP)
    for package in packages:
        found: dict[str, EntryPoint] = {}
        for entry in available:
            if entry.name == package:
                found.setdefault(entry.value, entry)
        if len(found) > 1:
            raise UnsupportedHostError(
                f"host_object: more than one adapter for {package!r} is installed: "
                f"{sorted(found)}; uninstall all but one"
            )
        for entry in found.values():
            potential: Potential = entry.load()(
                host_object, dtype=dtype, device=device, route=route
            )
            return potential
    cls = type(host_object)
    raise UnsupportedHostError(
        f"host_object: no adapter for {cls.__module__}.{cls.__qualname__}"
        f"; there are adapters for {sorted({entry.name for entry in available})}"
    )


def chosen_routes(names: Iterable[str], route: str | Mapping[str, str]) -> dict[str, str]:
    """The route of each term, from one for all or from patterns."""
    names = list(names)
    asked = {"*": route} if isinstance(route, str) else dict(route)
    routes = dict.fromkeys(names, "auto")
    for pattern, wanted in asked.items():
        if wanted not in ("auto", "native", "host"):
            raise InvalidInputError(
                f"route: got {wanted!r}, wanted 'auto', 'native', 'host', or a mapping from "
                "patterns of term names to these"
            )
        matches = fnmatch.filter(names, pattern)
        if not matches and not isinstance(route, str):
            raise InvalidInputError(
                f"route: {pattern!r} matches no term; there are {sorted(names)}"
            )
        routes |= dict.fromkeys(matches, wanted)
    return routes
