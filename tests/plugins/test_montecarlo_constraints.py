"""Moves and what hosts hold fixed: which distances each move keeps, and what samplers refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mdgraft import InvalidInputError, WrongEnsembleError
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ULA,
    AbstractMove,
    ChainState,
    Displacement,
    IdentitySwap,
    InsertionDeletion,
    Metropolis,
    Mixture,
    Proposal,
    Rotation,
    Sequence,
    SiteChange,
    Target,
    Torsion,
    Translation,
    Volume,
)
from mdgraft.montecarlo.moves.base import Noise, normal
from mdgraft.potentials.held import Held
from montecarlo_laws import F64, KT, TEMPERATURE, generator

N = 7
CHAIN = [(0, 1), (1, 2), (2, 3), (3, 4)]
MOLECULES = [[0, 1, 2], [3, 4], [5], [6]]
EVERY = torch.tensor(
    [*itertools.combinations(range(N), 2), *((i, -1) for i in range(N))], dtype=torch.long
)


class Springs:
    """An energy that says what its host holds fixed."""

    def __init__(self, held: Held | None = None) -> None:
        self.held = held

    def __call__(self, state: ChainState) -> torch.Tensor:
        return 200.0 * state.positions.square().sum(dim=(1, 2))

    def energies_and_forces(self, state: ChainState) -> tuple[torch.Tensor, torch.Tensor]:
        return self(state), -400.0 * state.positions


def start(n_chains: int = 3) -> ChainState:
    x = torch.randn(N, 3, generator=generator(3), dtype=F64)
    return ChainState.replicate(
        n_chains,
        positions=x,
        box=12.0 * torch.eye(3, dtype=F64),
        discrete={"kind": torch.tensor([0, 1, 0, 1])},
    )


def held(
    pairs: list[tuple[int, int]], pinned: tuple[int, ...] = (), state: ChainState | None = None
) -> Held:
    x = (start() if state is None else state).positions[0]
    lengths = [float((x[i] - x[j]).norm()) for i, j in pairs]
    made = Held.of(pairs, lengths, pinned)
    assert made is not None
    return made


class Nudge(AbstractMove):
    """A move of a user, which does not say what it keeps: particles all together, or one alone."""

    def __init__(self, alone: bool) -> None:
        super().__init__(scale=0.01)
        self.alone = alone

    def check(self, state: ChainState, target: Target) -> None:
        pass

    def draw(self, state: ChainState, generator: torch.Generator) -> Noise:
        return {"normal": normal(state, generator, 1, 3)}

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        x = state.positions.clone()
        x[:, : 1 if self.alone else N] += self.scale * noise["normal"]
        return Proposal(state=state.replace(positions=x), log_ratio=x.new_zeros(len(x)))


class Pairwise(Displacement):
    """A user's change of a move: what is drawn for particle 0 moves 1 as well."""

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        x = state.positions.clone()
        x[:, :2] += self.scale * noise["normal"]
        return Proposal(state=state.replace(positions=x), log_ratio=x.new_zeros(len(x)))


class Bending(Translation):
    """A user's change of a move: the last particle moves more."""

    def apply(self, state: ChainState, noise: Noise, target: Target) -> Proposal:
        proposal = super().apply(state, noise, target)
        x = proposal.state.positions.clone()
        x[:, -1] += self.scale * noise["normal"]
        return Proposal(state=state.replace(positions=x), log_ratio=proposal.log_ratio)


# What moves keep --------------------------------------------------------------------------------

