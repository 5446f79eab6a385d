"""Rigid rotations of molecules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike, available, gather, shift
from mdgraft.montecarlo.moves._rotations import rotate
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, pick, uniform
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

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which molecule, the axis ``(C, 3)`` and the angle ``(C,)``."""
        return {
            "which": uniform(state, generator),
            "axis": normal(state, generator, 3),
            "angle": normal(state, generator),
        }

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one. Impossible without a molecule."""
        x = state.positions
        there = available(state, len(self.molecules))
        rows, mask = self.molecules.rows(pick(noise["which"], there), x)
        members = gather(x, rows)
        weights = mask.to(x)
        centre = (members * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        arms = members - centre
        turned = rotate(arms, noise["axis"].to(x), (self.scale * noise["angle"]).to(x))
        mask = mask & there.any(dim=1)[:, None, None]
        return Proposal(
            state=state.replace(positions=shift(x, rows, (turned - arms) * mask)),
            log_ratio=noise["which"]
            .new_zeros(state.n_chains)
            .masked_fill(~there.any(dim=1), -torch.inf),
        )
