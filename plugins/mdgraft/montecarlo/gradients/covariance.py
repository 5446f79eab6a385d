"""Covariances over fixed samples: the default for stationary averages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft import ensembles
from mdgraft._errors import WrongEnsembleError
from mdgraft.estimate import Estimate
from mdgraft.montecarlo.gradients._assembly import assemble, chain_error
from mdgraft.montecarlo.gradients.base import AbstractGradient
from mdgraft.montecarlo.gradients.joining import batches
from mdgraft.montecarlo.gradients.observing import ChainObservable, Observer
from mdgraft.montecarlo.gradients.parameters import Conjugates
from mdgraft.montecarlo.metropolis import Metropolis
from mdgraft.montecarlo.samples import Samples
from mdgraft.montecarlo.state import ChainState

#: Entries of an influence series that are formed at a time, which bounds the memory.
_CHUNK = 1 << 23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariance(AbstractGradient):
    """``d<O> = <dO> + Cov(O, d ln pi)`` over samples of the stationary chain.

    For parameters of the energy this is ``<dO> - beta Cov(O, dU)``, for the chemical potential
    ``beta Cov(O, N)``, and so on. It asks nothing of the moves and has the smallest variance of
    all estimators here, but knows stationary averages only: chains must have been equilibrated,
    and neither burn-in nor the scale of a proposal has a derivative. When parameters of the energy
    have changed since the samples were taken, averages are reweighted to the present ones, as in
    `mdgraft.Ensemble`.

    Parameters
    ----------
    min_ess, max_pareto_k
        When the overlap is too small for reweighting; see `mdgraft.ensembles.Covariance`.
    """

    min_ess: float = 0.1
    max_pareto_k: float = 0.7

    def __post_init__(self) -> None:
        self._thresholds()

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
        WrongEnsembleError
            If the sampler takes proposals without a test, so that its law is not the target.
        """
        # Names are checked before the work is done.
        Conjugates(sampler.target, parameters)
        samples = sampler.sample(n_samples, stride=stride)
        return self.from_samples(samples, observable, parameters)

    def from_samples(
        self,
        samples: Samples,
        observable: ChainObservable,
        parameters: Sequence[str] | None = None,
    ) -> Estimate:
        """The same from samples that were taken before.

        Raises
        ------
        InsufficientOverlapError
            If parameters have moved too far since the samples were taken.
        WrongEnsembleError
            If the samples are biased.
        """
        if not samples.adjusted:
            raise WrongEnsembleError(
                "samples: proposals were taken without a test, so that their law is not the "
                "target's; use MALA instead of ULA, or Reparameterized(), which differentiates "
                "the law that is sampled"
            )
        target = samples.target
        conjugates = Conjugates(target, parameters)
        observer = Observer(observable, conjugates, samples.states[0])
        shape = (len(samples.states), samples.n_chains)
        found = [_sweep(batch, conjugates, observer) for batch in batches(samples.states)]
        log_weights, values, densities = (
            torch.cat(parts)
            for parts in ([p[0] for p in found], [p[1] for p in found], [p[2] for p in found])
        )
        explicit = None
        if observer.explicit:
            explicit = torch.cat([part[3] for part in found if part[3] is not None])
        thresholds = self._thresholds()
        overlap = thresholds.overlap(log_weights)
        thresholds.require(overlap)
        weights = log_weights.softmax(dim=0).reshape(shape)
        values = values.reshape(*shape, *observer.shape)
        densities = densities.reshape(*shape, conjugates.n_scalars)
        if explicit is not None:
            explicit = explicit.reshape(*shape, *observer.shape, conjugates.n_scalars)

        mean = torch.tensordot(weights, values, dims=2)
        relative = weights * weights.numel()
        deviation = values - mean
        gradient, error, inefficiency = covariance_gradient(
            weights=weights, deviation=deviation, densities=densities, explicit=explicit
        )
        moved = not math.isclose(overlap.max_weight * overlap.n_frames, 1.0, rel_tol=1e-12)
        return assemble(
            value=mean,
            value_influence=_scaled(relative, deviation),
            gradient=conjugates.split(gradient),
            gradient_error=conjugates.split(error),
            gradient_inefficiency=conjugates.split(inefficiency),
            method="reweighting" if moved else "covariance",
            bias="consistent",
            overlap=overlap,
        )

    def _thresholds(self) -> ensembles.Covariance:
        return ensembles.Covariance(min_ess=self.min_ess, max_pareto_k=self.max_pareto_k)


def _sweep(
    state: ChainState, conjugates: Conjugates, observer: Observer
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log weights, values, conjugates and explicit derivatives of some of the samples."""
    target = conjugates.target
    with torch.no_grad():
        energies = target.energies(state)
    generating = energies if state.energies is None else state.energies
    present = state.replace(energies=energies)
    return (
        -target.beta * (energies - generating),
        observer.values(present),
        conjugates(present),
        observer.derivatives(present),
    )


def covariance_gradient(
    *, weights: Tensor, deviation: Tensor, densities: Tensor, explicit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``<dO> + Cov(O, D)`` with its standard error and statistical inefficiency, each ``(*S, P)``.

    Parameters
    ----------
    weights
        ``(T, C)``, normalised.
    deviation
        ``O - <O>``, ``(T, C, *S)``.
    densities
        D, ``(T, C, P)``.
    explicit
        dO, ``(T, C, *S, P)``, or None for zero.
    """
    n_samples, n_chains = weights.shape
    shape, n_scalars = deviation.shape[2:], densities.shape[2]
    o = deviation.reshape(n_samples, n_chains, -1)
    relative = weights * weights.numel()
    width = max(1, _CHUNK // max(1, o.numel()))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, n_scalars, width):
        columns = slice(start, start + width)
        d = densities[..., columns]
        centred = d - torch.tensordot(weights, d, dims=2)
        series = o[..., :, None] * centred[..., None, :]
        if explicit is not None:
            series = series + explicit.reshape(*o.shape, n_scalars)[..., columns]
        gradient = torch.tensordot(weights, series, dims=2)
        error, inefficiency = chain_error(_scaled(relative, series - gradient))
        parts.append((gradient, error, inefficiency))
    if not parts:
        empty = o.new_zeros(*shape, 0)
        return empty, empty, empty
    joined = [torch.cat(columns, dim=-1) for columns in zip(*parts, strict=True)]
    gradient, error, inefficiency = (j.reshape(*shape, n_scalars) for j in joined)
    return gradient, error, inefficiency


def _scaled(factor: Tensor, series: Tensor) -> Tensor:
    """``(T, C)`` times ``(T, C, ...)``."""
    return factor.reshape(*factor.shape, *[1] * (series.ndim - 2)) * series
