"""Gradient estimators of Monte Carlo: a table of problems with exact answers times estimators."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError, UnsupportedDerivativeError, WrongEnsembleError
from mdgraft.ensembles import Ensemble
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ULA,
    ChainState,
    Displacement,
    Metropolis,
    Mixture,
    Proposal,
    Sequence,
    SiteChange,
    Target,
)
from mdgraft.montecarlo.gradients import (
    Coupled,
    Covariance,
    Insertion,
    PastBaseline,
    Reparameterized,
    Score,
    estimate_average,
)
from mdgraft.testsystems import GaussianTarget, HarmonicOscillators, IsingLattice
from montecarlo_problems import PROBLEMS, LineStep, gaussian

#: Estimators by name, and the problems that they are for.
DISCRETE = ("ising", "langmuir", "grand-canonical")
TABLE = [
    *(("covariance", Covariance(), name) for name in PROBLEMS),
    *(("coupled", Coupled(warm_up=120), name) for name in DISCRETE),
    ("coupled", Coupled(warm_up=60), "gaussian"),
    ("coupled", Coupled(warm_up=120), "harmonic-displacement"),
    ("coupled", Coupled(warm_up=120), "isobaric"),
    *(("score", Score(window=80), name) for name in ("ising", "langmuir", "isobaric")),
    ("score", Score(window=40), "gaussian"),
    ("score", Score(window=40, baseline=PastBaseline()), "gaussian"),
    ("score", Score(window=15), "gaussian-mala"),
    ("reparameterized", Reparameterized(warm_up=60), "gaussian"),
    ("reparameterized", Reparameterized(warm_up=30), "gaussian-mala"),
    ("reparameterized", Reparameterized(warm_up=30), "harmonic-hmc"),
    ("reparameterized", Reparameterized(warm_up=120), "ising"),
]


def z_scores(estimate, exact):
    """Deviations in standard errors, one tensor; a zero error must be right to rounding."""
    found = []
    for name, value in exact.items():
        difference = estimate.gradient[name] - torch.as_tensor(value, dtype=torch.float64)
        error = estimate.gradient_standard_error[name]
        found.append((difference / error.clamp(min=1e-9)).reshape(-1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("gradient", "problem"),
    [(gradient, problem) for _, gradient, problem in TABLE],
    ids=[f"{label}-{problem}-{k}" for k, (label, _, problem) in enumerate(TABLE)],
)
def test_gradient_agrees_with_the_exact_answer(gradient, problem):
    case = PROBLEMS[problem]()
    names = list(case.gradient)
    if isinstance(gradient, Reparameterized | Score) and problem == "gaussian-mala":
        names = ["well.center"]
    exact = {name: case.gradient[name] for name in names}
    estimate = gradient.estimate(case.sampler, case.observable, case.n_samples, parameters=names)
    assert estimate.n_frames == case.n_samples * case.sampler.state.n_chains
    value = torch.as_tensor(case.value, dtype=torch.float64)
    assert float(((estimate.value - value) / estimate.standard_error).abs().max()) < 4.5
    assert float(z_scores(estimate, exact).abs().max()) < 4.5
    # The errors say something: the answer is known better than to its own size.
    largest = max(float(torch.as_tensor(v).abs().max()) for v in exact.values())
    errors = torch.cat([estimate.gradient_standard_error[n].reshape(-1) for n in names])
    assert float(errors.min()) < largest
    assert estimate.bias == ("approximate" if isinstance(gradient, Score) else "consistent")


@pytest.mark.parametrize("problem", ["langmuir", "grand-canonical"])
def test_trial_insertions(problem):
    case = PROBLEMS[problem]()
    exact = {n: case.gradient[n] for n in ("log_activity", "chemical_potential")}
    estimate = Insertion(n_trials=2).estimate(
        case.sampler, case.observable, 200, parameters=list(exact)
    )
    assert float(z_scores(estimate, exact).abs().max()) < 4.5
    if problem == "grand-canonical":
        # Every insertion into an ideal gas adds one molecule: no variance at all.
        assert float(estimate.gradient_standard_error["log_activity"]) < 1e-12


# Chains of finite length, from a fixed start ----------------------------------------------------


def ising_chain(lattice, n_steps, start):
    """Mean magnetisation after each step from a fixed start, exactly, with a graph."""
    spins = lattice.states.discrete["spins"]
    energy, n = lattice.energy(lattice.states), lattice.n_sites
    matrix = torch.zeros(len(spins), len(spins), dtype=torch.float64)
    index = torch.arange(len(spins))
    for site in range(n):
        other = index ^ (1 << site)
        alpha = (-lattice.beta * (energy[other] - energy)).clamp(max=0.0).exp() / n
        matrix = matrix.index_put((index, other), alpha)
    matrix = matrix + torch.diag(1.0 - matrix.sum(dim=1))
    law = torch.zeros(len(spins), dtype=torch.float64)
    law[start] = 1.0
    means = []
    for _ in range(n_steps):
        law = law @ matrix
        means.append(law @ spins.double().mean(dim=1))
    return torch.stack(means)


@pytest.mark.parametrize("gradient", [Coupled(), Score(window=None), Reparameterized()])
def test_burn_in_of_a_lattice_is_differentiated_without_bias(gradient):
    lattice = IsingLattice((2, 2), coupling=0.2, field=0.35, temperature=1.0 / 0.00831446261815324)
    n_steps = 12
    means = ising_chain(lattice, n_steps, start=5)
    exact = torch.autograd.grad(means.mean(), [lattice.energy.coupling, lattice.energy.field])
    z = []
    for seed in range(12):
        state = ChainState.replicate(
            200,
            discrete={"spins": lattice.states.discrete["spins"][5]},
        )
        sampler = Metropolis(
            Target(lattice.energy, temperature=lattice.temperature),
            SiteChange("spins", (-1, 1)),
            state,
            seed=seed,
        )
        estimate = gradient.estimate(
            sampler, lambda s: s.discrete["spins"].double().mean(dim=1), n_steps
        )
        z.append(z_scores(estimate, {"coupling": float(exact[0]), "field": float(exact[1])}))
        assert estimate.bias == "consistent"
    scores = torch.stack(z)
    assert float(scores.abs().max()) < 4.5
    # Twelve seeds together: no bias, and errors of the right size.
    assert float(scores.mean(dim=0).abs().max()) < 4.5 / math.sqrt(12)
    assert 0.4 < float(scores.square().mean()) < 2.0


def line_chain(center, scale, start, n_steps):
    """Mean of x after each step of a random walk on a normal target, on a grid, with a graph."""
    grid = torch.linspace(-9.0, 9.0, 721, dtype=torch.float64)
    width = float(grid[1] - grid[0])
    jump = (grid - grid[:, None]) / scale
    density = (-0.5 * jump.square()).exp() / (scale * math.sqrt(2.0 * math.pi)) * width
    potential = 0.5 * (grid - center).square()
    moved = density * (potential[:, None] - potential).clamp(max=0.0).exp()
    off = moved - torch.diag(torch.diagonal(moved))
    matrix = off + torch.diag(1.0 - off.sum(dim=1))
    law = torch.zeros(len(grid), dtype=torch.float64)
    law[int((grid - start).abs().argmin())] = 1.0
    means = []
    for _ in range(n_steps):
        law = law @ matrix
        means.append(law @ grid)
    return torch.stack(means)


class WalkOfAll(MALA):
    """A random walk of all particles, as a normal move with neither forces nor a known score."""

    def mean(self, state, target):
        return state.positions

    def apply(self, state, noise, target):
        step = self.deviation(state, target) * noise["normal"]
        return Proposal(
            state=state.replace(positions=state.positions + step),
            log_ratio=step.new_zeros(state.n_chains),
        )


@pytest.mark.parametrize(
    ("gradient", "kind"),
    [
        (Reparameterized(), Displacement),
        (Reparameterized(), LineStep),
        (Score(window=None), Displacement),
        (Score(window=None), WalkOfAll),
    ],
)
def test_burn_in_and_the_scale_of_a_proposal(gradient, kind):
    center = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    means = line_chain(center, scale, 3.0, 6)
    exact = torch.autograd.grad(means.mean(), [center, scale])
    system = GaussianTarget(center=0.2)
    z = []
    for seed in range(6):
        sampler = Metropolis(
            Target(system.potential, temperature=system.temperature),
            kind(1.5, name="walk"),
            ChainState.replicate(800, positions=torch.tensor([[3.0, 0.0, 0.0]]).double()),
            seed=seed,
        )
        estimate = gradient.estimate(
            sampler, lambda s: s.positions[:, 0, 0], 6, parameters=["well.center", "walk.scale"]
        )
        deviation = estimate.value - means.mean().detach()
        assert abs(float(deviation / estimate.standard_error)) < 4.5
        exact_by_name = {"well.center": float(exact[0]), "walk.scale": float(exact[1])}
        z.append(z_scores(estimate, exact_by_name))
    scores = torch.stack(z)
    assert float(scores.abs().max()) < 4.5
    assert float(scores.mean(dim=0).abs().max()) < 4.5 / math.sqrt(6)
    # Start far out: both numbers matter, so that a zero would have been noticed.
    assert min(abs(float(g)) for g in exact) > 0.1


def test_langevin_steps_without_a_test_have_the_gradient_of_their_own_law():
    # alpha = 0.2 of METHODS: <x^2> = 1 / (1 - alpha/2), d<x^2>/dK = -0.9876543 (not -1).
    kt = 0.00831446261815324 * 300.0
    system = HarmonicOscillators(40, k=kt)
    sampler = Metropolis(
        Target(system.potential, temperature=300.0),
        ULA(math.sqrt(0.4)),
        ChainState(
            positions=system.sample(64, generator=torch.Generator().manual_seed(0)).positions
        ),
        seed=3,
    )
    estimate = Reparameterized(warm_up=60).estimate(
        sampler, lambda s: s.positions.square().mean(dim=(1, 2)), 300, parameters=["wells.k"]
    )
    error = float(estimate.gradient_standard_error["wells.k"]) * kt
    assert float(estimate.gradient["wells.k"]) * kt == pytest.approx(-0.9876543, abs=4.5 * error)
    assert error < 0.0123 / 2.0
    assert abs(float(estimate.value) - 1.0 / 0.9) < 4.5 * float(estimate.standard_error)
    assert estimate.bias == "biased"
    assert "not adjusted" in estimate.method


# How estimators compare -------------------------------------------------------------------------


def test_variance_ranking_on_one_chain():
    # 20 chains of 1000 steps of a random walk on N(theta, 1); d<x>/dtheta is 1. For 20000 steps of
    # one chain standard deviations are about 0.023, 0.05 and, with heavy tails, 0.1.
    errors = {}
    for name, gradient in (
        ("covariance", Covariance()),
        ("coupled", Coupled(warm_up=50)),
        ("score", Score(window=50)),
    ):
        system = GaussianTarget(center=0.5)
        start = system.sample(20, generator=torch.Generator().manual_seed(1)).positions
        sampler = Metropolis(
            Target(system.potential, temperature=system.temperature),
            LineStep(2.4),
            ChainState(positions=start),
            seed=2,
        )
        estimate = gradient.estimate(sampler, lambda s: s.positions[:, 0, 0], 1000)
        assert float(z_scores(estimate, {"well.center": 1.0}).abs()) < 4.5
        errors[name] = float(estimate.gradient_standard_error["well.center"])
    assert errors["covariance"] < errors["coupled"] < errors["score"]
    assert errors["covariance"] == pytest.approx(0.023, rel=0.5)
    assert errors["coupled"] == pytest.approx(0.05, rel=0.5)
    assert errors["score"] > 1.3 * errors["coupled"]


def test_covariance_agrees_with_an_ensemble_and_reweights_as_it_does():
    case = gaussian(Displacement(1.3), n_chains=4)
    samples = case.sampler.sample(200)
    potential = case.sampler.target.energy
    found = Covariance().from_samples(samples, case.observable)
    ensemble = samples.to_ensemble()
    wanted = ensemble.estimate(case.observable)
    assert torch.allclose(found.value, wanted.value)
    assert torch.allclose(found.gradient["well.center"], wanted.gradient["well.center"])
    with torch.no_grad():
        potential.get_parameter("well.center").add_(0.2)
    moved = Covariance().from_samples(samples, case.observable)
    again = ensemble.estimate(case.observable)
    assert isinstance(ensemble, Ensemble)
    assert moved.method == "reweighting"
    assert torch.allclose(moved.value, again.value)
    assert torch.allclose(moved.gradient["well.center"], again.gradient["well.center"])
    assert moved.effective_sample_size == pytest.approx(again.effective_sample_size)
    assert not torch.allclose(moved.value, found.value)


def test_the_same_seeds_give_the_same_estimate_and_other_seeds_do_not():
    def run(seed):
        case = gaussian(Displacement(1.3), n_chains=8)
        return Coupled(seed=seed).estimate(case.sampler, case.observable, 40)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.gradient["well.center"], again.gradient["well.center"])
    # The chain is the same, the choices between branches are not.
    assert torch.equal(first.value, other.value)
    assert not torch.equal(first.gradient["well.center"], other.gradient["well.center"])


def test_mixtures_and_sequences_of_moves():
    two = Mixture([Displacement(0.6, name="a"), Displacement(2.0, name="b")])
    move = Sequence([two, MALA(1.0)])
    for gradient in (Reparameterized(warm_up=40), Covariance(), Score(window=20)):
        case = gaussian(move)
        estimate = gradient.estimate(case.sampler, case.observable, 80)
        assert float(z_scores(estimate, case.gradient).abs().max()) < 4.5
    case = gaussian(two)
    run = Coupled(warm_up=60).run(case.sampler, case.observable, 120)
    assert float(z_scores(run.estimate, case.gradient).abs().max()) < 4.5
    assert run.coalescence.couplings == {"a": "reflection-maximal", "b": "reflection-maximal"}


class Well(torch.nn.Module):
    """A harmonic energy of chains."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.center = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64))

    def forward(self, state):
        return 0.5 * self.k * (state.positions - self.center).square().sum(dim=(1, 2))


