"""Rigid translations of molecules."""

from __future__ import annotations

import torch
from torch import Tensor

from mdgraft.montecarlo.moves._molecules import Groups, MoleculesLike, shift
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves._rotations import loops
from mdgraft.montecarlo.moves.base import AbstractMove, Noise, Proposal, normal, uniform
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

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those within a molecule, and those outside."""
        return self.molecules.keeps(pairs, state)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Which molecule, and the translation ``(C, 3)``."""
        return {"which": uniform(state, generator), "normal": normal(state, generator, 3)}

    def motion(self, state: ChainState) -> Motion:
        """The same proposals by compiled loops, where every molecule is present."""
        return self.molecules.motion(loops().SHIFT, 3)

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one. Impossible without a molecule."""
        x = state.positions
        which, there = self.molecules.choose(state, noise["which"])
        step = (self.scale * noise["normal"] * there[:, None]).to(x)
        rows, mask = self.molecules.rows(which, x)
        return Proposal(
            state=state.replace(positions=shift(x, rows, step[:, None] * mask)),
            log_ratio=torch.where(there, 0.0, -torch.inf).to(noise["normal"]),
        )
