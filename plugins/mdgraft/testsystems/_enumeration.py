"""Exact averages over few discrete states."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError

#: Two to this power is as many states as fit into memory.
_MAX_SITES = 20


def all_states(n_sites: int, values: tuple[int, int]) -> Tensor:
    """Every assignment of two values to n sites, int64 ``(2**n, n)``."""
    if n_sites > _MAX_SITES:
        raise InvalidInputError(
            f"shape: {n_sites} sites have too many states to enumerate, wanted at most {_MAX_SITES}"
        )
    bits = (torch.arange(2**n_sites)[:, None] >> torch.arange(n_sites)) & 1
    low, high = values
    return low + (high - low) * bits


def average(log_density: Tensor, values: Tensor) -> Tensor:
    """Average ``S`` of values ``(states, *S)`` over unnormalised log densities ``(states,)``."""
    mean: Tensor = torch.tensordot(log_density.softmax(dim=0), values.double(), dims=1)
    return mean
