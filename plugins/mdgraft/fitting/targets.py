"""From averages of systems to the quantities that a fit aims at."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor

from mdgraft._errors import ConfigurationError
from mdgraft._types import Observable
from mdgraft.fitting.averages import Average, thermal_energy
from mdgraft.fitting.config import OBSERVABLES, FitConfig, TargetConfig
from mdgraft.frames import Frames
from mdgraft.potentials import Potential


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be averaged over one system.

    Attributes
    ----------
    simple
        Observables by name.
    functions
        User functions by ``module:function``.
    """

    simple: tuple[str, ...]
    functions: tuple[str, ...]


def requests(config: FitConfig) -> dict[str, Request]:
    """What each system is asked for, in a fixed order."""
    simple: dict[str, dict[str, None]] = {name: {} for name in config.systems}
    functions: dict[str, dict[str, None]] = {name: {} for name in config.systems}
    for target in config.targets.values():
        if target.observable not in OBSERVABLES:
            functions[target.system][target.observable] = None
        elif target.observable == "heat_of_vaporization":
            simple[target.system]["enthalpy_per_molecule"] = None
            if target.gas is not None:
                simple[target.gas]["energy_per_molecule"] = None
        elif target.observable == "potential_energy" and config.systems[target.system].rigid:
            simple[target.system]["energy_per_molecule"] = None
        else:
            simple[target.system][target.observable] = None
    return {
        name: Request(simple=tuple(simple[name]), functions=tuple(functions[name]))
        for name in config.systems
    }


def combine(
    config: FitConfig, averages: Mapping[str, Mapping[str, Average]], parameters: Sequence[str]
) -> dict[str, Average]:
    """Targets, in their own units, from the averages of each system by observable."""
    found = {}
    for name, target in config.targets.items():
        scale = 1.0 / target.factor()
        parts, constant = _parts(config, target, averages)
        found[name] = Average(
            value=scale * (constant + math.fsum(sign * a.value for sign, a in parts)),
            standard_error=scale * math.hypot(*(a.standard_error for _, a in parts)),
            gradient={
                p: scale * math.fsum(sign * a.gradient.get(p, 0.0) for sign, a in parts)
                for p in parameters
            },
            gradient_standard_error={
                p: scale * math.hypot(*(a.gradient_standard_error.get(p, 0.0) for _, a in parts))
                for p in parameters
            },
        )
    return found


def _parts(
    config: FitConfig, target: TargetConfig, averages: Mapping[str, Mapping[str, Average]]
) -> tuple[list[tuple[float, Average]], float]:
    """Averages with their signs, and a constant, that add up to the target."""
    own = averages[target.system]
    if target.observable == "heat_of_vaporization":
        # U_gas/molecule - (U_liquid + P V)/molecule + RT; the two systems are independent.
        parts = [(-1.0, own["enthalpy_per_molecule"])]
        constant = thermal_energy(config.systems[target.system].temperature)
        if target.gas is None:
            return parts, constant + (target.gas_energy or 0.0)
        return [*parts, (1.0, averages[target.gas]["energy_per_molecule"])], constant
    if target.observable == "potential_energy" and config.systems[target.system].rigid:
        return [(1.0, own["energy_per_molecule"])], 0.0
    return [(1.0, own[target.observable])], 0.0


def load_function(reference: str, folder: Path, potential: Potential) -> Observable:
    """Import a user's observable ``module:function``; its module may lie in ``folder``.

    Raises
    ------
    ConfigurationError
        If it cannot be imported or is no function of one or two arguments.
    """
    module_name, _, attribute = reference.partition(":")
    sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigurationError(
            f"observable: {reference!r} cannot be imported ({error}); its module must be installed "
            f"or lie in {folder}"
        ) from error
    except AttributeError:
        raise ConfigurationError(
            f"observable: module {module_name!r} has no {attribute!r}"
        ) from None
    finally:
        sys.path.remove(str(folder))
    if not callable(function):
        raise ConfigurationError(f"observable: {reference!r} is not a function")
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 1:
        return cast(Observable, function)
    if len(required) != 2:
        raise ConfigurationError(
            f"observable: {reference!r} takes {len(required)} arguments, wanted (frames) or "
            "(frames, potential)"
        )

    def observable(frames: Frames) -> Tensor:
        values: Tensor = function(frames, potential)
        return values

    return observable