MOVES: dict[str, Callable[[], AbstractMove]] = {
    "displacement": lambda: Displacement(0.1),
    "displacement of some": lambda: Displacement(0.1, particles=[0, 2, 5]),
    "displacement of some together": lambda: Displacement(0.1, particles=[1, 6], together=True),
    "translation": lambda: Translation(0.1, [[0, 1, 2], [3, 4]]),
    "rotation": lambda: Rotation(0.5, [[0, 1, 2], [3, 4]]),
    "torsion": lambda: Torsion(0.5, CHAIN),
    "torsion about one bond": lambda: Torsion(0.5, CHAIN, rotatable=[(1, 2)]),
    "volume of particles": lambda: Volume(0.2),
    "volume of molecules": lambda: Volume(0.2, molecules=MOLECULES),
    "swap of particles": lambda: IdentitySwap(species=[0, 0, 0, 1, 1, 2, 2]),
    "swap of molecules": lambda: IdentitySwap(molecules=MOLECULES, species=[0, 1, 2, 3]),
    "swap of values": lambda: IdentitySwap(variable="kind"),
    "change of values": lambda: SiteChange("kind"),
    "MALA": lambda: MALA(0.05),
    "ULA": lambda: ULA(0.05),
    "HMC": lambda: HMC(0.05, 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_what_they_say(name: str) -> None:
    # Every distance and place, over so many proposals that all that can change has changed.
    move, state = MOVES[name](), start(600)
    target = Target(Springs(), temperature=TEMPERATURE)
    proposed = move.propose(state, target, generator(1)).state

    def rows(s: ChainState) -> torch.Tensor:
        x = torch.cat((s.positions, torch.zeros(len(s.positions), 1, 3, dtype=F64)), dim=1)
        distances = (x[:, EVERY[:, 0]] - x[:, EVERY[:, 1]]).norm(dim=-1)
        return distances

    change = (rows(proposed) - rows(state)).abs().amax(dim=0)
    kept = move.keeps(EVERY, state)
    assert kept is not None
    assert torch.equal(kept, change < 1e-12)


def test_insertions_keep_whole_molecules() -> None:
    move = InsertionDeletion(molecules=[[1, 2], [3, 4]], template=[[0.0, 0, 0], [0.1, 0, 0]])
    pairs = torch.tensor([(0, 5), (0, -1), (1, 2), (2, 3), (3, 4), (0, 1), (3, -1)])
    assert move.keeps(pairs, start()).tolist() == [True, True, True, False, True, False, False]


# What samplers refuse ---------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], AbstractMove], list[tuple[int, int]], tuple[int, ...], str]]
REFUSED = {
    "one particle": (
        lambda: Displacement(0.1),
        [(0, 1), (5, 6)],
        (),
        r"Displacement changes 2 of the 2 distances .*particles 0 and 1.*ignore_constraints",
    ),
    "one end": (
        lambda: Displacement(0.1, particles=[6]),
        [(0, 1), (5, 6)],
        (),
        "changes 1 of the 2",
    ),
    "a pinned one": (
        lambda: Displacement(0.1, particles=[2]),
        [],
        (2, 3),
        r"moves 1 of the 2 particles that the host keeps in place \(particle 2",
    ),
    "forces": (lambda: MALA(0.05), [(0, 1)], (), "MALA changes 1 of the 1"),
    "unadjusted": (lambda: ULA(0.05), [(0, 1)], (), "ULA changes 1 of the 1"),
    "trajectories": (lambda: HMC(0.05, 2), [(0, 1)], (4,), "HMC changes 1 .* and moves 1 of the 1"),
    "part of a molecule": (
        lambda: Translation(0.1, [[0, 1]]),
        [(0, 1), (1, 2)],
        (),
        "changes 1 of the 2",
    ),
    "across a torsion": (lambda: Torsion(0.5, CHAIN), [(0, 1), (0, 3)], (), "changes 1 of the 2"),
    "scaled atoms": (lambda: Volume(0.1), [(0, 1)], (), "Volume changes 1"),
    "in a mixture": (
        lambda: Mixture([Translation(0.1, MOLECULES), Displacement(0.1, name="shake")]),
        [(0, 1)],
        (),
        "shake changes 1",
    ),
    "in a sequence": (
        lambda: Sequence([Rotation(0.1, MOLECULES), MALA(0.1)]),
        [(0, 1)],
        (),
        "MALA changes 1",
    ),
}


def sampler(
    move: AbstractMove, what: Held | None, state: ChainState | None = None, **options: Any
) -> Metropolis:
    changes = frozenset().union(*(m.changes for m in move.components))
    pressure = 1.0 if "volume" in changes else None
    target = Target(Springs(what), temperature=TEMPERATURE, pressure=pressure, **options)
    return Metropolis(target, move, start() if state is None else state, seed=2)


@pytest.mark.parametrize("name", REFUSED)
def test_moves_that_break_constraints_are_refused(name: str) -> None:
    move, pairs, pinned, match = REFUSED[name]
    with pytest.raises(WrongEnsembleError, match=match):
        sampler(move(), held(pairs, pinned))
    sampler(move(), None).step()
    sampler(move(), held(pairs, pinned), ignore_constraints=True).step()


ALLOWED: dict[str, tuple[Callable[[], AbstractMove], list[tuple[int, int]], tuple[int, ...]]] = {
    "others": (lambda: Displacement(0.1, particles=[5, 6]), [(0, 1), (1, 2)], (3,)),
    "whole clusters": (
        lambda: Mixture([Translation(0.1, MOLECULES[:2]), Rotation(0.4, MOLECULES[:2])]),
        [(0, 1), (1, 2), (0, 2), (3, 4)],
        (6,),
    ),
    "torsions": (lambda: Torsion(0.6, CHAIN), [*CHAIN, (0, 2), (1, 3), (2, 4)], (5, 6)),
    "rigid molecules in a box": (
        lambda: Sequence([Volume(0.1, molecules=MOLECULES), Rotation(0.2, MOLECULES[:2])]),
        [(0, 1), (1, 2), (3, 4)],
        (),
    ),
    "a move that does not say": (lambda: Nudge(alone=False), [(0, 1), (5, 6)], ()),
    "proposals of a subclass": (lambda: Pairwise(0.05, particles=[0]), [(0, 1), (5, 6)], (3,)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_moves_that_keep_constraints_keep_them(name: str) -> None:
    move, pairs, pinned = ALLOWED[name]
    what = held(pairs, pinned)
    chains = sampler(move(), what)
    chains.burn_in(50)
    samples = chains.sample(50)
    counts = chains.statistics.values()
    assert all(int(c.acceptances.sum()) > 0 for c in counts)
    last = samples.states[-1].positions
    assert float(what.errors(last).max()) < 1e-10
    assert torch.equal(last[:, what.pinned], start().positions[:, what.pinned])


@pytest.mark.parametrize(("pairs", "pinned"), [([(0, 1)], ()), ([], (0, 3))])
def test_moves_that_do_not_say_are_watched(
    pairs: list[tuple[int, int]], pinned: tuple[int, ...]
) -> None:
    move = Mixture([Nudge(alone=True), Translation(0.1, [[5], [6]])])
    chains = sampler(move, held(pairs, pinned))
    with pytest.raises(WrongEnsembleError, match=r"Nudge (changes 1 of|moves 1 of the 2)"):
        chains.burn_in(200)
    sampler(move, held(pairs, pinned), ignore_constraints=True).burn_in(50)
    many = ChainState.replicate(
        2, positions=start().positions[0], box=torch.eye(3, dtype=F64), present=torch.tensor([True])
    )
    target = Target(Springs(held(pairs, pinned)), temperature=300.0, log_activity=0.0)
    with pytest.raises(WrongEnsembleError, match=r"Nudge does not say .* method keeps\(\)"):
        Metropolis(target, Mixture([Nudge(True), SiteChange("present")]), many)


def test_subclasses_with_other_proposals_are_watched() -> None:
    chains = sampler(Bending(0.05, [[5, 6]]), held([(5, 6)]))
    with pytest.raises(WrongEnsembleError, match="Bending changes 1 of the 1"):
        chains.burn_in(200)


def test_chains_start_from_the_lengths_that_are_held(tmp_path: Path) -> None:
    what, move = held([(0, 1)]), Translation(0.1, MOLECULES)
    stretched = ChainState(positions=start().positions * 1.02)
    with pytest.raises(InvalidInputError, match="particles 0 and 1 of chain 0 are .* nm apart"):
        sampler(move, what, stretched)
    free = sampler(move, None, stretched.replace(box=start().box, discrete=start().discrete))
    free.save(tmp_path / "other.npz")
    with pytest.raises(InvalidInputError, match="one of 1 constraints"):
        sampler(move, what).load(tmp_path / "other.npz")


def test_the_free_distribution_is_there_for_the_asking() -> None:
    x = torch.zeros(2, 3, dtype=F64)
    x[1, 0] = 0.1
    state = ChainState.replicate(400, positions=x)
    target = Target(
        Springs(held([(0, 1)], state=state)), temperature=TEMPERATURE, ignore_constraints=True
    )
    chains = Metropolis(target, Displacement(0.06, together=True), state, seed=1)
    chains.burn_in(100)
    samples = chains.sample(60, stride=3)
    means = samples.positions.square().mean(dim=(0, 2, 3))
    error = float(means.std()) / len(means) ** 0.5
    assert abs(float(means.mean()) - KT / 400.0) < 4 * error
