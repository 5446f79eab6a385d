"""From averages of systems to the quantities that a fit aims at."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from torch import Tensor

from mdgraft._errors import ConfigurationError, MDGraftError
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
    path = function_file(reference, folder)
    try:
        module = importlib.import_module(module_name) if path is None else _load(path)
    # Whatever the module's own code runs into.
    except Exception as error:
        raise ConfigurationError(
            f"observable: {reference!r} cannot be imported ({type(error).__name__}: {error}); its "
            f"module must be installed or lie in {folder}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigurationError(f"observable: module {module_name!r} has no {attribute!r}")
    if not callable(function):
        raise ConfigurationError(f"observable: {reference!r} is not a function")
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) not in (1, 2):
        raise ConfigurationError(
            f"observable: {reference!r} takes {len(required)} arguments, wanted (frames) or "
            "(frames, potential)"
        )

    def observable(frames: Frames) -> Tensor:
        try:
            values: Tensor = function(*(frames, potential)[: len(required)])
        except MDGraftError:
            raise
        # Whatever the user's code runs into.
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigurationError(
                f"observable: {reference!r} failed ({type(error).__name__}: {error}, "
                f"{where.filename}, line {where.lineno})"
            ) from error
        return values

    return observable


def function_file(reference: str, folder: Path) -> Path | None:
    """The file beside the configuration that holds a user's function, if it is there."""
    module_name, _, _ = reference.partition(":")
    path = folder.joinpath(*module_name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _load(path: Path) -> ModuleType:
    """Load a file as a module of its own: another folder may hold one of the same name."""
    spec = importlib.util.spec_from_file_location(f"_mdgraft_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
