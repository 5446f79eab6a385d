"""Rigid translations of molecules."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike, available, shift
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, pick, uniform
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Translation(AbstractMove):
    """Move one molecule as a whole by normal numbers.

    Parameters
    ----------
    scale
        Standard deviation of each component of the translation [nm].
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

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for particles that do not exist."""
        self.molecules.check(state, places=True)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which molecule, and the translation ``(C, 3)``."""
        return {"which": uniform(state, generator), "normal": normal(state, generator, 3)}

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one. Impossible without a molecule."""
        x = state.positions
        there = available(state, len(self.molecules))
        rows, mask = self.molecules.rows(pick(noise["which"], there), x)
        step = (self.scale * noise["normal"]).to(x)[:, None]
        mask = mask & there.any(dim=1)[:, None, None]
        return Proposal(
            state=state.replace(positions=shift(x, rows, step * mask)),
            log_ratio=noise["which"]
            .new_zeros(state.n_chains)
            .masked_fill(~there.any(dim=1), -torch.inf),
        )
