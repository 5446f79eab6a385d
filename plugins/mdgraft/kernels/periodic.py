"""Periodic images in triclinic boxes, by the rule that OpenMM uses."""

from __future__ import annotations

import torch
from torch import Tensor


def minimum_image(displacement: Tensor, box: Tensor) -> Tensor:
    """Shortest periodic image of displacements.

    The box must be in reduced (lower-triangular) form. Rounding goes from the third box vector to
    the first; whatever lies within half of every diagonal element is found exactly. The integers
    are constants: the gradient with respect to the box is that of ``displacement - n @ box``.

    Parameters
    ----------
    displacement
        ``(..., 3)`` [nm].
    box
        ``(..., 3, 3)`` [nm], broadcast against the displacements; rows are box vectors.

    Returns
    -------
    Tensor
        ``(..., 3)`` [nm].
    """
    with torch.no_grad():
        remainder, cell = displacement.detach(), box.detach()
        images = []
        for axis in (2, 1, 0):
            n = torch.floor(remainder[..., axis] / cell[..., axis, axis] + 0.5)
            remainder = remainder - n.unsqueeze(-1) * cell[..., axis, :]
            images.append(n)
        shift = torch.stack(images[::-1], dim=-1)
    return displacement - (shift.unsqueeze(-2) @ box).squeeze(-2)


def volume(box: Tensor) -> Tensor:
    """Volume of boxes ``(..., 3, 3)`` [nm] -> ``(...,)`` [nm^3]."""
    a, b, c = box.unbind(dim=-2)
    result: Tensor = (a * torch.linalg.cross(b, c)).sum(dim=-1)
    return result


def reciprocal(box: Tensor) -> Tensor:
    """Matrix that maps positions to fractional coordinates: ``s = r @ reciprocal(box)``."""
    a, b, c = box.unbind(dim=-2)
    columns = (torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b))
    return torch.stack(columns, dim=-1) / volume(box)[..., None, None]
