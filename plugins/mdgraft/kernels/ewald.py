"""Ewald summation in reciprocal space by explicit wave vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.periodic import reciprocal, volume


def ewald_reciprocal(
    positions: Tensor, charges: Tensor, box: Tensor, *, alpha: float, kmax: tuple[int, int, int]
) -> Tensor:
    r"""Reciprocal-space Coulomb energy.

    E = (2 pi / (4 pi eps0 V)) sum_{k != 0} exp(-k^2 / (4 alpha^2)) / k^2 |S(k)|^2 with
    k = 2 pi (m_x, m_y, m_z) in fractional coordinates and |m_d| < kmax_d.

    Parameters
    ----------
    positions
        ``(frames, N, 3)`` [nm].
    charges
        ``(N,)`` [e].
    box
        ``(frames, 3, 3)`` [nm].
    alpha
        Splitting parameter [1/nm].
    kmax
        One more than the largest index in each direction.

    Returns
    -------
    Tensor
        ``(frames,)`` [kJ/mol].
    """
    to_fractional = reciprocal(box)
    # Only half of the wave vectors are needed: S(-k) is the conjugate of S(k).
    index = [
        torch.arange(low, high, dtype=positions.dtype, device=positions.device)
        for low, high in ((0, kmax[0]), (1 - kmax[1], kmax[1]), (1 - kmax[2], kmax[2]))
    ]
    angle = 2 * math.pi * (positions @ to_fractional)
    phase = [
        torch.polar(torch.ones_like(theta), theta)
        for theta in (angle[..., d, None] * index[d] for d in range(3))
    ]
    plane = (phase[1].unsqueeze(-1) * phase[2].unsqueeze(-2)).flatten(-2)
    weighted = (phase[0] * charges.unsqueeze(-1)).transpose(-1, -2)
    structure = (weighted @ plane).reshape(*weighted.shape[:-1], len(index[1]), len(index[2]))

    m = torch.stack(torch.meshgrid(*index, indexing="ij"), dim=-1)
    k = 2 * math.pi * (m @ to_fractional.transpose(-1, -2)[:, None, None])
    k_squared = (k * k).sum(dim=-1)
    origin = (m == 0).all(dim=-1)
    k_squared = torch.where(origin, 1.0, k_squared)
    weight = torch.where(origin, 0.0, torch.where(m[..., 0] == 0, 1.0, 2.0))
    influence = weight * torch.exp(-k_squared / (4 * alpha**2)) / k_squared
    power = structure.real**2 + structure.imag**2
    total = (influence * power).sum(dim=(-3, -2, -1))
    result: Tensor = 2 * math.pi * COULOMB / volume(box) * total
    return result
