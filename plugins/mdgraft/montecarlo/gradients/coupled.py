"""Coupled branches: differentiable Metropolis-Hastings by smoothed perturbation analysis."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mdgraft.montecarlo.gradients.branching import AbstractBranching, BranchingRun
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.gradients.proposals import require_plain_proposals
from mdgraft.montecarlo.metropolis import Metropolis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(AbstractBranching):
    """Follow the branch that was not taken until it meets the chain.

    ``d<O_t> = <dO_t> + <W (O(y_t) - O(x_t))>`` where y is the branch that follows from another
    decision between accepting and rejecting, and W its weight; see `Branches`. Unbiased for the
    average over a chain of any length from where it started, burn-in included, and for discrete
    states as well. To get derivatives of stationary averages start from an equilibrated chain
    with a `warm_up` longer than branches live.

    Proposals of `Displacement`, `Translation`, `Torsion` and `Volume` are reflection-maximally
    coupled, orientations and choices of discrete states maximally, and others use common random
    numbers. The variance grows with the time that branches live: look at
    ``run(...).coalescence``.

    Parameters
    ----------
    warm_up, max_age, tolerance, couplings, seed
        See `AbstractBranching`.

    Raises
    ------
    InvalidInputError
        For a negative number.
    """

    def begin(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> BranchingRun:
        """See `AbstractPathGradient.begin`.

        Raises
        ------
        UnsupportedDerivativeError
            If a move makes proposals that depend on the target, as `MALA` and `HMC` do.
        """
        conjugates = Conjugates(sampler.target, parameters)
        require_plain_proposals(sampler, "Coupled")
        return BranchingRun(self, "coupled branches", sampler, observable, conjugates, stride)
