"""Hybrid Monte Carlo whose trajectories OpenMM runs."""

from __future__ import annotations

import math

import numpy as np
import openmm
import torch
from mdgraft import InvalidInputError
from mdgraft._errors import SimulationError, WrongEnsembleError
from mdgraft._units import BOLTZMANN
from mdgraft.montecarlo import AbstractMove, ChainState, Proposal, Target
from mdgraft.montecarlo._counts import checked_trajectory
from mdgraft.montecarlo.moves.base import Noise, normal, uniform
from mdgraft.potentials.held import Held
from torch import Tensor

from mdgraft_openmm._converter import number
from mdgraft_openmm._held import constraint_indices
from mdgraft_openmm.context_energy import ContextEnergy, configurations

# A trajectory there and back must return to where it started [nm].
_RETURN = 1e-4
# Constraints must hold at the start to this relative accuracy.
_CONSTRAINED = 1e-5
# Single-precision positions keep constraints to this relative accuracy.
_ROUNDING = 2e-6
# Adapted steps are at most those in which a constraint turns by this angle with its thermal speed
# [rad]. At 1 rad its equations have no or another solution, which velocities reach at five
# standard deviations, one time in 3e5.
_TURN = 0.2


class HybridMonteCarlo(AbstractMove):
    """Proposals are trajectories of a reversible OpenMM integrator with new velocities.

    Duane, Kennedy, Pendleton and Roweth, Phys. Lett. B 195, 216 (1987). Velocities are drawn from
    the Maxwell-Boltzmann distribution and projected onto the constraints; the trajectory is
    accepted with ``min(1, exp(-beta d(U + K)))``. Constraints are kept: the distribution is that
    of the constrained system. The sampler's target decides on the energy: with the same
    `ContextEnergy` it takes that at the end of the trajectory, otherwise it evaluates its own.

    Velocities of OpenMM's ``VerletIntegrator`` (leapfrog) are half a step behind the positions.
    They are kicked to the times of positions and projected onto the constraints, which makes the
    trajectory that of velocity Verlet with RATTLE (Andersen, J. Comput. Phys. 52, 24 (1983)), and
    the kinetic energy that of the end point. Trajectories are reversible to rounding and to the
    integrator's constraint tolerance, as long as steps are small enough for the constraints to have
    one solution near by; ``check_return`` makes sure of that. Without it burn-in does not adapt a
    step beyond that in which constraints turn by 0.2 rad with thermal speed.

    Parameters
    ----------
    energy
        The System and the platform that it runs on.
    scale
        Time step [ps].
    n_steps
        Steps of a trajectory.
    integrator
        None for ``VerletIntegrator``; or one of your own, which the move takes over: a
        ``CustomIntegrator`` that is deterministic, reversible, preserves volume in phase space, and
        starts and ends with velocities at the times of positions, such as ``MTSIntegrator``.
        Randomness is looked for and reversibility is tried; that volume is preserved is up to you.
    jitter
        The time step of a trajectory is uniform within this fraction of ``scale``.
    constraint_tolerance
        Relative, of the integrator and of velocities.
    check_return
        Run every trajectory back as well, at twice the cost, and reject those that do not return to
        their start (Lelievre, Rousset and Stoltz, Numer. Math. 143, 379 (2019)): exact even where
        steps are large or forces along constraints strong.
    name
        Under which the move is counted.

    Raises
    ------
    InvalidInputError
        For numbers out of range, or if OpenMM cannot run the System.
    WrongEnsembleError
        For an integrator that is random, has a thermostat, or is not reversible.
    """

    def __init__(
        self,
        energy: ContextEnergy,
        scale: float | Tensor,
        n_steps: int,
        *,
        integrator: openmm.Integrator | None = None,
        jitter: float = 0.1,
        constraint_tolerance: float = 1e-8,
        check_return: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, scale=scale)
        if not isinstance(energy, ContextEnergy):
            raise InvalidInputError(
                f"energy: got {type(energy).__name__}, wanted a mdgraft_openmm.ContextEnergy"
            )
        self.energy = energy
        self.n_steps, self.jitter = checked_trajectory(n_steps, jitter)
        self._tolerance, self.check_return = constraint_tolerance, check_return
        chosen = openmm.VerletIntegrator(0.001) if integrator is None else integrator
        _check_deterministic(chosen)
        self._leapfrog = isinstance(chosen, openmm.VerletIntegrator)
        chosen.setConstraintTolerance(constraint_tolerance)
        self._context = energy.open(chosen)
        self._integrator = chosen
        self._variables = _globals_of(chosen)
        system = energy.system
        self._mass = np.array(
            [number(system.getParticleMass(i)) for i in range(system.getNumParticles())]
        )[:, None]
        self._inverse_mass = np.divide(
            1.0, self._mass, out=np.zeros_like(self._mass), where=self._mass > 0
        )
        rows = [system.getConstraintParameters(i) for i in constraint_indices(system)]
        self._pairs = np.array([row[:2] for row in rows], dtype=int).reshape(-1, 2)
        self._lengths = np.array([number(row[2]) for row in rows])
        self._constrained = len(rows) > 0
        self._accepted_violation = 10.0 * constraint_tolerance + (
            0.0 if energy.double_precision else _ROUNDING
        )
        self.target_acceptance = 0.8
        self._largest_step = math.inf

    # Move -------------------------------------------------------------------------------------

    def check(self, state: ChainState, target: Target) -> None:
        """Raise for another System, broken constraints, or an integrator that is not reversible."""
        if state.n_particles != self.energy.n_particles:
            raise InvalidInputError(
                f"state: has {state.n_particles} particles, the System {self.energy.n_particles}"
            )
        if state.present is not None:
            raise InvalidInputError(f"{self.name}: moves all particles; none can be absent")
        self._check_constraints(state)
        if self._constrained and not self.check_return:
            masses = self._inverse_mass[self._pairs, 0].sum(axis=1)
            speeds = np.sqrt(BOLTZMANN * target.temperature * masses)
            self._largest_step = _TURN * float((self._lengths / speeds).min())
        if not self._leapfrog:
            self._check_reversible(state, target)

    def largest_scale(self, state: ChainState) -> float:
        """Beyond which constraints need not have one solution near by; see ``check_return``."""
        return self._largest_step

    @property
    def held(self) -> Held | None:
        """Constraints of the System, and particles without mass."""
        return self.energy.held

    def keeps(self, pairs: Tensor, state: ChainState) -> Tensor:
        """Those that the System constrains."""
        own = (
            set() if self.held is None else {tuple(sorted(row)) for row in self.held.rows.tolist()}
        )
        return torch.tensor([tuple(sorted(row)) in own for row in pairs.tolist()], dtype=torch.bool)

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        """Normal numbers ``(C, N, 3)`` for the velocities, and ``(C,)`` for the time step."""
        return {
            "normal": normal(state, generator, state.n_particles, 3),
            "jitter": uniform(state, generator),
        }

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        """``log_ratio = -beta (K' - K)``; a trajectory that fails is rejected."""
        own = target.energy is self.energy
        before, forces = state, state.forces if own else None
        if forces is None:
            energies, forces = self.energy.energies_and_forces(state)
            if own:
                before = state.replace(energies=energies, forces=forces.to(state.positions))
        initial = forces.detach().to("cpu", torch.float64).numpy()
        velocities = self._velocities(noise, target)
        steps = float(self.scale.detach()) * (
            1.0 + self.jitter * (2.0 * noise["jitter"].cpu().numpy() - 1.0)
        )
        positions, ends, pulls, ratios = [], [], [], []
        for c, (x, box) in enumerate(configurations(before)):
            end = self._trajectory(x, box, velocities[c], initial[c], float(steps[c]))
            positions.append(x if end is None else end[0])
            ends.append(math.nan if end is None else end[1])
            pulls.append(initial[c] if end is None else end[2])
            ratios.append(-math.inf if end is None else -target.beta * end[3])
        log_ratio = torch.tensor(ratios, dtype=torch.float64, device=state.positions.device)
        ended = before.replace(
            positions=_like(positions, state.positions),
            energies=torch.tensor(ends, dtype=torch.float64, device=log_ratio.device)
            if own
            else None,
            forces=_like(pulls, state.positions) if own else None,
        )
        return Proposal(
            state=ended,
            log_ratio=log_ratio,
            known=log_ratio > -torch.inf if own else None,
            before=before,
        )

    # Host -------------------------------------------------------------------------------------

    def _velocities(self, noise: Noise, target: Target) -> np.ndarray:
        speed = np.sqrt(BOLTZMANN * target.temperature * self._inverse_mass)
        drawn: np.ndarray = speed * noise["normal"].detach().to("cpu", torch.float64).numpy()
        return drawn

    def _trajectory(
        self,
        x: np.ndarray,
        box: np.ndarray | None,
        velocities: np.ndarray,
        forces: np.ndarray,
        step: float,
    ) -> tuple[np.ndarray, float, np.ndarray, float] | None:
        """Positions, energy and forces at the end, and the change of kinetic energy.

        None if the trajectory blew up.
        """
        context = self._context
        self.energy.put(context, x, box)
        try:
            v = self._projected(velocities)
            kinetic = self._kinetic(v)
            half = 0.5 * step * self._inverse_mass
            context.setVelocities(v - half * forces if self._leapfrog else v)
            self._run(step)
            state = context.getState(energy=True, forces=True, positions=True, velocities=True)
            end = np.array(state.getPositions(asNumpy=True)._value, dtype=np.float64)
            force = self.energy.forces_of(state)
            v = np.array(state.getVelocities(asNumpy=True)._value, dtype=np.float64)
            v = v * (self._mass > 0)
            if self._leapfrog:
                v = self._projected(v + half * force)
            if self.check_return and self._distance_back(x, end, -v, force, step) > _RETURN:
                return None
        except openmm.OpenMMException:
            context.reinitialize(preserveState=False)
            self._restore_parameters()
            return None
        energy = number(state.getPotentialEnergy())
        change = self._kinetic(v) - kinetic
        if not (np.isfinite(end).all() and np.isfinite(force).all()):
            return None
        # OpenMM gives up on constraints that do not converge without a word.
        if self._violation(end).max(initial=0.0) > self._accepted_violation:
            return None
        if not (math.isfinite(energy) and math.isfinite(change)):
            return None
        return end, energy, force, change

    def _distance_back(
        self, x: np.ndarray, end: np.ndarray, v: np.ndarray, forces: np.ndarray, step: float
    ) -> float:
        """How far from ``x`` a trajectory from ``end`` misses it."""
        kick = 0.5 * step * self._inverse_mass * forces
        self._context.setPositions(end)
        self._context.setVelocities(v - kick if self._leapfrog else v)
        self._run(step)
        back = self._context.getState(positions=True).getPositions(asNumpy=True)._value
        return float(np.nan_to_num(np.abs(np.array(back) - x), nan=np.inf).max())

    def _run(self, step: float) -> None:
        self._integrator.setStepSize(step)
        for name, value in self._variables.items():
            self._integrator.setGlobalVariableByName(name, value)
        self._integrator.step(self.n_steps)

    def _restore_parameters(self) -> None:
        """Global parameters are those of the energy, whatever happened to this Context."""
        for name, value in self.energy.context.getParameters().items():
            self._context.setParameter(name, value)

    def _projected(self, velocities: np.ndarray) -> np.ndarray:
        """Velocities without their components along constraints."""
        if not self._constrained:
            return velocities
        self._context.setVelocities(velocities)
        self._context.applyVelocityConstraints(self._tolerance)
        found = self._context.getState(velocities=True).getVelocities(asNumpy=True)._value
        return np.array(found, dtype=np.float64)

    def _kinetic(self, velocities: np.ndarray) -> float:
        return 0.5 * float((self._mass * velocities**2).sum())

    # Checks -----------------------------------------------------------------------------------

    def _violation(self, x: np.ndarray) -> np.ndarray:
        """Relative errors of the constraints."""
        arms = x[self._pairs[:, 0]] - x[self._pairs[:, 1]]
        errors: np.ndarray = np.abs(np.linalg.norm(arms, axis=-1) - self._lengths) / self._lengths
        return errors

    def _check_constraints(self, state: ChainState) -> None:
        for chain, (x, _) in enumerate(configurations(state)):
            off = self._violation(x)
            if off.max(initial=0.0) > _CONSTRAINED:
                first, second = self._pairs[off.argmax()]
                raise InvalidInputError(
                    f"state: the constraint between particles {first} and {second} does not hold "
                    f"in chain {chain}: {np.linalg.norm(x[first] - x[second]):g} nm, wanted "
                    f"{self._lengths[off.argmax()]:g}; start from Sampler.equilibrate or from "
                    "context.applyConstraints"
                )

    def _check_reversible(self, state: ChainState, target: Target) -> None:
        """Run there, turn around, and see whether that leads back."""
        x, box = configurations(state[:1])[0]
        generator = torch.Generator().manual_seed(0)
        noise = {"normal": normal(state[:1], generator, state.n_particles, 3)}
        step = float(self.scale.detach())
        nothing = np.zeros_like(x)
        try:
            self.energy.put(self._context, x, box)
            self._context.setVelocities(self._projected(self._velocities(noise, target)[0]))
            self._run(step)
            ended = self._context.getState(positions=True, velocities=True)
            end, v = (
                np.array(found._value, dtype=np.float64)
                for found in (ended.getPositions(asNumpy=True), ended.getVelocities(asNumpy=True))
            )
            off = self._distance_back(x, end, -v, nothing, step)
        except openmm.OpenMMException as error:
            raise SimulationError(
                f"integrator: a trajectory from the start fails ({error}); take a smaller scale"
            ) from error
        if not off < _RETURN:
            raise WrongEnsembleError(
                "integrator: is not reversible: a trajectory there and back misses its start by "
                f"{off:.2g} nm, so that its proposals have no detailed balance; use "
                "VerletIntegrator, or a smaller time step if it should be"
            )


