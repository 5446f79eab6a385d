"""Distances, angles and dihedrals whose derivatives stay finite where they are degenerate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft.kernels.periodic import minimum_image


def displacement(positions: Tensor, box: Tensor | None, i: Tensor, j: Tensor) -> Tensor:
    """Vectors from particles ``i`` to ``j``: ``(frames, n, 3)`` for index tensors ``(n,)``."""
    vectors = positions[:, j] - positions[:, i]
    return vectors if box is None else minimum_image(vectors, box[:, None])


def safe_norm(vectors: Tensor) -> Tensor:
    """Euclidean norm over the last axis; where it is zero, so is its derivative."""
    squared = (vectors * vectors).sum(dim=-1)
    # The second derivative holds squared**-1.5, which must not overflow either.
    zero = squared <= torch.finfo(squared.dtype).tiny ** (2 / 3)
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, squared)))


def distance(positions: Tensor, box: Tensor | None, i: Tensor, j: Tensor) -> Tensor:
    """Distances ``(frames, n)`` [nm]."""
    return safe_norm(displacement(positions, box, i, j))


def rescaled(vectors: Tensor) -> Tensor:
    """Vectors ``(..., 3)`` divided by their largest component, a constant of differentiation.

    A function that does not depend on the length of a vector, such as an angle, keeps its value
    and all its derivatives, while its intermediate results can no longer under- or overflow.
    """
    size = vectors.detach().abs().amax(dim=-1, keepdim=True)
    tiny = math.sqrt(torch.finfo(vectors.dtype).tiny)
    return vectors / torch.where(size <= tiny, 1.0, size)


def direction(vectors: Tensor) -> Tensor:
    """Scale vectors ``(..., 3)`` to unit length; those that are zero have zero derivatives."""
    vectors = rescaled(vectors)
    length = safe_norm(vectors).unsqueeze(-1)
    zero = length == 0
    return torch.where(zero, 0.0, vectors / torch.where(zero, 1.0, length))


def polar_angle(y: Tensor, x: Tensor, undefined: float) -> Tensor:
    """``atan2(y, x)``, or the constant ``undefined`` where both are zero."""
    size = torch.maximum(x.detach().abs(), y.detach().abs())
    zero = size <= math.sqrt(torch.finfo(x.dtype).tiny)
    size = torch.where(zero, 1.0, size)
    # atan2 does not depend on a common factor; its derivative divides by x**2 + y**2.
    angle = torch.atan2(torch.where(zero, 0.0, y) / size, torch.where(zero, 1.0, x) / size)
    return torch.where(zero, undefined, angle)


def vanishes(cross: Tensor) -> Tensor:
    """Whether the vector product of `rescaled` vectors is nothing but rounding."""
    return cross.detach().abs().amax(dim=-1) <= 4.0 * torch.finfo(cross.dtype).eps


def _bend(
    positions: Tensor, box: Tensor | None, particles: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Angle, whether it is straight (0 or pi), and the arms' vector and scalar product."""
    i, j, k = particles.unbind(-1)
    first = rescaled(displacement(positions, box, i, j))
    second = rescaled(displacement(positions, box, k, j))
    cross, dot = torch.linalg.cross(first, second), (first * second).sum(dim=-1)
    straight = vanishes(cross)
    sine = safe_norm(torch.where(straight.unsqueeze(-1), 0.0, cross))
    return polar_angle(sine, dot, 0.5 * math.pi), straight, cross, dot


def angle(positions: Tensor, box: Tensor | None, particles: Tensor) -> Tensor:
    """Angles between 0 and pi, ``(frames, n)`` [radian].

    Where the three particles are collinear the angle has a cusp; there its derivatives are zero.
    Where the vertex coincides with another particle there is no angle; the value is pi/2, as on
    OpenMM's Reference platform, and its derivatives are zero.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    box
        ``(frames, 3, 3)`` [nm], or None for an open system.
    particles
        ``(n, 3)`` indices; the second is the vertex.
    """
    theta, _, _, _ = _bend(positions, box, particles)
    return theta


def squared_angle_deviation(
    positions: Tensor, box: Tensor | None, particles: Tensor, reference: Tensor
) -> Tensor:
    """``(angle - reference)**2`` ``(frames, n)`` [radian^2], smooth wherever it can be.

    For a straight angle whose reference is straight as well, the square is smooth although the
    angle is not, and its second derivative is the bending stiffness. For any other reference the
    square keeps a cusp, whose derivative is taken as zero. Arguments are those of `angle`, and
    ``reference`` ``(n,)`` [radian].
    """
    theta, straight, cross, dot = _bend(positions, box, particles)
    # (angle - straight)**2 = tan**2 + O(tan**4), in the components of the vector product.
    tangent = cross / torch.where(straight & (dot != 0), dot, 1.0).unsqueeze(-1)
    limit = math.pi * (dot < 0).to(dot.dtype)
    smooth = (tangent * tangent).sum(dim=-1) + (limit - reference) ** 2
    return torch.where(straight, smooth, (theta - reference) ** 2)


def dihedral(positions: Tensor, box: Tensor | None, particles: Tensor) -> Tensor:
    """Dihedral angles between -pi and pi, ``(frames, n)`` [radian], zero for cis.

    Where three consecutive particles are collinear there is no dihedral; the value is pi/2, as on
    OpenMM's Reference platform, and its derivatives are zero.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    box
        ``(frames, 3, 3)`` [nm], or None for an open system.
    particles
        ``(n, 4)`` indices.
    """
    i, j, k, m = particles.unbind(-1)
    a = rescaled(displacement(positions, box, j, i))
    b = rescaled(displacement(positions, box, j, k))
    c = rescaled(displacement(positions, box, m, k))
    ab, bc = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    undefined = vanishes(ab) | vanishes(bc)
    # phi = atan2(|b| a.(b x c), (a x b).(b x c))
    y = torch.where(undefined, 0.0, safe_norm(b) * (a * bc).sum(dim=-1))
    x = torch.where(undefined, 0.0, (ab * bc).sum(dim=-1))
    return polar_angle(y, x, 0.5 * math.pi)
