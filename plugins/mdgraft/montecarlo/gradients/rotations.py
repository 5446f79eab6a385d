"""Coupled rotations: two molecules turn into the same orientation as often as possible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft.montecarlo.gradients.couplings import AbstractCoupling, uniform_numbers
from mdgraft.montecarlo.gradients.discrete import choose_alike
from mdgraft.montecarlo.moves._molecules import available
from mdgraft.montecarlo.moves._rotations import rotate
from mdgraft.montecarlo.moves.base import AbstractMove, Noise
from mdgraft.montecarlo.moves.rotation import Rotation
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target

#: Orientations that are this close [rad] are left so by the same rotation.
_ALIGNED = 1e-5
#: Candidates that are drawn at a time for each chain.
_MOST_TRIES = 1024


class RotationCoupling(AbstractCoupling):
    """`Rotation` of the same molecule, maximally coupled in its orientation.

    The rotation R that x proposes corresponds to ``R D`` for y, where D turns the molecule of y
    into that of x (Kabsch, Acta Cryst. A 34, 827 (1978)). y takes it with probability
    ``min(1, f(R D) / f(R))``, and else draws from the residual by rejection (Thorisson, Coupling,
    Stationarity, and Regeneration (2000), section 1.4). The density of a rotation by an angle t
    about an axis that is uniform is ``f ~ g(t) / (1 - cos t)`` against the uniform measure, with
    the wrapped normal density g. Molecules of different shapes end up as alike as they can.
    """

    name = "maximal in the orientation"

    def noise(
        self,
        move: AbstractMove,
        x: ChainState,
        y: ChainState,
        noise: Noise,
        target: Target,
        generator: torch.Generator,
    ) -> Noise:
        """Choose the molecule alike, and change ``axis`` and ``angle`` if it is the same one."""
        assert isinstance(move, Rotation)
        there = [available(state, len(move.molecules)) for state in (x, y)]
        first, second, u = choose_alike(noise["which"], there[0], there[1], generator)
        arms = [_arms(move, state, first) for state in (x, y)]
        scale = float(move.scale.detach())
        turn = _matrix(noise["axis"].double(), scale * noise["angle"].double())
        between = _alignment(arms[1], arms[0])
        # One particle alone has no orientation.
        oriented = (arms[0].abs().amax(dim=(1, 2)) > 0) & (arms[1].abs().amax(dim=(1, 2)) > 0)
        apart = _axis_angle(between)[1] > _ALIGNED
        (rows,) = ((first == second) & oriented & apart).nonzero(as_tuple=True)
        axis, angle = _coupled(turn[rows], between[rows], scale, generator)
        return {
            **noise,
            "which": u,
            "axis": noise["axis"].index_copy(0, rows, axis.to(noise["axis"])),
            "angle": noise["angle"].index_copy(0, rows, (angle / scale).to(noise["angle"])),
        }


def _coupled(
    turn: Tensor, between: Tensor, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Axis ``(C, 3)`` and angle ``(C,)`` of the rotation of y, given that of x ``(C, 3, 3)``."""

    def log_ratio(mine: Tensor, others: Tensor) -> Tensor:
        return _log_density(mine, scale) - _log_density(others, scale)

    same = turn @ between
    axis, angle = _axis_angle(same)
    left = ~(uniform_numbers(turn, generator).log() < log_ratio(same, turn))
    tries = 1
    while bool(left.any()):
        (rows,) = left.nonzero(as_tuple=True)
        drawn = torch.randn(len(rows) * tries, 4, generator=generator, dtype=torch.float64)
        drawn = drawn.to(turn.device)
        tried = _matrix(drawn[:, :3], scale * drawn[:, 3])
        # What x would have had to propose for y to meet it here.
        back = tried @ between[rows].repeat_interleave(tries, dim=0).transpose(-1, -2)
        residual = -torch.expm1(log_ratio(back, tried).clamp(max=0.0))
        taken = (uniform_numbers(drawn, generator) < residual).reshape(-1, tries)
        done = taken.any(dim=1)
        first = taken.to(torch.int8).argmax(dim=1)[done]
        best = drawn.reshape(-1, tries, 4)[done, first]
        axis = axis.index_copy(0, rows[done], best[:, :3])
        angle = angle.index_copy(0, rows[done], scale * best[:, 3])
        left = left.index_fill(0, rows[done], False)
        # The nearer the orientations, the rarer and the longer the search for the residual.
        tries = min(2 * tries, _MOST_TRIES)
    return axis, angle


def _log_density(rotation: Tensor, scale: float) -> Tensor:
    """``ln g(t) - ln(1 - cos t)`` of rotations ``(C, 3, 3)``, up to a constant."""
    _, angle = _axis_angle(rotation)
    turns = 2.0 * math.pi * torch.arange(-8, 9, dtype=torch.float64, device=angle.device)
    exponents = -0.5 * ((angle[:, None] + turns) / scale).square()
    measure = 2.0 * (0.5 * angle).sin().clamp(min=1e-12).log()
    density: Tensor = exponents.logsumexp(dim=1) - measure
    return density


def _arms(move: Rotation, state: ChainState, which: Tensor) -> Tensor:
    """Particles of one molecule relative to its centre ``(C, K, 3)``; zero where there is none."""
    return move.molecules.arms(state.positions.double(), which)[1]


def _alignment(source: Tensor, destination: Tensor) -> Tensor:
    """The rotation ``(C, 3, 3)`` that brings one set of arms ``(C, K, 3)`` closest to another."""
    u, _, vh = torch.linalg.svd(source.transpose(-1, -2) @ destination)
    v = vh.transpose(-1, -2)
    sign = torch.linalg.det(v @ u.transpose(-1, -2))
    flip = torch.ones_like(u[:, 0])
    flip[:, 2] = sign
    rotation: Tensor = (v * flip[:, None]) @ u.transpose(-1, -2)
    return rotation


def _matrix(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotation matrices ``(C, 3, 3)``."""
    identity = torch.eye(3, dtype=axis.dtype, device=axis.device).expand(len(axis), -1, -1)
    return rotate(identity, axis, angle).transpose(-1, -2)


def _axis_angle(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Axis ``(C, 3)`` and angle ``(C,)`` in [0, pi], by the quaternion.

    The quaternion is the eigenvector of a matrix whose eigenvalues are apart for every rotation
    (Bar-Itzhack, J. Guid. Control Dyn. 23, 1085 (2000)).
    """
    r = [[rotation[:, i, j] for j in range(3)] for i in range(3)]
    zero = torch.zeros_like(r[0][0])
    upper = [
        [r[0][0] - r[1][1] - r[2][2], r[1][0] + r[0][1], r[2][0] + r[0][2], r[2][1] - r[1][2]],
        [zero, r[1][1] - r[0][0] - r[2][2], r[2][1] + r[1][2], r[0][2] - r[2][0]],
        [zero, zero, r[2][2] - r[0][0] - r[1][1], r[1][0] - r[0][1]],
        [zero, zero, zero, r[0][0] + r[1][1] + r[2][2]],
    ]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in upper], dim=-2)
    quaternion = torch.linalg.eigh(matrix, UPLO="U").eigenvectors[..., -1]
    quaternion = quaternion * torch.where(quaternion[:, 3:] < 0, -1.0, 1.0)
    vector = quaternion[:, :3]
    length = vector.norm(dim=1)
    x_axis = torch.zeros_like(vector)
    x_axis[:, 0] = 1.0
    axis = torch.where(length[:, None] > 0, vector, x_axis)
    return axis, 2.0 * torch.atan2(length, quaternion[:, 3])