class WellWithForces(Well):
    """The same, with forces of its own and without a graph, as a host has them."""

    def energies_and_forces(self, state):
        with torch.no_grad():
            return self(state), -self.k * (state.positions - self.center)


@pytest.mark.parametrize("move", [MALA(1.1, name="m"), HMC(0.3, 3, name="m")])
def test_energies_with_forces_of_their_own_are_differentiated_by_differences(move):
    found = []
    for energy in (WellWithForces(), Well()):
        sampler = Metropolis(
            Target(energy, temperature=300.0),
            move,
            ChainState.replicate(8, positions=torch.tensor([[0.3, 0.1, -0.4]]).double()),
            seed=4,
        )
        estimate = Reparameterized().estimate(
            sampler,
            lambda s: s.positions[:, 0].square(),
            12,
            parameters=["k", "center", "m.scale"],
        )
        found.append(estimate.gradient)
    for name, by_differences in found[0].items():
        assert torch.allclose(by_differences, found[1][name], rtol=2e-6, atol=2e-7)
        assert float(by_differences.abs().max()) > 0.0


def test_float32_chains():
    system = GaussianTarget(center=0.4, n_dimensions=3)
    system.potential.to(torch.float32)
    start = system.sample(64, generator=torch.Generator().manual_seed(1)).positions.float()
    for gradient in (Covariance(), Coupled(warm_up=40)):
        sampler = Metropolis(
            Target(system.potential, temperature=system.temperature),
            Displacement(1.3),
            ChainState(positions=start),
            seed=1,
        )
        estimate = gradient.estimate(sampler, lambda s: s.positions[:, 0, 0], 120)
        assert float(z_scores(estimate, {"well.center": 1.0}).abs()) < 4.5
        assert estimate.gradient["well.center"].dtype == torch.float64


