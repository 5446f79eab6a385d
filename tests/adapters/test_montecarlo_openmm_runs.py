"""Chains in OpenMM: restarts, failures, what is refused, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError, MissingBoxError, SimulationError, WrongEnsembleError
from mdgraft.montecarlo import (
    ChainState,
    Displacement,
    Metropolis,
    Mixture,
    Recording,
    Sequence,
    Target,
    Torsion,
    Translation,
    transition,
)
from mdgraft_openmm import ContextEnergy, HybridMonteCarlo
from montecarlo_laws import F64, TEMPERATURE
from montecarlo_systems import (
    chain,
    diatomics,
    velocity_verlet,
    wells,
)

# Restarts, failures, refusals -------------------------------------------------------------------


def test_a_stored_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    def made(seed: int) -> Metropolis:
        system, x = chain(constrained=True)
        energy = ContextEnergy(system)
        return Metropolis(
            Target(energy, temperature=TEMPERATURE),
            Sequence(
                [HybridMonteCarlo(energy, 0.006, 5), Torsion(1.0, [(i, i + 1) for i in range(4)])]
            ),
            ChainState.replicate(3, positions=x),
            seed=seed,
        )

    whole, stopped, continued = made(1), made(1), made(2)
    for adapt in (True, False):
        for _ in range(5):
            stopped.step(adapt=adapt)
    stopped.save(tmp_path / "run.npz")
    continued.load(tmp_path / "run.npz")
    for adapt in (True, False):
        for _ in range(5):
            whole.step(adapt=adapt)
    again, uncut = continued.sample(6), whole.sample(6)
    assert torch.equal(again.positions, uncut.positions)
    assert torch.equal(again.energies, uncut.energies)
    assert whole.scales == continued.scales


def test_records_of_trajectories_replay() -> None:
    energy = ContextEnergy(wells())
    target = Target(energy, temperature=TEMPERATURE)
    state = ChainState.replicate(3, positions=torch.full((4, 3), 0.02, dtype=F64))
    chains = Metropolis(target, HybridMonteCarlo(energy, 0.1, 4), state)
    for update in chains.sample(5, record=Recording()).updates:
        again = transition(update.transition.before, update.move, target, update.noise, update.u)
        assert torch.equal(again.after.positions, update.transition.after.positions)


def test_trajectories_that_blow_up_are_rejections() -> None:
    system = openmm.System()
    force = openmm.CustomExternalForce("1000*x^8+a*y^2+z^2")
    force.addGlobalParameter("a", 1.0)
    for i in range(2):
        system.addParticle(1.0)
        force.addParticle(i, [])
    system.addForce(force)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setParameter("a", 2.0)
    energy = ContextEnergy(context)
    state = ChainState.replicate(3, positions=torch.full((2, 3), 0.6, dtype=F64))
    move = HybridMonteCarlo(energy, 2.0, 60, jitter=0.0)
    chains = Metropolis(Target(energy, temperature=TEMPERATURE), move, state)
    for _ in range(3):
        chains.step()
    assert torch.equal(chains.state.positions, state.positions)
    assert dict(move._context.getParameters()) == {"a": 2.0}


def random_integrator() -> openmm.CustomIntegrator:
    integrator = velocity_verlet()
    integrator.addComputePerDof("v", "0.9*v+0.1*gaussian")
    return integrator


def euler() -> openmm.CustomIntegrator:
    integrator = openmm.CustomIntegrator(0.001)
    integrator.addPerDofVariable("x0", 0)
    integrator.addComputePerDof("x0", "x")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("v", "v+dt*f/m-dt*v*50")
    return integrator


@pytest.mark.parametrize(
    "integrator",
    [
        openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.001),
        openmm.NoseHooverIntegrator(300.0, 1.0, 0.001),
        openmm.VariableVerletIntegrator(1e-3),
        openmm.BrownianIntegrator(300.0, 1.0, 0.001),
    ],
    ids=lambda i: type(i).__name__,
)
def test_integrators_that_are_no_proposals(integrator: openmm.Integrator) -> None:
    with pytest.raises(WrongEnsembleError, match="no reversible proposals"):
        HybridMonteCarlo(ContextEnergy(wells()), 0.1, 3, integrator=integrator)


def test_custom_integrators_are_tried() -> None:
    energy = ContextEnergy(wells())
    target = Target(energy, temperature=TEMPERATURE)
    state = ChainState.replicate(2, positions=torch.full((4, 3), 0.02, dtype=F64))
    with pytest.raises(WrongEnsembleError, match="draws random numbers"):
        HybridMonteCarlo(energy, 0.1, 3, integrator=random_integrator())
    move = HybridMonteCarlo(energy, 0.1, 3, integrator=euler())
    with pytest.raises(WrongEnsembleError, match="not reversible: .* there and back"):
        Metropolis(target, move, state)


def test_refusals() -> None:
    system, x = chain(constrained=True)
    energy = ContextEnergy(system)
    target = Target(energy, temperature=TEMPERATURE)
    stretched = ChainState.replicate(2, positions=x * 1.01)
    with pytest.raises(InvalidInputError, match=r"constraint between particles \d and \d does not"):
        Metropolis(target, HybridMonteCarlo(energy, 0.001, 3), stretched)
    with pytest.raises(InvalidInputError, match="has 4 particles, the System 5"):
        Metropolis(target, Displacement(0.1), ChainState(positions=x[None, :4]))
    with pytest.raises(InvalidInputError, match="wanted a mdgraft_openmm.ContextEnergy"):
        HybridMonteCarlo(system, 0.1, 3)  # type: ignore[arg-type]
    for n_steps, jitter, match in ((0, 0.1, "n_steps"), (3, 1.5, "jitter")):
        with pytest.raises(InvalidInputError, match=match):
            HybridMonteCarlo(energy, 0.1, n_steps, jitter=jitter)
    periodic, y, _ = diatomics(2)
    with pytest.raises(MissingBoxError, match="box"):
        Metropolis(
            Target(ContextEnergy(periodic), temperature=300.0),
            Displacement(0.1),
            ChainState(positions=y[None]),
        )
    small = 0.5 * torch.eye(3, dtype=F64)
    with pytest.raises(SimulationError, match="OpenMM cannot evaluate"):
        Metropolis(
            Target(ContextEnergy(periodic), temperature=300.0),
            Displacement(0.1),
            ChainState(positions=y[None], box=small[None]),
        )


class Timed(ContextEnergy):
    """Adds up the seconds spent in it."""

    spent = 0.0

    def __call__(self, state: ChainState) -> torch.Tensor:
        return super().__call__(state)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        return super().energies_of_arrays(positions, boxes)

    def bound(self, *arrays: Any) -> Callable[[], None]:
        evaluate = super().bound(*arrays)

        def timed() -> None:
            start = time.perf_counter()
            evaluate()
            self.spent += time.perf_counter() - start

        return timed


def test_time_goes_into_the_host() -> None:
    # Fewer chains and atoms than this are for the benchmarks: seconds are not for tests.
    system, x, box = diatomics(125, 4.2)
    energy = Timed(system)
    moves = Mixture(
        [Translation(0.02, [[2 * i, 2 * i + 1] for i in range(125)]), Displacement(0.01)]
    )
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE),
        moves,
        ChainState.replicate(4, positions=x, box=box),
    )
    fractions = []
    for _ in range(5):
        energy.spent, start = 0.0, time.perf_counter()
        chains.sample(20)
        fractions.append(energy.spent / (time.perf_counter() - start))
    assert max(fractions) > 0.8, fractions
