"""One step of Langevin dynamics by the LF-Middle scheme with constraints."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mdgraft._errors import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.constraints import ConstraintSet
from mdgraft.dynamics.state import Forces, State, checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangevinMiddle:
    """LF-Middle discretisation of Langevin dynamics, as ``openmm.LangevinMiddleIntegrator`` does.

    ::

        v  <- v + h M^-1 F(x)
        v  <- project v
        x* <- x + h/2 v
        v  <- a v + sqrt((1 - a^2) kT M^-1) eta,      a = exp(-gamma h)
        x* <- x* + h/2 v
        x' <- project x* along the constraints of the old x
        v  <- v + (x' - x*)/h

    (Zhang, Liu, Yan, Tuckerman and Liu, J. Phys. Chem. A 123, 6056 (2019).) Velocities of a state
    are half a step behind its positions. Differentiable end to end, by the noise held fixed, in
    the state, the noise, temperature, friction, time step and whatever forces, lengths and masses
    depend on. Massless particles keep their velocities.

    Parameters
    ----------
    timestep
        h [ps], a number or a scalar tensor.
    temperature
        T [K], likewise.
    friction
        gamma [1/ps], likewise.
    """

    timestep: float | Tensor
    temperature: float | Tensor
    friction: float | Tensor

    def step(
        self,
        state: State,
        forces: Forces,
        constraints: ConstraintSet,
        *,
        noise: Tensor,
        box: Tensor | None = None,
        lengths: Tensor | None = None,
        masses: Tensor | None = None,
        **options: Any,
    ) -> State:
        """Advance by one step.

        Parameters
        ----------
        state
            Where the step begins; its forces are used if they are known.
        forces
            Maps positions and box to forces, such as ``potential.forces``.
        constraints
            Constraints, masses and virtual sites; a set without constraints holds masses alone.
        noise
            eta, ``(..., N, 3)`` standard normal numbers.
        box
            ``(..., 3, 3)`` box vectors as rows [nm], or None.
        lengths, masses
            In place of those of the set.
        **options
            ``solver``, as of `ConstraintSet.project_positions`.

        Returns
        -------
        State
            Where it ends.

        Raises
        ------
        InvalidInputError
            For a time step that is not positive, a negative temperature or friction, one that is
            zero and to be differentiated, or a wrong shape.
        ConstraintError
            If the constraints cannot be met.
        """
        old = state.positions
        h = checked("timestep", self.timestep, old)
        temperature = checked("temperature", self.temperature, old, zero=True)
        friction = checked("friction", self.friction, old, zero=True)
        if noise.shape != old.shape:
            raise InvalidInputError(
                f"noise: got shape {tuple(noise.shape)}, wanted that of the positions, "
                f"{tuple(old.shape)}"
            )
        weight = constraints.inverse_masses(masses).unsqueeze(-1)
        mobile = weight > 0
        force = forces(old, box) if state.forces is None else state.forces
        velocities = state.velocities + h * weight * force
        velocities = constraints.project_velocities(velocities, old, box=box, masses=masses)
        trial = old + 0.5 * h * velocities * mobile
        kept = torch.exp(-friction * h)
        variance = -torch.expm1(-2.0 * friction * h) * BOLTZMANN * temperature
        # Without a bath there is no noise, whatever else changes; the root has no derivative there.
        bath = (friction > 0) & (temperature > 0)
        spread = torch.where(bath, torch.where(bath, variance, 1.0).sqrt(), 0.0)
        # The root has no derivative at zero, where massless particles are.
        scale = torch.where(mobile, torch.where(mobile, weight, 1.0).sqrt(), 0.0)
        velocities = torch.where(mobile, kept * velocities + spread * scale * noise, velocities)
        trial = trial + 0.5 * h * velocities * mobile
        moved = constraints.project_positions(
            trial, old, box=box, lengths=lengths, masses=masses, **options
        )
        velocities = velocities + (moved - trial) * mobile / h
        return State(positions=moved, velocities=velocities)
