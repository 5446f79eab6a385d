"""NonbondedForce."""

from __future__ import annotations

import dataclasses
import math

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings, Offsets

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    column,
    global_key,
    number,
)
from mdgraft_openmm._mesh import box_lengths, mesh_parameters

_METHODS = {
    openmm.NonbondedForce.NoCutoff: Method.NO_CUTOFF,
    openmm.NonbondedForce.CutoffNonPeriodic: Method.CUTOFF_NON_PERIODIC,
    openmm.NonbondedForce.CutoffPeriodic: Method.CUTOFF_PERIODIC,
    openmm.NonbondedForce.Ewald: Method.EWALD,
    openmm.NonbondedForce.PME: Method.PME,
    openmm.NonbondedForce.LJPME: Method.LJPME,
}
_PARTICLE_SCALES = tuple(f"particle_offset_{q}_scale" for q in ("charge", "sigma", "epsilon"))
_EXCEPTION_SCALES = tuple(
    f"exception_offset_{q}_scale" for q in ("charge_product", "sigma", "epsilon")
)


class NonbondedConverter(AbstractConverter):
    """NonbondedForce <-> Nonbonded."""

    polynomial = frozenset({"charge", "exception_charge_product", "exception_epsilon"})
    flat_at_zero = frozenset({"epsilon"})

    def read(self, force: openmm.NonbondedForce, host: Host) -> Nonbonded:
        """Build the term with the host's own Ewald parameters."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        particles = [force.getParticleParameters(i) for i in range(n)]
        exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        pairs = checked_indices(name, exceptions, 0, 1, n_particles=n)
        ordered = torch.sort(pairs, dim=-1).values
        unique, counts = torch.unique(ordered, dim=0, return_counts=True)
        if bool((counts > 1).any()):
            repeated = unique[counts > 1][0].tolist()
            raise InvalidInputError(f"{name}: particles {repeated} have more than one exception")
        if bool((ordered[:, 0] == ordered[:, 1]).any()):
            raise InvalidInputError(f"{name}: an exception pairs a particle with itself")
        settings = _settings(force, host)
        names = tuple(
            force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())
        )
        return Nonbonded(
            *(column(particles, c) for c in range(3)),
            exceptions=pairs,
            exception_charge_product=column(exceptions, 2),
            exception_sigma=column(exceptions, 3),
            exception_epsilon=column(exceptions, 4),
            settings=settings,
            switching_distance=_switching_distance(force, settings.method),
            reaction_field_dielectric=_scalar(force.getReactionFieldDielectric()),
            global_names=tuple(map(global_key, names)),
            global_defaults=torch.tensor(
                [force.getGlobalParameterDefaultValue(i) for i in range(len(names))],
                dtype=torch.float64,
            ),
            particle_offsets=_offsets(
                name,
                [
                    force.getParticleParameterOffset(i)
                    for i in range(force.getNumParticleParameterOffsets())
                ],
                names,
                n,
            ),
            exception_offsets=_offsets(
                name,
                [
                    force.getExceptionParameterOffset(i)
                    for i in range(force.getNumExceptionParameterOffsets())
                ],
                names,
                len(exceptions),
            ),
        )

    def write(self, values: Values, force: openmm.NonbondedForce) -> None:
        """Set particles, exceptions, offsets, switching distance and dielectric."""
        for i in range(force.getNumParticles()):
            row = (values[key][i] for key in ("charge", "sigma", "epsilon"))
            force.setParticleParameters(i, *row)
        for i in range(force.getNumExceptions()):
            first, second, *_ = force.getExceptionParameters(i)
            row = (values[f"exception_{key}"][i] for key in ("charge_product", "sigma", "epsilon"))
            force.setExceptionParameters(i, first, second, *row)
        for i in range(force.getNumParticleParameterOffsets()):
            parameter, particle, *_ = force.getParticleParameterOffset(i)
            row = (values[key][i] for key in _PARTICLE_SCALES)
            force.setParticleParameterOffset(i, parameter, particle, *row)
        for i in range(force.getNumExceptionParameterOffsets()):
            parameter, exception, *_ = force.getExceptionParameterOffset(i)
            row = (values[key][i] for key in _EXCEPTION_SCALES)
            force.setExceptionParameterOffset(i, parameter, exception, *row)
        if "switching_distance" in values:
            force.setSwitchingDistance(float(values["switching_distance"]))
        if "reaction_field_dielectric" in values:
            force.setReactionFieldDielectric(float(values["reaction_field_dielectric"]))

    def refused(self, values: Values, force: openmm.NonbondedForce) -> str | None:
        """Find what no Context accepts."""
        for key in ("sigma", "epsilon", "exception_sigma", "exception_epsilon"):
            if len(values[key]) and values[key].min() < 0:
                return (
                    f"{force.getName()}.{key}: entry {int(values[key].argmin())} is "
                    f"{values[key].min():g}; OpenMM accepts only values that are not negative"
                )
        if "switching_distance" in values:
            distance = float(values["switching_distance"])
            if not 0 <= distance < _cutoff(force):
                return _switching_error(force, distance)
            if distance == 0 and force.getUseDispersionCorrection() and _periodic(force):
                return (
                    f"{force.getName()}.switching_distance: the dispersion correction diverges at "
                    "0 nm; wanted a positive distance, or no correction"
                )
        return None

    def structural(self, values: Values, force: openmm.NonbondedForce) -> list[str]:
        """Changes that no live Context takes over: see `AbstractConverter.structural`."""
        changed = []
        if "switching_distance" in values and float(values["switching_distance"]) != number(
            force.getSwitchingDistance()
        ):
            changed.append("switching_distance")
        if (
            "reaction_field_dielectric" in values
            and float(values["reaction_field_dielectric"]) != force.getReactionFieldDielectric()
        ):
            changed.append("reaction_field_dielectric")
        with_offset = {
            force.getExceptionParameterOffset(i)[1]
            for i in range(force.getNumExceptionParameterOffsets())
        }
        for i in range(force.getNumExceptions()):
            row = force.getExceptionParameters(i)
            old = number(row[2]) != 0 or number(row[4]) != 0
            new = values["exception_charge_product"][i] != 0 or values["exception_epsilon"][i] != 0
            if old != new and i not in with_offset:
                changed.append(f"exception {i} (particles {row[0]} and {row[1]})")
        return changed


def _scalar(value: object) -> torch.Tensor:
    return torch.tensor(number(value), dtype=torch.float64)


def _cutoff(force: openmm.NonbondedForce) -> float:
    return number(force.getCutoffDistance())


def _periodic(force: openmm.NonbondedForce) -> bool:
    return _METHODS[force.getNonbondedMethod()].periodic


def _switching_error(force: openmm.NonbondedForce, distance: float) -> str:
    return (
        f"{force.getName()}.switching_distance: {distance:g} nm is not between 0 and the cutoff, "
        f"{_cutoff(force):g} nm"
    )


def _switching_distance(force: openmm.NonbondedForce, method: Method) -> torch.Tensor | None:
    if not force.getUseSwitchingFunction():
        return None
    distance = number(force.getSwitchingDistance())
    if not 0 <= distance < _cutoff(force):
        raise InvalidInputError(_switching_error(force, distance))
    # OpenMM checks it in any case, but ignores the switching function in these two methods.
    if method in (Method.NO_CUTOFF, Method.LJPME):
        return None
    return _scalar(distance)


def _offsets(
    name: str, rows: list[tuple[object, ...]], names: tuple[str, ...], n_targets: int
) -> Offsets | None:
    if not rows:
        return None
    target = checked_indices(name, rows, 1, n_particles=n_targets).squeeze(-1)
    # The last offset of a target and parameter replaces the earlier ones, as in OpenMM.
    last = {(row[0], row[1]): i for i, row in enumerate(rows)}
    return Offsets(
        target=target,
        parameter=torch.tensor([names.index(str(row[0])) for row in rows]),
        scales=torch.stack([column(rows, c) for c in (2, 3, 4)], dim=-1),
        active=torch.tensor([last[row[0], row[1]] == i for i, row in enumerate(rows)]),
    )


def _settings(force: openmm.NonbondedForce, host: Host) -> NonbondedSettings:
    method = _METHODS[force.getNonbondedMethod()]
    settings = NonbondedSettings(
        method=method,
        cutoff=math.inf if method is Method.NO_CUTOFF else _cutoff(force),
        dispersion_correction=bool(force.getUseDispersionCorrection()) and method.periodic,
        exceptions_periodic=method.periodic
        and bool(force.getExceptionsUsePeriodicBoundaryConditions()),
        include_direct=bool(force.getIncludeDirectSpace()),
    )
    if not settings.cutoff > 0:
        raise InvalidInputError(
            f"{force.getName()}: has a cutoff of {settings.cutoff:g} nm, which must be positive"
        )
    if not method.ewald:
        return settings
    if not 0 < force.getEwaldErrorTolerance() < 0.5:
        raise InvalidInputError(
            f"{force.getName()}: has an Ewald error tolerance of "
            f"{force.getEwaldErrorTolerance():g}, which must lie between 0 and 0.5"
        )
    if method is Method.EWALD:
        alpha, kmax = _ewald_parameters(force, host)
        return dataclasses.replace(settings, alpha=alpha, kmax=kmax)
    alpha, grid = mesh_parameters(force, host)
    settings = dataclasses.replace(settings, alpha=alpha, grid=grid)
    if method is Method.LJPME:
        alpha, grid = mesh_parameters(force, host, "LJPME")
        settings = dataclasses.replace(settings, dispersion_alpha=alpha, dispersion_grid=grid)
    return settings


def _ewald_parameters(
    force: openmm.NonbondedForce, host: Host
) -> tuple[float, tuple[int, int, int]]:
    """Alpha and wave-vector counts from the error tolerance, by OpenMM's published rule.

    Each count is the smallest number with
    0.05 sqrt(L alpha) k exp(-(pi k / (L alpha))^2) below the tolerance, made odd.
    """
    tolerance = force.getEwaldErrorTolerance()
    alpha = math.sqrt(-math.log(2 * tolerance)) / _cutoff(force)

    def excess(k: int, length: float) -> float:
        x = k * math.pi / (length * alpha)
        return 0.05 * math.sqrt(length * alpha) * k * math.exp(-x * x) - float(tolerance)

    counts = []
    for length in box_lengths(host):
        k = 10
        if excess(k, length) < 0:
            while k > 0 and excess(k, length) < 0:
                k -= 1
            k += 1
        else:
            while excess(k, length) > 0:
                k += 1
        counts.append(k + 1 if k % 2 == 0 else k)
    return alpha, (counts[0], counts[1], counts[2])
