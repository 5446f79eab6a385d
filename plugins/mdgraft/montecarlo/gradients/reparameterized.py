"""Reparameterised chains: derivatives of the path, and of what accepting and rejecting cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mdgraft.montecarlo.gradients.branching import AbstractBranching, BranchingRun
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.gradients.proposals import scale_names
from mdgraft.montecarlo.gradients.tangents import Tangents
from mdgraft.montecarlo.metropolis import Metropolis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparameterized(AbstractBranching):
    """Differentiate the path at fixed random numbers, and couple what decisions cut.

    ``d<O_t> = <dO_t + grad O . v + W (O(y_t) - O(x_t))>`` with the tangent ``v = dx/dtheta`` of
    the path (see `Tangents`) and the branch y that follows from another decision (see `Branches`),
    whose weight follows from the total derivative of the acceptance probability. Leaving the
    second part out is the mistake that automatic differentiation makes. For `MALA`, `HMC`
    and `ULA`, whose proposals depend on the target, and for the scales of moves, named
    ``<move>.scale``. Unbiased for the average over a chain of any length from where it started.

    Where the potential is convex both parts contract and the variance is small. Elsewhere
    tangents grow, as in any chaotic system; look at the standard error. The samples of `ULA` are
    not those of the target: the estimate is the derivative of what is sampled, and called biased.

    Parameters
    ----------
    warm_up, max_age, tolerance, couplings, seed
        See `AbstractBranching`. Common random numbers of `HMC` bring chains close but never quite
        together, so that a larger tolerance pays.

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
        """See `AbstractPathGradient.begin`; `AbstractRun.advance` may raise.

        Raises
        ------
        UnsupportedDerivativeError
            If the observable has no derivative in the positions.
        """
        conjugates = Conjugates(sampler.target, parameters, scales=scale_names(sampler))
        return BranchingRun(
            self,
            "reparameterized" if sampler.adjusted else "reparameterized, not adjusted",
            sampler,
            observable,
            conjugates,
            stride,
            Tangents(sampler, conjugates),
        )
