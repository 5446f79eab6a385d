"""The exact answers of the test systems, against their own samplers and energies."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft._units import BAR_NM3, BOLTZMANN
from mdgraft.ensembles import standard_error, statistical_inefficiency
from mdgraft.testsystems import HarmonicOscillators, IdealGas


def within(series, exact, z=4.5):
    """Whether the mean of a series agrees with an exact value."""
    return abs(float(series.mean()) - exact) < z * float(standard_error(series))


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.3])
def test_oscillators_are_sampled_exactly(correlation):
    system = HarmonicOscillators(2, center=0.3, k=800.0, temperature=320.0)
    generator = torch.Generator().manual_seed(0)
    frames = system.sample(4000, correlation=correlation, generator=generator)
    x = frames.positions
    assert frames.sampled == "NVT"
    assert within(x[:, 0, 1], 0.3)
    assert within(x[:, 1, 2] ** 2, system.mean_square())
    energy = system.potential(frames.positions)
    assert within(energy.detach(), system.mean_energy())
    lag = (x[1:] - 0.3) * (x[:-1] - 0.3) / system.variance
    assert abs(float(lag.mean()) - correlation) < 0.05


def test_oscillator_energy_and_forces():
    system = HarmonicOscillators(2, center=0.1, k=50.0)
    x = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(system.potential(x), 25.0 * ((x - 0.1) ** 2).sum(dim=(1, 2)))
    assert torch.allclose(system.potential.forces(x), -50.0 * (x - 0.1))


def test_closed_form_derivatives_follow_from_closed_form_averages():
    h = 1e-6

    def mean_square(center, k):
        return HarmonicOscillators(1, center=center, k=k).mean_square()

    exact = HarmonicOscillators(1, center=0.2, k=3.0).mean_square_gradient()
    by_center = (mean_square(0.2 + h, 3.0) - mean_square(0.2 - h, 3.0)) / (2 * h)
    by_k = (mean_square(0.2, 3.0 + h) - mean_square(0.2, 3.0 - h)) / (2 * h)
    assert exact["wells.center"] == pytest.approx(by_center, rel=1e-6)
    assert exact["wells.k"] == pytest.approx(by_k, rel=1e-6)


def test_sample_size_fractions_in_closed_form():
    one = HarmonicOscillators(1, k=1.0)  # three degrees of freedom
    assert one.kish_fraction(1.5) == pytest.approx(0.942809**3, rel=1e-5)
    assert one.entropy_fraction(1.5) == pytest.approx(0.964577**3, rel=1e-5)
    ten = HarmonicOscillators(10, k=1.0)
    assert ten.kish_fraction(1.5) == pytest.approx(0.170888, rel=1e-5)
    assert ten.entropy_fraction(1.5) == pytest.approx(0.338925, rel=1e-5)
    assert ten.kish_fraction(1.0) == ten.entropy_fraction(1.0) == 1.0
    assert ten.kish_fraction(0.4) == 0.0


def test_ideal_gas_volumes_are_gamma_distributed():
    gas = IdealGas(8, temperature=350.0, pressure=40.0)
    frames = gas.sample(4000, correlation=0.7, generator=torch.Generator().manual_seed(2))
    assert frames.sampled == "NPT"
    volumes = torch.linalg.det(frames.box)
    n = 8
    kt_over_p = BOLTZMANN * 350.0 / (40.0 * BAR_NM3)
    assert gas.volume_moment() == pytest.approx((n + 1) * kt_over_p)
    assert gas.volume_moment(2) == pytest.approx((n + 1) * (n + 2) * kt_over_p**2)
    assert within(volumes, gas.volume_moment())
    assert within(volumes**2, gas.volume_moment(2))
    # <1/V> = P / (n kT): the molecules alone, not n + 1.
    assert within(1 / volumes, 1 / (n * kt_over_p))
    g = (1 + 0.49) / (1 - 0.49)
    assert float(statistical_inefficiency(volumes)) == pytest.approx(g, rel=0.3)
    inside = (frames.positions >= 0) & (
        frames.positions <= frames.box.amax(dim=(1, 2))[:, None, None]
    )
    assert bool(inside.all())


def test_ideal_gas_derivatives_follow_from_its_moments():
    h = 1e-5

    def mean(temperature=300.0, pressure=10.0, tension=0.0):
        gas = IdealGas(5, temperature=temperature, pressure=pressure)
        return gas.volume_moment(tension=tension)

    gas = IdealGas(5, temperature=300.0, pressure=10.0)
    by_t = (mean(temperature=300 + h) - mean(temperature=300 - h)) / (2 * h)
    by_p = (mean(pressure=10 + h) - mean(pressure=10 - h)) / (2 * h)
    by_tension = (mean(tension=h) - mean(tension=-h)) / (2 * h)
    assert gas.mean_volume_temperature_derivative() == pytest.approx(by_t, rel=1e-6)
    assert gas.mean_volume_pressure_derivative() == pytest.approx(by_p, rel=1e-6)
    assert gas.mean_volume_gradient()["squeeze.tension"] == pytest.approx(by_tension, rel=1e-6)


def test_samplers_repeat_with_a_seed():
    system = HarmonicOscillators(1, k=2.0)
    first, second = (
        system.sample(5, correlation=0.5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first.positions, second.positions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HarmonicOscillators(1, k=-1.0), "k: got -1.0"),
        (lambda: HarmonicOscillators(1, k=math.nan), "k: got nan"),
        (lambda: HarmonicOscillators(1, k=1.0, temperature=0.0), "temperature: got 0.0"),
        (lambda: IdealGas(0, pressure=1.0), "n_molecules: got 0"),
        (lambda: IdealGas(1, pressure=-1.0), "pressure: got -1.0"),
        (lambda: HarmonicOscillators(1, k=1.0).sample(0), "n_frames: got 0"),
        (lambda: HarmonicOscillators(1, k=1.0).sample(9, correlation=1.0), "correlation: got 1.0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()