def test_the_gradient_is_an_argument():
    found = []
    for gradient in (None, Covariance(), Coupled(warm_up=10)):
        case = gaussian(Displacement(1.3), n_chains=8)
        found.append(estimate_average(case.sampler, case.observable, 30, gradient=gradient))
    assert [e.method for e in found] == ["covariance", "covariance", "coupled branches"]
    assert torch.equal(found[0].gradient["well.center"], found[1].gradient["well.center"])
    with pytest.raises(InvalidInputError, match="wanted an estimator"):
        estimate_average(case.sampler, case.observable, 30, gradient="covariance")


# What must raise --------------------------------------------------------------------------------


def test_a_pathwise_gradient_raises_and_says_what_to_use():
    case = gaussian(Displacement(1.3), n_chains=4)
    samples = case.sampler.sample(5)
    with pytest.raises(UnsupportedDerivativeError, match=r"Covariance\(\).*Coupled\(\)"):
        samples.positions.mean().backward()
    with pytest.raises(UnsupportedDerivativeError, match=r"Covariance\(\)"):
        Metropolis(
            case.sampler.target,
            Displacement(torch.tensor(1.0, requires_grad=True)),
            case.sampler.state,
        )


def energy_only(state):
    return state.positions.square().sum(dim=(1, 2))


