"""CustomCentroidBondForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.base import parameter_keys
from mdgraft.potentials.custom.compound_bond import CustomCentroidBond

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_indices, number
from mdgraft_openmm.forces._custom import (
    global_names,
    item_names,
    item_parameters,
    item_rows,
    refused_tables,
    tables,
    write_tables,
)


class CustomCentroidBondConverter(AbstractConverter):
    """CustomCentroidBondForce <-> CustomCentroidBond."""

    def read(self, force: openmm.CustomCentroidBondForce, host: Host) -> CustomCentroidBond:
        """Build the term."""
        name, names = force.getName(), item_names(force, "Bond")
        groups = [force.getGroupParameters(i) for i in range(force.getNumGroups())]
        bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
        size = force.getNumGroupsPerBond()
        members, owners, masses, weighted, weights = [], [], [], [], []
        for i, (particles, own) in enumerate(groups):
            if own and len(own) != len(particles):
                raise InvalidInputError(
                    f"{name}: group {i} has {len(particles)} particles but {len(own)} weights"
                )
            checked_indices(
                name, [(p,) for p in particles], 0, n_particles=host.system.getNumParticles()
            )
            mass = [number(host.system.getParticleMass(p)) for p in particles]
            if sum(own or mass) == 0:
                raise InvalidInputError(f"{name}: the weights of group {i} add up to 0")
            members += particles
            owners += [i] * len(particles)
            masses += mass
            weighted += [bool(own)] * len(particles)
            weights += own
        for i, (of_bond, _) in enumerate(bonds):
            if len(of_bond) != size:
                raise InvalidInputError(
                    f"{name}: bond {i} has {len(of_bond)} groups, wanted {size}"
                )
        return CustomCentroidBond(
            force.getEnergyFunction(),
            checked_indices(name, [g for g, _ in bonds], *range(size), n_particles=len(groups)),
            item_parameters(force, names, [parameters for _, parameters in bonds]),
            members=torch.tensor(members, dtype=torch.long),
            group=torch.tensor(owners, dtype=torch.long),
            masses=torch.tensor(masses, dtype=torch.float64),
            weighted=torch.tensor(weighted, dtype=torch.bool),
            group_weights=torch.tensor([number(w) for w in weights], dtype=torch.float64),
            n_groups=len(groups),
            global_names=global_names(force),
            tables=tables(force),
            periodic=force.usesPeriodicBoundaryConditions(),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomCentroidBondForce) -> None:
        """Set per-bond parameters, group weights and tabulated functions."""
        names = item_names(force, "Bond")
        for i, row in enumerate(item_rows(values, names, force.getNumBonds())):
            force.setBondParameters(i, force.getBondParameters(i)[0], row.tolist())
        write_tables(force, values, names)
        new = values.get(_weight_key(force))
        start = 0
        for i in range(force.getNumGroups()):
            particles, own = force.getGroupParameters(i)
            if own and new is not None:
                force.setGroupParameters(i, particles, new[start : start + len(own)].tolist())
                start += len(own)

    def refused(self, values: Values, force: openmm.CustomCentroidBondForce) -> str | None:
        """Find periodic tables whose ends differ."""
        return refused_tables(force, values, item_names(force, "Bond"))

    def structural(self, values: Values, force: openmm.CustomCentroidBondForce) -> list[str]:
        """Weights are fixed when a Context is made."""
        new = values.get(_weight_key(force))
        old = [w for i in range(force.getNumGroups()) for w in force.getGroupParameters(i)[1]]
        return ["group_weights"] if new is not None and new.tolist() != old else []


def _weight_key(force: openmm.CustomCentroidBondForce) -> str:
    functions = (force.getTabulatedFunctionName(i) for i in range(force.getNumTabulatedFunctions()))
    return parameter_keys([*item_names(force, "Bond"), *functions, "group_weights"])[-1]
