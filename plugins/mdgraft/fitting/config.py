"""The TOML file that describes a fit, as data."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mdgraft._errors import ConfigurationError

#: Observables known by name; others are ``module:function``.
OBSERVABLES = ("density", "heat_of_vaporization", "potential_energy", "volume")

# Factor from each accepted unit to the one that is used inside.
_PER_CUBIC = {"kg/m3": 1.0, "kg/m^3": 1.0, "g/l": 1.0, "g/cm3": 1e3, "g/cm^3": 1e3, "g/ml": 1e3}
_ENERGIES = {"kj/mol": 1.0, "kilojoule/mole": 1.0, "kcal/mol": 4.184, "kilocalorie/mole": 4.184}
_VOLUMES = {"nm3": 1.0, "nm^3": 1.0, "a3": 1e-3, "a^3": 1e-3, "angstrom^3": 1e-3}
UNITS: dict[str, tuple[str, dict[str, float]]] = {
    "density": ("kg/m^3", _PER_CUBIC),
    "heat_of_vaporization": ("kJ/mol", _ENERGIES),
    "potential_energy": ("kJ/mol", _ENERGIES),
    "volume": ("nm^3", _VOLUMES),
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SystemConfig(_Table):
    """One system: its files, thermodynamic state and how it is sampled.

    Attributes
    ----------
    host
        Name of the host that runs it.
    files
        The host's input files by role, relative to the TOML file; for OpenMM ``system`` (a
        serialised System), ``positions`` (a serialised State, or a PDB or mmCIF file) and, when
        atoms are selected by name, ``topology`` (a PDB or mmCIF file).
    temperature, pressure
        Thermodynamic state [K], [bar]; no pressure means constant volume, or the pressure of the
        barostat that the system has.
    frames
        Frames drawn each time the system is sampled.
    interval
        Time between frames [ps], or ``"auto"`` to measure it.
    equilibration
        Time to equilibrate before each sampling [ps].
    timestep, friction
        Of the Langevin integrator [ps], [1/ps].
    barostat_frequency
        Time steps between volume moves, unless the system has a barostat of its own.
    block_frames
        Frames stored at a time; what an interrupted run may lose.
    platform, properties
        The host's compute platform and its properties; None chooses.
    seed
        Seed of everything random in this system.
    rigid
        The energy is the same in every configuration, as for one rigid molecule alone: it is
        evaluated at the input positions and not sampled.
    """

    host: str = "openmm"
    files: dict[str, str]
    temperature: Positive
    pressure: Finite | None = None
    frames: Annotated[int, Field(ge=2)] = 200
    interval: Positive | Literal["auto"] = "auto"
    equilibration: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    timestep: Positive = 0.002
    friction: Positive = 1.0
    barostat_frequency: Count = 25
    block_frames: Count = 100
    platform: str | None = None
    properties: dict[str, str] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] = 0
    rigid: bool = False


class SelectionConfig(_Table):
    """Which entries of one named parameter take the trainable value.

    Without a criterion all entries are selected; several criteria must all hold. An entry that
    belongs to several particles, such as a bond, is selected when each of them qualifies.

    Attributes
    ----------
    parameter
        Name in the potential, such as ``NonbondedForce.sigma``.
    systems
        The systems that this applies to; by default all that have the parameter.
    entries
        Indices into the parameter.
    particles
        Indices of particles.
    element, atom_name, residue_name
        Need a topology.
    factor
        The entries become this multiple of the value.
    """

    parameter: str
    systems: list[str] | None = None
    entries: list[Annotated[int, Field(ge=0)]] | None = None
    particles: list[Annotated[int, Field(ge=0)]] | None = None
    element: list[str] | None = None
    atom_name: list[str] | None = None
    residue_name: list[str] | None = None
    factor: Finite = 1.0

    @field_validator("element", "atom_name", "residue_name", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ParameterConfig(_Table):
    """One trainable number, shared by all selected entries.

    Attributes
    ----------
    select
        A parameter name, a selection, or a list of these.
    initial
        Starting value in the host's unit; by default the value in the files.
    bounds
        Lowest and highest value.
    scale
        The size of a typical change; by default the magnitude of the starting value.
    """

    select: list[SelectionConfig] = Field(min_length=1)
    initial: Finite | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    scale: Positive | None = None

    @field_validator("select", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [{"parameter": item} if isinstance(item, str) else item for item in items]

    @model_validator(mode="after")
    def _ordered(self) -> ParameterConfig:
        lower, upper = self.bounds
        if not lower < upper:
            raise ValueError(f"bounds: got [{lower:g}, {upper:g}], wanted the lower one first")
        if self.initial is not None and not lower <= self.initial <= upper:
            raise ValueError(
                f"initial: got {self.initial:g}, which is outside the bounds [{lower:g}, {upper:g}]"
            )
        return self


class TargetConfig(_Table):
    """One target.

    Attributes
    ----------
    observable
        ``density``, ``heat_of_vaporization``, ``potential_energy``, ``volume``, or
        ``module:function``, a function of the frames (and, if it takes a second argument, the
        potential) with one value for each frame. By default the target's own name.
    system
        The system it is averaged over; by default the first one.
    value, uncertainty
        The target and its standard uncertainty, in ``unit``; the uncertainty sets the weight.
    unit
        By default kg/m^3, kJ/mol or nm^3.
    gas
        For a heat of vaporisation: the system that holds the molecule in the gas.
    gas_energy
        Instead of ``gas``: the potential energy of one molecule in the gas, a constant [kJ/mol];
        0 for a rigid molecule without interactions within itself.
    """

    observable: str = ""
    system: str = ""
    value: Finite
    uncertainty: Positive
    unit: str | None = None
    gas: str | None = None
    gas_energy: Finite | None = None

    def factor(self) -> float:
        """What turns a number in ``unit`` into one in the unit used inside."""
        if self.unit is None or self.observable not in UNITS:
            return 1.0
        return UNITS[self.observable][1][_unit_key(self.unit)]

    def unit_name(self) -> str:
        """The unit in which the target is reported."""
        if self.unit is not None:
            return self.unit
        return UNITS[self.observable][0] if self.observable in UNITS else ""


class OptimizerConfig(_Table):
    """How parameters are changed.

    Attributes
    ----------
    method
        ``gauss_newton``, ``scipy.least_squares``, ``scipy.<method>`` for a method of
        ``scipy.optimize.minimize``, or ``torch.<class>`` for a class of ``torch.optim``.
    options
        Passed on to it.
    """

    method: str = "gauss_newton"
    options: dict[str, Any] = Field(default_factory=dict)


class ConvergenceConfig(_Table):
    """When to stop.

    Attributes
    ----------
    max_iterations
        Most evaluations, reweighted ones included.
    standard_errors
        A fit is converged when, in fresh samples at the final parameters, every average is within
        this many of its own standard errors of its target.
    target_uncertainty
        Add the target's uncertainty in quadrature to that standard error.
    """

    max_iterations: Count = 20
    standard_errors: Positive = 1.0
    target_uncertainty: bool = False


class ReweightingConfig(_Table):
    """When samples may be reused at other parameters.

    Attributes
    ----------
    min_effective_fraction
        Smallest Kish effective sample size, as a fraction of the frames, at least 0.1; with 1
        no frames are reused. Frames whose weights have too heavy a tail are never reused.
    """

    min_effective_fraction: Annotated[float, Field(ge=0.1, le=1)] = 0.5


class FitConfig(_Table):
    """A whole fit; see the attributes' classes."""

    systems: dict[str, SystemConfig] = Field(min_length=1)
    parameters: dict[str, ParameterConfig] = Field(min_length=1)
    targets: dict[str, TargetConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    convergence: ConvergenceConfig = Field(default_factory=ConvergenceConfig)
    reweighting: ReweightingConfig = Field(default_factory=ReweightingConfig)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Give targets their default observable and system."""
        if not isinstance(data, dict) or not isinstance(data.get("targets"), dict):
            return data
        systems = data.get("systems")
        first = next(iter(systems), "") if isinstance(systems, dict) else ""
        targets = {
            name: {"observable": name, "system": first} | target
            if isinstance(target, dict)
            else target
            for name, target in data["targets"].items()
        }
        return data | {"targets": targets}

    @model_validator(mode="after")
    def _consistent(self) -> FitConfig:
        for kind in ("systems", "parameters", "targets"):
            for name in getattr(self, kind):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{kind}.{name}: a name needs letters, digits and underscores only"
                    )
        twice = set(self.parameters) & set(self.targets)
        if twice:
            raise ValueError(f"{sorted(twice)} name both a parameter and a target; rename one")
        for name, parameter in self.parameters.items():
            for selection in parameter.select:
                self._known_systems(f"parameters.{name}.select.systems", selection.systems or [])
        for name, target in self.targets.items():
            self._check_target(f"targets.{name}", target)
        return self

    def _known_systems(self, key: str, names: list[str]) -> None:
        for name in names:
            if name not in self.systems:
                raise ValueError(f"{key}: no system {name!r}; there are {sorted(self.systems)}")

    def _check_gas(self, key: str, target: TargetConfig) -> None:
        if (target.gas is None) == (target.gas_energy is None):
            raise ValueError(
                f"{key}: a heat of vaporisation needs either gas (a system that holds the "
                "molecule alone) or gas_energy (its constant energy in kJ/mol, 0 for a rigid "
                "molecule without interactions within itself)"
            )
        if target.gas is None:
            return
        self._known_systems(f"{key}.gas", [target.gas])
        if target.gas == target.system:
            raise ValueError(f"{key}.gas: got {target.gas!r}, the liquid itself")
        liquid, gas = self.systems[target.system], self.systems[target.gas]
        if gas.temperature != liquid.temperature:
            raise ValueError(
                f"{key}.gas: systems.{target.gas} is at {gas.temperature:g} K, "
                f"systems.{target.system} at {liquid.temperature:g} K"
            )

    def _check_target(self, key: str, target: TargetConfig) -> None:
        self._known_systems(f"{key}.system", [target.system])
        kind, system = target.observable, self.systems[target.system]
        if kind not in OBSERVABLES and not _FUNCTION.fullmatch(kind):
            raise ValueError(
                f"{key}.observable: got {kind!r}, wanted one of {', '.join(OBSERVABLES)} or "
                "module:function"
            )
        if (
            kind in UNITS
            and target.unit is not None
            and _unit_key(target.unit) not in UNITS[kind][1]
        ):
            raise ValueError(
                f"{key}.unit: got {target.unit!r}, wanted one of {', '.join(UNITS[kind][1])}"
            )
        if kind == "heat_of_vaporization":
            self._check_gas(key, target)
        elif target.gas is not None or target.gas_energy is not None:
            raise ValueError(f"{key}: gas and gas_energy belong to a heat_of_vaporization only")
        if system.rigid and kind != "potential_energy":
            raise ValueError(f"{key}: systems.{target.system} is rigid and not sampled")
        if system.rigid and not self.convergence.target_uncertainty:
            raise ValueError(
                f"{key}: the energy of a rigid system has no standard error to converge within; "
                "set convergence.target_uncertainty = true"
            )

    def digest(self) -> str:
        """Fingerprint of everything but the iteration limit, which a resumed run may raise."""
        data = self.model_dump(mode="json")
        data["convergence"].pop("max_iterations")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path) -> FitConfig:
    """Read and check a configuration.

    Raises
    ------
    ConfigurationError
        Naming the file, the key, what it holds and what was wanted.
    """
    source = Path(path)
    try:
        data = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{source}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{source}: is not valid TOML: {error}") from error
    try:
        return FitConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigurationError(f"{source}: " + f"\n{source}: ".join(lines)) from error


def _explain(item: Any) -> str:
    """One pydantic error as ``key: what came, what was wanted``."""
    key = ".".join(str(part) for part in item["loc"]) or "file"
    message, kind = str(item["msg"]), item["type"]
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "extra_forbidden":
        return f"{key}: is not a known key; check the spelling"
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return text if not item["loc"] else f"{key}: {text}"
    return f"{key}: got {item['input']!r}; {message[:1].lower()}{message[1:]}"


def _unit_key(unit: str) -> str:
    return unit.strip().lower().replace("å", "a").replace("³", "3").replace("**", "^")
