"""Couplings: each chain keeps its law, and the two meet as often as they can."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft.montecarlo import (
    HMC,
    ChainState,
    Displacement,
    IdentitySwap,
    InsertionDeletion,
    Metropolis,
    Rotation,
    SiteChange,
    Target,
    Torsion,
    Translation,
    Volume,
)
from mdgraft.montecarlo.gradients import CommonRandomNumbers, Coupled, Score
from mdgraft.montecarlo.gradients.couplings import reflected
from mdgraft.montecarlo.gradients.discrete import as_uniform, coupled_choice
from mdgraft.montecarlo.gradients.registry import Couplings
from mdgraft.montecarlo.moves.base import pick
from mdgraft.testsystems import GaussianTarget

N = 40000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zero(state):
    return torch.zeros(state.n_chains, dtype=torch.float64)


def is_normal(x):
    """Whether numbers look standard normal in their first four moments."""
    n = x.numel()
    moments = [x.mean(), x.square().mean() - 1.0, x.pow(3).mean(), x.pow(4).mean() - 3.0]
    spread = [1.0, 2.0, 15.0, 96.0]
    return all(abs(float(m)) < 4.5 * math.sqrt(v / n) for m, v in zip(moments, spread, strict=True))


@pytest.mark.parametrize("distance", [0.0, 0.3, 2.0, 8.0])
def test_reflected_numbers_are_normal_and_meet_as_often_as_possible(distance):
    xi = torch.randn(N, 3, generator=generator(1), dtype=torch.float64)
    z = distance * torch.tensor([0.6, 0.0, 0.8]).double().expand(N, -1)
    other = reflected(xi, z, generator(2))
    assert is_normal(other)
    assert is_normal((other * torch.tensor([0.6, 0.0, 0.8]).double()).sum(dim=1))
    meet = (other - xi - z).abs().amax(dim=1) < 1e-12
    # The overlap of two normal densities: erfc(|z| / 2 sqrt 2).
    expected = math.erfc(distance / (2.0 * math.sqrt(2.0)))
    error = math.sqrt(max(expected * (1.0 - expected), 1e-12) / N)
    assert abs(float(meet.double().mean()) - expected) < 4.5 * error + 1e-9
    assert torch.allclose(other.norm(dim=1)[~meet], xi.norm(dim=1)[~meet])


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ([1, 1, 1, 0], [1, 1, 1, 0]),
        ([1, 1, 0, 0], [1, 1, 1, 1]),
        ([1, 1, 1, 1], [0, 1, 1, 0]),
        ([1, 1, 1, 0], [0, 1, 1, 1]),
        ([1, 0, 0, 0], [0, 1, 1, 1]),
    ],
)
def test_coupled_choices_are_uniform_and_agree_as_often_as_possible(mine, others):
    a, b = (torch.tensor(s).bool().expand(N, -1) for s in (mine, others))
    u = torch.rand(N, generator=generator(3), dtype=torch.float64)
    first = pick(u, a)
    second = coupled_choice(first, a, b, generator(4))
    wanted = b[0].double() / b[0].sum()
    found = torch.bincount(second, minlength=4).double() / N
    assert bool(((found - wanted).abs() < 4.5 * (wanted * (1 - wanted) / N).sqrt() + 1e-12).all())
    overlap = float(torch.minimum(a[0].double() / a[0].sum(), wanted).sum())
    agreement = float((first == second).double().mean())
    assert abs(agreement - overlap) < 4.5 * math.sqrt(max(overlap * (1 - overlap), 1e-12) / N)
    assert torch.equal(pick(as_uniform(second, b), b), second)


def test_coupled_choices_from_nothing():
    nothing, one = torch.zeros(3, 2).bool(), torch.tensor([[True, False]] * 3)
    chosen = torch.zeros(3).long()
    assert torch.equal(coupled_choice(chosen, nothing, one, generator()), chosen)
    assert torch.equal(coupled_choice(chosen, one, nothing, generator()), chosen)


def meeting(move, x, y, target, attempts=200):
    """Fraction of coupled proposals that meet, or are as different as the states were."""
    couplings = Couplings((move,))
    random = generator(5)
    met = []
    for _ in range(attempts):
        noise = move.draw(x, random)
        other = couplings.noise(move, x, y, noise, target, random)
        one, two = (move.apply(s, n, target).state for s, n in ((x, noise), (y, other)))
        met.append((one.positions - two.positions).abs().flatten(1).amax(dim=1) < 1e-12)
    return float(torch.stack(met).double().mean())


def chain_of_four():
    return torch.tensor(
        [[0.1, 0.1, 0.0], [0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.2, 0.12, 0.05]]
    ).double()


def test_torsions_meet():
    target = Target(zero, temperature=300.0)
    move = Torsion(1.0, [(0, 1), (1, 2), (2, 3)])
    x = ChainState.replicate(50, positions=chain_of_four())
    turn = {"which": torch.zeros(50), "normal": torch.full((50,), 0.8, dtype=torch.float64)}
    y = move.apply(x, turn, target).state
    assert meeting(move, x, y, target) == pytest.approx(
        math.erfc(0.8 / (2.0 * math.sqrt(2.0))), abs=0.03
    )


def test_translations_meet():
    target = Target(zero, temperature=300.0)
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [1.0, 1.0, 1.0]]).double()
    x = ChainState.replicate(50, positions=positions)
    y = x.replace(positions=x.positions + torch.tensor([[0.2], [0.2], [0.0]]).double())
    move = Translation(0.3, [[0, 1], [2]])
    wanted = 0.5 * math.erfc(0.2 * math.sqrt(3.0) / 0.3 / (2.0 * math.sqrt(2.0)))
    assert meeting(move, x, y, target) == pytest.approx(wanted, abs=0.03)


def test_volumes_meet():
    target = Target(zero, temperature=300.0, pressure=1.0)
    x = ChainState.replicate(
        50,
        positions=torch.tensor([[0.5, 0.5, 0.5]]).double(),
        box=torch.eye(3, dtype=torch.float64),
    )
    scaled = torch.tensor(1.1, dtype=torch.float64)
    y = x.replace(positions=x.positions * scaled, box=x.box * scaled)
    wanted = math.erfc(3.0 * math.log(1.1) / 0.4 / (2.0 * math.sqrt(2.0)))
    assert meeting(Volume(0.4), x, y, target) == pytest.approx(wanted, abs=0.03)


def test_sites_with_more_than_two_values_take_the_same_new_one():
    target = Target(zero, temperature=300.0)
    x = ChainState.replicate(4000, discrete={"kind": torch.tensor([0, 2])})
    y = ChainState.replicate(4000, discrete={"kind": torch.tensor([1, 2])})
    move = SiteChange("kind", (0, 1, 2))
    random = generator(6)
    noise = move.draw(x, random)
    other = Couplings((move,)).noise(move, x, y, noise, target, random)
    one = move.apply(x, noise, target).state.discrete["kind"]
    two = move.apply(y, other, target).state.discrete["kind"]
    changed = one[:, 0] != 0
    # Of {1, 2} and {0, 2} half can agree.
    same = (one == two).all(dim=1)[changed].double().mean()
    assert float(same) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(one[:, 1] == 2, two[:, 1] == 2)
    wanted = (two[changed][:, 0] == 0).double().mean()
    assert float(wanted) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("move", [SiteChange("s", (0, 1, 2)), IdentitySwap(variable="s")])
def test_lattices_of_two_axes_are_coupled_as_those_of_one(move):
    target = Target(zero, temperature=300.0)
    sites = [torch.tensor(values) for values in ([0, 1, 2, 2, 0, 1], [0, 2, 1, 2, 0, 1])]
    found = []
    for shape in ((6,), (2, 3)):
        x, y = (ChainState.replicate(500, discrete={"s": s.reshape(shape)}) for s in sites)
        random = generator(9)
        noise = move.draw(x, random)
        found.append(Couplings((move,)).noise(move, x, y, noise, target, random))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_swaps_of_a_lattice_take_the_same_pair():
    target = Target(zero, temperature=300.0)
    x = ChainState.replicate(2000, discrete={"s": torch.tensor([0, 1, 1, 0])})
    move = IdentitySwap(variable="s")
    random = generator(7)
    noise = move.draw(x, random)
    other = Couplings((move,)).noise(move, x, x, noise, target, random)
    one, two = (move.apply(x, n, target).state.discrete["s"] for n in (noise, other))
    assert torch.equal(one, two)


def test_deletions_take_the_same_molecule():
    target = Target(zero, temperature=300.0, log_activity=0.0)
    box = torch.eye(3, dtype=torch.float64)
    x = ChainState.replicate(
        2000,
        positions=torch.rand(4, 3, generator=generator(8), dtype=torch.float64),
        box=box,
        present=torch.tensor([True, True, True, False]),
    )
    y = x.replace(present=torch.tensor([True, False, True, False]).expand(2000, -1).clone())
    move = InsertionDeletion()
    random = generator(9)
    noise = dict(move.draw(x, random)) | {"insert": torch.ones(2000, dtype=torch.float64)}
    other = Couplings((move,)).noise(move, x, y, noise, target, random)
    one, two = (move.apply(s, n, target).state.present for s, n in ((x, noise), (y, other)))
    left = (~one & x.present).long().argmax(dim=1), (~two & y.present).long().argmax(dim=1)
    # Two of three can agree; where y keeps what x has more of, they meet in number.
    assert float((left[0] == left[1]).double().mean()) == pytest.approx(2 / 3, abs=0.05)
    assert float((left[1] == 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_couplings_can_be_chosen_and_are_reported():
    system = GaussianTarget(n_dimensions=3)
    state = ChainState.replicate(8, positions=torch.zeros(1, 3, dtype=torch.float64))
    sampler = Metropolis(
        Target(system.potential, temperature=system.temperature), Displacement(1.0), state
    )

    def x(s):
        return s.positions[:, 0, 0]

    shared = Coupled(couplings={"Displacement": CommonRandomNumbers()})
    run = shared.run(sampler, x, 30)
    assert run.coalescence.couplings == {"Displacement": "common random numbers"}
    # Shifted by the same steps, branches of a random walk do not meet.
    assert len(run.coalescence.lifetimes) == 0 and run.coalescence.n_alive > 0
    assert "none met the chain" in str(run.coalescence)
    with pytest.raises(InvalidInputError, match="couplings: no moves"):
        Coupled(couplings={"Walk": CommonRandomNumbers()}).run(sampler, x, 3)


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_rotations_meet_and_keep_their_law(scale):
    target = Target(zero, temperature=300.0)
    n = 4000
    x = ChainState.replicate(n, positions=chain_of_four())
    move = Rotation(scale, [[0, 1, 2, 3]])
    start = {
        "which": torch.zeros(n),
        "axis": torch.tensor([[0.3, -0.5, 0.8]]).double().expand(n, -1),
        "angle": torch.full((n,), 0.5 / scale, dtype=torch.float64),
    }
    y = move.apply(x, start, target).state
    random = generator(11)
    noise = move.draw(x, random)
    other = Couplings((move,)).noise(move, x, y, noise, target, random)
    one, two = (move.apply(s, m, target).state.positions for s, m in ((x, noise), (y, other)))
    met = (one - two).abs().amax(dim=(1, 2)) < 1e-10
    assert 0.2 < float(met.double().mean()) < 1.0
    # The law of y: the cosine of the angle that it turned by, and what it does to a direction.
    alone = move.apply(y, move.draw(y, generator(12)), target).state.positions

    def turned(after):
        arms = [p - p.mean(dim=1, keepdim=True) for p in (y.positions, after)]
        arms = [a / a.norm(dim=2, keepdim=True) for a in arms]
        return torch.cat([(arms[0] * arms[1]).sum(dim=2), arms[1][:, 0], arms[1][:, 1]], dim=1)

    a, b = turned(two), turned(alone)
    error = ((a.var(dim=0) + b.var(dim=0)) / n).sqrt()
    assert float(((a.mean(dim=0) - b.mean(dim=0)) / error).abs().max()) < 4.5
    squares = a.square(), b.square()
    error = ((squares[0].var(dim=0) + squares[1].var(dim=0)) / n).sqrt()
    assert float(((squares[0].mean(dim=0) - squares[1].mean(dim=0)) / error).abs().max()) < 4.5


class Dipole(torch.nn.Module):
    """A dumbbell in a field along z: ``U = -field cos(theta)``."""

    def __init__(self, field):
        super().__init__()
        self.field = torch.nn.Parameter(torch.tensor(field, dtype=torch.float64))

    def forward(self, state):
        return -self.field * cosine(state)


def cosine(state):
    arm = state.positions[:, 1] - state.positions[:, 0]
    return arm[:, 2] / arm.norm(dim=1)


@pytest.mark.parametrize("gradient", [Coupled(warm_up=60), Score(window=40)])
def test_a_dipole_in_a_field(gradient):
    # Langevin: <cos> = coth a - 1/a with a = beta field, and its derivative.
    energy = Dipole(3.0)
    target = Target(energy, temperature=300.0)
    start = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]).double()
    sampler = Metropolis(
        target, Rotation(1.2, [[0, 1]]), ChainState.replicate(128, positions=start), seed=3
    )
    sampler.burn_in(60, adapt=False)
    estimate = gradient.estimate(sampler, cosine, 150)
    a = 3.0 * target.beta
    exact = target.beta * (1.0 / a**2 - 1.0 / math.sinh(a) ** 2)
    error = float(estimate.gradient_standard_error["field"])
    assert abs(float(estimate.gradient["field"]) - exact) < 4.5 * error
    assert error < 0.3 * exact
    mean = 1.0 / math.tanh(a) - 1.0 / a
    assert abs(float(estimate.value) - mean) < 4.5 * float(estimate.standard_error)


def test_what_is_the_same_stays_the_same():
    target = Target(zero, temperature=300.0)
    x = ChainState.replicate(50, positions=chain_of_four())
    for move in (Rotation(0.5, [[0, 1, 2, 3]]), Rotation(0.5, [[0], [1, 2, 3]])):
        assert meeting(move, x, x, target, attempts=10) == 1.0


def test_moves_without_a_better_coupling_say_so():
    names = Couplings((Rotation(0.3, [[0, 1]]), HMC(0.1, 2))).names
    assert names == {"Rotation": "maximal in the orientation", "HMC": "common random numbers"}
