"""Averages over Markov chains, with a gradient by a method of one's choice."""

from __future__ import annotations

from collections.abc import Sequence

from mdgraft._errors import InvalidInputError
from mdgraft.estimate import Estimate
from mdgraft.montecarlo.gradients.base import AbstractGradient
from mdgraft.montecarlo.gradients.covariance import Covariance
from mdgraft.montecarlo.gradients.observing import ChainObservable
from mdgraft.montecarlo.metropolis import Metropolis


def estimate_average(
    sampler: Metropolis,
    observable: ChainObservable,
    n_samples: int,
    *,
    stride: int = 1,
    parameters: Sequence[str] | None = None,
    gradient: AbstractGradient | None = None,
) -> Estimate:
    """Average an observable over the samples to come, and differentiate the average.

    Parameters
    ----------
    sampler
        The chains, which are run on.
    observable, n_samples, stride, parameters
        See `AbstractGradient.estimate`.
    gradient
        The estimator of the gradient; by default ``Covariance()``, for stationary averages.

    Raises
    ------
    InvalidInputError
        If ``gradient`` is no estimator, and for what `AbstractGradient.estimate` refuses.
    """
    method = Covariance() if gradient is None else gradient
    if not isinstance(method, AbstractGradient):
        raise InvalidInputError(
            f"gradient: got {gradient!r}, wanted an estimator of mdgraft.montecarlo.gradients such "
            "as Covariance() or Coupled()"
        )
    return method.estimate(sampler, observable, n_samples, stride=stride, parameters=parameters)
