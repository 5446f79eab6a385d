"""Reparameterised chains: derivatives of the path, and of what accepting and rejecting cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import BiasClass, Estimate
from mdgraft.montecarlo.gradients.base import AbstractGradient, from_series, steps
from mdgraft.montecarlo.gradients.branches import Branches
from mdgraft.montecarlo.gradients.coupled import CoupledRun, branch_contributions
from mdgraft.montecarlo.gradients.couplings import AbstractCoupling
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.gradients.proposals import scale_names
from mdgraft.montecarlo.gradients.registry import Couplings
from mdgraft.montecarlo.gradients.tangents import Tangents
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparameterized(AbstractGradient):
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
    warm_up
        Steps before the first sample, in which tangents and branches form but are not counted.
    max_age
        Updates after which a branch is cut, see `Coupled`.
    tolerance
        Distance [nm] of every particle below which a branch and its chain are the same. Common
        random numbers of `HMC` bring chains close but never quite together.
    couplings
        Couplings by the names of moves, in place of the usual ones.
    seed
        Of the choices between branches.

    Raises
    ------
    InvalidInputError
        For a negative number.
    """

    warm_up: int = 0
    max_age: int | None = None
    tolerance: float = 1e-9
    couplings: Mapping[str, AbstractCoupling] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warm_up < 0 or (self.max_age is not None and self.max_age < 1):
            raise InvalidInputError(
                f"warm_up, max_age: got {self.warm_up} and {self.max_age}, wanted at least 0 and 1"
            )
        if not self.tolerance >= 0.0:
            raise InvalidInputError(f"tolerance: got {self.tolerance!r}, wanted at least 0 nm")

    def estimate(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """See `AbstractGradient.estimate`.

        Raises
        ------
        UnsupportedDerivativeError
            If the observable has no derivative in the positions.
        """
        run = self.run(sampler, observable, n_samples, stride=stride, parameters=parameters)
        return run.estimate

    def run(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> CoupledRun:
        """As `estimate`, with statistics of the branches."""
        conjugates = Conjugates(sampler.target, parameters, scales=scale_names(sampler))
        observer = Observer(observable, conjugates, sampler.state)
        tangents = Tangents(sampler, conjugates)
        branches = Branches(
            sampler,
            conjugates.n_scalars,
            Couplings(sampler.moves.updates, self.couplings),
            torch.Generator().manual_seed(self.seed + 1000003 * sampler.state.step),
            max_age=self.max_age,
            tolerance=self.tolerance,
        )
        densities = conjugates(sampler.state)

        def advance(updates: Sequence[Update], densities: Tensor) -> Tensor:
            for update in updates:
                branches.evolve(update)
                slopes, densities = tangents.advance(update, densities)
                if update.move.adjusted:
                    branches.give_birth(update.transition, slopes)
            return densities

        for _ in range(self.warm_up):
            densities = advance(sampler.step(), densities)
        values, gradients = [], []
        for updates, sample in steps(sampler, n_samples, stride):
            densities = advance(updates, densities)
            if not sample:
                continue
            state = sampler.state
            value = observer.values(state)
            gradient = branch_contributions(branches, observer, value)
            for part in (observer.derivatives(state), tangents.contributions(observer, state)):
                gradient = gradient if part is None else gradient + part
            values.append(value)
            gradients.append(gradient)
        coalescence = branches.coalescence()
        unbiased = sampler.adjusted and not coalescence.n_cut
        bias: BiasClass = "consistent" if unbiased else "biased"
        method = "reparameterized" if sampler.adjusted else "reparameterized, not adjusted"
        return CoupledRun(
            estimate=from_series(
                torch.stack(values), torch.stack(gradients), conjugates, method=method, bias=bias
            ),
            coalescence=coalescence,
        )
