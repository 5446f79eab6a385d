"""The modes of a mesh and the influence function on them, by torch operations on any device.

See `mdgraft.kernels.fused.influence` for the definitions.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import Tensor

from mdgraft._units import COULOMB
from mdgraft.kernels.fused.influence import Interaction
from mdgraft.kernels.pme import moduli

#: [kJ/mol nm].
COULOMB_FACTOR = COULOMB / math.pi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modes:
    """Modes of the spectrum of a real mesh, flattened, M in number.

    Attributes
    ----------
    waves
        ``(2, M, 3)`` wave numbers, and those of the mirrors: a Nyquist frequency stands for two
        vectors, which differ in a triclinic box.
    shares
        ``(2, M)`` what each of both counts, over the moduli of the splines.
    pairs
        ``(M,)`` how many modes of the whole spectrum each stands for.
    """

    waves: Tensor
    shares: Tensor
    pairs: Tensor


@functools.lru_cache(maxsize=8)
def _arrays(grid: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axes = [np.arange(n) for n in (grid[0], grid[1], grid[2] // 2 + 1)]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    size = np.array(grid)
    nyquist = 2 * index == size
    waves = np.stack([np.where(2 * index < size, index, index - size)] * 2)
    waves[1] = np.where(nyquist, index, waves[1])
    double = nyquist.any(axis=-1)
    shares = np.stack([np.where(double, 0.5, 1.0), np.where(double, 0.5, 0.0)])
    for axis, n in enumerate(grid):
        shares = shares / moduli(n)[index[:, axis]]
    alone = (index[:, 2] == 0) | nyquist[:, 2]
    return waves.astype(np.float64), shares, np.where(alone, 1.0, 2.0)


def modes_of(grid: tuple[int, int, int], device: torch.device) -> Modes:
    """Modes of a mesh."""
    waves, shares, pairs = (torch.as_tensor(a, device=device) for a in _arrays(grid))
    return Modes(waves=waves, shares=shares, pairs=pairs)


def influence(
    kind: Interaction, alpha: float, modes: Modes, reciprocals: Tensor, volumes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The influence and its first two derivatives in t = |R m|^2, by mirrors ``(2, F, M)``."""
    factor = COULOMB_FACTOR if kind == Interaction.COULOMB else -(math.pi**1.5) / 3
    vectors = modes.waves[:, None] @ reciprocals.transpose(1, 2)
    t = (vectors * vectors).sum(dim=-1)
    scale = modes.shares[:, None] * (factor / volumes)[:, None]
    value, slope, curve = (_coulomb if kind == Interaction.COULOMB else _dispersion)(t, alpha)
    return scale * value, scale * slope, scale * curve


def _coulomb(t: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(-a t)/t."""
    a = (math.pi / alpha) ** 2
    origin = t == 0
    inverse = 1 / torch.where(origin, 1.0, t)
    value = torch.where(origin, 0.0, torch.exp(-a * t) * inverse)
    total = a + inverse
    return value, -value * total, value * (total * total + inverse * inverse)


def _dispersion(t: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """2 pi^(7/2) t^(3/2) erfc(b) + exp(-b^2) (alpha^3 - 2 alpha pi^2 t), with b^2 = a t."""
    a, p = (math.pi / alpha) ** 2, math.pi**3.5
    root, decay = torch.sqrt(t), torch.exp(-a * t)
    tail = torch.erfc(math.sqrt(a) * root)
    value = 2 * p * t * root * tail + decay * (alpha**3 - 2 * alpha * math.pi**2 * t)
    slope = 3 * p * root * tail - 3 * alpha * math.pi**2 * decay
    # The curvature diverges at the origin, which no box moves.
    origin = t == 0
    curve = torch.where(origin, 0.0, 1.5 * p * tail / torch.where(origin, 1.0, root))
    return value, slope, curve


def squares(waves: Tensor, weights: Tensor) -> Tensor:
    """Sums over modes and mirrors of weights ``(2, F, M)`` times m m^T, ``(F, 3, 3)``."""
    # Libraries for matrices take a hundred times as long for results of three rows.
    pairs = waves[:, None, :, :, None] * waves[:, None, :, None, :]
    return (weights[..., None, None] * pairs).sum(dim=(0, 2))
