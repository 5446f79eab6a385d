"""Random displacements of particles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves._molecules import shift
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves._rotations import loops
from mdgraft.montecarlo.moves.base import (
    AbstractGaussianMove,
    Noise,
    Proposal,
    normal,
    uniform,
)
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class Displacement(AbstractGaussianMove):
    """Move one particle, or all of them, by normal numbers (Metropolis et al., 1953).

    Parameters
    ----------
    scale
        Standard deviation of each coordinate [nm].
    particles
        Indices of the particles that may move; by default all.
    together
        Move all of them at once rather than one, chosen at random.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For a scale that is not positive or an index out of range.
    """

    def __init__(
        self,
        scale: float | Tensor,
        *,
        particles: Sequence[int] | None = None,
        together: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        self.particles = None if particles is None else torch.as_tensor(list(particles)).long()
        self.together = together
        # Roberts, Gelman and Gilks (1997) for many coordinates; a higher one for three.
        self.target_acceptance = 0.234 if together else 0.4

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for particles that do not exist."""
        chosen = self._movable(state)
        if not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= state.n_particles:
            raise InvalidInputError(
                f"particles: got {chosen.tolist()[:6]}, wanted indices below {state.n_particles}"
            )
        if len(torch.unique(chosen)) != len(chosen):
            raise InvalidInputError("particles: an index occurs twice")

    def _movable(self, state: ChainState) -> Tensor:
        if self.particles is None:
            return torch.arange(state.n_particles, device=state.positions.device)
        return self.particles.to(state.positions.device)

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those between particles that do not move."""
        free = torch.ones(state.n_particles + 1, dtype=torch.bool)
        free[self._movable(state).cpu()] = False
        return free[pairs].all(dim=1)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """``normal`` is ``(C, M, 3)`` for M particles together, or ``(C, 1, 3)`` with ``which``."""
        if self.together:
            return {"normal": normal(state, generator, len(self._movable(state)), 3)}
        return {
            "which": uniform(state, generator),
            "normal": normal(state, generator, 1, 3),
        }

    def rows(self, state: ChainState, noise: Noise) -> Tensor:
        """Indices of the particles that move ``(C, M)``."""
        if self.together:
            return self._movable(state).expand(state.n_chains, -1)
        n_movable = state.n_particles if self.particles is None else len(self.particles)
        # A product just below the number may round up to it.
        index = (noise["which"] * n_movable).long().clamp_(max=n_movable - 1)
        return (index if self.particles is None else self._movable(state)[index])[:, None]

    def mean(self, state: ChainState, target: Target) -> Tensor:
        """The present positions ``(C, M, 3)`` of the particles that move together."""
        if not self.together:
            raise InvalidInputError(
                "together: a displacement of one particle at random is no normal proposal of all; "
                "use Displacement(scale, together=True)"
            )
        return state.positions[:, self._movable(state)]

    def deviation(self, state: ChainState, target: Target) -> Tensor:
        """The scale."""
        return self.scale.to(state.positions)

    def motion(self, state: ChainState) -> Motion:
        """The same proposals by compiled loops."""
        particles = self._movable(state).numpy()
        n = len(particles)
        if self.together:
            return Motion(loops().APART, numbers=3 * n, members=particles, sizes=np.array([n]))
        sizes = np.ones(n, dtype=np.int64)
        return Motion(loops().SHIFT, numbers=4, members=particles, sizes=sizes)

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Symmetric: the ratio is one."""
        x = state.positions
        step = self.deviation(state, target) * noise["normal"].to(x)
        return Proposal(
            state=state.replace(positions=shift(x, self.rows(state, noise), step)),
            log_ratio=noise["normal"].new_zeros(state.n_chains),
        )
