"""Host energies on arrays: steps are those on tensors, bit by bit, and taken where they can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError, SimulationError
from mdgraft.kernels.switch import plain_kernels
from mdgraft.montecarlo import (
    MALA,
    AbstractMove,
    ChainState,
    Displacement,
    Metropolis,
    Mixture,
    Proposal,
    Recording,
    Rotation,
    Sequence,
    Target,
    Torsion,
    Translation,
    Volume,
)
from mdgraft.montecarlo.moves.base import Noise
from mdgraft_openmm import ContextEnergy
from montecarlo_laws import F64, TEMPERATURE
from montecarlo_systems import chain, diatomics, site_water

BONDS = [(i, i + 1) for i in range(4)]

MOVES: dict[str, Callable[[], AbstractMove]] = {
    "one particle": lambda: Displacement(0.01),
    "one of some": lambda: Displacement(0.02, particles=[4, 0]),
    "all particles": lambda: Displacement(0.005, together=True),
    "some together": lambda: Displacement(0.008, particles=[1, 3], together=True),
    "torsions": lambda: Torsion(0.9, BONDS),
    "translations": lambda: Translation(0.01, [[0, 1], [2, 3, 4]]),
    "rotations": lambda: Rotation(0.05, [[0, 1], [2, 3, 4]]),
    "a mixture": lambda: Mixture(
        [Torsion(0.9, BONDS), Displacement(0.01), Displacement(0.005, together=True)],
        [0.4, 0.5, 0.1],
    ),
    "a sequence of mixtures": lambda: Sequence(
        [Mixture([Torsion(0.9, BONDS), Displacement(0.01)]), Rotation(0.05, [[0, 1]])]
    ),
    "a sequence": lambda: Sequence([t := Torsion(0.9, BONDS), Displacement(0.01), t]),
}


def of_a_chain(moves: AbstractMove, n_chains: int = 4, seed: int = 1, **options: Any) -> Metropolis:
    system, x = chain()
    energy = options.pop("energy", ContextEnergy)(system)
    state = ChainState.replicate(n_chains, positions=x)
    return Metropolis(Target(energy, temperature=TEMPERATURE, **options), moves, state, seed=seed)


def in_a_box(moves: AbstractMove, seed: int = 1) -> Metropolis:
    system, x, box = diatomics(8, 1.8)
    state = ChainState.replicate(3, positions=x, box=box)
    stretched = 1.0 + 0.05 * torch.arange(3, dtype=F64)[:, None, None]
    state = ChainState(positions=state.positions, box=box * stretched)
    return Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE), moves, state, seed=seed
    )


def same(first: Metropolis, second: Metropolis) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("n_chains", [1, 4])
@pytest.mark.parametrize("name", MOVES)
def test_samples_are_those_of_single_steps(name: str, n_chains: int) -> None:
    fast, slow = (of_a_chain(MOVES[name](), n_chains) for _ in range(2))
    assert fast._arrays() is not None
    fast.burn_in(20, adapt=False)
    for _ in range(20):
        slow.step()
    slow.reset_statistics()
    same(fast, slow)
    samples = fast.sample(15, stride=3)
    states = []
    for _ in range(15):
        for _ in range(3):
            slow.step()
        states.append(slow.state)
    same(fast, slow)
    assert torch.equal(samples.positions, torch.stack([s.positions for s in states]))
    assert torch.equal(
        samples.energies, torch.stack([s.energies for s in states if s.energies is not None])
    )
    assert [s.step for s in samples.states] == [20 + 3 * k for k in range(1, 16)]
    counts = [int(c.acceptances.sum()) for c in fast.statistics.values()]
    assert all(0 < count < 60 * n_chains * 3 for count in counts)
    with torch.no_grad():
        torch.testing.assert_close(
            fast.target.energies(fast.state), fast.state.energies, rtol=1e-12, atol=1e-9
        )


def test_boxes_of_chains_differ() -> None:
    molecules = [[2 * i, 2 * i + 1] for i in range(8)]
    fast, slow = (
        in_a_box(Sequence([Translation(0.03, molecules), Rotation(0.3, molecules)]))
        for _ in range(2)
    )
    assert fast._arrays() is not None
    fast.sample(10, stride=2)
    for _ in range(20):
        slow.step()
    same(fast, slow)


def test_a_stored_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, stopped, continued = (of_a_chain(MOVES["a sequence"](), seed=seed) for seed in (1, 1, 2))
    stopped.burn_in(30)
    stopped.sample(4, stride=2)
    stopped.save(tmp_path / "run.npz")
    continued.load(tmp_path / "run.npz")
    whole.burn_in(30)
    whole.sample(4, stride=2)
    again, uncut = continued.sample(7), whole.sample(7)
    assert torch.equal(again.positions, uncut.positions)
    same(whole, continued)


def test_samples_do_not_change_afterwards() -> None:
    chains = of_a_chain(Torsion(0.9, BONDS))
    start = chains.state.positions.clone()
    first = chains.sample(3)
    kept = first.positions.clone()
    chains.sample(20)
    assert torch.equal(first.positions, kept)
    assert not torch.equal(chains.state.positions, kept[-1])
    assert torch.equal(chains._state.replace(positions=start).positions, start)


# Where tensors are needed -----------------------------------------------------------------------


class Lifted(ContextEnergy):
    """An energy of a user, who changes what is inherited."""

    def __call__(self, state: ChainState) -> torch.Tensor:
        return super().__call__(state) + 1e5 * state.positions[:, 0, 0].square()


class Sideways(Displacement):
    """A move of a user, who changes what is inherited."""

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        normal = noise["normal"] * torch.tensor([1.0, 0.0, 0.0])
        return super().apply(state, {**noise, "normal": normal}, target)


class Halved(Target):
    """A distribution of a user."""

    @property
    def beta(self) -> float:
        return 0.5 * super().beta

    def log_density(self, state: ChainState, energies: torch.Tensor | None = None) -> torch.Tensor:
        return super().log_density(state, energies)


def watched() -> Metropolis:
    system, x = chain()
    return Metropolis(
        Halved(ContextEnergy(system), temperature=TEMPERATURE),
        Displacement(0.01),
        ChainState.replicate(2, positions=x),
    )


def in_single_precision() -> Metropolis:
    system, x = chain()
    return Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE),
        Displacement(0.01),
        ChainState.replicate(2, positions=x.float()),
    )


def with_sites() -> Metropolis:
    system, x, box = site_water()
    molecules = [list(range(4 * i, 4 * i + 4)) for i in range(len(x) // 4)]
    return Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE),
        Translation(0.01, molecules),
        ChainState.replicate(2, positions=x, box=box),
    )


def with_pressure() -> Metropolis:
    system, x, box = diatomics(8, 1.8)
    return Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE, pressure=1.0),
        Sequence([Translation(0.01, [[0, 1]]), Volume(0.01)]),
        ChainState.replicate(2, positions=x, box=box),
    )


TENSORS: dict[str, Callable[[], Metropolis]] = {
    "energy of a graft": lambda: of_a_chain(Displacement(0.01), energy=mdgraft.graft),
    "a function": lambda: of_a_chain(
        Displacement(0.01), energy=lambda system: ContextEnergy(system).__call__
    ),
    "an energy that is changed": lambda: of_a_chain(Displacement(0.01), energy=Lifted),
    "a move that is changed": lambda: of_a_chain(Sideways(0.01)),
    "a target that is changed": watched,
    "forces": lambda: of_a_chain(MALA(0.001)),
    "some forces": lambda: of_a_chain(Sequence([Displacement(0.01), MALA(0.001)])),
    "a mixture with forces": lambda: of_a_chain(Mixture([Displacement(0.01), MALA(0.001)])),
    "a mixture with a move that is changed": lambda: of_a_chain(
        Mixture([Sideways(0.01), Torsion(0.5, BONDS)])
    ),
    "single precision": in_single_precision,
    "virtual sites": with_sites,
    "pressure": with_pressure,
}


@pytest.mark.parametrize("name", TENSORS)
def test_chains_that_need_tensors_use_them(name: str) -> None:
    fast, slow = TENSORS[name](), TENSORS[name]()
    assert fast._arrays() is None
    fast.sample(4, stride=2)
    for _ in range(8):
        slow.step()
    same(fast, slow)


def test_plain_kernels_and_records_use_tensors() -> None:
    chains, other = (of_a_chain(Displacement(0.01)) for _ in range(2))
    with plain_kernels():
        assert chains._arrays() is None
        chains.sample(5)
    assert len(other.sample(5, record=Recording()).updates) == 5
    same(chains, other)


def test_what_is_inherited_and_changed_counts() -> None:
    # The first bead is held at x = 0 by what the subclass adds, and moves along x alone.
    held = of_a_chain(Displacement(0.02, particles=[0]), 16, energy=Lifted)
    held.burn_in(100)
    spread = float(held.sample(100).positions[:, :, 0, 0].std())
    free = of_a_chain(Displacement(0.02, particles=[0]), 16)
    free.burn_in(100)
    assert spread < 0.8 * float(free.sample(100).positions[:, :, 0, 0].std())
    sideways = of_a_chain(Sideways(0.02), 4)
    start = sideways.state.positions
    moved = sideways.sample(30).states[-1].positions - start
    assert float(moved[..., 0].abs().max()) > 0.0 and float(moved[..., 1:].abs().max()) == 0.0


# Failures ---------------------------------------------------------------------------------------


class Breaking(ContextEnergy):
    """Energies that are not a number from some call on."""

    left = 10**9

    def __call__(self, state: ChainState) -> torch.Tensor:
        return torch.from_numpy(self.energies_of_arrays(state.positions.numpy(), None))

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        self.left -= 1
        found = super().energies_of_arrays(positions, boxes)
        if self.left < 0:
            found[-1] = np.nan
        return found


class Lacking(ContextEnergy):
    """Energies of the first chain alone."""

    def __call__(self, state: ChainState) -> torch.Tensor:
        return super().__call__(state)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        found = super().energies_of_arrays(positions, boxes)
        return found[:1] if self.lacking else found

    lacking = False


def test_energies_of_some_chains_are_refused() -> None:
    chains = of_a_chain(MOVES["a sequence"](), energy=Lacking)
    assert chains._arrays() is not None
    energy: Any = chains.target.energy
    energy.lacking = True
    with pytest.raises(InvalidInputError, match=r"shape \(1,\), wanted \(4,\), one energy"):
        chains.sample(2)


def in_steps(chains: Metropolis, n_steps: int) -> None:
    for _ in range(n_steps):
        chains.step()


def test_an_energy_that_is_not_a_number_raises_and_leaves_the_last_step() -> None:
    broken = [of_a_chain(MOVES["a sequence"](), energy=Breaking) for _ in range(2)]
    fast, slow = broken
    assert fast._arrays() is not None
    for chains in broken:
        energy: Any = chains.target.energy
        energy.left = 3 * 7 + 1
    with pytest.raises(SimulationError, match="that of a proposal of chain 3 is nan"):
        fast.sample(30)
    with pytest.raises(SimulationError, match="that of a proposal of chain 3 is nan"):
        in_steps(slow, 30)
    same(fast, slow)
    assert fast.state.step == 7


def test_what_the_host_refuses_raises() -> None:
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("10*x")
    force.addParticle(0, [])
    system.addForce(force)
    chains = Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE),
        Displacement(1e308),
        ChainState.replicate(1, positions=torch.zeros(1, 3, dtype=F64)),
    )
    assert chains._arrays() is not None
    with pytest.raises(SimulationError, match=r"energy: (OpenMM cannot|that of a proposal)"):
        chains.sample(200)
