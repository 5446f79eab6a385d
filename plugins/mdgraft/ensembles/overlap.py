"""How well sampled frames represent a reweighted distribution."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError

#: Log weights that spread less than this are uniform up to rounding of the energies.
_UNIFORM = 1e-9
#: Fewer points than this say nothing about a tail.
_MIN_TAIL = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Quality of a set of weights.

    Attributes
    ----------
    n_frames
        Number of frames N.
    effective_sample_size
        Kish's ``1 / sum w^2``.
    entropy_sample_size
        ``exp(-sum w ln w)``.
    max_weight
        The largest normalised weight.
    pareto_k
        Shape of the tail of the weights, or None; see `pareto_k`.
    ok
        Whether averages over these weights pass the thresholds of the ensemble's gradient method.
    """

    n_frames: int
    effective_sample_size: float
    entropy_sample_size: float
    max_weight: float
    pareto_k: float | None
    ok: bool


def _normalised(log_weights: Tensor) -> Tensor:
    if log_weights.ndim != 1 or log_weights.shape[0] < 1:
        raise InvalidInputError(
            f"log_weights: got shape {tuple(log_weights.shape)}, wanted (frames,)"
        )
    if bool(torch.isnan(log_weights).any()) or bool((log_weights == math.inf).any()):
        raise InvalidInputError("log_weights: holds NaN or +infinity")
    return torch.log_softmax(log_weights.detach().double(), dim=0)


def kish_sample_size(log_weights: Tensor) -> float:
    """Kish's effective sample size ``(sum w)^2 / sum w^2`` of unnormalised log weights ``(N,)``."""
    return math.exp(-float(torch.logsumexp(2.0 * _normalised(log_weights), dim=0)))


def entropy_sample_size(log_weights: Tensor) -> float:
    """Entropic sample size ``exp(-sum w ln w)`` of unnormalised log weights ``(N,)``."""
    log_w = _normalised(log_weights)
    return math.exp(float(torch.special.entr(log_w.exp()).sum()))


def uniform(log_weights: Tensor) -> bool:
    """Whether log weights ``(N,)`` are equal up to rounding."""
    return float((log_weights.max() - log_weights.min()).detach()) < _UNIFORM


def pareto_k(log_weights: Tensor) -> float | None:
    """Shape k of a generalised Pareto distribution fitted to the largest weights.

    The tail holds ``min(N / 5, 3 sqrt(N))`` weights; the fit is that of Zhang and Stephens,
    Technometrics 51, 316 (2009), with the weak prior of Vehtari et al., JMLR 25(72) (2024). The
    variance of an importance-weighted average is infinite for k > 1/2, and above 0.7 it converges
    too slowly to be useful.

    Parameters
    ----------
    log_weights
        ``(N,)`` unnormalised.

    Returns
    -------
    float or None
        None when the weights are uniform or the tail has fewer than five points.
    """
    log_w = _normalised(log_weights)
    n = log_w.shape[0]
    n_tail = math.ceil(min(0.2 * n, 3.0 * math.sqrt(n)))
    if n_tail < _MIN_TAIL or n <= n_tail or uniform(log_w):
        return None
    largest = torch.sort(log_w).values[-n_tail - 1 :]
    excess = torch.exp(largest[1:] - largest[-1]) - torch.exp(largest[0] - largest[-1])
    excess = excess[excess > 1e-12]
    if excess.shape[0] < _MIN_TAIL:
        return None
    return _fit_shape(excess)


def _fit_shape(x: Tensor) -> float:
    """Posterior mean of the shape for ascending positive excesses ``(n,)``."""
    n = x.shape[0]
    m = 30 + int(math.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    # theta = -k / scale on a grid of quantiles of its empirical prior; k(theta) in closed form.
    theta = 1.0 / x[-1] + (1.0 - torch.sqrt(m / (grid - 0.5))) / (3.0 * quartile)
    k_of_theta = -torch.log1p(-theta[:, None] * x).mean(dim=1)
    log_likelihood = n * (torch.log(theta / k_of_theta) + k_of_theta - 1.0)
    posterior = torch.softmax(log_likelihood, dim=0)
    best = (theta * posterior).sum()
    shape = float(torch.log1p(-best * x).mean())
    return (n * shape + 10.0 * 0.5) / (n + 10.0)
