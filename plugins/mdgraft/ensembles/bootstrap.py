"""The moving-block bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.ensembles.statistics import statistical_inefficiency


def moving_block_bootstrap(
    series: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    n_resamples: int = 200,
    block_length: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replicates of a statistic of a correlated series, for outputs nonlinear in averages.

    Overlapping blocks of successive frames are drawn with replacement and joined to the original
    length (Kunsch, Ann. Statist. 17, 1217 (1989)).

    Parameters
    ----------
    series
        ``(F, ...)``.
    statistic
        Maps a resampled ``(F, ...)`` series to a tensor of shape S.
    n_resamples
        Number of replicates R.
    block_length
        Frames a block; by default five correlation times, ``2.5 (g + 1)`` with the largest
        statistical inefficiency g of the series.
    generator
        Source of random numbers; pass one for repeatable results.

    Returns
    -------
    Tensor
        ``(R, *S)``; its standard deviation over R estimates the standard error.

    Raises
    ------
    InvalidInputError
        For a block longer than the series, or fewer than two resamples.
    """
    n = series.shape[0]
    if n_resamples < 2:
        raise InvalidInputError(f"n_resamples: got {n_resamples}, wanted at least 2")
    if block_length is None:
        g = max(statistical_inefficiency(series).reshape(-1).tolist(), default=1.0)
        block_length = min(max(1, math.ceil(2.5 * (g + 1.0))), max(1, n // 2))
    if not 1 <= block_length <= n:
        raise InvalidInputError(f"block_length: got {block_length}, wanted 1 to {n} frames")
    n_blocks = math.ceil(n / block_length)
    device = series.device if generator is None else generator.device
    starts = torch.randint(
        n - block_length + 1, (n_resamples, n_blocks), generator=generator, device=device
    ).to(series.device)
    offsets = torch.arange(block_length, device=series.device)
    index = (starts[:, :, None] + offsets).reshape(n_resamples, -1)[:, :n]
    return torch.stack([statistic(series[chosen]) for chosen in index])
