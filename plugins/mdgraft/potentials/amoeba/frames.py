"""Local frames of multipoles, as AMOEBA and HIPPO define them."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from mdgraft.potentials.geometry import direction


class Axes(enum.IntEnum):
    """How the particles z, x and y give a frame; numbered as in OpenMM."""

    Z_THEN_X = 0
    BISECTOR = 1
    Z_BISECT = 2
    THREE_FOLD = 3
    Z_ONLY = 4
    NONE = 5


@dataclasses.dataclass(frozen=True)
class LocalAxes:
    """Definition of the frame of every particle.

    Attributes
    ----------
    kind
        ``(N,)`` values of `Axes`.
    z, x, y
        ``(N,)`` particles; -1 for one that is not there.
    """

    kind: Tensor
    z: Tensor
    x: Tensor
    y: Tensor


def local_frames(positions: Tensor, axes: LocalAxes) -> Tensor:
    """Axes x, y and z of each particle as rows.

    With a particle y, a frame of kind Z_THEN_X is left-handed around a chiral centre of the other
    sense, so that the components along y change sign. Positions are not wrapped into a box.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    axes
        Definitions.

    Returns
    -------
    Tensor
        ``(frames, N, 3, 3)``.
    """

    def towards(particle: Tensor) -> Tensor:
        return positions[:, particle.clamp(min=0)] - positions

    def of_kind(*kinds: Axes) -> Tensor:
        wanted = torch.tensor([int(kind) for kind in kinds], device=axes.kind.device)
        return torch.isin(axes.kind, wanted).unsqueeze(-1)

    unit = torch.eye(3, dtype=positions.dtype, device=positions.device)
    to_z, to_x, to_y = (direction(towards(p)) for p in (axes.z, axes.x, axes.y))
    z = torch.where(of_kind(Axes.BISECTOR), direction(to_z + to_x), to_z)
    z = torch.where(of_kind(Axes.THREE_FOLD), direction(to_z + to_x + to_y), z)
    x = torch.where(of_kind(Axes.Z_BISECT), direction(to_x + to_y), to_x)
    # The axis of the coordinates that is not near z.
    near = z.detach()[..., :1].abs() >= 0.866
    x = torch.where(of_kind(Axes.Z_ONLY), torch.where(near, unit[1], unit[0]), x)
    x = direction(x - z * (z * x).sum(dim=-1, keepdim=True))
    y = torch.linalg.cross(z, x)

    own = -towards(axes.y)
    volume = (torch.linalg.cross(towards(axes.z) + own, towards(axes.x) + own) * own).sum(dim=-1)
    mirrored = (volume.detach() < 0).unsqueeze(-1)
    mirrored = mirrored & of_kind(Axes.Z_THEN_X) & (axes.y >= 0).unsqueeze(-1)
    y = torch.where(mirrored, -y, y)

    frames = torch.stack([x, y, z], dim=-2)
    fixed = (axes.z < 0) | (of_kind(Axes.NONE).squeeze(-1) & (axes.x < 0))
    return torch.where(fixed[:, None, None], unit, frames)
