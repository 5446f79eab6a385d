"""Couplings: two chains make proposals that are alike as often as possible.

Each chain on its own moves exactly as it would alone; only the two together are special.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from mdgraft.kernels.periodic import volume
from mdgraft.montecarlo.moves._molecules import gather
from mdgraft.montecarlo.moves.base import AbstractGaussianMove, AbstractMove, Noise
from mdgraft.montecarlo.moves.displacement import Displacement
from mdgraft.montecarlo.moves.torsion import Torsion
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class AbstractCoupling(abc.ABC):
    """Turns the random numbers of one chain into those of another.

    For any two states the result has the distribution that ``move.draw`` has, given nothing but
    the two states.
    """

    #: What it is called in reports.
    name: str

    def prepare(self, move: AbstractMove, state: ChainState) -> None:
        """Get ready for chains that start from a state.

        Whatever a coupling keeps from one call of `noise` to the next must follow from this state
        alone, so that runs that are stored can go on.
        """
        return None

    @abc.abstractmethod
    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Random numbers for ``y``, given those for ``x``; the same number of chains in both."""


class CommonRandomNumbers(AbstractCoupling):
    """Both chains use the same random numbers.

    Where a move contracts, or discrete states meet by themselves, chains come together; otherwise
    they may never do, and the variance of an estimate grows with the length of the chain.
    """

    name = "common random numbers"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """The same."""
        return noise


class ReflectionMaximal(AbstractCoupling):
    """Normal proposals meet as often as possible, and are mirror images otherwise.

    With ``z = (m_x - m_y) / s`` the distance of the means and ``xi`` the normal numbers of x, y
    takes ``xi + z``, which is the same proposal, with probability ``min(1, phi(xi + z) /
    phi(xi))``, and else the reflection of ``xi`` at the plane between the two (Bou-Rabee, Eberle
    and Zimmer, Ann. Appl. Probab. 30, 1209 (2020); Jacob, O'Leary and Atchade, J. R. Stat. Soc. B
    82, 543 (2020)).
    """

    name = "reflection-maximal"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Change ``normal``."""
        if isinstance(move, Displacement):
            rows = move.rows(x, noise)
            means = gather(x.positions, rows), gather(y.positions, rows)
            deviations = move.deviation(x, target), move.deviation(y, target)
        else:
            assert isinstance(move, AbstractGaussianMove)
            means = move.mean(x, target), move.mean(y, target)
            deviations = move.deviation(x, target), move.deviation(y, target)
        if not torch.equal(*deviations):
            # Proposals of different widths are no mirror images.
            return noise
        z = ((means[0] - means[1]) / deviations[0]).double()
        return {**noise, "normal": reflected(noise["normal"], z, generator)}


class TorsionCoupling(AbstractCoupling):
    """`Torsion` about the same bond, with `ReflectionMaximal` in the torsion angle."""

    name = "reflection-maximal in the torsion"

    def __init__(self) -> None:
        self._ends: Tensor | None = None

    def prepare(self, move: AbstractMove, state: ChainState) -> None:
        """Choose the particles by which each torsion is measured, from the first chain."""
        assert isinstance(move, Torsion)
        self._ends = _torsions(move, state.positions[0])

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Change ``normal``."""
        assert isinstance(move, Torsion)
        if self._ends is None:
            self.prepare(move, x)
        assert self._ends is not None
        n_bonds = len(self._ends)
        which = (noise["which"] * n_bonds).long().clamp(max=n_bonds - 1)
        rows = self._ends.to(which.device)[which]
        angles = [_angle(gather(state.positions.double(), rows)) for state in (x, y)]
        difference = torch.remainder(angles[0] - angles[1] + math.pi, 2 * math.pi) - math.pi
        z = difference / move.scale.detach().to(difference)
        return {**noise, "normal": reflected(noise["normal"], z, generator)}


class VolumeCoupling(AbstractCoupling):
    """`Volume` with `ReflectionMaximal` in ``ln V``."""

    name = "reflection-maximal in ln V"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Change ``normal``."""
        logs = [volume(s.box.double()).abs().log() for s in (x, y) if s.box is not None]
        z = (logs[0] - logs[1]) / move.scale.detach().to(logs[0])
        return {**noise, "normal": reflected(noise["normal"], z, generator)}


def uniform_numbers(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), one for each entry of the first axis, float64 ``(C,)``."""
    made = torch.rand(
        like.shape[0], generator=generator, dtype=torch.float64, device=generator.device
    )
    return made.to(like.device)


def reflected(xi: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers that are ``xi + z`` as often as possible, else ``xi`` reflected along z.

    Parameters
    ----------
    xi
        Standard normal ``(C, ...)``.
    z
        Distance of the means in standard deviations, the same shape.

    Returns
    -------
    Tensor
        Standard normal, of the same shape.
    """
    flat, shift = xi.reshape(xi.shape[0], -1), z.reshape(xi.shape[0], -1)
    along = (flat * shift).sum(dim=1)
    squared = shift.square().sum(dim=1)
    u = uniform_numbers(xi, generator)
    # ln phi(xi + z) - ln phi(xi) = -xi.z - |z|^2 / 2.
    meet = u.log() < -along - 0.5 * squared
    mirror = flat - 2.0 * (along / squared.clamp(min=1e-300))[:, None] * shift
    return torch.where(meet[:, None], flat + shift, mirror).reshape(xi.shape)


def _torsions(move: Torsion, positions: Tensor) -> Tensor:
    """Four particles for each bond ``(B, 4)``: fixed, the two of the bond, turned.

    The outer ones are those that are nearest to the bond on either side and not in line with it.
    """
    ends = []
    x = positions.double()
    index, mask = move._moved.index, move._moved.mask
    for axis, row, used in zip(move.axes.tolist(), index, mask, strict=True):
        turned = set(row[used].tolist())
        fixed = set(range(len(x))) - turned - set(axis)
        line = x[axis[1]] - x[axis[0]]
        line = line / line.norm()

        def nearest(among: set[int], line: Tensor = line, axis: list[int] = axis) -> int:
            chosen = torch.tensor(sorted(among))
            arms = x[chosen] - x[axis[0]]
            away = (arms - (arms @ line)[:, None] * line).norm(dim=1)
            near = torch.minimum(arms.norm(dim=1), (x[chosen] - x[axis[1]]).norm(dim=1))
            return int(chosen[(near + 1e6 * (away < 1e-3 * near)).argmin()])

        ends.append([nearest(fixed) if fixed else axis[0], *axis, nearest(turned)])
    return torch.tensor(ends)


def _angle(x: Tensor) -> Tensor:
    """Angle ``(C,)`` about the middle bond of four points ``(C, 4, 3)``, from first to last."""
    axis = x[:, 2] - x[:, 1]
    axis = axis / axis.norm(dim=-1, keepdim=True)
    first, last = x[:, 0] - x[:, 1], x[:, 3] - x[:, 1]
    a = first - (first * axis).sum(dim=-1, keepdim=True) * axis
    b = last - (last * axis).sum(dim=-1, keepdim=True) * axis
    return torch.atan2((axis * torch.linalg.cross(a, b)).sum(dim=-1), (a * b).sum(dim=-1))
