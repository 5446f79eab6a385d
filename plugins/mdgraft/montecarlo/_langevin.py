"""Euler-Maruyama steps of overdamped Langevin dynamics as proposals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft.montecarlo.moves.base import (
    AbstractGaussianMove,
    Noise,
    Proposal,
    check_all_move,
    normal,
)
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class AbstractLangevinMove(AbstractGaussianMove):
    """``x' = x + (s^2/2 m) beta F(x) + (s / sqrt m) xi`` with normal ``xi``.

    Parameters
    ----------
    scale
        s, the standard deviation of a coordinate with m = 1 [nm].
    mass
        m, ``(N,)`` without unit: how much less than s a particle moves; 1 by default.
    name
        Under which the move is counted.
    """

    def __init__(
        self,
        scale: float | Tensor,
        *,
        mass: Sequence[float] | Tensor | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        self.mass = None if mass is None else torch.as_tensor(mass, dtype=torch.float64)
        if self.mass is not None and not bool(((self.mass > 0) & (self.mass < torch.inf)).all()):
            raise InvalidInputError("mass: wanted positive numbers, one for each particle")
        # Roberts and Rosenthal (1998). Without a test the scale decides on the bias: it is kept.
        self.target_acceptance = 0.574 if self.adjusted else None

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for masses of other particles, or numbers of molecules that vary."""
        check_all_move(self, state)
        if self.mass is not None and self.mass.shape != (state.n_particles,):
            raise InvalidInputError(
                f"mass: got shape {tuple(self.mass.shape)}, wanted ({state.n_particles},)"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """None: every particle moves."""
        return torch.zeros(len(pairs), dtype=torch.bool)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """``normal`` is ``(C, N, 3)``."""
        return {"normal": normal(state, generator, state.n_particles, 3)}

    def mean(self, state: ChainState, target: Target) -> Tensor:
        """Mean of the proposal ``(C, N, 3)`` [nm]."""
        forces = state.forces
        if forces is None:
            forces = target.energies_and_forces(state)[1]
        variance = self.deviation(state, target).square()
        return state.positions + 0.5 * target.beta * variance * forces

    def deviation(self, state: ChainState, target: Target) -> Tensor:
        """Standard deviation of the proposal, ``()`` or ``(N, 1)`` [nm]."""
        scale = self.scale.to(state.positions)
        return scale if self.mass is None else scale / self.mass.to(scale).sqrt()[:, None]

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """Hastings' ratio of the two normal densities."""
        before = state
        if before.forces is None or before.energies is None:
            energies, forces = target.energies_and_forces(state)
            before = state.replace(energies=energies, forces=forces)
        deviation, xi = self.deviation(before, target), noise["normal"].to(state.positions)
        proposed = before.replace(positions=self.mean(before, target) + deviation * xi)
        energies, forces = target.energies_and_forces(proposed)
        proposed = proposed.replace(energies=energies, forces=forces)
        back = (before.positions - self.mean(proposed, target)) / deviation
        log_ratio = 0.5 * (xi.square() - back.square()).double().sum(dim=(-2, -1))
        return Proposal(
            state=proposed,
            log_ratio=torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf),
            before=before,
        )
