"""Runs that draw random numbers for many steps at once are those of single steps, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdgraft.montecarlo._numbers
import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError, MissingBoxError, SimulationError
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
from montecarlo_laws import F64, TEMPERATURE
from montecarlo_systems import chain, diatomics, site_water

BONDS = [(i, i + 1) for i in range(4)]
HALVES = [[0, 1], [2, 3, 4]]

MOVES: dict[str, Callable[[], AbstractMove]] = {
    "one particle": lambda: Displacement(0.01),
    "one of some": lambda: Displacement(0.02, particles=[4, 0]),
    "all particles": lambda: Displacement(0.005, together=True),
    "some together": lambda: Displacement(0.008, particles=[1, 3], together=True),
    "translations": lambda: Translation(0.01, HALVES),
    "rotations": lambda: Rotation(0.05, HALVES),
    "torsions": lambda: Torsion(0.9, BONDS),
    "a mixture of one": lambda: Mixture([Displacement(0.01)]),
    "a mixture": lambda: Mixture(
        [
            Torsion(0.9, BONDS),
            Displacement(0.005, together=True),
            Rotation(0.05, HALVES),
            Displacement(0.01, name="rare"),
        ],
        [0.4, 0.3, 0.29, 0.01],
    ),
    "a sequence": lambda: Sequence([t := Torsion(0.9, BONDS), Displacement(0.01), t]),
    "a sequence of mixtures": lambda: Sequence(
        [
            Mixture([Torsion(0.9, BONDS), Displacement(0.005, together=True)]),
            Rotation(0.05, [[0, 1]]),
            Mixture(
                [Mixture([Translation(0.01, HALVES), Displacement(0.02)]), Torsion(0.3, BONDS)]
            ),
        ]
    ),
}


class Counted(ContextEnergy):
    """Counts how often each way of evaluating is taken, and fails when told to."""

    arrays = evaluations = 0
    left = 10**9
    failure: BaseException = KeyboardInterrupt()

    def __call__(self, state: ChainState) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.failure
        return super().__call__(state)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        self.arrays += 1
        return super().energies_of_arrays(positions, boxes)

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        evaluate = super().bound(positions, boxes, energies)

        def counted() -> None:
            self.evaluations += 1
            self.left -= 1
            if self.left < 0:
                raise self.failure
            evaluate()

        return counted


def of_a_chain(moves: AbstractMove, n_chains: int = 1, seed: int = 1) -> Metropolis:
    system, x = chain()
    state = ChainState.replicate(n_chains, positions=x)
    return Metropolis(Target(Counted(system), temperature=TEMPERATURE), moves, state, seed=seed)


def stepped(chains: Metropolis, n_steps: int, *, adapt: bool = False) -> list[ChainState]:
    states = []
    for _ in range(n_steps):
        chains.step(adapt=adapt)
        states.append(chains.state)
    return states


def same(first: Metropolis, second: Metropolis) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(params=[1, 40, None], ids=["step by step", "short blocks", "long blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(mdgraft.montecarlo._numbers, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("n_chains", [1, 3])
@pytest.mark.parametrize("name", MOVES)
def test_samples_are_those_of_single_steps(name: str, n_chains: int, stride: int) -> None:
    fast, slow = (of_a_chain(MOVES[name](), n_chains) for _ in range(2))
    energy: Any = fast.target.energy
    energy.arrays = 0
    # Several runs: what one draws too much it gives back.
    for n_samples in (1, 11, 2):
        before = fast.state.step
        samples = fast.sample(n_samples, stride=stride)
        states = stepped(slow, n_samples * stride)[stride - 1 :: stride]
        same(fast, slow)
        assert torch.equal(samples.positions, torch.stack([s.positions for s in states]))
        assert [s.step - before for s in samples.states] == [
            stride * (k + 1) for k in range(n_samples)
        ]
        for mine, wanted in zip(samples.states, states, strict=True):
            assert torch.equal(mine.positions, wanted.positions)
            assert wanted.energies is not None and mine.energies is not None
            assert torch.equal(mine.energies, wanted.energies)
            assert mine.forces is None
    # The lean way was taken, and no energy was computed in vain.
    assert energy.arrays == 0
    assert energy.evaluations == 14 * stride * len(fast.moves.updates)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("n_chains", [1, 5])
@pytest.mark.parametrize("name", MOVES)
def test_scales_adapt_as_in_single_steps(name: str, n_chains: int) -> None:
    fast, slow = (of_a_chain(MOVES[name](), n_chains) for _ in range(2))
    energy: Any = fast.target.energy
    energy.arrays = 0
    fast.burn_in(15)
    fast.burn_in(10)
    stepped(slow, 25, adapt=True)
    slow.reset_statistics()
    assert energy.arrays == 0 and energy.evaluations == 25 * len(fast.moves.updates)
    assert fast.scales == slow.scales
    assert fast.scales != of_a_chain(MOVES[name](), n_chains).scales
    fast.sample(4)
    stepped(slow, 4)
    same(fast, slow)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", ["all particles", "a mixture", "a sequence of mixtures"])
def test_a_run_may_be_cut_anywhere(name: str, tmp_path: Path) -> None:
    whole, stopped, other = (of_a_chain(MOVES[name](), 2, seed) for seed in (1, 1, 2))
    other.sample(3)
    wanted = whole.sample(20).positions
    found = [stopped.sample(7).positions]
    stopped.save(tmp_path / "run.npz")
    other.load(tmp_path / "run.npz")
    for chains, n_samples in ((other, 4), (other, 1), (other, 8)):
        found.append(chains.sample(n_samples).positions)
    assert torch.equal(torch.cat(found), wanted)
    same(whole, other)


FAILURES: dict[str, BaseException] = {
    "an interrupt": KeyboardInterrupt(),
    "the host": SimulationError("energy: OpenMM cannot evaluate a configuration (tired)"),
}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("after", [0, 1, 13, 14])
@pytest.mark.parametrize("name", ["one particle", "a mixture", "a sequence"])
def test_runs_that_are_cut_short_go_on(name: str, after: int, failure: str, adapt: bool) -> None:
    fast, slow = (of_a_chain(MOVES[name](), 2) for _ in range(2))
    for chains in (fast, slow):
        energy: Any = chains.target.energy
        energy.left, energy.failure = after, FAILURES[failure]
    run: Callable[[int], Any] = fast.burn_in if adapt else fast.sample
    with pytest.raises(type(FAILURES[failure])):
        run(20)
    with pytest.raises(type(FAILURES[failure])):
        stepped(slow, 20, adapt=adapt)
    same(fast, slow)
    assert fast.state.step == after // len(fast.moves.updates)
    for chains in (fast, slow):
        energy = chains.target.energy
        energy.left = 10**9
    fast.sample(6)
    stepped(slow, 6)
    same(fast, slow)


def test_energies_that_are_no_numbers_leave_the_last_update() -> None:
    # The well ends at x = 0.02, beyond which its energy is no number.
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("10*x + sqrt(0.02-x)")
    force.addParticle(0, [])
    system.addForce(force)
    energy = ContextEnergy(system)
    fast, slow = (
        Metropolis(
            Target(energy, temperature=TEMPERATURE),
            Displacement(0.01),
            ChainState.replicate(1, positions=torch.zeros(1, 3, dtype=F64)),
            seed=3,
        )
        for _ in range(2)
    )
    with pytest.raises(SimulationError, match="that of a proposal of chain 0 is nan"):
        fast.sample(1000)
    with pytest.raises(SimulationError, match="that of a proposal of chain 0 is nan"):
        stepped(slow, 1000)
    assert fast.state.step > 0
    same(fast, slow)


# Contexts ---------------------------------------------------------------------------------------


def in_boxes(boxes: torch.Tensor) -> tuple[Metropolis, Metropolis]:
    system, x, _ = diatomics(8, 1.8)
    molecules = [[2 * i, 2 * i + 1] for i in range(8)]
    state = ChainState(positions=x.expand(len(boxes), *x.shape).clone(), box=boxes)
    fast, slow = (
        Metropolis(
            Target(ContextEnergy(system), temperature=TEMPERATURE),
            Mixture([Translation(0.03, molecules), Rotation(0.3, molecules)]),
            state,
            seed=1,
        )
        for _ in range(2)
    )
    return fast, slow


@pytest.mark.parametrize("stretch", [0.0, 0.05])
def test_boxes_are_those_of_the_chains(stretch: float) -> None:
    lengths = 1.8 * (1.0 + stretch * torch.arange(3, dtype=F64))
    fast, slow = in_boxes(lengths[:, None, None] * torch.eye(3, dtype=F64))
    for _ in range(3):
        fast.sample(5, stride=2)
        stepped(slow, 10)
        same(fast, slow)
        # Others may use the Context between two runs.
        energy: Any = fast.target.energy
        energy.context.setPeriodicBoxVectors([2.5, 0, 0], [0, 2.5, 0], [0, 0, 2.5])


def test_one_box_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = openmm.Context.setPeriodicBoxVectors

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        plain(*arguments)

    fast, _ = in_boxes((1.8 * torch.eye(3, dtype=F64)).expand(3, 3, 3).clone())
    varied, _ = in_boxes(torch.tensor([1.8, 1.9])[:, None, None].double() * torch.eye(3).double())
    monkeypatch.setattr(openmm.Context, "setPeriodicBoxVectors", counted)
    fast.sample(5)
    assert len(calls) == 1
    varied.sample(5)
    assert len(calls) == 1 + 2 * 5


def test_parameters_of_the_context_count_at_once() -> None:
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("k*(x^2+y^2+z^2)")
    force.addGlobalParameter("k", 100.0)
    force.addParticle(0, [])
    system.addForce(force)
    chains = Metropolis(
        Target(ContextEnergy(system), temperature=TEMPERATURE),
        Displacement(0.05),
        ChainState.replicate(2, positions=torch.full((1, 3), 0.01, dtype=F64)),
    )
    chains.sample(5)
    energy: Any = chains.target.energy
    energy.context.setParameter("k", 300.0)
    chains.forget_energies()
    samples = chains.sample(30)
    wanted = 300.0 * samples.positions.square().sum(dim=(2, 3))
    torch.testing.assert_close(samples.energies, wanted, rtol=1e-12, atol=0.0)


def test_bound_energies_are_those_of_calls() -> None:
    system, x, box = site_water()
    energy = ContextEnergy(system)
    generator = torch.Generator().manual_seed(3)
    noise = 0.01 * torch.randn(3, *x.shape, generator=generator, dtype=F64)
    positions = np.empty(noise.shape)
    energies = np.empty((3, 2))[:, 1]
    for scales in ([1.0, 1.0, 1.0], [1.0, 1.1, 1.2]):
        boxes = np.array(scales)[:, None, None] * box.numpy()
        evaluate = energy.bound(positions, boxes, energies)
        for factor in (1.0, -1.0):
            # Virtual sites follow their parents, whatever their positions say.
            positions[:] = (x + factor * noise).numpy()
            evaluate()
            assert np.array_equal(energies, energy.energies_of_arrays(positions, boxes))
            with torch.no_grad():
                called = energy(
                    ChainState(positions=torch.from_numpy(positions), box=torch.from_numpy(boxes))
                )
            assert np.array_equal(energies, called.numpy())


class Reversed(ContextEnergy):
    """An energy whose two ways are made of one another."""

    def bound(
        self, positions: np.ndarray, boxes: np.ndarray | None, energies: np.ndarray
    ) -> Callable[[], None]:
        def evaluate() -> None:
            energies[:] = self.energies_of_arrays(positions, boxes)

        return evaluate


def test_few_and_odd_ways_to_evaluate() -> None:
    system, x = chain()
    positions, energies = x[None].numpy(), np.empty(1)
    Reversed(system).bound(positions, None, energies)()
    assert np.array_equal(energies, ContextEnergy(system).energies_of_arrays(positions, None))
    periodic, y, box = diatomics(8, 1.8)
    for energy, some in ((ContextEnergy(system), x), (ContextEnergy(periodic), y)):
        none = energy.energies_of_arrays(some.numpy()[None][:0], box.numpy()[None][:0])
        assert none.shape == (0,) and none.dtype == np.float64


def test_what_cannot_be_bound_raises() -> None:
    system, x, box = diatomics(8, 1.8)
    energy = ContextEnergy(system)
    positions, energies = x[None].numpy(), np.empty(1)
    with pytest.raises(MissingBoxError, match="state: has no box"):
        energy.bound(positions, None, energies)
    with pytest.raises(InvalidInputError, match="state: has 15 particles, the System 16"):
        energy.bound(positions[:, 1:], box[None].numpy(), energies)
    with pytest.raises(SimulationError, match="energy: OpenMM cannot evaluate"):
        energy.bound(positions, 0.0 * box[None].numpy(), energies)
