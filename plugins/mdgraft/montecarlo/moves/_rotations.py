"""Rotations of vectors."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from mdgraft.kernels.switch import compiled_kernels, under_transform


def compiled_rotations(positions: Tensor, angle: Tensor) -> ModuleType | None:
    """Compiled loops that turn particles, where there is nothing to differentiate; else None.

    They take arrays, and cost a fourth of plain operations.
    """
    if positions.device.type != "cpu" or not compiled_kernels(positions) or under_transform():
        return None
    # Some versions of torch leave `unpack_dual` without types.
    unpack: Any = unpack_dual
    if any(t.requires_grad or unpack(t).tangent is not None for t in (positions, angle)):
        return None
    return loops()


@functools.cache
def loops() -> ModuleType:
    """Compiled loops, imported when they are needed: the compiler takes its time."""
    return importlib.import_module("mdgraft.kernels.fused.chains")


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
