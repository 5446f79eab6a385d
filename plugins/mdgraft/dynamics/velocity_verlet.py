"""One step of velocity Verlet with constraints."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from mdgraft.constraints import ConstraintSet
from mdgraft.dynamics.state import Forces, State, checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class VelocityVerlet:
    """Velocity Verlet with SHAKE and RATTLE, as OpenMM's documentation writes it.

    ::

        v  <- v + h/2 M^-1 F(x)
        x* <- x + h v
        x  <- project x* along the constraints of the old x
        v  <- v + h/2 M^-1 F(x) + (x - x*)/h
        v  <- project v

    The same map as ``openmm.CustomIntegrator`` with these steps (the user guide's
    ``CustomIntegrator`` example with constraints); OpenMM's ``VerletIntegrator`` is leapfrog,
    which has other velocities. (Andersen, J. Comput. Phys. 52, 24 (1983).) Differentiable end to
    end in the state, the time step and whatever forces, lengths and masses depend on.

    Parameters
    ----------
    timestep
        h [ps], a number or a scalar tensor.
    """

    timestep: float | Tensor

    def step(
        self,
        state: State,
        forces: Forces,
        constraints: ConstraintSet,
        *,
        box: Tensor | None = None,
        lengths: Tensor | None = None,
        masses: Tensor | None = None,
        **options: Any,
    ) -> State:
        """Advance by one step.

        Parameters
        ----------
        state
            Where the step begins.
        forces
            Maps positions and box to forces, such as ``potential.forces``.
        constraints
            Constraints, masses and virtual sites; a set without constraints holds masses alone.
        box
            ``(..., 3, 3)`` box vectors as rows [nm], or None.
        lengths, masses
            In place of those of the set.
        **options
            ``solver``, as of `ConstraintSet.project_positions`.

        Returns
        -------
        State
            Where it ends, with forces there.

        Raises
        ------
        InvalidInputError
            For a time step that is not positive, or a wrong shape.
        ConstraintError
            If the constraints cannot be met.
        """
        h = checked("timestep", self.timestep, state.positions)
        weight = constraints.inverse_masses(masses).unsqueeze(-1)
        old = state.positions
        force = forces(old, box) if state.forces is None else state.forces
        velocities = state.velocities + 0.5 * h * weight * force
        trial = old + h * velocities
        moved = constraints.project_positions(
            trial, old, box=box, lengths=lengths, masses=masses, **options
        )
        force = forces(moved, box)
        # Only what constraints have done: virtual sites have no velocity.
        shift = (moved - trial) * (weight > 0)
        velocities = velocities + 0.5 * h * weight * force + shift / h
        velocities = constraints.project_velocities(velocities, moved, box=box, masses=masses)
        return State(positions=moved, velocities=velocities, forces=force)
