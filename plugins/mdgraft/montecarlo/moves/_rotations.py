"""Rotations of vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(vectors: Tensor, axis: Tensor, angle: Tensor) -> Tensor:
    """Rotate about an axis through the origin, by Rodrigues' formula.

    Parameters
    ----------
    vectors
        ``(C, K, 3)``.
    axis
        ``(C, 3)`` of any length but zero.
    angle
        ``(C,)`` [rad].
    """
    unit = (axis / axis.norm(dim=-1, keepdim=True))[:, None].expand_as(vectors)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along = (unit * vectors).sum(dim=-1, keepdim=True)
    turned = vectors * cosine + torch.linalg.cross(unit, vectors) * sine
    result: Tensor = turned + unit * along * (1.0 - cosine)
    return result


def uniform_rotation(normal: Tensor) -> Tensor:
    """Rotation matrices ``(C, 3, 3)`` from normal numbers ``(C, 4)``, uniform over all rotations.

    A normal vector of four components has a uniform direction, which is a uniform unit quaternion
    (Shoemake, Graphics Gems III (1992), p. 124).
    """
    w, x, y, z = (normal / normal.norm(dim=-1, keepdim=True)).unbind(dim=-1)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), dim=-1),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), dim=-1),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), dim=-1),
    )
    return torch.stack(rows, dim=-2)
