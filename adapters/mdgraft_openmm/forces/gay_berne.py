"""GayBerneForce."""

from __future__ import annotations

import math

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.gay_berne import GayBerne

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    changed_scalars,
    checked_cutoff,
    checked_indices,
    column,
    indices,
    number,
    scalar,
)

_SIZES = ("sx", "sy", "sz", "ex", "ey", "ez")


class GayBerneConverter(AbstractConverter):
    """GayBerneForce <-> GayBerne."""

    polynomial = frozenset({"exception_epsilon"})
    flat_at_zero = frozenset({"epsilon"})

    def read(self, force: openmm.GayBerneForce, host: Host) -> GayBerne:
        """Build the term."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        particles = [force.getParticleParameters(i) for i in range(n)]
        exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        axes = indices(particles, 2, 3)
        if bool(((axes < -1) | (axes >= n)).any()):
            raise InvalidInputError(f"{name}: an axis is given by a particle that does not exist")
        pairs = checked_indices(name, exceptions, 0, 1, n_particles=n)
        if len(torch.unique(pairs.sort(dim=-1).values, dim=0)) != len(pairs):
            raise InvalidInputError(f"{name}: two particles have more than one exception")
        switching_cutoff = number(force.getCutoffDistance())
        distance = scalar(force.getSwitchingDistance())
        return GayBerne(
            column(particles, 0),
            column(particles, 1),
            torch.stack([column(particles, c) for c in (4, 5, 6)], dim=-1),
            torch.stack([column(particles, c) for c in (7, 8, 9)], dim=-1),
            axes=axes,
            exceptions=pairs,
            exception_sigma=column(exceptions, 2),
            exception_epsilon=column(exceptions, 3),
            cutoff=checked_cutoff(force, host),
            switching=(distance, switching_cutoff) if force.getUseSwitchingFunction() else None,
            periodic=force.getNonbondedMethod() == force.CutoffPeriodic,
        )

    def write(self, values: Values, force: openmm.GayBerneForce) -> None:
        """Set particles, exceptions and the switching distance."""
        for i in range(force.getNumParticles()):
            _, _, x, y, *_ = force.getParticleParameters(i)
            sizes = (values[key][i] for key in _SIZES)
            force.setParticleParameters(i, values["sigma"][i], values["epsilon"][i], x, y, *sizes)
        for i in range(force.getNumExceptions()):
            first, second, *_ = force.getExceptionParameters(i)
            row = (values[f"exception_{key}"][i] for key in ("sigma", "epsilon"))
            force.setExceptionParameters(i, first, second, *row)
        if "switching_distance" in values:
            force.setSwitchingDistance(float(values["switching_distance"]))

    def refused(self, values: Values, force: openmm.GayBerneForce) -> str | None:
        """Find what no Context accepts."""
        for key in ("sigma", "epsilon", "exception_sigma", "exception_epsilon", *_SIZES):
            lowest = values[key].min(initial=math.inf)
            if lowest < 0 or (key in _SIZES and lowest == 0):
                wanted = "positive values" if key in _SIZES else "values that are not negative"
                return (
                    f"{force.getName()}.{key}: entry {int(values[key].argmin())} is {lowest:g}; "
                    f"OpenMM accepts only {wanted}"
                )
        for i in range(force.getNumParticles()):
            x, y = force.getParticleParameters(i)[2:4]
            sx, sy, sz, ex, ey, ez = (values[key][i] for key in _SIZES)
            if (y == -1 and (sy, ey) != (sz, ez)) or (x == -1 and (sx, ex) != (sz, ez)):
                shape = "a sphere" if x == -1 else "axially symmetric"
                return (
                    f"{force.getName()}.{', '.join(_SIZES)}: particle {i} must be {shape}, for it "
                    f"has no {'x' if x == -1 else 'y'} axis; tie these parameters together"
                )
        if "switching_distance" in values:
            distance, cutoff = float(values["switching_distance"]), force.getCutoffDistance()
            if not 0 <= distance < number(cutoff):
                return (
                    f"{force.getName()}.switching_distance: {distance:g} nm is not between 0 and "
                    f"the cutoff, {number(cutoff):g} nm"
                )
        return None

    def structural(self, values: Values, force: openmm.GayBerneForce) -> list[str]:
        """A live Context takes over neither the switching distance nor what becomes excluded."""
        changed = []
        if "switching_distance" in values:
            changed = changed_scalars(values, force, {"switching_distance": "SwitchingDistance"})
        for key, get, count in (
            ("epsilon", force.getParticleParameters, force.getNumParticles()),
            ("exception_epsilon", force.getExceptionParameters, force.getNumExceptions()),
        ):
            place = 1 if key == "epsilon" else 3
            before = [number(get(i)[place]) != 0 for i in range(count)]
            if before != (values[key] != 0).tolist():
                changed.append(key)
        return changed
