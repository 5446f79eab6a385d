"""Markov chains whose energies are OpenMM's: the whole time beside OpenMM's calls alone."""

from __future__ import annotations

import itertools
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
    Sequence,
    Target,
    Torsion,
    Translation,
)
from mdgraft_openmm import ContextEnergy
from timing import Result, Settings, described

_STRIDE = 10


class Timed:
    """An energy that adds up the seconds spent in it, Python's part included."""

    def __init__(self, energy: ContextEnergy) -> None:
        self.energy, self.held, self.sites = energy, energy.held, energy.sites
        self.seconds = 0.0

    def __call__(self, state: ChainState) -> torch.Tensor:
        return self._timed(self.energy)(state)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        return self._timed(self.energy.energies_of_arrays)(positions, boxes)

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        return self._timed(self.energy.bound(positions, boxes, energies))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            found = function(*arguments)
            self.seconds += time.perf_counter() - begin
            return found

        return timed


def montecarlo(settings: Settings) -> Iterator[Result]:
    """Alanine dipeptide on Reference, in vacuum and OBC2; 346 rigid waters with PME on the CPU."""
    for solvent, n_steps in (("vacuum", 8000), ("obc2", 200)):
        case = systems.alanine(solvent)
        energy = ContextEnergy(case.system)
        (bonded,) = (f for f in case.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
        bonds = [bonded.getBondParameters(i)[:2] for i in range(bonded.getNumBonds())]
        whole = [list(range(case.n_atoms))]
        one, turned = Displacement(0.01), Torsion(0.5, bonds)
        together = Displacement(0.002, together=True, name="Displacement of all")
        shifted, rotated = Translation(0.05, whole), Rotation(0.3, whole)
        cases: list[tuple[AbstractMove, tuple[int, ...], int]] = [
            (one, (1, 4, 16, 64), _STRIDE),
            (turned, (1, 4, 16, 64), _STRIDE),
        ]
        if solvent == "vacuum":
            mixture = Mixture([one, turned, shifted, rotated])
            mixture.name = "Mixture of four"
            sequence = Sequence([one, turned])
            sequence.name = "Sequence of two"
            rest = (together, shifted, rotated, mixture, sequence)
            cases += [(move, (1, 16), _STRIDE) for move in rest]
            # Every step a sample.
            cases += [(move, (1,), 1) for move in (one, together, mixture)]
        for move, counts, stride in cases:
            for n_chains in counts:
                steps = max(10, n_steps // n_chains)
                yield _measured(
                    f"alanine {solvent}", case, energy, move, n_chains, steps, stride, settings
                )
    case = systems.water_box(346, rigid=True)
    molecules = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(case.n_atoms // 3)]
    energy = ContextEnergy(
        case.system, platform="CPU", properties={"Threads": str(settings.threads)}
    )
    rigid = Mixture([Translation(0.02, molecules), Rotation(0.3, molecules)], [0.5, 0.5])
    for n_chains in (1, 4):
        yield _measured("water", case, energy, rigid, n_chains, 100 // n_chains, _STRIDE, settings)


def _measured(
    row: str,
    case: systems.Case,
    energy: ContextEnergy,
    move: AbstractMove,
    n_chains: int,
    n_steps: int,
    stride: int,
    settings: Settings,
) -> Result:
    timed = Timed(energy)
    state = ChainState.replicate(
        n_chains,
        positions=torch.from_numpy(case.positions),
        box=torch.from_numpy(case.box) if energy.periodic else None,
    )
    n_steps = 10 * max(1, n_steps // (100 if settings.quick else 10))
    chains, within = (
        Metropolis(Target(used, temperature=300.0), move, state, seed=1) for used in (energy, timed)
    )
    for sampler in (chains, within):
        sampler.burn_in(n_steps, adapt=False)
    n_energies = n_steps * n_chains * len(move.updates)
    ours, theirs, shares = [], [], []
    for _ in range(settings.repeats):
        begin = time.perf_counter()
        samples = chains.sample(n_steps // stride, stride=stride)
        ours.append(time.perf_counter() - begin)
        theirs.append(_alone(energy, samples.positions.flatten(0, 1)[:500].numpy(), n_energies))
        timed.seconds, begin = 0.0, time.perf_counter()
        within.sample(n_steps // stride, stride=stride)
        shares.append(timed.seconds / (time.perf_counter() - begin))
    return Result(
        row=f"montecarlo {row}",
        work=f"{n_chains} chains, {move.name}" + ("" if stride > 1 else ", every step"),
        beside="the same number of setPositions, getState and getPotentialEnergy",
        atoms=case.n_atoms,
        ours=ours,
        theirs=theirs,
        target=1.25,
        extra={
            "steps": n_steps,
            "microseconds": 1e6 * min(ours) / n_steps,
            "share in the energy": shares,
        },
        **described(settings),
    )


def _alone(energy: ContextEnergy, configurations: np.ndarray, n_energies: int) -> float:
    """Seconds of so many energies by OpenMM's calls and nothing else."""
    put, get = energy.context.setPositions, energy.context.getState
    each = list(itertools.islice(itertools.cycle(configurations), n_energies))
    begin = time.perf_counter()
    for x in each:
        put(x)
        get(energy=True).getPotentialEnergy()
    return time.perf_counter() - begin