def _like(arrays: list[np.ndarray], tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(tensor)


def _check_deterministic(integrator: openmm.Integrator) -> None:
    kind = type(integrator).__name__
    if isinstance(integrator, openmm.VerletIntegrator):
        groups = integrator.getIntegrationForceGroups() & 0xFFFFFFFF
        if groups != 0xFFFFFFFF:
            raise WrongEnsembleError(
                f"integrator: applies only the force groups {groups:#x}, but the velocities that "
                "it is given belong to all; call setIntegrationForceGroups(0xFFFFFFFF), or pass "
                "a MTSIntegrator"
            )
        return
    if not isinstance(integrator, openmm.CustomIntegrator):
        raise WrongEnsembleError(
            f"integrator: {kind} is random, has a thermostat or changes its step, so that its "
            "trajectories are no reversible proposals; leave it out for VerletIntegrator, or pass "
            "a deterministic CustomIntegrator"
        )
    for index in range(integrator.getNumComputations()):
        expression = str(integrator.getComputationStep(index)[2])
        if "gaussian" in expression or "uniform" in expression:
            raise WrongEnsembleError(
                f"integrator: {kind} draws random numbers ({expression}); its trajectories are no "
                "reversible proposals. Leave out its thermostat"
            )


def _globals_of(integrator: openmm.Integrator) -> dict[str, float]:
    """Global variables of a CustomIntegrator, which every trajectory must start from."""
    if not isinstance(integrator, openmm.CustomIntegrator):
        return {}
    return {
        integrator.getGlobalVariableName(i): float(integrator.getGlobalVariable(i))
        for i in range(integrator.getNumGlobalVariables())
    }
