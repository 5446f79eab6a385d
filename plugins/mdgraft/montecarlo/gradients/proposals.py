"""How the acceptance and the proposals of a move depend on parameters."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from mdgraft._errors import UnsupportedDerivativeError
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class _Looked(Exception):  # noqa: N818 - not an error: an answer
    """A move looked at the target."""


class _Unseen:
    """A target that tells when it is looked at."""

    def __getattr__(self, name: str) -> NoReturn:
        raise _Looked


def looks_at_target(move: AbstractMove, state: ChainState) -> bool:
    """Whether proposals of a move are made with the help of the target, as those of `MALA` are."""
    unseen = cast(Target, cast(Any, _Unseen()))
    bare = state.replace(positions=state.positions)
    try:
        with torch.no_grad():
            move.propose(bare, unseen, torch.Generator().manual_seed(0))
    except _Looked:
        return True
    return False


def scale_names(sampler: Metropolis) -> list[str]:
    """What the scales of the moves are called as parameters."""
    return [f"{name}.scale" for name in sampler.scales]


def require_plain_proposals(sampler: Metropolis, method: str) -> None:
    """Raise unless no proposal depends on the target."""
    for move in sampler.moves.components:
        if looks_at_target(move, sampler.state[:1]):
            raise UnsupportedDerivativeError(
                f"sampler: the proposals of {move.name} depend on the target, which {method}() "
                "does not differentiate; use Reparameterized(), or Covariance() for stationary "
                "averages"
            )


@torch.no_grad()
def density_slopes(
    conjugates: Conjugates, update: Update, densities: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives ``(C, P)`` of ``log_alpha`` for proposals that depend on no parameter.

    Parameters
    ----------
    conjugates
        The parameters.
    update
        One update of C chains.
    densities
        ``(C, P)``: the conjugates of ``update.transition.before``.

    Returns
    -------
    tuple of Tensor
        The slopes, zero where no proposal is possible, and the conjugates of the state after.
    """
    result = update.transition
    possible = result.log_alpha > -torch.inf
    proposed = densities.clone()
    (rows,) = possible.nonzero(as_tuple=True)
    if len(rows) == len(possible):
        proposed = conjugates(result.proposed)
    elif len(rows):
        proposed = proposed.index_copy(0, rows, conjugates(result.proposed[rows]))
    after = torch.where(result.accepted[:, None], proposed, densities)
    return proposed - densities, after
