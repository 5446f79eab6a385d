"""Coupled branches: differentiable Metropolis-Hastings by smoothed perturbation analysis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import BiasClass, Estimate
from mdgraft.montecarlo.gradients.base import AbstractGradient, from_series, steps
from mdgraft.montecarlo.gradients.branches import Branches, Coalescence
from mdgraft.montecarlo.gradients.couplings import AbstractCoupling
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.gradients.proposals import density_slopes, require_plain_proposals
from mdgraft.montecarlo.gradients.registry import Couplings
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledRun:
    """An estimate by coupled branches, and how these fared."""

    estimate: Estimate
    coalescence: Coalescence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(AbstractGradient):
    """Follow the branch that was not taken until it meets the chain.

    ``d<O_t> = <dO_t> + <W (O(y_t) - O(x_t))>`` where y is the branch that follows from another
    decision between accepting and rejecting, and W its weight; see `Branches`. Unbiased for the
    average over a chain of any length from where it started, burn-in included, and for discrete
    states as well. To get derivatives of stationary averages start from an equilibrated chain
    with a `warm_up` longer than branches live.

    Proposals of `Displacement`, `Translation`, `Torsion` and `Volume` are reflection-maximally
    coupled, orientations and choices of discrete states maximally, and others use common random
    numbers. The variance
    grows with the time that branches live: look at ``run(...).coalescence``.

    Parameters
    ----------
    warm_up
        Steps before the first sample, in which branches are born but not counted.
    max_age
        Updates after which a branch is cut, which bounds the variance at the price of a bias: the
        estimate is then called biased if any was cut.
    tolerance
        Distance [nm] of every particle below which a branch and its chain are the same; far below
        what matters, far above rounding.
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
            If a move makes proposals that depend on the target, as `MALA` and `HMC` do.
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
        conjugates = Conjugates(sampler.target, parameters)
        require_plain_proposals(sampler, "Coupled")
        observer = Observer(observable, conjugates, sampler.state)
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
                slopes, densities = density_slopes(conjugates, update, densities)
                branches.give_birth(update.transition, slopes)
            return densities

        for _ in range(self.warm_up):
            densities = advance(sampler.step(), densities)
        values, gradients = [], []
        for updates, sample in steps(sampler, n_samples, stride):
            densities = advance(updates, densities)
            if sample:
                state = sampler.state
                value = observer.values(state)
                gradient = branch_contributions(branches, observer, value)
                explicit = observer.derivatives(state)
                values.append(value)
                gradients.append(gradient if explicit is None else gradient + explicit)
        series = torch.stack(gradients)
        coalescence = branches.coalescence()
        bias: BiasClass = "biased" if coalescence.n_cut else "consistent"
        return CoupledRun(
            estimate=from_series(
                torch.stack(values), series, conjugates, method="coupled branches", bias=bias
            ),
            coalescence=coalescence,
        )


def branch_contributions(branches: Branches, observer: Observer, value: Tensor) -> Tensor:
    """``W (O(y) - O(x))``, ``(C, *S, P)``."""
    n_chains, shape = value.shape[0], value.shape[1:]
    made = value.new_zeros(branches.n_scalars * n_chains, *shape)
    alive = branches.alive
    if len(alive):
        other = observer.values(branches.states[alive])
        weights = branches.weights[alive].reshape(-1, *[1] * len(shape))
        made[alive] = weights * (other - value[alive % n_chains])
    return made.reshape(branches.n_scalars, n_chains, *shape).movedim(0, -1)
