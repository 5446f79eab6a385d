"""ConstantPotentialForce."""

from __future__ import annotations

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.constant_potential import (
    ConstantPotential,
    ConstantPotentialSettings,
    Electrodes,
)

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    column,
    number,
)
from mdgraft_openmm._mesh import mesh_parameters


class ConstantPotentialConverter(AbstractConverter):
    """ConstantPotentialForce <-> ConstantPotential."""

    polynomial = frozenset(
        {
            "charge",
            "exception_charge_product",
            "potential",
            "external_field",
            "charge_constraint_target",
        }
    )

    def read(self, force: openmm.ConstantPotentialForce, host: Host) -> ConstantPotential:
        """Build the term with the host's own mesh."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        exceptions = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        pairs = checked_indices(name, exceptions, 0, 1, n_particles=n)
        _, counts = torch.unique(pairs.sort(dim=-1).values, dim=0, return_counts=True)
        if bool((counts > 1).any()):
            raise InvalidInputError(f"{name}: two particles have more than one exception")
        electrodes = _electrodes(force, host)
        inside = torch.isin(pairs, electrodes.particles).any(dim=-1)
        if bool(inside.any()):
            row = int(inside.nonzero()[0])
            raise InvalidInputError(
                f"{name}: exception {row} has particles {pairs[row].tolist()}, but particles of "
                "an electrode can have no exceptions"
            )
        target = None
        if force.getUseChargeConstraint():
            if not len(electrodes.particles):
                raise InvalidInputError(
                    f"{name}: constrains the charge, but there are no electrode particles"
                )
            target = torch.tensor(number(force.getChargeConstraintTarget()), dtype=torch.float64)
        return ConstantPotential(
            column([(force.getParticleParameters(i),) for i in range(n)], 0),
            exceptions=pairs,
            exception_charge_product=column(exceptions, 2),
            electrodes=electrodes,
            external_field=torch.tensor(_field(force), dtype=torch.float64),
            charge_constraint_target=target,
            settings=_settings(force, host),
        )

    def write(self, values: Values, force: openmm.ConstantPotentialForce) -> None:
        """Set particles, exceptions, electrodes, field and target."""
        for i in range(force.getNumParticles()):
            force.setParticleParameters(i, values["charge"][i])
        for i in range(force.getNumExceptions()):
            first, second, _ = force.getExceptionParameters(i)
            force.setExceptionParameters(i, first, second, values["exception_charge_product"][i])
        for i in range(force.getNumElectrodes()):
            particles = force.getElectrodeParameters(i)[0]
            row = (values[key][i] for key in ("potential", "gaussian_width", "thomas_fermi_scale"))
            force.setElectrodeParameters(i, particles, *row)
        force.setExternalField(openmm.Vec3(*map(float, values["external_field"])))
        if "charge_constraint_target" in values:
            force.setChargeConstraintTarget(float(values["charge_constraint_target"]))

    def refused(self, values: Values, force: openmm.ConstantPotentialForce) -> str | None:
        """Find widths and scales that make no sense."""
        for key, lowest in (("gaussian_width", "positive"), ("thomas_fermi_scale", "not negative")):
            wrong = values[key] <= 0 if lowest == "positive" else values[key] < 0
            if wrong.any():
                i = int(values[key].argmin())
                return (
                    f"{force.getName()}.{key}: entry {i} is {values[key][i]:g}, wanted values that "
                    f"are {lowest}"
                )
        return None

    def structural(self, values: Values, force: openmm.ConstantPotentialForce) -> list[str]:
        """Exceptions that start or cease to interact."""
        changed = []
        for i in range(force.getNumExceptions()):
            first, second, old = force.getExceptionParameters(i)
            if (number(old) != 0) != (values["exception_charge_product"][i] != 0):
                changed.append(f"exception {i} (particles {first} and {second})")
        return changed


def _field(force: openmm.ConstantPotentialForce) -> list[float]:
    vector = np.asarray(getattr(force.getExternalField(), "_value", force.getExternalField()))
    return [float(component) for component in vector]


def _electrodes(force: openmm.ConstantPotentialForce, host: Host) -> Electrodes:
    name, n = force.getName(), host.system.getNumParticles()
    rows = [force.getElectrodeParameters(i) for i in range(force.getNumElectrodes())]
    owner: dict[int, int] = {}
    for electrode, row in enumerate(rows):
        for particle in row[0]:
            if not 0 <= particle < n:
                raise InvalidInputError(
                    f"{name}: electrode {electrode} holds particle {particle}, but indices reach "
                    f"only from 0 to {n - 1}"
                )
            if particle in owner:
                raise InvalidInputError(
                    f"{name}: particle {particle} belongs to electrodes {owner[particle]} and "
                    f"{electrode}"
                )
            owner[particle] = electrode
    if force.getConstantPotentialMethod() == openmm.ConstantPotentialForce.Matrix:
        for particle in owner:
            if number(host.system.getParticleMass(particle)) != 0:
                raise InvalidInputError(
                    f"{name}: the matrix method needs electrode particles without mass, but "
                    f"particle {particle} has one"
                )
    return Electrodes(
        particles=torch.tensor(list(owner), dtype=torch.long),
        members=torch.tensor(list(owner.values()), dtype=torch.long),
        potential=column(rows, 1),
        gaussian_width=column(rows, 2),
        thomas_fermi_scale=column(rows, 3),
    )


def _settings(force: openmm.ConstantPotentialForce, host: Host) -> ConstantPotentialSettings:
    alpha, grid = mesh_parameters(force, host)
    return ConstantPotentialSettings(
        cutoff=number(force.getCutoffDistance()),
        alpha=alpha,
        grid=grid,
        exceptions_periodic=bool(force.getExceptionsUsePeriodicBoundaryConditions()),
    )
