"""AmoebaGeneralizedKirkwoodForce."""

from __future__ import annotations

from typing import Any

import openmm
import torch
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft.potentials.amoeba.generalized_kirkwood import (
    PARTICLE,
    SCALARS,
    GeneralizedKirkwood,
    Solvation,
)

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    changed_scalars,
    column,
    number,
    scalar,
)

_GETTERS = {key: "".join(part.capitalize() for part in key.split("_")) for key in SCALARS}


class AmoebaGeneralizedKirkwoodConverter(AbstractConverter):
    """AmoebaGeneralizedKirkwoodForce <-> GeneralizedKirkwood.

    Charges are those of the multipoles: OpenMM refuses others.
    """

    polynomial = frozenset({"surface_area_factor", "probe_radius"})

    def read(self, force: openmm.AmoebaGeneralizedKirkwoodForce, host: Host) -> GeneralizedKirkwood:
        """Build the term that holds the parameters."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        multipoles = [f for f in host.system.getForces() if _is_multipole(f)]
        if not multipoles or multipoles[0].getNonbondedMethod() != multipoles[0].NoCutoff:
            raise InvalidInputError(
                f"{name}: needs an AmoebaMultipoleForce without a cutoff in the same System"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        charges = [number(multipoles[0].getMultipoleParameters(i)[0]) for i in range(n)]
        for i, (own, charge) in enumerate(zip(column(rows, 0).tolist(), charges, strict=True)):
            if own != charge:
                raise InvalidInputError(
                    f"{name}: its charges are not those of the multipoles; particle {i} has "
                    f"{own:g} e, wanted {charge:g} e as in the AmoebaMultipoleForce"
                )
        if bool((column(rows, 4) > 0).any()):
            raise UnsupportedForceError(f"{name}: no native torch form with neck factors")
        parameters = {key: column(rows, 1 + k) for k, key in enumerate(PARTICLE)}
        parameters |= {key: scalar(getattr(force, f"get{_GETTERS[key]}")()) for key in SCALARS}
        tanh = bool(force.getTanhRescaling())
        if tanh:
            parameters["tanh_parameters"] = torch.tensor(
                [number(x) for x in force.getTanhParameters()], dtype=torch.float64
            )
        return GeneralizedKirkwood(
            parameters, Solvation(cavity=bool(force.getIncludeCavityTerm()), tanh=tanh)
        )

    def write(self, values: Values, force: openmm.AmoebaGeneralizedKirkwoodForce) -> None:
        """Set particles and the properties of the solvent."""
        for i in range(force.getNumParticles()):
            charge, *_, neck = force.getParticleParameters(i)
            row = (values[key][i] for key in PARTICLE)
            force.setParticleParameters(i, charge, *row, neck)
        for key, name in _GETTERS.items():
            getattr(force, f"set{name}")(float(values[key]))
        if "tanh_parameters" in values:
            force.setTanhParameters(*map(float, values["tanh_parameters"]))

    def settle(self, force: openmm.AmoebaGeneralizedKirkwoodForce, system: openmm.System) -> None:
        """Take over the charges of the multipoles."""
        multipoles: Any = next(f for f in system.getForces() if _is_multipole(f))
        for i in range(force.getNumParticles()):
            _, *rest = force.getParticleParameters(i)
            force.setParticleParameters(i, multipoles.getMultipoleParameters(i)[0], *rest)

    def structural(self, values: Values, force: openmm.AmoebaGeneralizedKirkwoodForce) -> list[str]:
        """A live Context takes over the particles only."""
        changed = changed_scalars(values, force, _GETTERS)
        if "tanh_parameters" in values:
            old = [number(x) for x in force.getTanhParameters()]
            changed += ["tanh_parameters"] * (old != values["tanh_parameters"].tolist())
        return changed


def _is_multipole(force: openmm.Force) -> bool:
    return isinstance(force, openmm.AmoebaMultipoleForce)
