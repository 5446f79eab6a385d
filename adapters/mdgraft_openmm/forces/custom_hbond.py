"""CustomHbondForce."""

from __future__ import annotations

import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.custom.base import parameter_keys
from mdgraft.potentials.custom.hbond import CustomHbond

from mdgraft_openmm._converter import AbstractConverter, Host, Values, checked_cutoff, indices
from mdgraft_openmm.forces._custom import (
    global_names,
    item_names,
    item_parameters,
    refused_tables,
    tables,
    write_tables,
)


class CustomHbondConverter(AbstractConverter):
    """CustomHbondForce <-> CustomHbond."""

    def read(self, force: openmm.CustomHbondForce, host: Host) -> CustomHbond:
        """Build the term."""
        name, n = force.getName(), host.system.getNumParticles()
        donors = [force.getDonorParameters(i) for i in range(force.getNumDonors())]
        acceptors = [force.getAcceptorParameters(i) for i in range(force.getNumAcceptors())]
        for kind, rows in (("donor", donors), ("acceptor", acceptors)):
            for i, row in enumerate(rows):
                if not 0 <= row[0] < n or any(not -1 <= p < n for p in row[1:3]):
                    raise InvalidInputError(
                        f"{name}: {kind} {i} has the particles {list(row[:3])}, wanted indices "
                        f"from 0 to {n - 1}, or -1 for a second or third one that is not there"
                    )
        pairs = [force.getExclusionParticles(i) for i in range(force.getNumExclusions())]
        seen: set[tuple[int, int]] = set()
        for i, (donor, acceptor) in enumerate(pairs):
            if not (0 <= donor < len(donors) and 0 <= acceptor < len(acceptors)):
                raise InvalidInputError(
                    f"{name}: exclusion {i} refers to donor {donor} and acceptor {acceptor}, but "
                    f"there are {len(donors)} and {len(acceptors)}"
                )
            if (donor, acceptor) in seen:
                raise InvalidInputError(
                    f"{name}: donor {donor} and acceptor {acceptor} have more than one exclusion; "
                    "remove all but one"
                )
            seen.add((donor, acceptor))
        return CustomHbond(
            force.getEnergyFunction(),
            indices(donors, 0, 1, 2),
            indices(acceptors, 0, 1, 2),
            item_parameters(force, item_names(force, "Donor"), [row[3] for row in donors]),
            item_parameters(force, item_names(force, "Acceptor"), [row[3] for row in acceptors]),
            exclusions=torch.tensor([list(p) for p in pairs], dtype=torch.long).reshape(-1, 2),
            cutoff=checked_cutoff(force, host),
            periodic=force.getNonbondedMethod() == force.CutoffPeriodic,
            global_names=global_names(force),
            tables=tables(force),
            where=f"{name}: energy function",
        )

    def write(self, values: Values, force: openmm.CustomHbondForce) -> None:
        """Set per-donor and per-acceptor parameters and tabulated functions."""
        names = _names(force)
        count = force.getNumPerDonorParameters()
        keys = parameter_keys(names)
        for i in range(force.getNumDonors()):
            *particles, _ = force.getDonorParameters(i)
            force.setDonorParameters(i, *particles, [values[key][i] for key in keys[:count]])
        for i in range(force.getNumAcceptors()):
            *particles, _ = force.getAcceptorParameters(i)
            force.setAcceptorParameters(i, *particles, [values[key][i] for key in keys[count:]])
        write_tables(force, values, names)

    def refused(self, values: Values, force: openmm.CustomHbondForce) -> str | None:
        """Find periodic tables whose ends differ."""
        return refused_tables(force, values, _names(force))


def _names(force: openmm.CustomHbondForce) -> tuple[str, ...]:
    return item_names(force, "Donor") + item_names(force, "Acceptor")
