"""Rao-Blackwellised acceptance, and proposals that are tuned by its gradient."""

from __future__ import annotations

import pytest
import torch
from mdgraft import InvalidInputError, UnsupportedDerivativeError
from mdgraft.montecarlo import HMC, MALA, ULA, ChainState, Displacement, Metropolis, Target
from mdgraft.montecarlo.gradients import Acceptance, RaoBlackwell, SquaredJump
from mdgraft.montecarlo.tuning import tune
from mdgraft.testsystems import GaussianTarget, HarmonicOscillators


def bound(state):
    return state.positions[:, 0, :1]


def walk(scale, n_chains=256, n_dimensions=1, seed=1):
    system = GaussianTarget(n_dimensions=n_dimensions)
    generator = torch.Generator().manual_seed(seed)
    return Metropolis(
        Target(system.potential, temperature=system.temperature),
        Displacement(scale),
        ChainState(positions=system.sample(n_chains, generator=generator).positions),
        seed=seed,
    )


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_derivative_of_the_autocovariance_by_the_scale(scale):
    system = GaussianTarget()
    estimate = RaoBlackwell(objective=SquaredJump(features=bound)).estimate(walk(scale), 120)
    # The autocovariance is one less half of the squared jump.
    derivative = -0.5 * float(estimate.gradient["Displacement.scale"])
    error = 0.5 * float(estimate.gradient_standard_error["Displacement.scale"])
    assert abs(derivative - system.autocovariance_derivative(scale)) < 4.5 * error
    assert error < 0.015
    deviation = float(estimate.value) - system.squared_jump(scale)
    assert abs(deviation) < 4.5 * float(estimate.standard_error)
    assert estimate.bias == "consistent"


def test_mean_acceptance_and_its_derivative():
    system = GaussianTarget(n_dimensions=3)
    estimate = RaoBlackwell(objective=Acceptance()).estimate(walk(1.3, n_dimensions=3), 100)
    assert abs(float(estimate.value) - system.acceptance(1.3)) < 4.5 * float(
        estimate.standard_error
    )
    h = 1e-5
    exact = (system.acceptance(1.3 + h) - system.acceptance(1.3 - h)) / (2 * h)
    deviation = float(estimate.gradient["Displacement.scale"]) - exact
    assert abs(deviation) < 4.5 * float(estimate.gradient_standard_error["Displacement.scale"])


@pytest.mark.parametrize("start", [0.4, 8.0])
def test_the_best_proposal_is_found(start):
    sampler = walk(start)
    result = tune(
        sampler, n_rounds=30, n_samples=20, objective=SquaredJump(features=bound), rate=1.5
    )
    best = GaussianTarget().optimal_scale()
    # The optimum is flat: 8 % off it costs less than 0.5 % of the objective.
    assert float(result.final["Displacement.scale"]) == pytest.approx(best, rel=0.08)
    assert sampler.scales == {
        "Displacement": pytest.approx(float(result.final["Displacement.scale"]))
    }
    assert result.values["Displacement.scale"].shape == (30,)
    assert float(result.values["Displacement.scale"][0]) == start
    assert float(result.objective[-1]) > float(result.objective[0])
    assert "Displacement.scale" in str(result) and "objective" in str(result)
    # Nothing of the tuning counts as sampling.
    assert int(sampler.statistics["Displacement"].attempts.sum()) == 0


@pytest.mark.parametrize("move", [MALA(0.2), HMC(0.02, 5)])
def test_moves_with_forces(move):
    system = HarmonicOscillators(2, k=2.5)
    start = system.sample(64, generator=torch.Generator().manual_seed(0)).positions
    sampler = Metropolis(
        Target(system.potential, temperature=system.temperature),
        move,
        ChainState(positions=start),
        seed=2,
    )
    result = tune(sampler, n_rounds=15, n_samples=8, rate=1.5)
    assert float(result.objective[-1]) > 3.0 * float(result.objective[0])


