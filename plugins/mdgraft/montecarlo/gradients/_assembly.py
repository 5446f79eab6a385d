"""From series of chains to estimates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy import stats
from torch import Tensor

from mdgraft.ensembles.overlap import Overlap
from mdgraft.ensembles.statistics import _standard_error
from mdgraft.estimate import BiasClass, Estimate

#: From this many chains on their differences tell the error, if there are fewer samples than these.
_MANY_CHAINS, _SHORT = 20, 50
#: Entries of a series that are treated at a time, which bounds the memory.
_CHUNK = 1 << 23


def chain_error(series: Tensor) -> tuple[Tensor, Tensor]:
    """Standard error of the mean of series of independent chains, and its inefficiency.

    It follows from the correlation in time of the series, one chain after the other, since between
    chains there is none; it is calibrated for few and for skewed numbers, see
    `mdgraft.ensembles.standard_error`. Where many chains are too short for that, it follows from
    the differences of their means, with Student's factor, which holds for chains that are not
    stationary as well.

    Parameters
    ----------
    series
        ``(T, C, *S)``: T samples of each of C chains.

    Returns
    -------
    tuple of Tensor
        Each ``S``: the standard error, and the number of samples that weigh as much as one
        independent one.
    """
    n_samples, n_chains = series.shape[:2]
    shape = series.shape[2:]
    flat = series.reshape(n_samples, n_chains, -1)
    total = n_samples * n_chains
    variance = flat.reshape(total, -1).var(dim=0, correction=0)
    if n_chains >= _MANY_CHAINS and n_samples < _SHORT:
        widened = float(stats.t.ppf(0.975, n_chains - 1)) / float(stats.norm.ppf(0.975))
        squared = flat.mean(dim=0).var(dim=0) / n_chains
        safe = torch.where(variance > 0, variance, 1.0)
        inefficiency = torch.where(variance > 0, total * squared / safe, 1.0)
        inefficiency = inefficiency.clamp(min=1.0, max=float(total))
        return (widened * squared.sqrt()).reshape(shape), inefficiency.reshape(shape)
    by_chain = flat.transpose(0, 1).reshape(total, -1)
    parts = [
        _standard_error(columns)
        for columns in torch.split(by_chain, max(1, _CHUNK // total), dim=1)
    ]
    if not parts:
        return flat.new_zeros(shape), flat.new_ones(shape)
    error, inefficiency = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return error.reshape(shape), inefficiency.reshape(shape)


def uniform_overlap(n_frames: int) -> Overlap:
    """The overlap of samples that all weigh the same."""
    return Overlap(
        n_frames=n_frames,
        effective_sample_size=float(n_frames),
        entropy_sample_size=float(n_frames),
        max_weight=1.0 / n_frames,
        pareto_k=None,
        ok=True,
    )


def assemble(
    *,
    value: Tensor,
    value_influence: Tensor,
    gradient: Mapping[str, Tensor],
    gradient_error: Mapping[str, Tensor],
    gradient_inefficiency: Mapping[str, Tensor],
    method: str,
    bias: BiasClass,
    overlap: Overlap | None = None,
) -> Estimate:
    """The estimate of a value S with an influence series ``(T, C, *S)``, and of its gradient."""
    n_frames = value_influence.shape[0] * value_influence.shape[1]
    overlap = uniform_overlap(n_frames) if overlap is None else overlap
    error, inefficiency = chain_error(value_influence)
    return Estimate(
        value=value,
        standard_error=error,
        gradient=gradient,
        gradient_standard_error=gradient_error,
        n_frames=n_frames,
        effective_sample_size=overlap.effective_sample_size,
        entropy_sample_size=overlap.entropy_sample_size,
        max_weight=overlap.max_weight,
        pareto_k=overlap.pareto_k,
        statistical_inefficiency=inefficiency,
        gradient_inefficiency=gradient_inefficiency,
        method=method,
        bias=bias,
    )
