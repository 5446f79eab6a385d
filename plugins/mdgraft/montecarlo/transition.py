"""One accept-or-reject update as a function of its random numbers."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft._errors import SimulationError
from mdgraft.montecarlo.moves.base import AbstractMove, Noise
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """What happened in one update of C chains.

    Attributes
    ----------
    before, proposed, after
        States with their energies. A proposal that is impossible equals ``before``.
    log_alpha
        ``(C,)`` logarithm of the acceptance ratio, before ``min(0, .)``; ``-inf`` for what is
        impossible. With a graph where gradients are on.
    accepted
        ``(C,)`` booleans: ``ln u < log_alpha``.
    component
        ``(C,)`` int64: which of the move's components proposed.
    """

    before: ChainState
    proposed: ChainState
    after: ChainState
    log_alpha: Tensor
    accepted: Tensor
    component: Tensor


def transition(
    state: ChainState, move: AbstractMove, target: Target, noise: Noise, u: Tensor
) -> Transition:
    """Propose, and accept or reject by Metropolis and Hastings' rule.

    Deterministic: the same state, noise and u give the same result. Energies and
    forces that the state knows are used, others computed.

    Parameters
    ----------
    state
        C chains.
    move
        A move that is one update: no `Sequence`, whose ``updates`` are.
    target
        The distribution.
    noise
        What ``move.draw(state, generator)`` gave.
    u
        ``(C,)`` uniform in [0, 1).

    Raises
    ------
    SimulationError
        If an energy is NaN or ``-inf``.
    """
    if state.energies is None:
        state = state.replace(energies=checked(target.energies(state), "of the present state"))
    proposal = move.apply(state, noise, target)
    before = state if proposal.before is None else proposal.before
    # Virtual sites have no say in a proposal: they follow.
    made = target.placed(proposal.state)
    energies = _proposed_energies(made, proposal.known, proposal.log_ratio, before, target)
    proposed = made.replace(energies=energies)
    log_alpha = target.log_density(proposed) - target.log_density(before) + proposal.log_ratio
    accepted = u.log() < log_alpha if move.adjusted else torch.isfinite(energies)
    component = proposal.component
    if component is None:
        component = torch.zeros_like(accepted, dtype=torch.long)
    return Transition(
        before=before,
        proposed=proposed,
        after=before.where(accepted, proposed),
        log_alpha=log_alpha,
        accepted=accepted,
        component=component,
    )


def _proposed_energies(
    proposed: ChainState,
    known: Tensor | None,
    log_ratio: Tensor,
    before: ChainState,
    target: Target,
) -> Tensor:
    """Energies of the proposals, computed where they are neither known nor beside the point."""
    if known is None and _all_above(log_ratio):
        energies = target.energies(proposed) if proposed.energies is None else proposed.energies
        return checked(energies, "of a proposal")
    assert before.energies is not None
    possible = log_ratio > -torch.inf
    if known is None:
        known = torch.full_like(possible, proposed.energies is not None)
    found = before.energies if proposed.energies is None else proposed.energies
    energies = torch.where(known & possible, found, before.energies)
    (rows,) = (possible & ~known).nonzero(as_tuple=True)
    if len(rows) == len(possible):
        energies = target.energies(proposed)
    elif len(rows):
        energies = energies.index_copy(0, rows, target.energies(proposed[rows]))
    return checked(energies, "of a proposal")


def checked(energies: Tensor, which: str) -> Tensor:
    """Energies ``(C,)``, none of which is NaN or ``-inf``; others raise `SimulationError`."""
    if not _all_above(energies):
        chain = int((~(energies > -torch.inf)).nonzero()[0])
        raise SimulationError(
            f"energy: that {which} of chain {chain} is {float(energies[chain].detach())}; let the "
            "energy return +inf where a configuration is impossible, or make smaller moves"
        )
    return energies


def _all_above(values: Tensor) -> bool:
    """Whether all are above minus infinity, and none is NaN."""
    return float(values.detach().min()) > -math.inf