def test_masses_can_be_tuned():
    # Two oscillators of very different stiffness: the stiff one wants small steps, a large mass.
    class Two(torch.nn.Module):
        def forward(self, state):
            k = torch.tensor([[1.0], [25.0]], dtype=torch.float64)
            return 0.5 * 2.494 * (k * state.positions.square()).sum(dim=(1, 2))

    x = torch.randn(128, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x / torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    sampler = Metropolis(
        Target(Two(), temperature=300.0),
        MALA(0.3, mass=[1.0, 1.0], name="m"),
        ChainState(positions=x),
        seed=3,
    )
    weighted = SquaredJump(features=lambda s: s.positions * torch.tensor([[1.0], [5.0]]).double())
    result = tune(
        sampler, n_rounds=40, n_samples=8, objective=weighted, parameters=["m.mass"], rate=5.0
    )
    light, heavy = result.final["m.mass"].tolist()
    assert heavy > 3.0 * light
    assert float(result.objective[-1]) > float(result.objective[0])


def test_derivatives_by_differences_agree_with_automatic_ones():
    class Well(torch.nn.Module):
        def forward(self, state):
            return 1.2 * state.positions.square().sum(dim=(1, 2))

    class WellWithForces(Well):
        def energies_and_forces(self, state):
            return self(state), -2.4 * state.positions

    start = torch.randn(32, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for energy in (Well(), WellWithForces()):
        sampler = Metropolis(
            Target(energy, temperature=300.0), HMC(0.4, 3), ChainState(positions=start), seed=1
        )
        found.append(RaoBlackwell().estimate(sampler, 10, parameters=["HMC.scale", "HMC.mass"]))
    for name in ("HMC.scale", "HMC.mass"):
        assert torch.allclose(found[0].gradient[name], found[1].gradient[name], rtol=1e-5)
    assert torch.allclose(found[0].value, found[1].value)


class Hidden(Displacement):
    """A displacement whose scale leaves the graph, as that of a host's trajectory does."""

    def deviation(self, state, target):
        return self.scale.detach().to(state.positions)


def test_a_move_without_a_graph_is_not_taken_for_one_without_a_derivative():
    shown = walk(1.5, n_chains=32)
    hidden = Metropolis(shown.target, Hidden(1.5, name="Displacement"), shown.state, seed=1)
    shown = Metropolis(shown.target, Displacement(1.5), shown.state, seed=1)
    a, b = (RaoBlackwell().estimate(s, 10).gradient["Displacement.scale"] for s in (shown, hidden))
    assert float(a) != 0.0
    assert float(b) == pytest.approx(float(a), rel=1e-5)


def test_where_energies_are_infinite_derivatives_are_finite():
    class Wall(torch.nn.Module):
        def forward(self, state):
            x = state.positions[:, 0, 0]
            return torch.where(x > 0, 1.0 / x, torch.inf)

    sampler = Metropolis(
        Target(Wall(), temperature=300.0),
        Displacement(0.7),
        ChainState.replicate(64, positions=torch.tensor([[0.5, 0.0, 0.0]]).double()),
    )
    estimate = RaoBlackwell().estimate(sampler, 20)
    assert bool(torch.isfinite(estimate.gradient["Displacement.scale"]))
    assert bool(torch.isfinite(estimate.gradient_standard_error["Displacement.scale"]))


def test_refusals():
    sampler = walk(1.0, n_chains=2)
    with pytest.raises(InvalidInputError, match=r"wanted some of \['Displacement.scale'\]"):
        RaoBlackwell().estimate(sampler, 5, parameters=["well.center"])
    with pytest.raises(InvalidInputError, match="n_rounds"):
        tune(sampler, n_rounds=1)
    with pytest.raises(InvalidInputError, match="n_samples"):
        tune(sampler, n_samples=0)
    with pytest.raises(InvalidInputError, match="objective"):
        tune(sampler, objective=SquaredJump(features=lambda s: 0.0 * s.positions))
    with pytest.raises(InvalidInputError, match="features"):
        tune(sampler, objective=SquaredJump(features=lambda s: s.positions.sum()))
    unadjusted = Metropolis(sampler.target, ULA(0.1), sampler.state)
    with pytest.raises(UnsupportedDerivativeError, match="MALA instead of ULA"):
        RaoBlackwell().estimate(unadjusted, 5)
