"""AmoebaVdwForce."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft.potentials.amoeba.vdw import (
    EPSILON_RULES,
    LAMBDA,
    SIGMA_RULES,
    Alchemical,
    AmoebaVdw,
    AmoebaVdwSettings,
    ParticleTypes,
)

from mdgraft_openmm._converter import (
    AbstractConverter,
    Host,
    Values,
    checked_indices,
    column,
    number,
)

_ALCHEMICAL = {
    openmm.AmoebaVdwForce.Decouple: Alchemical.DECOUPLE,
    openmm.AmoebaVdwForce.Annihilate: Alchemical.ANNIHILATE,
}


class AmoebaVdwConverter(AbstractConverter):
    """AmoebaVdwForce <-> AmoebaVdw."""

    polynomial = frozenset({"scale_factor"})

    def read(self, force: openmm.AmoebaVdwForce, host: Host) -> AmoebaVdw:
        """Build the term, by particle or by type as the force was filled."""
        name, n = force.getName(), host.system.getNumParticles()
        if force.getNumParticles() != n:
            raise InvalidInputError(
                f"{name}: has {force.getNumParticles()} particles, the System {n}"
            )
        rows = [force.getParticleParameters(i) for i in range(n)]
        settings = _settings(force, host)
        types = _types(force, rows)
        return AmoebaVdw(
            checked_indices(name, rows, 0, n_particles=n).squeeze(-1),
            None if types is not None else column(rows, 1),
            None if types is not None else column(rows, 2),
            reduction_factor=column(rows, 3),
            scale_factor=column(rows, 6),
            settings=settings,
            exclusions=_exclusions(force, n, periodic=settings.cutoff is not None),
            alchemical=torch.tensor([bool(row[4]) for row in rows], dtype=torch.bool),
            softcore_alpha=None
            if settings.alchemical is Alchemical.NONE
            else torch.tensor(force.getSoftcoreAlpha(), dtype=torch.float64),
            types=types,
        )

    def write(self, values: Values, force: openmm.AmoebaVdwForce) -> None:
        """Set particles, types and the softcore parameter."""
        for i in range(force.getNumParticles()):
            parent, sigma, epsilon, _, alchemical, kind, _ = force.getParticleParameters(i)
            if "sigma" in values:
                sigma, epsilon = values["sigma"][i], values["epsilon"][i]
            reduction, scale = values["reduction_factor"][i], values["scale_factor"][i]
            force.setParticleParameters(
                i, parent, sigma, epsilon, reduction, alchemical, kind, scale
            )
        if "type_sigma" in values:
            for i in range(force.getNumParticleTypes()):
                row = values["type_sigma"][i], values["type_epsilon"][i]
                force.setParticleTypeParameters(i, *row)
            for i in range(force.getNumTypePairs()):
                first, second, *_ = force.getTypePairParameters(i)
                row = values["type_pair_sigma"][i], values["type_pair_epsilon"][i]
                force.setTypePairParameters(i, first, second, *row)
        if "softcore_alpha" in values:
            force.setSoftcoreAlpha(float(values["softcore_alpha"]))

    def refused(self, values: Values, force: openmm.AmoebaVdwForce) -> str | None:
        """Find radii that no Context accepts."""
        lennard_jones = force.getPotentialFunction() == openmm.AmoebaVdwForce.LennardJones
        for key in ("sigma", "type_sigma"):
            sigma = values.get(key, np.empty(0))
            wrong = sigma < 0 if lennard_jones else sigma <= 0
            if wrong.any():
                i = int(sigma.argmin())
                return (
                    f"{force.getName()}.{key}: entry {i} is {sigma[i]:g} nm; OpenMM accepts only "
                    f"values that are {'not negative' if lennard_jones else 'positive'}"
                )
        return None

    def structural(self, values: Values, force: openmm.AmoebaVdwForce) -> list[str]:
        """Changes of radii and depths while there is a dispersion correction.

        A live Context keeps the correction that it computed when it was made.
        """
        periodic = force.getNonbondedMethod() == openmm.AmoebaVdwForce.CutoffPeriodic
        if not (periodic and force.getUseDispersionCorrection()):
            return []
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        kinds = [force.getParticleTypeParameters(i) for i in range(force.getNumParticleTypes())]
        pairs = [force.getTypePairParameters(i) for i in range(force.getNumTypePairs())]
        present = {
            "sigma": column(rows, 1),
            "epsilon": column(rows, 2),
            "type_sigma": column(kinds, 0),
            "type_epsilon": column(kinds, 1),
            "type_pair_sigma": column(pairs, 2),
            "type_pair_epsilon": column(pairs, 3),
        }
        return [
            f"{key} with a dispersion correction"
            for key, old in present.items()
            if key in values and not np.array_equal(old.numpy(), values[key])
        ]

    def global_defaults(self, force: Any) -> dict[str, float]:
        """The scale of alchemical interactions, which every such force adds to a Context."""
        return {LAMBDA: 1.0}

    def settable_globals(self, force: Any) -> Collection[str]:
        """None: OpenMM has no setter, and always declares 1."""
        return ()

    def set_global_default(self, force: Any, name: str, value: float) -> None:
        """Nothing to set."""


def _settings(force: openmm.AmoebaVdwForce, host: Host) -> AmoebaVdwSettings:
    name = force.getName()
    sigma_rule, epsilon_rule = force.getSigmaCombiningRule(), force.getEpsilonCombiningRule()
    for kind, rule, known in (
        ("sigma", sigma_rule, SIGMA_RULES),
        ("epsilon", epsilon_rule, EPSILON_RULES),
    ):
        if rule not in known:
            raise InvalidInputError(
                f"{name}: has the {kind} combining rule {rule!r}, wanted one of {', '.join(known)}"
            )
    periodic = force.getNonbondedMethod() == openmm.AmoebaVdwForce.CutoffPeriodic
    cutoff = number(force.getCutoffDistance()) if periodic else None
    if cutoff is not None:
        box = host.system.getDefaultPeriodicBoxVectors()
        shortest = min(number(box[d][d]) for d in range(3))
        if not 0 < cutoff <= 0.5 * shortest:
            raise InvalidInputError(
                f"{name}: has a cutoff of {cutoff:g} nm, which must be positive and at most half "
                f"of the shortest default box length, {shortest:g} nm"
            )
    return AmoebaVdwSettings(
        cutoff=cutoff,
        lennard_jones=force.getPotentialFunction() == openmm.AmoebaVdwForce.LennardJones,
        sigma_rule=sigma_rule,
        epsilon_rule=epsilon_rule,
        alchemical=_ALCHEMICAL.get(force.getAlchemicalMethod(), Alchemical.NONE),
        softcore_power=force.getSoftcorePower(),
        dispersion_correction=periodic and bool(force.getUseDispersionCorrection()),
    )


def _types(force: openmm.AmoebaVdwForce, rows: list[tuple[Any, ...]]) -> ParticleTypes | None:
    # There is no getter for the mode; only particles added by type have an index.
    if not rows or all(row[5] < 0 for row in rows):
        return None
    name = force.getName()
    kinds = [force.getParticleTypeParameters(i) for i in range(force.getNumParticleTypes())]
    pairs = [force.getTypePairParameters(i) for i in range(force.getNumTypePairs())]
    return ParticleTypes(
        index=checked_indices(name, rows, 5, n_particles=len(kinds)).squeeze(-1),
        sigma=column(kinds, 0),
        epsilon=column(kinds, 1),
        pairs=checked_indices(name, pairs, 0, 1, n_particles=len(kinds)),
        pair_sigma=column(pairs, 2),
        pair_epsilon=column(pairs, 3),
    )


def _exclusions(force: openmm.AmoebaVdwForce, n: int, *, periodic: bool) -> torch.Tensor:
    """Excluded pairs ``(exclusions, 2)``.

    A pair may be listed for one particle only: without a cutoff OpenMM asks the one with the
    lower index, with a cutoff the one with the higher index.
    """
    listed = [(i, int(j)) for i in range(n) for j in force.getParticleExclusions(i)]
    for i, j in listed:
        if not 0 <= j < n:
            raise InvalidInputError(
                f"{force.getName()}: particle {i} excludes {j}, but indices reach only from 0 to "
                f"{n - 1}"
            )
    kept = [(i, j) for i, j in listed if (i > j if periodic else i < j)]
    return torch.tensor(kept, dtype=torch.long).reshape(-1, 2)
