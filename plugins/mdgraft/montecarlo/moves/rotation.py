"""Rigid rotations of molecules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike, shift
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves._rotations import compiled_rotations, loops, rotate
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Rotation(AbstractMove):
    """Turn one molecule about its geometric centre.

    The axis is uniform over all directions and the angle normal, so that a rotation and its
    inverse are equally likely. Molecules must be whole, not wrapped into the box.

    Parameters
    ----------
    scale
        Standard deviation of the angle [rad].
    molecules
        Indices of the particles of each. Where their number varies, one for each place; only
        those that are present are chosen.
    name
        Under which the move is counted.
    """

    def __init__(
        self, scale: float | Tensor, molecules: MoleculesLike, *, name: str | None = None
    ) -> None:
        super().__init__(name=name, scale=scale)
        self.molecules = Groups("molecules", molecules)
        self.target_acceptance = 0.4

    def largest_scale(self, state: ChainState) -> float:
        """Half a turn."""
        return math.pi

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for particles that do not exist."""
        self.molecules.check(state, places=True)

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those within a molecule, and those outside."""
        return self.molecules.keeps(pairs, state)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which molecule, the axis ``(C, 3)`` and the angle ``(C,)``."""
        return {
            "which": uniform(state, generator),
            "axis": normal(state, generator, 3),
            "angle": normal(state, generator),
        }

    def motion(self, state: ChainState) -> Motion:
        """The same proposals by compiled loops, where every molecule is present."""
        return self.molecules.motion(loops().ABOUT_CENTRE, 4)

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one. Impossible without a molecule."""
        x = state.positions
        which, there = self.molecules.choose(state, noise["which"])
        angle = self.scale * noise["angle"] * there
        if compiled_rotations(x, angle):
            moved = x.clone()
            loops().turn_about_centres(
                moved.numpy(),
                which.numpy(),
                *self.molecules.arrays,
                noise["axis"].numpy(),
                angle.numpy(),
            )
        else:
            rows, arms = self.molecules.arms(x, which)
            moved = shift(x, rows, rotate(arms, noise["axis"].to(x), angle.to(x)) - arms)
        return Proposal(
            state=state.replace(positions=moved),
            log_ratio=torch.where(there, 0.0, -torch.inf).to(angle),
        )
