"""Correlated random numbers with a known correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError


def autoregressive(
    n_steps: int,
    shape: tuple[int, ...],
    *,
    correlation: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stationary AR(1) chains of standard normal numbers, float64 ``(n_steps, *shape)``.

    Successive values correlate by ``correlation``, values k steps apart by its k-th power; the
    statistical inefficiency of the mean is ``(1 + correlation) / (1 - correlation)``. This is the
    Ornstein-Uhlenbeck process at equal times.

    Raises
    ------
    InvalidInputError
        For no steps, or a correlation outside (-1, 1).
    """
    if n_steps < 1:
        raise InvalidInputError(f"n_frames: got {n_steps}, wanted at least 1")
    if not -1.0 < correlation < 1.0:
        raise InvalidInputError(f"correlation: got {correlation!r}, wanted a number in (-1, 1)")
    chain = torch.randn(n_steps, *shape, generator=generator, dtype=torch.float64)
    if correlation != 0.0:
        noise = math.sqrt(1.0 - correlation * correlation)
        for step in range(1, n_steps):
            chain[step] = correlation * chain[step - 1] + noise * chain[step]
    return chain
