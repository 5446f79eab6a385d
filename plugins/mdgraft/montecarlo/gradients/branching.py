"""What estimators that follow branches have in common: their settings, and their runs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import BiasClass, Estimate
from mdgraft.montecarlo.gradients.base import from_series
from mdgraft.montecarlo.gradients.branches import Branches, Coalescence
from mdgraft.montecarlo.gradients.couplings import AbstractCoupling
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.gradients.proposals import density_slopes
from mdgraft.montecarlo.gradients.registry import Couplings
from mdgraft.montecarlo.gradients.run import AbstractPathGradient, AbstractRun
from mdgraft.montecarlo.gradients.tangents import Tangents
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState

_BRANCHES, _DENSITIES, _TANGENTS = "branches.", "densities", "tangents"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledRun:
    """An estimate by coupled branches, and how these fared."""

    estimate: Estimate
    coalescence: Coalescence


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractBranching(AbstractPathGradient):
    """An estimator with `Branches`.

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

    @abc.abstractmethod
    def begin(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> BranchingRun:
        """See `AbstractPathGradient.begin`."""

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
        run = self.begin(sampler, observable, stride=stride, parameters=parameters)
        run.advance(n_samples)
        return run.result()


class BranchingRun(AbstractRun):
    """A run with one branch for each chain and parameter scalar, and tangents if need be.

    Parameters
    ----------
    settings
        Of the estimator.
    method
        What the estimate is called.
    sampler, observable, conjugates, stride
        See `AbstractRun`.
    tangents
        Of the configurations, or None where none depends on parameters.
    """

    def __init__(
        self,
        settings: AbstractBranching,
        method: str,
        sampler: Metropolis,
        observable: ChainObservable,
        conjugates: Conjugates,
        stride: int,
        tangents: Tangents | None = None,
    ) -> None:
        super().__init__(sampler, observable, conjugates, stride)
        self._method, self._n_warm_up, self._tangents = method, settings.warm_up, tangents
        self._branches = Branches(
            sampler,
            conjugates.n_scalars,
            Couplings(sampler.moves.updates, settings.couplings),
            torch.Generator().manual_seed(settings.seed + 1000003 * sampler.state.step),
            max_age=settings.max_age,
            tolerance=settings.tolerance,
        )
        self._densities = conjugates(sampler.state)

    def estimate(self) -> Estimate:
        """See `AbstractRun.estimate`."""
        return self.result().estimate

    def result(self) -> CoupledRun:
        """The estimate, with statistics of the branches."""
        self._require_samples()
        coalescence = self._branches.coalescence()
        unbiased = self.sampler.adjusted and not coalescence.n_cut
        bias: BiasClass = "consistent" if unbiased else "biased"
        return CoupledRun(
            estimate=from_series(
                self.series("values"),
                self.series("gradients"),
                self.conjugates,
                method=self._method,
                bias=bias,
            ),
            coalescence=coalescence,
        )

    def _warm_up(self) -> None:
        for _ in range(self._n_warm_up):
            for update in self.sampler.step():
                self._follow(update)

    def _follow(self, update: Update) -> None:
        self._branches.evolve(update)
        if self._tangents is None:
            slopes, self._densities = density_slopes(self.conjugates, update, self._densities)
        else:
            slopes, self._densities = self._tangents.advance(update, self._densities)
        if update.move.adjusted:
            self._branches.give_birth(update.transition, slopes)

    def _take(self, state: ChainState) -> None:
        value = self.observer.values(state)
        gradient = branch_contributions(self._branches, self.observer, value)
        parts = [self.observer.derivatives(state)]
        if self._tangents is not None:
            parts.append(self._tangents.contributions(self.observer, state))
        for part in parts:
            gradient = gradient if part is None else gradient + part
        self._append(values=value, gradients=gradient)

    def _series_shapes(self) -> Mapping[str, tuple[int, ...]]:
        one = (self.sampler.state.n_chains, *self.observer.shape)
        return {"values": one, "gradients": (*one, self.conjugates.n_scalars)}

    def _own_state(self) -> dict[str, Tensor]:
        found = {_BRANCHES + name: t for name, t in self._branches.state_dict().items()}
        found[_DENSITIES] = self._densities
        if self._tangents is not None:
            found[_TANGENTS] = self._tangents.values
        return found

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        device = self._densities.device
        self._densities = values[_DENSITIES].to(device)
        if self._tangents is not None:
            self._tangents.values = values[_TANGENTS].to(device)
        self._branches.load_state_dict(
            {k.removeprefix(_BRANCHES): v for k, v in values.items() if k.startswith(_BRANCHES)}
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
