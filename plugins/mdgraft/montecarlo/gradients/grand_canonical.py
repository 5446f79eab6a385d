"""Derivatives by the activity from trial insertions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError
from mdgraft.estimate import Estimate
from mdgraft.montecarlo.gradients._assembly import assemble, chain_error
from mdgraft.montecarlo.gradients.base import AbstractGradient, steps
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.base import AbstractMove
from mdgraft.montecarlo.moves.insertion_deletion import InsertionDeletion
from mdgraft.montecarlo.moves.site_change import SiteChange
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.transition import transition

_NAMES = ("log_activity", "chemical_potential")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Insertion(AbstractGradient):
    """``d<O>/d ln z = <lambda (O(X + x) - <O>)>`` over trial insertions x.

    The equation of Georgii, Nguyen and Zessin, ``<sum_i h(x_i, X)> = <lambda h(x, X + x)>`` with
    ``lambda = z V exp(-beta dU)`` averaged over insertions x, turns the covariance of an observable
    with the number of molecules into an average over trial insertions, as Widom's method (J. Chem.
    Phys. 39, 2808 (1963)) does with the free energy. It is independent of fluctuations of the
    number and knows derivatives by the activity alone; for others use `Covariance`. In dense
    systems few insertions count, and its variance is large.

    Parameters
    ----------
    n_trials
        Trial insertions for each sample.
    seed
        Of the trials.

    Raises
    ------
    InvalidInputError
        For less than one trial.
    """

    n_trials: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise InvalidInputError(f"n_trials: got {self.n_trials}, wanted at least 1")

    def estimate(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        n_samples: int,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """See `AbstractGradient.estimate`; ``log_activity`` is the default.

        Raises
        ------
        UnsupportedDerivativeError
            For other parameters than ``log_activity``, the same for all places, and
            ``chemical_potential``, or for samplers without exactly one move that inserts.
        """
        wanted = ["log_activity"] if parameters is None else parameters
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        if not set(wanted) <= set(_NAMES):
            raise UnsupportedDerivativeError(
                f"parameters: got {wanted}, wanted some of {_NAMES}; Covariance() knows others"
            )
        target = sampler.target
        conjugates = Conjugates(target, wanted)
        if target.log_activity is not None and target.log_activity.ndim:
            raise UnsupportedDerivativeError(
                "parameters: places have activities of their own, which trial insertions do not "
                "tell apart; use Covariance(), or a scalar log_activity"
            )
        move = _inserting(sampler)
        observer = Observer(observable, conjugates, sampler.state)
        generator = torch.Generator().manual_seed(self.seed + 1000003 * sampler.state.step)
        values, rates, products = [], [], []
        for _, sample in steps(sampler, n_samples, stride):
            if not sample:
                continue
            state = sampler.state
            values.append(observer.values(state))
            found = [self._trial(move, state, observer, generator) for _ in range(self.n_trials)]
            rates.append(torch.stack([rate for rate, _ in found]).mean(dim=0))
            products.append(torch.stack([product for _, product in found]).mean(dim=0))
        series, rate, product = torch.stack(values), torch.stack(rates), torch.stack(products)
        mean = series.mean(dim=(0, 1))
        wide = rate.reshape(*rate.shape, *[1] * mean.ndim)
        # <lambda O'> - <lambda> <O>, and its influence series.
        weighted = product - wide * mean
        gradient = weighted.mean(dim=(0, 1))
        influence = weighted - gradient - rate.mean() * (series - mean)
        error, inefficiency = chain_error(influence)
        factors = torch.tensor(
            [target.beta if name == "chemical_potential" else 1.0 for name in conjugates.names],
            dtype=torch.float64,
            device=gradient.device,
        )
        return assemble(
            value=mean,
            value_influence=series - mean,
            gradient=conjugates.split(gradient[..., None] * factors),
            gradient_error=conjugates.split(error[..., None] * factors),
            gradient_inefficiency=conjugates.split(
                inefficiency[..., None].expand(*mean.shape, len(factors))
            ),
            method="trial insertions",
            bias="consistent",
        )

    @torch.no_grad()
    def _trial(
        self,
        move: AbstractMove,
        state: ChainState,
        observer: Observer,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """``lambda`` ``(C,)`` and ``lambda O(X + x)`` ``(C, *S)``, one insertion in each chain."""
        noise = dict(move.draw(state, generator))
        if isinstance(move, InsertionDeletion):
            noise["insert"] = torch.zeros_like(noise["insert"])
        never = torch.ones(state.n_chains, dtype=torch.float64, device=state.positions.device)
        result = transition(state, move, observer.conjugates.target, noise, never)
        assert state.present is not None and result.proposed.present is not None
        numbers = state.present.sum(dim=1)
        inserted = result.proposed.present.sum(dim=1) > numbers
        if isinstance(move, InsertionDeletion):
            # The acceptance ratio is lambda / (n + 1), with n molecules of this species.
            if move.places is not None:
                numbers = state.present[:, move.places.to(state.positions.device)].sum(dim=1)
            ways = numbers + 1.0
        else:
            # One site of S was tried.
            ways = torch.full_like(numbers, state.present.shape[1], dtype=torch.float64)
        rate = torch.where(inserted, ways * result.log_alpha.exp(), 0.0)
        value = observer.values(result.proposed)
        return rate, rate.reshape(-1, *[1] * (value.ndim - 1)) * value


def _inserting(sampler: Metropolis) -> AbstractMove:
    """The one move that inserts."""
    found = [
        move
        for update in sampler.moves.updates
        for move in update.components
        if isinstance(move, InsertionDeletion)
        or (isinstance(move, SiteChange) and move.variable == "present")
    ]
    if len(found) != 1:
        raise UnsupportedDerivativeError(
            f"sampler: has {len(found)} moves that insert molecules, wanted exactly one, an "
            "InsertionDeletion or a SiteChange('present'); use Covariance()"
        )
    return found[0]