def histogram(state):
    return (state.positions[:, 0, 0] > 0).double()


def x_of(state):
    return state.positions[:, 0, 0]


@pytest.mark.parametrize(
    ("gradient", "move", "observable", "options", "error", "match"),
    [
        (Coupled(), MALA(1.0), x_of, {}, UnsupportedDerivativeError, r"MALA.*Reparameterized"),
        (Coupled(), HMC(0.3, 2), x_of, {}, UnsupportedDerivativeError, r"HMC.*Reparameterized"),
        (Score(), HMC(0.3, 2), x_of, {}, UnsupportedDerivativeError, r"HMC.*no known density"),
        (Covariance(), ULA(0.3), x_of, {}, WrongEnsembleError, "without a test"),
        (
            Reparameterized(),
            MALA(1.0),
            histogram,
            {},
            UnsupportedDerivativeError,
            "observable.*smooth",
        ),
        (
            Reparameterized(),
            MALA(1.0),
            x_of,
            {"parameters": ["temperature"]},
            UnsupportedDerivativeError,
            "temperature",
        ),
        (
            Score(),
            MALA(1.0),
            x_of,
            {"parameters": ["temperature"]},
            UnsupportedDerivativeError,
            "temperature",
        ),
        (
            Score(),
            LineStep(1.0),
            x_of,
            {"parameters": ["LineStep.scale"]},
            UnsupportedDerivativeError,
            "score of the scale of LineStep",
        ),
        (
            Covariance(),
            Displacement(1.0),
            x_of,
            {"parameters": ["Displacement.scale"]},
            InvalidInputError,
            "matches no parameter",
        ),
        (
            Covariance(),
            Displacement(1.0),
            x_of,
            {"parameters": ["pressure"]},
            InvalidInputError,
            "pressure",
        ),
        (
            Covariance(),
            Displacement(1.0),
            x_of,
            {"parameters": ["chemical_potential"]},
            InvalidInputError,
            "log_activity",
        ),
        (
            Coupled(),
            Displacement(1.0),
            lambda s: s.positions,
            {"stride": 0},
            InvalidInputError,
            "stride",
        ),
        (
            Coupled(),
            Displacement(1.0),
            lambda s: s.positions.sum(),
            {},
            InvalidInputError,
            "observable: returned shape",
        ),
        (
            Covariance(),
            Displacement(1.0),
            lambda s: s.positions[:, 0, 0] * math.nan,
            {},
            InvalidInputError,
            "NaN",
        ),
        (
            Insertion(),
            Displacement(1.0),
            x_of,
            {},
            InvalidInputError,
            "log_activity",
        ),
        (
            Insertion(),
            Displacement(1.0),
            x_of,
            {"parameters": ["well.center"]},
            UnsupportedDerivativeError,
            "Covariance",
        ),
    ],
)
def test_refusals(gradient, move, observable, options, error, match):
    case = gaussian(move, n_chains=3)
    with pytest.raises(error, match=match):
        gradient.estimate(case.sampler, observable, 5, **options)


