"""Exact answers of the Monte Carlo test systems: against known numbers and their own samplers."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.ensembles import standard_error
from mdgraft.testsystems import (
    GaussianTarget,
    GrandCanonicalIdealGas,
    IsingLattice,
    LangmuirSites,
)

#: The temperature at which beta is one [mol/kJ].
UNIT = 1.0 / BOLTZMANN


def within(series, exact, z=4.5):
    """Whether the mean of independent numbers agrees with an exact value."""
    return abs(float(series.double().mean()) - exact) < z * float(standard_error(series.double()))


@pytest.mark.parametrize(
    ("scale", "derivative"), [(1.0, -0.246467), (1.5, -0.133781), (3.0, 0.029694)]
)
def test_gaussian_autocovariance_derivative(scale, derivative):
    target = GaussianTarget()
    assert target.autocovariance_derivative(scale) == pytest.approx(derivative, abs=1e-6)
    h = 1e-4
    by_difference = (target.autocovariance(scale + h) - target.autocovariance(scale - h)) / (2 * h)
    assert target.autocovariance_derivative(scale) == pytest.approx(by_difference, abs=1e-7)


def test_gaussian_optimal_proposal():
    target = GaussianTarget()
    assert target.optimal_scale() == pytest.approx(2.426401, abs=1e-6)
    assert target.autocovariance(target.optimal_scale()) == pytest.approx(0.627898, abs=1e-6)
    # 0.44 is the familiar optimal acceptance in one dimension.
    assert target.acceptance(target.optimal_scale()) == pytest.approx(0.44, abs=0.01)


@pytest.mark.parametrize("n_dimensions", [1, 2, 3])
def test_gaussian_closed_forms_agree_with_direct_sampling(n_dimensions):
    target = GaussianTarget(center=0.2, n_dimensions=n_dimensions)
    generator = torch.Generator().manual_seed(n_dimensions)
    x = target.sample(20000, generator=generator).positions
    step = 1.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        beta = 1.0 / (BOLTZMANN * target.temperature)
        alpha = (-beta * (target.potential(x + step) - target.potential(x))).clamp(max=0.0).exp()
    assert within(alpha, target.acceptance(1.3))
    bound = step[:, 0, :n_dimensions].square().sum(dim=1)
    assert within(alpha * bound, target.squared_jump(1.3))
    assert within(x[:, 0, 0], 0.2)


def test_ising_known_answers():
    lattice = IsingLattice(temperature=UNIT / 0.4)
    assert float(lattice.mean_energy().detach()) == pytest.approx(-13.1591018, abs=1e-7)
    capacity = lattice.heat_capacity()
    assert float(capacity.detach()) == pytest.approx(5.8772882, abs=1e-7)
    (derivative,) = torch.autograd.grad(capacity, lattice.energy.coupling)
    assert float(derivative) == pytest.approx(0.5464248, abs=1e-7)


def test_ising_gradients_agree_with_differences():
    def magnetisation(state):
        return state.discrete["spins"].double().mean(dim=1)

    def at(field):
        lattice = IsingLattice((2, 3), coupling=0.3, field=field, temperature=UNIT)
        return float(lattice.mean(magnetisation).detach())

    lattice = IsingLattice((2, 3), coupling=0.3, field=0.2, temperature=UNIT)
    by_difference = (at(0.2 + 1e-5) - at(0.2 - 1e-5)) / 2e-5
    assert float(lattice.gradient(magnetisation)["field"]) == pytest.approx(by_difference, rel=1e-8)
    sampled = lattice.sample(20000, generator=torch.Generator().manual_seed(0))
    assert within(magnetisation(sampled), at(0.2))
    assert within(lattice.energy(sampled).detach(), float(lattice.mean_energy().detach()))


def test_langmuir_sites():
    sites = LangmuirSites(5, epsilon=-0.8, activity=0.7)
    h = 1e-6

    def at(epsilon, activity):
        return LangmuirSites(5, epsilon=epsilon, activity=activity).mean_occupancy()

    by_energy = (at(-0.8 + h, 0.7) - at(-0.8 - h, 0.7)) / (2 * h)
    assert sites.mean_occupancy_gradient()["epsilon"] == pytest.approx(by_energy, rel=1e-6)
    up, down = (0.7 * math.exp(sites.beta * sign * h) for sign in (1, -1))
    by_mu = (at(-0.8, up) - at(-0.8, down)) / (2 * h)
    assert sites.mean_occupancy_chemical_potential_derivative() == pytest.approx(by_mu, rel=1e-6)
    sampled = sites.sample(5000, generator=torch.Generator().manual_seed(1))
    assert within(sampled.numbers, 5 * sites.mean_occupancy())
    assert torch.allclose(sites.energy(sampled), -0.8 * sampled.numbers.double())
    assert sites.chemical_potential == pytest.approx(math.log(0.7) / sites.beta)


def test_grand_canonical_ideal_gas():
    gas = GrandCanonicalIdealGas(volume=8.0, activity=0.6, epsilon=0.4)
    assert gas.mean_number() == pytest.approx(4.8 * math.exp(-gas.beta * 0.4))
    sampled = gas.sample(5000, generator=torch.Generator().manual_seed(2))
    numbers = sampled.numbers.double()
    assert within(numbers, gas.mean_number())
    assert within((numbers - gas.mean_number()) ** 2, gas.number_variance())
    assert sampled.box is not None and float(torch.linalg.det(sampled.box[0])) == pytest.approx(8.0)
    assert gas.mean_number_gradient()["epsilon"] == pytest.approx(-gas.beta * gas.mean_number())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GaussianTarget(n_dimensions=4), "n_dimensions"),
        (lambda: GaussianTarget(temperature=0.0), "temperature"),
        (lambda: IsingLattice((5, 5)), "too many states"),
        (lambda: IsingLattice((1, 3)), "shape"),
        (lambda: IsingLattice(temperature=-1.0), "temperature"),
        (lambda: LangmuirSites(3, epsilon=0.0, activity=0.0), "activity"),
        (lambda: GrandCanonicalIdealGas(volume=-1.0, activity=1.0), "volume"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()
