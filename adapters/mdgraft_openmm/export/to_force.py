"""Any torch energy as an OpenMM Force."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError, MissingBoxError, Potential
from torch import Tensor

from mdgraft_openmm.backends import AbstractBackend, Request, first_that_works
from mdgraft_openmm.export.availability import registered_platforms
from mdgraft_openmm.export.energy import (
    EnergyFunction,
    check_evaluation_mode,
    defaults_of,
    kind_of,
)
from mdgraft_openmm.export.script import Frame

_logger = logging.getLogger("mdgraft_openmm.export")


def to_force(
    module: Callable[..., Any],
    *,
    particles: Iterable[int] | None = None,
    periodic: bool = False,
    global_parameters: Mapping[str, Any] | Iterable[str] | None = None,
    backend: AbstractBackend | str = "auto",
    parameter_derivatives: Sequence[str] | bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    check: bool = True,
    example: Any = None,
    platform: str | None = None,
    name: str | None = None,
    force_group: int = 0,
) -> openmm.Force:
    """Turn a torch energy into a Force that a System can hold.

    Parameters
    ----------
    module
        A ``torch.nn.Module`` or callable ``(positions, box, **globals) -> energy``, or what
        `mdgraft.graft` returns: positions ``(N, 3)`` [nm], box ``(3, 3)`` with vectors as rows
        [nm] or None, global parameters as scalars by name, energy a scalar [kJ/mol]. It may return
        ``(energy, forces)`` with forces ``(N, 3)`` [kJ/mol/nm]; otherwise they are the gradient.
        A model without a box may leave that argument out.
    particles
        Particles that the module gets, in this order; all by default. They are compared with the
        System to which the force is added, so add its particles first.
    periodic
        Whether the module gets the box, and OpenMM may wrap positions.
    global_parameters
        Names with defaults, numbers in OpenMM's units or quantities, or names whose defaults the
        module knows (a `Potential`, or a signature with defaults). ``Context.setParameter`` changes
        them. None means none, and all of a `Potential`'s own; pass ``()`` to keep those as they
        are.
    backend
        ``"auto"``, the name of a Force class, or an object of `mdgraft_openmm.backends`. See
        `explain_backends` for what ``"auto"`` takes.
    parameter_derivatives
        Global parameters, True for all or False for none, in which
        ``State.getEnergyParameterDerivatives`` gives derivatives [kJ/mol per unit of the
        parameter]. OpenMM reports zero for all others. They cost a PythonForce one more call of
        Python for each parameter, and copies of the module whenever a Context is made.
    dtype, device
        Of the tensors that the module gets: the module's own by default, else float64 on the CPU.
    compile
        Let ``torch.compile`` compile the module on first use.
    check
        Compare energy, forces and derivatives in parameters on first use (of a TorchForce: on
        ``example``, if there is one).
    example
        Positions ``(n, 3)`` or ``(frames, n, 3)`` [nm] of the module's particles, as a pair with
        box vectors if ``periodic``. A TorchForce is traced from them and compared with the module.
    platform
        Name of the platform that will run the force, where a backend works on some only.
    name
        Of the force; by default that of its class.
    force_group
        From 0 to 31.

    Returns
    -------
    openmm.Force
        A ``PythonForce``, ``TorchForce`` or ``PythonTorchForce``, or a ``CustomCVForce`` around
        some of the first or last where derivatives in parameters are wanted. The module is used
        as it is at each evaluation, except by a TorchForce and in files, which keep it as it was.

    Raises
    ------
    InvalidInputError
        For a module that cannot be called, particles, parameters or other arguments that make no
        sense.
    UnavailableBackendError
        If the backend that is asked for, or every one, cannot run the module here.

    Warns
    -----
    NonConservativeForceWarning
        On first use, if forces are not the gradient of the energy.
    MDGraftWarning
        On first use, if derivatives in global parameters are not those of the energy.
    """
    request = _request(**{k: v for k, v in locals().items() if k not in _NOT_OF_REQUEST})
    if force_group not in range(32):
        raise InvalidInputError(f"force_group: got {force_group!r}, wanted 0 to 31")
    if not isinstance(name, str | None):
        raise InvalidInputError(f"name: got {name!r}, wanted a string")
    force, used, passed = first_that_works(request, backend)
    for other, why in passed.items():
        _logger.info("%s instead of %s: %s", used.name, other, why)
    force.setForceGroup(int(force_group))
    if name is not None:
        force.setName(name)
    made: openmm.Force = force
    return made


_NOT_OF_REQUEST = ("backend", "name", "force_group")


def explain_backends(module: Callable[..., Any], **options: Any) -> dict[str, str]:
    """What ``backend="auto"`` takes, and why it passes over others.

    Parameters
    ----------
    module, options
        As of `to_force`.

    Returns
    -------
    dict
        For each Force class in the order in which they are tried, why it is passed over; for the
        last one, which is used, ``"used"``.
    """
    options = {k: v for k, v in options.items() if k not in _NOT_OF_REQUEST}
    _, used, passed = first_that_works(_request(module=module, **options), "auto")
    return {**passed, used.name: "used"}


def _request(
    *,
    module: Callable[..., Any],
    particles: Iterable[int] | None = None,
    periodic: bool = False,
    global_parameters: Mapping[str, Any] | Iterable[str] | None = None,
    parameter_derivatives: Sequence[str] | bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    check: bool = True,
    example: Any = None,
    platform: str | None = None,
) -> Request:
    """Check arguments before anything is built."""
    check_evaluation_mode(module)
    defaults = defaults_of(module, global_parameters)
    chosen = _indices(particles)
    if isinstance(module, Potential):
        if module.periodic and not periodic:
            raise MissingBoxError(
                "periodic: got False, but this potential depends on the box; pass periodic=True"
            )
        if chosen is not None and len(chosen) != module.n_particles:
            raise InvalidInputError(
                f"particles: got {len(chosen)}, wanted {module.n_particles}, one for each "
                "particle of the potential"
            )
        if compile:
            raise InvalidInputError(
                "compile: a potential has compiled kernels of its own; leave compile out"
            )
        if dtype not in (None, module.dtype):
            raise InvalidInputError(
                f"dtype: got {dtype}, but the potential has {module.dtype}; use potential.to()"
            )
    own_dtype, own_device = kind_of(module, dtype, device)
    if platform is not None and platform not in registered_platforms():
        raise InvalidInputError(
            f"platform: got {platform!r}, but this OpenMM has {registered_platforms()}"
        )
    return Request(
        function=EnergyFunction(
            module,
            periodic=periodic,
            defaults=defaults,
            dtype=own_dtype,
            device=own_device,
            compiled=compile,
        ),
        particles=chosen,
        slopes=_slopes(parameter_derivatives, defaults),
        check=check,
        frames=_frames(example, periodic, chosen),
        platform=platform,
    )


def _indices(particles: Iterable[int] | None) -> tuple[int, ...] | None:
    if particles is None:
        return None
    try:
        array = np.asarray(list(particles))
        if array.dtype == bool:
            raise TypeError("a mask of booleans was passed, see numpy.flatnonzero")
        chosen = tuple(operator.index(i) for i in array.tolist())
    except TypeError as error:
        raise InvalidInputError(f"particles: wanted indices of particles ({error})") from error
    if not chosen:
        # OpenMM would take no particles for all of them.
        raise InvalidInputError("particles: is empty; wanted at least one, or None for all")
    if min(chosen) < 0 or len(set(chosen)) != len(chosen):
        raise InvalidInputError(
            f"particles: wanted different indices from 0 on, got {list(chosen[:10])}"
        )
    return chosen


def _slopes(asked: Sequence[str] | bool, defaults: Mapping[str, float]) -> tuple[str, ...]:
    if isinstance(asked, bool):
        return tuple(defaults) if asked else ()
    if not isinstance(asked, Iterable):
        raise InvalidInputError(
            f"parameter_derivatives: got {asked!r}, wanted True, False or names"
        )
    names = (asked,) if isinstance(asked, str) else tuple(dict.fromkeys(asked))
    for name in names:
        if name not in defaults:
            raise InvalidInputError(
                f"parameter_derivatives: {name!r} is none of the global parameters "
                f"{list(defaults)}; name it in global_parameters too"
            )
    return names


def _frames(example: Any, periodic: bool, particles: tuple[int, ...] | None) -> list[Frame]:
    if example is None:
        return []
    positions, box = example if isinstance(example, tuple) else (example, None)
    x = _numbers("positions", positions)
    if x.ndim not in (2, 3) or x.shape[-1] != 3:
        raise InvalidInputError(
            f"example: positions have shape {tuple(x.shape)}, wanted (n, 3) or (frames, n, 3)"
        )
    if particles is not None and x.shape[-2] != len(particles):
        raise InvalidInputError(
            f"example: has {x.shape[-2]} positions, wanted those of the {len(particles)} particles"
        )
    x = x.reshape(-1, *x.shape[-2:])
    if not periodic:
        return [(frame, None) for frame in x]
    if box is None:
        raise MissingBoxError("example: has no box, but periodic is true; pass (positions, box)")
    h = _numbers("box", box)
    if (
        h.ndim not in (2, 3)
        or h.shape[-2:] != (3, 3)
        or h.reshape(-1, 3, 3).shape[0]
        not in (
            1,
            len(x),
        )
    ):
        raise InvalidInputError(
            f"example: the box has shape {tuple(h.shape)}, wanted (3, 3) or one for each frame"
        )
    return list(zip(x, h.reshape(-1, 3, 3).expand(len(x), 3, 3), strict=True))


def _numbers(what: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        found = value.detach().to("cpu", torch.float64)
    else:
        if hasattr(value, "value_in_unit_system"):
            value = value.value_in_unit_system(openmm.unit.md_unit_system)
        try:
            found = torch.tensor(np.asarray(value, float), device="cpu")
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"example: {what} are no numbers in nm ({error})") from error
    if not bool(torch.isfinite(found).all()):
        raise InvalidInputError(f"example: {what} hold NaN or infinity")
    return found