def test_an_energy_without_parameters_raises():
    sampler = Metropolis(
        Target(energy_only, temperature=300.0),
        Displacement(0.1),
        ChainState.replicate(2, positions=torch.zeros(1, 3, dtype=torch.float64)),
    )
    with pytest.raises(InvalidInputError, match="no trainable parameter"):
        Covariance().estimate(sampler, x_of, 5)
    estimate = Covariance().estimate(sampler, x_of, 5, parameters=["temperature"])
    assert list(estimate.gradient) == ["temperature"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Coupled(warm_up=-1), "warm_up"),
        (lambda: Coupled(max_age=0), "max_age"),
        (lambda: Coupled(tolerance=-1.0), "tolerance"),
        (lambda: Reparameterized(warm_up=-1), "warm_up"),
        (lambda: Score(window=0), "window"),
        (lambda: Score(baseline="mean"), "baseline"),
        (lambda: Covariance(min_ess=2.0), "min_ess"),
        (lambda: Insertion(n_trials=0), "n_trials"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()


def test_branches_that_are_cut_make_an_estimate_biased():
    case = gaussian(Displacement(1.3), n_chains=32)
    run = Coupled(max_age=3).run(case.sampler, case.observable, 60)
    assert run.coalescence.n_cut > 0
    assert run.estimate.bias == "biased"
    assert int(run.coalescence.lifetimes.max()) <= 3
    assert "cut" in run.coalescence.summary()
