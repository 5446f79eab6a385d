"""Distances of conformations: radius of gyration, RMSD, and an orientation restraint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mdgraft._units import ENERGY, NANOMETER
from mdgraft.potentials.geometry import safe_norm
from mdgraft.potentials.term import AbstractTerm


class RadiusOfGyration(AbstractTerm):
    """``sqrt(mean |r - centre|^2)`` of some particles [nm], as an energy.

    Parameters
    ----------
    particles
        ``(n,)`` indices; all count alike, whatever their masses.
    """

    particles: Tensor
    precision: Tensor

    def __init__(self, particles: Tensor) -> None:
        super().__init__()
        self.register_buffer("particles", particles)
        # A term without parameters still has a dtype and a device.
        self.register_buffer("precision", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)``."""
        x = _centered(positions[:, self.particles])
        result: Tensor = safe_norm(x.reshape(x.shape[0], -1)) / self.particles.numel() ** 0.5
        return result.to(positions.dtype)


class RMSD(AbstractTerm):
    """Root mean square deviation from a reference after optimal superposition [nm].

    From the largest eigenvalue of the quaternion matrix, whose derivatives come from its
    characteristic polynomial, so that they stay finite where other eigenvalues coincide. Where the
    deviation vanishes it has a cusp, and its derivative is taken as zero.

    Parameters
    ----------
    particles
        ``(n,)`` indices.
    reference_positions
        ``(N, 3)`` [nm], of all particles of the system.

    References
    ----------
    E. A. Coutsias, C. Seok and K. A. Dill, J. Comput. Chem. 25, 1849 (2004); characteristic
    polynomial: D. L. Theobald, Acta Cryst. A61, 478 (2005).
    """

    particles: Tensor

    def __init__(self, particles: Tensor, reference_positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("particles", particles)
        self.add_parameter("reference_positions", reference_positions, NANOMETER)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)``."""
        x = _centered(positions[:, self.particles])
        y = _centered(values["reference_positions"][self.particles])
        correlation = x.transpose(-1, -2) @ y
        squares = (x * x).sum(dim=(-2, -1)) + (y * y).sum()
        largest = _largest_eigenvalue(correlation)[0]
        deviation = (squares - 2 * largest) / self.particles.shape[0]
        aligned = deviation < 1e-20
        root = torch.sqrt(torch.where(aligned, 1.0, deviation))
        return torch.where(aligned, 0.0, root).to(positions.dtype)


class OrientationRestraint(AbstractTerm):
    """``E = 2 k (1 - q0^2)``: the rotation that superposes particles on a reference is restrained.

    With q0 the scalar part of its quaternion this is ``2 k sin^2(theta/2)``, theta the angle of the
    rotation.

    Parameters
    ----------
    particles
        ``(n,)`` indices.
    k
        ``()`` [kJ/mol].
    reference_positions
        ``(N, 3)`` [nm], of all particles of the system.
    """

    particles: Tensor

    def __init__(self, particles: Tensor, k: Tensor, reference_positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("particles", particles)
        self.add_parameter("k", k, ENERGY)
        self.add_parameter("reference_positions", reference_positions, NANOMETER)

    def forward(
        self,
        positions: Tensor,
        box: Tensor | None,
        values: Mapping[str, Tensor],
        global_values: Mapping[str, Tensor],
    ) -> Tensor:
        """Energy of each frame ``(frames,)`` [kJ/mol]."""
        x = _centered(positions[:, self.particles])
        y = _centered(values["reference_positions"][self.particles])
        correlation = y.transpose(-1, -2) @ x
        largest, slope, matrix = _largest_eigenvalue(correlation)
        # The square of an eigenvector's component is a cofactor over the polynomial's slope.
        identity = torch.eye(3, dtype=x.dtype, device=x.device)
        minor = largest[:, None, None] * identity - matrix[:, 1:, 1:]
        energy = 2 * values["k"] * (1 - _determinant(minor) / slope)
        return energy.to(positions.dtype)


def _centered(points: Tensor) -> Tensor:
    """In double precision: a deviation is a small difference between large sums of squares."""
    points = points.double()
    return points - points.mean(dim=-2, keepdim=True)


def _determinant(m: Tensor) -> Tensor:
    """Of matrices ``(..., 3, 3)``, with derivatives also where they are singular."""
    a, b, c = m.unbind(dim=-2)
    result: Tensor = (a * torch.linalg.cross(b, c)).sum(dim=-1)
    return result


def _largest_eigenvalue(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest eigenvalue of the quaternion matrix of correlations ``(frames, 3, 3)``.

    Returns it with the slope of the characteristic polynomial there, and the matrix.
    """
    xx, xy, xz, yx, yy, yz, zx, zy, zz = r.reshape(-1, 9).unbind(-1)
    rows = (
        (xx + yy + zz, yz - zy, zx - xz, xy - yx),
        (yz - zy, xx - yy - zz, xy + yx, xz + zx),
        (zx - xz, xy + yx, yy - xx - zz, yz + zy),
        (xy - yx, xz + zx, yz + zy, zz - xx - yy),
    )
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    # P(t) = t^4 + c2 t^2 + c1 t + c0; the determinant by cofactors of the first row.
    c2 = -2 * (r * r).sum(dim=(-2, -1))
    c1 = -8 * _determinant(r)
    c0 = torch.zeros_like(c1)
    for column in range(4):
        rest = [k for k in range(4) if k != column]
        minor = matrix[:, 1:][:, :, rest]
        c0 = c0 + (-1) ** column * matrix[:, 0, column] * _determinant(minor)
    eigenvalue = torch.linalg.eigvalsh(matrix.detach())[:, -1].detach()
    # Points on a line can turn about it at no cost: the eigenvalue is a double one, and equals the
    # norm of the correlations, which have rank one.
    norm2 = (r * r).sum(dim=(-2, -1))
    line = _slope(eigenvalue, c2, c1).detach() <= 1e-10 * norm2.detach() ** 1.5
    norm = torch.sqrt(torch.where(line & (norm2 > 0), norm2, 1.0))
    # Newton steps whose value is zero: each doubles the order to which derivatives are right.
    for _ in range(2):
        residual = eigenvalue * (eigenvalue * (eigenvalue * eigenvalue + c2) + c1) + c0
        slope = torch.where(line, 1.0, _slope(eigenvalue, c2, c1))
        eigenvalue = eigenvalue - (residual - residual.detach()) / slope
    slope = torch.where(line, 1.0, _slope(eigenvalue, c2, c1))
    return torch.where(line, torch.where(norm2 > 0, norm, 0.0), eigenvalue), slope, matrix


def _slope(t: Tensor, c2: Tensor, c1: Tensor) -> Tensor:
    return t * (4 * t * t + 2 * c2) + c1
