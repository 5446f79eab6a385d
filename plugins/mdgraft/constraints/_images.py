"""Nearest periodic images of constrained vectors in any cell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def image_shifts(vectors: Tensor, cells: Tensor, pbc: Sequence[bool]) -> Tensor:
    """Sums of box vectors ``(F, R, 3)`` that lead to the shortest images.

    Vectors ``(F, R, 3)``, cells ``(F, 3, 3)``. The whole numbers are constants of differentiation,
    the box is not. Cells must not be so oblique that a shortest image lies beyond the neighbours
    of the one that rounding finds.
    """
    periodic = torch.tensor(pbc, dtype=vectors.dtype, device=vectors.device)
    with torch.no_grad():
        plain, box = vectors.detach(), cells.detach()
        n = -torch.round(plain @ torch.linalg.inv(box)) * periodic
        best, size = n, torch.linalg.vector_norm(plain + n @ box, dim=-1)
        ranges = [(-1, 0, 1) if on else (0,) for on in pbc]
        for step in itertools.product(*ranges):
            other = n + torch.tensor(step, dtype=n.dtype, device=n.device)
            distance = torch.linalg.vector_norm(plain + other @ box, dim=-1)
            # The margin keeps what rounding found where two images are equally near.
            closer = distance < size * (1 - 1e-9)
            best = torch.where(closer.unsqueeze(-1), other, best)
            size = torch.where(closer, distance, size)
    return best @ cells
