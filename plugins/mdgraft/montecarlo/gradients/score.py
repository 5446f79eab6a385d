"""The score function: the logarithm of a path's probability as a weight."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError, UnsupportedDerivativeError
from mdgraft.ensembles import autocovariance
from mdgraft.estimate import BiasClass, Estimate
from mdgraft.montecarlo.gradients.base import from_series
from mdgraft.montecarlo.gradients.jacobians import chain_jacobian
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.gradients.parameters import Conjugates, trainable
from mdgraft.montecarlo.gradients.proposals import (
    density_slopes,
    looks_at_target,
    scale_names,
)
from mdgraft.montecarlo.gradients.run import AbstractPathGradient, AbstractRun
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.moves.base import AbstractGaussianMove, AbstractMove
from mdgraft.montecarlo.moves.displacement import Displacement
from mdgraft.montecarlo.moves.rotation import Rotation
from mdgraft.montecarlo.moves.torsion import Torsion
from mdgraft.montecarlo.moves.translation import Translation
from mdgraft.montecarlo.moves.volume import Volume
from mdgraft.montecarlo.samples import Update
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import HasForces, Target

#: Normal numbers that the scale of a move multiplies.
_SCALED: dict[type[AbstractMove], str] = {
    Displacement: "normal",
    Translation: "normal",
    Torsion: "normal",
    Volume: "normal",
    Rotation: "angle",
}


class AbstractBaseline(abc.ABC):
    """What is subtracted from an observable before it is weighted: any function of the past."""

    @abc.abstractmethod
    def weighted(self, values: Tensor, increments: Tensor, scores: Tensor, window: int) -> Tensor:
        """Weighted values whose average is the derivative.

        Parameters
        ----------
        values
            O, ``(T, C, S)``.
        increments
            Increment of the score that leads to each sample, ``(T, C, P)``.
        scores
            Sums of the last ``window`` increments, ``(T, C, P)``.
        window
            M.

        Returns
        -------
        Tensor
            ``(T, C, S, P)``.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanBaseline(AbstractBaseline):
    """Subtract the mean over all samples."""

    def weighted(self, values: Tensor, increments: Tensor, scores: Tensor, window: int) -> Tensor:
        """See `AbstractBaseline`."""
        deviation = values - values.mean(dim=(0, 1))
        return deviation[..., :, None] * scores[..., None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastBaseline(AbstractBaseline):
    """Subtract what the observable before an increment says about the one after.

    The control variate ``rho_k (O_{t-k} - <O>)`` for an increment k samples back, with the
    autocorrelation rho of the observable.
    """

    def weighted(self, values: Tensor, increments: Tensor, scores: Tensor, window: int) -> Tensor:
        """See `AbstractBaseline`."""
        deviation = values - values.mean(dim=(0, 1))
        weighted = deviation[..., :, None] * scores[..., None, :]
        covariance = autocovariance(deviation).mean(dim=1)
        rho = covariance / torch.where(covariance[0] > 0, covariance[0], 1.0)
        for k in range(1, min(window, len(values) - 1) + 1):
            # Once the estimated correlation has vanished it is only noise.
            known = (rho[1 : k + 1] > 0).all(dim=0)
            if not bool(known.any()):
                break
            expected = torch.where(known, rho[k], 0.0) * deviation[:-k]
            weighted[k:] -= expected[..., :, None] * increments[1 : len(values) - k + 1, :, None]
        return weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(AbstractPathGradient):
    """``d<O_t> = <dO_t> + <(O_t - b) q_t>`` with the score q of the path that led to t.

    The score is the derivative of the logarithm of the path's probability: of ``ln alpha`` for
    each accepted proposal, of ``ln(1 - alpha)`` for each rejected one, and of the proposal's
    density where this depends on a parameter (Glynn, Commun. ACM 33, 75 (1990); Warren and Allen,
    Phys. Rev. Lett. 109, 250601 (2012)). It needs no coupling and knows burn-in, discrete states
    and the scales of moves, named ``<move>.scale``, but its variance grows with the window.

    Parameters
    ----------
    window
        Samples that the score reaches back; None for all since the start. A window that is short
        against correlation times is a bias, so that the estimate is called approximate; without
        one it is unbiased for chains of this length from where they started. With a window, as
        many samples are run first, to fill it.
    baseline
        What is subtracted from the observable.

    Raises
    ------
    InvalidInputError
        For a window below one sample.
    """

    window: int | None = 50
    baseline: AbstractBaseline = dataclasses.field(default_factory=MeanBaseline)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InvalidInputError(f"window: got {self.window}, wanted at least 1 sample, or None")
        if not isinstance(self.baseline, AbstractBaseline):
            raise InvalidInputError(
                f"baseline: got {type(self.baseline).__name__}, wanted MeanBaseline() or "
                "PastBaseline()"
            )

    def begin(
        self,
        sampler: Metropolis,
        observable: ChainObservable,
        *,
        stride: int = 1,
        parameters: Sequence[str] | None = None,
    ) -> ScoreRun:
        """See `AbstractPathGradient.begin`.

        Raises
        ------
        UnsupportedDerivativeError
            For a move whose proposals have no density that depends on parameters in a known way,
            such as `HMC`.
        """
        conjugates = Conjugates(sampler.target, parameters, scales=scale_names(sampler))
        return ScoreRun(self, sampler, observable, conjugates, stride)


class ScoreRun(AbstractRun):
    """A run that adds up the score; see `Score` and `AbstractRun`."""

    def __init__(
        self,
        settings: Score,
        sampler: Metropolis,
        observable: ChainObservable,
        conjugates: Conjugates,
        stride: int,
    ) -> None:
        self._scorers = {
            move.name: _Scorer(move, sampler, conjugates) for move in sampler.moves.updates
        }
        super().__init__(sampler, observable, conjugates, stride)
        self._settings = settings
        self._densities = conjugates(sampler.state)
        self._increment = torch.zeros_like(self._densities)
        #: Increments of the samples that fill the window.
        self._lead: list[Tensor] = []

    def estimate(self) -> Estimate:
        """See `AbstractRun.estimate`."""
        self._require_samples()
        window, lead = self._settings.window, len(self._lead)
        values, increments = self.series("values"), self.series("increments")
        every = torch.cat([torch.stack(self._lead), increments]) if lead else increments
        total = torch.cat([torch.zeros_like(every[:1]), every.cumsum(dim=0)])
        scores = total[1 + lead :] - (0.0 if window is None else total[1:-lead])
        flat = values.reshape(*values.shape[:2], -1)
        weighted = self._settings.baseline.weighted(
            flat, increments, scores, len(every) if window is None else window
        )
        weighted = weighted.reshape(*values.shape, self.conjugates.n_scalars)
        if self.observer.explicit:
            weighted = weighted + self.series("explicit")
        bias: BiasClass = "consistent" if window is None else "approximate"
        if not self.sampler.adjusted:
            bias = "biased"
        reach = "since the start" if window is None else f"over {window} samples"
        return from_series(
            values, weighted, self.conjugates, method=f"score function {reach}", bias=bias
        )

    def _warm_up(self) -> None:
        for _ in range(self._settings.window or 0):
            for _ in range(self.stride):
                for update in self.sampler.step():
                    self._follow(update)
            self._lead.append(self._increment)
            self._increment = torch.zeros_like(self._increment)

    def _follow(self, update: Update) -> None:
        change, self._densities = self._scorers[update.move.name].score(update, self._densities)
        self._increment = self._increment + change

    def _take(self, state: ChainState) -> None:
        self._append(values=self.observer.values(state), increments=self._increment)
        self._increment = torch.zeros_like(self._increment)
        derivative = self.observer.derivatives(state)
        if derivative is not None:
            self._append(explicit=derivative)

    def _series_shapes(self) -> Mapping[str, tuple[int, ...]]:
        one = (self.sampler.state.n_chains, *self.observer.shape)
        scores = (self.sampler.state.n_chains, self.conjugates.n_scalars)
        shapes = {"values": one, "increments": scores}
        if self.observer.explicit:
            shapes["explicit"] = (*one, self.conjugates.n_scalars)
        return shapes

    def _own_state(self) -> dict[str, Tensor]:
        # Between samples there is no increment left.
        empty = self._densities.new_zeros(0, *self._densities.shape)
        return {
            "densities": self._densities,
            "lead": torch.stack(self._lead) if self._lead else empty,
        }

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        device = self._densities.device
        self._densities = values["densities"].to(device)
        self._increment = torch.zeros_like(self._densities)
        self._lead = list(values["lead"].to(device).unbind(dim=0))


class _Scorer:
    """Increments of the score for the updates by one move."""

    def __init__(self, move: AbstractMove, sampler: Metropolis, conjugates: Conjugates) -> None:
        self.conjugates = conjugates
        self.target: Target = sampler.target
        looking = [m for m in move.components if looks_at_target(m, sampler.state[:1])]
        wanted = [m for m in move.components if f"{m.name}.scale" in conjugates.scales]
        unlisted = [m for m in wanted if type(m) not in _SCALED]
        for part in unlisted:
            if part is not move or not _moves_all(part, sampler):
                raise UnsupportedDerivativeError(
                    f"parameters: the score of the scale of {part.name} is not known; it is for "
                    f"{sorted(kind.__name__ for kind in _SCALED)} and, outside of mixtures, for "
                    "normal proposals of all positions"
                )
        self.gaussian = bool(looking or unlisted)
        # Whether other moves need the conjugates of the states that this one makes.
        self._mixed = len(sampler.moves.updates) > 1
        for part in looking:
            if part is not move or not _moves_all(part, sampler):
                raise UnsupportedDerivativeError(
                    f"sampler: the proposals of {part.name} depend on the target and have no known "
                    "density; use Reparameterized(), or Covariance() for stationary averages"
                )
            if isinstance(self.target.energy, HasForces):
                raise UnsupportedDerivativeError(
                    f"sampler: the proposals of {part.name} depend on forces that the energy "
                    "gives without a graph; use Reparameterized(), or Covariance()"
                )
        if self.gaussian and "temperature" in conjugates.thermodynamic:
            raise UnsupportedDerivativeError(
                f"parameters: temperature is not differentiated together with the density of the "
                f"proposals of {move.name}; use Covariance()"
            )

    def score(self, update: Update, densities: Tensor) -> tuple[Tensor, Tensor]:
        """The increment ``(C, P)``, and the conjugates of the state after."""
        if self.gaussian:
            slopes, proposal = self._gaussian(update)
            if self._mixed:
                densities = self.conjugates(update.transition.after)
            return _decision(update, slopes) + proposal, densities
        slopes, after = density_slopes(self.conjugates, update, densities)
        return _decision(update, slopes) + self._scales(update, slopes), after

    def _scales(self, update: Update, like: Tensor) -> Tensor:
        """``d ln q / d s = (|xi|^2 - n) / s`` for n normal numbers xi times a scale s."""
        made = torch.zeros_like(like)
        first = like.shape[1] - len(self.conjugates.scales)
        parts = update.move.components
        for k, part in enumerate(parts):
            name = f"{part.name}.scale"
            key = ("" if part is update.move else f"{k}.") + _SCALED.get(type(part), "")
            if name not in self.conjugates.scales or key not in update.noise:
                continue
            xi = update.noise[key]
            xi = xi.reshape(xi.shape[0], -1)
            change = (xi.square().sum(dim=1) - xi.shape[1]) / part.scale.detach()
            mine = update.transition.component == k
            column = first + self.conjugates.scales.index(name)
            made[:, column] = torch.where(mine, change.to(made), 0.0)
        return made

    def _gaussian(self, update: Update) -> tuple[Tensor, Tensor]:
        """Slopes of ``log_alpha`` and of the proposal's log density, each ``(C, P)``."""
        move, result = update.move, update.transition
        assert isinstance(move, AbstractGaussianMove)
        before, proposed = (
            s.replace(positions=s.positions) for s in (result.before, result.proposed)
        )
        scale = move.scale.detach().clone().requires_grad_(True)
        free = move.with_scale(scale)
        leaves = self.conjugates.parameters
        with trainable(leaves), torch.enable_grad():
            there = _log_normal(free, before, proposed, self.target)
            back = _log_normal(free, proposed, before, self.target)
            log_alpha = (
                self.target.log_density(proposed) - self.target.log_density(before) + back - there
            )
            slopes, proposal = chain_jacobian((log_alpha, there), [*leaves, scale])
        return self._columns(slopes, move), self._columns(proposal, move)

    def _columns(self, found: Tensor, move: AbstractMove) -> Tensor:
        """Energy parameters first, then nothing for thermodynamic ones, then scales."""
        n_energy = self.conjugates.n_energy_scalars
        made = found.new_zeros(found.shape[0], self.conjugates.n_scalars)
        made[:, :n_energy] = found[:, :n_energy]
        name = f"{move.name}.scale"
        if name in self.conjugates.scales:
            first = self.conjugates.n_scalars - len(self.conjugates.scales)
            made[:, first + self.conjugates.scales.index(name)] = found[:, -1]
        return made


def _moves_all(move: AbstractMove, sampler: Metropolis) -> bool:
    """Whether proposals are normal in all positions, so that their density both ways is known."""
    if not isinstance(move, AbstractGaussianMove):
        return False
    with torch.no_grad():
        mean = move.mean(sampler.state, sampler.target)
    return mean.shape == sampler.state.positions.shape


def _decision(update: Update, slopes: Tensor) -> Tensor:
    """Increment of accepting or rejecting, given the slopes of ``log_alpha``, ``(C, P)``."""
    result = update.transition
    if not update.move.adjusted:
        return torch.zeros_like(slopes)
    log_alpha = result.log_alpha.detach()[:, None].clamp(max=0.0)
    odds = log_alpha.exp() / (-torch.expm1(log_alpha)).clamp(min=1e-300)
    factor = torch.where(result.accepted[:, None], 1.0, -odds)
    return torch.where((log_alpha < 0) & (log_alpha > -torch.inf), factor * slopes, 0.0)


def _log_normal(move: AbstractGaussianMove, x: ChainState, y: ChainState, target: Target) -> Tensor:
    """``ln q(y | x)`` up to a constant, ``(C,)``."""
    deviation = move.deviation(x, target)
    z = (y.positions - move.mean(x, target)) / deviation
    widths = deviation.log().expand_as(z)
    if target.sites is not None:
        # Virtual sites follow, whatever was proposed for them.
        free = torch.ones(z.shape[1], dtype=torch.bool, device=z.device)
        free[list(target.sites.indices)] = False
        z, widths = z[:, free], widths[:, free]
    return -(0.5 * z.square() + widths).flatten(1).double().sum(dim=1)
