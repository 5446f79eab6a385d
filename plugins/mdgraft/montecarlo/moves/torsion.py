"""Rotations about bonds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.kernels.periodic import reciprocal
from mdgraft.montecarlo.moves._molecules import Groups, gather, shift
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves._rotations import compiled_rotations, loops, rotate
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Torsion(AbstractMove):
    """Turn what lies on one side of a bond about that bond by a normal angle.

    Bond lengths and angles stay as they are. The two atoms of the bond do not move, so that the
    map is a rotation of the others about a fixed axis: it preserves volume, and its inverse is as
    likely. The smaller side turns. Molecules must be whole, not wrapped into the box.

    Parameters
    ----------
    scale
        Standard deviation of the angle [rad].
    bonds
        Pairs of particles: all bonds, constraints included, of the molecules whose torsions are to
        move.
    rotatable
        The bonds to turn about; by default every bond that is in no ring and has further
        particles on both sides.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For a bond that is in a ring, or has nothing on one side, or if there is none to turn about.
    """

    def __init__(
        self,
        scale: float | Tensor,
        bonds: Sequence[Sequence[int]],
        *,
        rotatable: Sequence[Sequence[int]] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        neighbours = _graph(bonds)
        axes, moved = [], []
        for pair in bonds if rotatable is None else rotatable:
            first, second = (int(i) for i in pair)
            if second not in neighbours.get(first, ()):
                raise InvalidInputError(f"rotatable: ({first}, {second}) is not among the bonds")
            sides = [_side(neighbours, first, second), _side(neighbours, second, first)]
            if any(side is None for side in sides):
                if rotatable is None:
                    continue
                raise InvalidInputError(
                    f"rotatable: the bond ({first}, {second}) is in a ring, which a rotation opens"
                )
            smaller = min((side for side in sides if side is not None), key=len)
            if not smaller:
                if rotatable is None:
                    continue
                raise InvalidInputError(
                    f"rotatable: nothing lies beyond one end of the bond ({first}, {second})"
                )
            axes.append((first, second))
            moved.append(sorted(smaller))
        if not axes:
            raise InvalidInputError(
                "bonds: there is none to turn about; use Displacement or Rotation instead"
            )
        #: The bonds that are turned about ``(B, 2)``.
        self.axes = torch.tensor(axes)
        self._moved = Groups("bonds", moved)
        self.target_acceptance = 0.4

    def largest_scale(self, state: ChainState) -> float:
        """Half a turn."""
        return math.pi

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for particles that do not exist, or bonds across the box."""
        if int(self.axes.max()) >= state.n_particles:
            raise InvalidInputError(
                f"bonds: got index {int(self.axes.max())}, wanted indices below {state.n_particles}"
            )
        self._moved.check(state, disjoint=False)
        if state.box is None:
            return
        axes = self.axes.to(state.positions.device)
        bond = state.positions[:, axes[:, 1]] - state.positions[:, axes[:, 0]]
        fractional = bond @ reciprocal(state.box).to(bond)
        if bool((fractional.abs() > 0.5).any()):
            pair = axes[int((fractional.abs() > 0.5).any(dim=-1).nonzero()[0, 1])].tolist()
            raise InvalidInputError(
                f"positions: the bond {tuple(pair)} spans more than half the box; make molecules "
                "whole before sampling"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those on either side of every bond, the bond itself included in both."""
        kept = torch.ones(len(pairs), dtype=torch.bool)
        for axis, row, used in zip(
            self.axes.tolist(), self._moved.index, self._moved.mask, strict=True
        ):
            turned = torch.zeros(state.n_particles + 1, dtype=torch.bool)
            turned[row[used]] = True
            still = ~turned
            turned[axis] = True
            kept &= turned[pairs].all(dim=1) | still[pairs].all(dim=1)
        return kept

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which bond, and the angle ``(C,)``."""
        return {"which": uniform(state, generator), "normal": normal(state, generator)}

    def motion(self, state: ChainState) -> Motion:
        """The same proposals by compiled loops."""
        return self._moved.motion(loops().ABOUT_BOND, 1, self.axes)

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one."""
        x = state.positions
        angle = self.scale * noise["normal"]
        n_bonds = len(self._moved)
        # A product just below the number may round up to it.
        which = (noise["which"] * n_bonds).long().clamp_(max=n_bonds - 1)
        if compiled_rotations(x, angle):
            moved = x.clone()
            loops().turn_about_bonds(
                moved.numpy(),
                which.numpy(),
                *self._moved.arrays,
                self.axes.numpy(),
                angle.numpy(),
            )
        else:
            ends = gather(x, self.axes.to(x.device)[which])
            origin, axis = ends[:, :1], ends[:, 1] - ends[:, 0]
            rows, mask = self._moved.rows(which, x)
            arms = gather(x, rows) - origin
            moved = shift(x, rows, (rotate(arms, axis, angle.to(x)) - arms) * mask)
        return Proposal(
            state=state.replace(positions=moved),
            log_ratio=noise["which"].new_zeros(state.n_chains),
        )


def _graph(bonds: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    neighbours: dict[int, set[int]] = {}
    for pair in bonds:
        if len(pair) != 2 or int(pair[0]) == int(pair[1]) or min(map(int, pair)) < 0:
            raise InvalidInputError(f"bonds: got {tuple(pair)}, wanted pairs of particles")
        first, second = (int(i) for i in pair)
        neighbours.setdefault(first, set()).add(second)
        neighbours.setdefault(second, set()).add(first)
    return neighbours


def _side(neighbours: dict[int, set[int]], start: int, other: int) -> set[int] | None:
    """What hangs on ``start`` without the bond to ``other``; None if that is in a ring."""
    found, stack = {start}, [start]
    while stack:
        here = stack.pop()
        for there in neighbours[here] - found:
            if here == start and there == other:
                continue
            if there == other:
                return None
            found.add(there)
            stack.append(there)
    return found - {start}
