"""What all pairs or items share, as programs read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft.kernels.fused.graph import Series

#: ``series -> (factor, shift, coefficients...)``.
Table = Callable[[Series], np.ndarray]


class Constants:
    """Constants of a formula and coefficients of its series, once on each device.

    Parameters
    ----------
    values
        The constants.
    table
        Coefficients of a series, if the formula has any.
    """

    def __init__(self, values: Sequence[float], table: Table | None) -> None:
        self._values, self._table = list(values), table
        self._made: dict[tuple[torch.device, torch.dtype, tuple[Series, ...]], Tensor] = {}

    def numbers(self, series: tuple[Series, ...], like: Tensor) -> Tensor:
        """Constants, then for each series a factor, a shift and coefficients ``(n,)``."""
        key = like.device, like.dtype, series
        if key not in self._made:
            parts = [np.array(self._values)]
            for one in series:
                assert self._table is not None
                parts.append(self._table(one))
            numbers = torch.as_tensor(np.concatenate(parts), dtype=like.dtype)
            self._made[key] = numbers.to(like.device)
        return self._made[key]


def shared_numbers(
    shared: Sequence[Tensor],
    moves: Sequence[Tensor | None] | None,
    fixed: Tensor,
    n_frames: int,
) -> Tensor:
    """``(n_frames, n)``: shared quantities, their directions if there are any, what is fixed."""
    parts = [t.reshape(1, 1).expand(n_frames, 1) for t in shared]
    for move in moves or ():
        parts.append(fixed.new_zeros(n_frames, 1) if move is None else move.reshape(n_frames, 1))
    parts.append(fixed.expand(n_frames, -1))
    return torch.cat([part.to(fixed.dtype) for part in parts], dim=1)


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sums over particles of a b^T, ``(F, N, 3), (F, N, 3) -> (F, 3, 3)``.

    Libraries for matrices take forty times as long for so few rows.
    """
    result: Tensor = (a[..., None] * b[..., None, :]).sum(dim=1)
    return result


def some_frames(
    directions: Sequence[Tensor | None] | None, frames: slice
) -> list[Tensor | None] | None:
    """Directions of some of the frames."""
    if directions is None:
        return None
    return [move if move is None else move[frames] for move in directions]
