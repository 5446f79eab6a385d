"""Hybrid (Hamiltonian) Monte Carlo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo._counts import checked_trajectory
from mdgraft.montecarlo.moves.base import (
    AbstractMove,
    Noise,
    Proposal,
    check_all_move,
    normal,
    uniform,
)
from mdgraft.montecarlo.state import ChainState
from mdgraft.montecarlo.target import Target


class HMC(AbstractMove):
    """A trajectory of L leapfrog steps with new momenta, accepted or rejected as a whole.

    Duane, Kennedy, Pendleton and Roweth, Phys. Lett. B 195, 216 (1987). Velocities belong to the
    times of positions (velocity Verlet), so that the kinetic energy is that of the end point. L
    evaluations of forces a step. A trajectory that blows up is rejected.

    Parameters
    ----------
    scale
        Time step [ps].
    n_steps
        L.
    mass
        One number or ``(N,)`` [Da], or a matrix ``(3N, 3N)`` that is symmetric and positive
        definite; 1 Da by default. The distribution does not depend on it.
    jitter
        The time step of a trajectory is uniform within this fraction of ``scale``, which keeps
        trajectories from being as long as a period.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For numbers out of range, or a mass matrix that is not positive definite.
    """

    def __init__(
        self,
        scale: float | Tensor,
        n_steps: int,
        *,
        mass: Any = 1.0,
        jitter: float = 0.1,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        self.n_steps, self.jitter = checked_trajectory(n_steps, jitter)
        self.mass = torch.as_tensor(mass, dtype=torch.float64)
        self._factor: Tensor | None = None
        if self.mass.ndim == 2:
            factor, bad = torch.linalg.cholesky_ex(self.mass)
            if int(bad) or not torch.allclose(self.mass, self.mass.T):
                raise InvalidInputError("mass: the matrix is not symmetric and positive definite")
            self._factor = factor
        elif self.mass.ndim > 2 or not bool(((self.mass > 0) & (self.mass < torch.inf)).all()):
            raise InvalidInputError("mass: wanted positive numbers [Da], or a matrix")
        self.target_acceptance = 0.8

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for masses of other particles, or numbers of molecules that vary."""
        n = state.n_particles
        check_all_move(self, state)
        if self.mass.shape not in ((), (n,), (3 * n, 3 * n)):
            raise InvalidInputError(
                f"mass: got shape {tuple(self.mass.shape)}, wanted (), ({n},) or ({3 * n}, {3 * n})"
            )

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """None: every particle moves."""
        return torch.zeros(len(pairs), dtype=torch.bool)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Normal numbers ``(C, N, 3)`` for the velocities, and ``(C,)`` for the time step."""
        return {
            "normal": normal(state, generator, state.n_particles, 3),
            "jitter": uniform(state, generator),
        }

    def velocities(self, noise: Noise, target: Target) -> Tensor:
        """Velocities ``(C, N, 3)`` [nm/ps] of the Maxwell-Boltzmann distribution."""
        xi = noise["normal"]
        speed = (BOLTZMANN * target.temperature) ** 0.5
        if self._factor is not None:
            # p = L xi has covariance M, so v = M^-1 p = L^-T xi.
            columns = xi.reshape(xi.shape[0], -1, 1)
            solved = torch.linalg.solve_triangular(self._factor.to(xi).T, columns, upper=True)
            drawn: Tensor = speed * solved.reshape(xi.shape)
            return drawn
        drawn = speed * xi / self._column(xi).sqrt()
        return drawn

    def kinetic_energy(self, velocities: Tensor) -> Tensor:
        """``v M v / 2``, ``(C,)`` [kJ/mol]."""
        if self._factor is not None:
            # v M v = |L^T v|^2.
            flat = velocities.reshape(velocities.shape[0], -1)
            return 0.5 * (flat @ self._factor.to(flat)).square().sum(dim=-1)
        return 0.5 * (velocities.square() * self._column(velocities)).sum(dim=(-2, -1))

    def acceleration(self, forces: Tensor) -> Tensor:
        """``M^-1 F``, ``(C, N, 3)`` [nm/ps^2]."""
        if self._factor is not None:
            columns = forces.reshape(forces.shape[0], -1, 1)
            solved = torch.cholesky_solve(columns, self._factor.to(forces))
            return solved.reshape(forces.shape)
        return forces / self._column(forces)

    def _column(self, like: Tensor) -> Tensor:
        """Masses ``()`` or ``(N, 1)``."""
        mass = self.mass.to(like)
        return mass[:, None] if mass.ndim else mass

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """``log_ratio = -beta (K' - K)``; leapfrog steps are reversible and preserve volume."""
        before = state
        if before.forces is None or before.energies is None:
            energies, forces = target.energies_and_forces(state)
            before = state.replace(energies=energies, forces=forces)
        v = self.velocities(noise, target).to(state.positions)
        jitter = 1.0 + self.jitter * (2.0 * noise["jitter"] - 1.0)
        ended, v_end, alive = self.trajectory(before, v, self.scale * jitter, target)
        change = (self.kinetic_energy(v_end) - self.kinetic_energy(v)).double()
        log_ratio = torch.where(alive, -target.beta * change, -torch.inf)
        return Proposal(state=ended, log_ratio=log_ratio, before=before)

    def trajectory(
        self, state: ChainState, velocities: Tensor, step: Tensor, target: Target
    ) -> tuple[ChainState, Tensor, Tensor]:
        """Run the leapfrog steps.

        Parameters
        ----------
        state
            Where to start, with energies and forces.
        velocities
            ``(C, N, 3)`` [nm/ps].
        step
            Time step of each chain ``(C,)`` [ps].
        target
            Gives the forces.

        Returns
        -------
        tuple
            The end with energies and forces, its velocities ``(C, N, 3)``, and which chains are
            still finite ``(C,)``; a chain that blew up is where it started.
        """
        assert state.energies is not None and state.forces is not None
        x, v, energies, forces = state.positions, velocities, state.energies, state.forces
        h = step.to(x)[:, None, None]
        alive = _finite(v)
        for _ in range(self.n_steps):
            v = v + 0.5 * h * self.acceleration(forces)
            alive = alive & _finite(v)
            # A chain that has blown up waits where it started.
            moving = alive[:, None, None]
            x = torch.where(moving, x + h * torch.where(moving, v, 0.0), state.positions)
            energies, forces = target.energies_and_forces(state.replace(positions=x))
            alive = alive & torch.isfinite(energies) & _finite(forces)
            v = v + 0.5 * h * self.acceleration(forces)
        alive = alive & _finite(v)
        moved = alive[:, None, None]
        ended = state.replace(
            positions=torch.where(moved, x, state.positions),
            energies=torch.where(alive, energies, state.energies),
            forces=torch.where(moved, forces, state.forces),
        )
        return ended, torch.where(moved, v, velocities), alive


def _finite(values: Tensor) -> Tensor:
    """Which chains are finite throughout: ``(C, N, 3)`` -> ``(C,)``."""
    return torch.isfinite(values).flatten(1).all(dim=1)
