"""Markov chains whose energies are OpenMM's: the whole time beside the time in these energies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openmm
import systems
import torch
from mdgraft.montecarlo import (
    AbstractMove,
    ChainState,
    Displacement,
    Metropolis,
    Mixture,
    Rotation,
    Target,
    Torsion,
    Translation,
)
from mdgraft_openmm import ContextEnergy
from timing import Result, Settings, described


class Timed:
    """An energy that adds up the seconds spent in it."""

    def __init__(self, energy: ContextEnergy) -> None:
        self.energy, self.held, self.sites = energy, energy.held, energy.sites
        self.seconds = 0.0

    def __call__(self, state: ChainState) -> torch.Tensor:
        return self._timed(self.energy, state)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        return self._timed(self.energy.energies_of_arrays, positions, boxes)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        found = function(*arguments)
        self.seconds += time.perf_counter() - begin
        return found


def montecarlo(settings: Settings) -> Iterator[Result]:
    """Alanine dipeptide on Reference, in vacuum and OBC2; 346 rigid waters with PME on the CPU."""
    for solvent, n_steps in (("vacuum", 4000), ("obc2", 200)):
        case = systems.alanine(solvent)
        energy = ContextEnergy(case.system)
        (bonded,) = (f for f in case.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
        bonds = [bonded.getBondParameters(i)[:2] for i in range(bonded.getNumBonds())]
        for move in (Displacement(0.01), Torsion(0.5, bonds)):
            for n_chains in (1, 4, 16, 64):
                steps = max(10, n_steps // n_chains)
                yield _measured(f"alanine {solvent}", case, energy, move, n_chains, steps, settings)
    case = systems.water_box(346, rigid=True)
    molecules = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(case.n_atoms // 3)]
    energy = ContextEnergy(
        case.system, platform="CPU", properties={"Threads": str(settings.threads)}
    )
    rigid = Mixture([Translation(0.02, molecules), Rotation(0.3, molecules)], [0.5, 0.5])
    for n_chains in (1, 4):
        yield _measured("water", case, energy, rigid, n_chains, 100 // n_chains, settings)


def _measured(
    row: str,
    case: systems.Case,
    energy: ContextEnergy,
    move: AbstractMove,
    n_chains: int,
    n_steps: int,
    settings: Settings,
) -> Result:
    timed = Timed(energy)
    state = ChainState.replicate(
        n_chains,
        positions=torch.from_numpy(case.positions),
        box=torch.from_numpy(case.box) if energy.periodic else None,
    )
    chains = Metropolis(Target(timed, temperature=300.0), move, state, seed=1)
    n_steps = 10 * max(1, n_steps // (100 if settings.quick else 10))
    chains.burn_in(n_steps)
    # Loops are compiled at their first call.
    chains.sample(1)
    ours, theirs = [], []
    for _ in range(settings.repeats):
        timed.seconds, begin = 0.0, time.perf_counter()
        chains.sample(max(1, n_steps // 10), stride=10)
        ours.append(time.perf_counter() - begin)
        theirs.append(timed.seconds)
    return Result(
        row=f"montecarlo {row}",
        work=f"{n_chains} chains, {move.name}",
        beside="the energies in it",
        atoms=case.n_atoms,
        ours=ours,
        theirs=theirs,
        target=1.25,
        extra={"steps": n_steps, "microseconds": 1e6 * min(ours) / n_steps},
        **described(settings),
    )
