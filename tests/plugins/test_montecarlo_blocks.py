"""Random numbers of many steps at a time, what compiled runs hand out, and who takes part."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
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
from mdgraft.montecarlo._adaptation import Adaptation
from mdgraft.montecarlo._numbers import RandomNumbers
from mdgraft.montecarlo.moves._motion import Motion
from mdgraft.montecarlo.moves.base import normal, normal_of, uniform
from montecarlo_laws import F64, TEMPERATURE, generator

K = 500.0


class Springs:
    """Harmonic energies by arrays, as a host might compute them."""

    calls = 0

    def __call__(self, state: ChainState) -> torch.Tensor:
        return torch.from_numpy(self.energies_of_arrays(state.positions.numpy(), None))

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        self.calls += 1
        # One chain after the other: sums must not depend on how many there are.
        return np.array([0.5 * K * float((x * x).sum()) for x in positions])


def springs(moves: AbstractMove, n_chains: int = 3, energy: Any = None, n: int = 4) -> Metropolis:
    target = Target(Springs() if energy is None else energy, temperature=TEMPERATURE)
    x = 0.05 * torch.randn(n_chains, n, 3, generator=generator(2), dtype=F64)
    return Metropolis(target, moves, ChainState(positions=x), seed=5)


def same(first: Metropolis, second: Metropolis) -> None:
    one, two = first.state_dict(), second.state_dict()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 2, 3), (5, 1, 17, 16, 1), (100, 1, 500), (7,)])
def test_numbers_are_those_that_are_drawn_one_by_one(sizes: tuple[int, ...]) -> None:
    state = ChainState(positions=torch.zeros(3, 1, 3, dtype=F64))
    step = 3 * sum(sizes)
    ahead, direct = generator(4), generator(4)
    numbers = RandomNumbers(step, [slice(None)])
    for n_steps in (5, 1, 2):
        table = torch.from_numpy(numbers.draw(ahead, n_steps))
        assert table.shape == (3, step * n_steps)
        at = 0
        for _ in range(n_steps):
            for size in sizes:
                drawn = direct.get_state()
                u = uniform(state, direct, size)
                assert torch.equal(table[0, at : at + 3 * size], u.flatten())
                direct.set_state(drawn)
                z = normal(state, direct, size)
                assert torch.equal(table[1, at : at + 3 * size], z.flatten())
                assert torch.equal(table[2, at : at + 3 * size], u.flatten().log())
                at += 3 * size
        numbers.used = at
    numbers.give_back(ahead)
    assert torch.equal(ahead.get_state(), direct.get_state())


def test_unused_numbers_are_given_back() -> None:
    ahead, direct = generator(1), generator(1)
    numbers = RandomNumbers(10, [slice(9, 10)])
    for used in (0, 1, 29, 30):
        table = numbers.draw(ahead, 3).copy()
        numbers.used = used
        assert np.array_equal(
            table[0, :used], torch.rand(used, generator=direct, dtype=F64).numpy()
        )
    numbers.give_back(ahead)
    assert torch.equal(ahead.get_state(), direct.get_state())


def test_logarithms_that_decide_are_there() -> None:
    numbers = RandomNumbers(7, [slice(1, 2), slice(4, 7)])
    table = torch.from_numpy(numbers.draw(generator(1), 50))
    for first, last in ((1, 2), (4, 7)):
        u, logarithms = (table[row].view(50, 7)[:, first:last] for row in (0, 2))
        assert torch.equal(logarithms, u.clone(memory_format=torch.contiguous_format).log())


def test_normal_numbers_are_normal() -> None:
    # Of uniform numbers in the middle of equal bins the moments are closed forms, nearly.
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    z = normal_of(u)
    assert torch.equal(u, (torch.arange(200_000, dtype=F64) + 0.5) / 200_000)
    torch.testing.assert_close(0.5 * torch.erfc(-z / math.sqrt(2.0)), u, rtol=1e-10, atol=0.0)
    for power, wanted in ((1, 0.0), (2, 1.0), (4, 3.0), (6, 15.0)):
        assert float(z.pow(power).mean()) == pytest.approx(wanted, rel=2e-3, abs=1e-9)
    drawn = normal(ChainState(positions=torch.zeros(50_000, 1, 3, dtype=F64)), generator(3), 2)
    count = drawn.numel()
    for power, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        variance = math.prod(range(1, 2 * power, 2)) - wanted**2
        error = math.sqrt(variance / count)
        assert abs(float(drawn.pow(power).mean()) - wanted) < 4.0 * error
    correlation = float((drawn[:, 0] * drawn[:, 1]).mean())
    assert abs(correlation) < 4.0 / math.sqrt(count / 2)


def test_normal_numbers_are_finite_and_symmetric() -> None:
    k = torch.tensor([0, 1, 12345, 2**50, 2**52 - 1], dtype=F64)
    below, above = normal_of(k * 2.0**-53), normal_of((2.0**53 - 1.0 - k) * 2.0**-53)
    assert bool(torch.isfinite(below).all()) and bool((below.diff() > 0).all())
    assert torch.equal(above, -below)
    # Half a unit of 2^-53 is the probability of a smaller number than the first.
    assert float(below[0]) == pytest.approx(-8.2923611, abs=0.02)
    assert abs(float(below[-1])) < 1e-15


# Scales -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [[0.3], [-0.7], [math.nan], [0.2, -1.0, math.nan, -math.inf]])
def test_scales_follow_the_approximation(ratios: list[float]) -> None:
    move = Displacement(0.2)
    adaptation = Adaptation([Displacement(0.1), move])
    state = ChainState(positions=torch.zeros(1, 1, 3, dtype=F64))
    scale = 0.2
    alpha = sum(0.0 if math.isnan(r) else math.exp(min(r, 0.0)) for r in ratios) / len(ratios)
    for k in range(1, 4):
        wanted = scale * math.exp(2.0 / k**0.6 * (alpha - 0.4))
        scale = adaptation.scale(1, scale, np.array(ratios), state)
        assert scale == pytest.approx(wanted, rel=1e-14)
    assert adaptation.steps == [0, 3]


def test_scales_stay_in_sight() -> None:
    turned = Rotation(2.0, [[0, 1]])
    adaptation = Adaptation([turned, Displacement(0.1)])
    state = ChainState(positions=torch.zeros(1, 2, 3, dtype=F64))
    assert adaptation.scale(0, 2.0, np.zeros(4), state) == math.pi
    assert adaptation.scale(1, 99.0, np.zeros(4), state) == 100.0
    turned.target_acceptance = None
    assert Adaptation([turned]).scale(0, 2.0, np.zeros(1), state) == 2.0


# Samples ----------------------------------------------------------------------------------------


def test_samples_are_a_sequence_of_states() -> None:
    chains = springs(Displacement(0.05))
    start = chains.state
    samples = chains.sample(6, stride=2)
    states = samples.states
    assert len(states) == 6 and [s.step for s in states] == [2, 4, 6, 8, 10, 12]
    assert [s.step for s in states[1:-1:2]] == [4, 8]
    assert torch.equal(states[-1].positions, chains.state.positions)
    assert torch.equal(states[-1].positions, states[5].positions)
    with pytest.raises(IndexError):
        states[6]
    # A state is nobody else's.
    states[0].positions.zero_()
    samples.positions.zero_()
    assert bool(states[0].positions.any()) and bool(samples.positions.any())
    assert all(s.positions.is_contiguous() for s in states)
    assert samples.positions.is_contiguous() and samples.energies.is_contiguous()
    assert samples.box is None and samples.present is None
    assert samples.numbers.tolist() == [[4] * 3] * 6
    wanted = 0.5 * K * samples.positions.square().sum(dim=(2, 3))
    torch.testing.assert_close(samples.energies, wanted, rtol=1e-12, atol=0.0)
    assert samples.frames().positions.shape == (18, 4, 3)
    assert start.step == 0 and torch.equal(
        start.positions, springs(Displacement(1)).state.positions
    )


def test_what_is_handed_out_has_no_stream_of_its_own() -> None:
    # A run that went on from a sample would otherwise repeat the random numbers before it.
    state = springs(Displacement(0.05)).state
    assert state.generator_state is not None
    for moves in (Displacement(0.05), Mixture([Displacement(0.05)])):
        chains = Metropolis(Target(Springs(), temperature=TEMPERATURE), moves, state)
        assert chains.sample(3).states[-1].generator_state is None
        assert chains.step()[0].transition.after.generator_state is None
        other = Metropolis(chains.target, moves, chains.state)
        assert torch.equal(chains.sample(5).positions, other.sample(5).positions)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda chains: pickle.loads(pickle.dumps(chains))]
)
def test_copies_are_runs_of_their_own(copied: Callable[[Metropolis], Metropolis]) -> None:
    moves = Sequence([Mixture([Displacement(0.3), Translation(0.2, [[0, 1]])]), Displacement(0.5)])
    chains = springs(moves)
    chains.sample(3)
    other = copied(chains)
    chains.burn_in(20)
    other.burn_in(20)
    same(chains, other)
    assert chains.scales == other.scales
    scales = dict(chains.scales)
    other.burn_in(20)
    assert chains.scales == scales != other.scales
    chains.burn_in(20)
    same(chains, other)


@pytest.mark.parametrize("name", ["one", "together", "rotation", "mixture"])
def test_fluctuations_are_those_of_the_law(name: str) -> None:
    moves = {
        "one": Displacement(0.1),
        "together": Displacement(0.05, together=True),
        "rotation": Sequence([Rotation(1.0, [[0, 1], [2, 3]]), Displacement(0.1)]),
        "mixture": Mixture([Translation(0.08, [[0, 1], [2, 3]]), Displacement(0.1)]),
    }
    chains = springs(moves[name], 64)
    chains.burn_in(400)
    squares = chains.sample(400, stride=4).positions.square().mean(dim=(0, 2, 3))
    wanted = 8.31446261815324e-3 * TEMPERATURE / K
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - wanted) < 4.0 * error
    assert error < 0.03 * wanted


# Who takes part ---------------------------------------------------------------------------------


class Slow(Springs):
    """A subclass that changes what arrays give."""

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        return super().energies_of_arrays(positions, boxes)


class Drawn(Displacement):
    """A move with other random numbers."""

    def draw(self, state: ChainState, generator: torch.Generator) -> Any:
        return {name: 0.5 * value for name, value in super().draw(state, generator).items()}


class Wider(Displacement):
    """A move with another motion, which says nothing of its proposals."""

    def motion(self, state: ChainState) -> Motion:
        return super().motion(state)


class Choosy(Mixture):
    """A mixture of a user."""


class Free(Displacement):
    """A move that takes every proposal."""

    adjusted = False


OTHERS: dict[str, Callable[[], AbstractMove]] = {
    "another draw": lambda: Drawn(0.05),
    "another motion": lambda: Wider(0.05),
    "another mixture": lambda: Choosy([Displacement(0.05)]),
    "part of a mixture": lambda: Mixture([Displacement(0.05), Drawn(0.05)]),
    "part of a sequence": lambda: Sequence([Displacement(0.05), Drawn(0.05)]),
    "no test": lambda: Free(0.05),
}


@pytest.mark.parametrize("name", OTHERS)
def test_moves_of_users_use_tensors(name: str) -> None:
    fast, slow = springs(OTHERS[name]()), springs(OTHERS[name]())
    assert fast._arrays() is None
    fast.sample(5)
    for _ in range(5):
        slow.step()
    same(fast, slow)


def test_methods_of_one_object_use_tensors() -> None:
    chains = springs(Displacement(0.05))
    assert chains._arrays() is not None
    vars(chains.moves)["draw"] = chains.moves.draw
    assert chains._arrays() is None
    assert springs(Displacement(0.05), energy=Slow())._arrays() is None
    # Objects without a dictionary have no methods of their own either.
    assert springs(Displacement(0.05), energy=Bare())._arrays() is not None


class Bare:
    """An energy with slots."""

    __slots__ = ()

    def __call__(self, state: ChainState) -> torch.Tensor:
        return torch.zeros(state.n_chains, dtype=F64)

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        return np.zeros(len(positions))


class Keeping(Springs):
    """An energy that keeps the arrays it was given."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, state: ChainState) -> torch.Tensor:
        return torch.from_numpy(self.energies_of_arrays(state.positions.numpy(), None))

    def energies_of_arrays(self, positions: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        self.seen.append(positions)
        return super().energies_of_arrays(positions, boxes)


def test_arrays_that_an_energy_keeps_do_not_change() -> None:
    energy = Keeping()
    chains = springs(Displacement(0.1, together=True), energy=energy)
    chains.sample(10)
    assert energy.calls == 11
    assert len({array.tobytes() for array in energy.seen}) == 11
    for array in energy.seen:
        assert np.isfinite(array).all() and array.flags.c_contiguous


def test_torsions_of_big_groups() -> None:
    # Groups of many sizes in one table, the same as on tensors.
    bonds = [(i, i + 1) for i in range(11)]
    moves = Mixture(
        [Torsion(0.4, bonds), Rotation(0.4, [[0, 1, 2], [3, 4], [5]]), Displacement(0.02)]
    )
    fast, slow = (springs(moves, 7, n=12) for _ in range(2))
    assert fast._arrays() is not None
    fast.sample(30)
    for _ in range(30):
        slow.step()
    same(fast, slow)
