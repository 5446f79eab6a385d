"""Averages over frames and their gradients: closed forms, finite differences, identities."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from mdgraft import (
    Frames,
    InvalidInputError,
    Potential,
    WrongEnsembleError,
)
from mdgraft._units import BAR_NM3, BOLTZMANN, DALTON_PER_NM3
from mdgraft.ensembles import (
    Density,
    Ensemble,
    Enthalpy,
    PotentialEnergy,
    Stack,
    Volume,
    heat_capacity,
    isothermal_compressibility,
    moving_block_bootstrap,
    thermal_expansion,
)
from mdgraft.potentials import AbstractTerm
from mdgraft.potentials.bonded import HarmonicBond
from mdgraft.testsystems import HarmonicOscillators, IdealGas

T = 300.0
KT = BOLTZMANN * T


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bonded_potential(n_particles=4, dtype=torch.float64):
    """A chain of unequal bonds: two parameters of several entries each."""
    pairs = torch.tensor([[i, i + 1] for i in range(n_particles - 1)])
    length = torch.linspace(0.12, 0.2, n_particles - 1, dtype=dtype)
    k = torch.linspace(900.0, 1500.0, n_particles - 1, dtype=dtype)
    return Potential(
        {"bonds": HarmonicBond(pairs, length, k, periodic=False)}, n_particles=n_particles
    )


def chain_frames(n_frames=30, n_particles=4, seed=0):
    """Bent chains with bonds near their lengths: any frames serve exact identities."""
    steps = torch.randn(n_frames, n_particles, 3, generator=seeded(seed), dtype=torch.float64)
    steps = 0.16 * steps / steps.norm(dim=-1, keepdim=True)
    steps = steps * (1 + 0.1 * torch.randn(n_frames, n_particles, 1, generator=seeded(seed + 1)))
    return Frames(positions=steps.cumsum(dim=1), sampled="NVT")


def end_to_end(frames):
    return (frames.positions[:, -1] - frames.positions[:, 0]).norm(dim=-1)


def gyration(frames):
    centred = frames.positions - frames.positions.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=-1).mean(dim=1)


def several(frames):
    return torch.stack([end_to_end(frames), gyration(frames), end_to_end(frames) ** 2], dim=-1)


def first_coordinate(frames):
    return frames.positions[:, 0, 0]


def oscillator(n_particles=1, n_frames=3000, correlation=0.6, seed=0, **options):
    system = HarmonicOscillators(n_particles, center=0.1, k=700.0, temperature=T)
    frames = system.sample(n_frames, correlation=correlation, generator=seeded(seed))
    return system, Ensemble(system.potential, frames, temperature=T, **options)


def set_parameter(potential, name, value):
    with torch.no_grad():
        potential.get_parameter(name).copy_(torch.as_tensor(value))


def within(value, error, exact, z=4.0):
    return bool(((value - torch.as_tensor(exact)).abs() < z * error).all())


# Gradients against finite differences -------------------------------------------------------------


def reweighted(potential, frames, reference, observable):
    """The textbook average at the present parameters, written plainly."""
    with torch.no_grad():
        energies = potential(frames.positions, frames.box)
        w = torch.exp(-(energies - reference) / KT)
        return torch.tensordot(w / w.sum(), observable(frames), dims=1)


@pytest.mark.parametrize("moved", [False, True], ids=["generating", "moved"])
@pytest.mark.parametrize("route", ["backward", "estimate"])
def test_gradient_is_that_of_the_exact_reweighted_average(moved, route):
    potential, frames = bonded_potential(), chain_frames()
    ensemble = Ensemble(potential, frames, temperature=T, batch_size=7)
    reference = potential(frames.positions).detach()
    if moved:
        set_parameter(potential, "bonds.k", potential.values()["bonds.k"].detach() * 1.02)
    exact = reweighted(potential, frames, reference, several)
    if route == "backward":
        value = ensemble.average(several)
        rows = [
            torch.autograd.grad(v, list(potential.parameters()), retain_graph=True) for v in value
        ]
        names = [name for name, _ in potential.named_parameters()]
        gradient = {
            name: torch.stack(parts)
            for name, parts in zip(names, zip(*rows, strict=True), strict=True)
        }
    else:
        estimate = ensemble.estimate(several)
        value, gradient = estimate.value, estimate.gradient
        assert estimate.method == ("reweighting" if moved else "covariance")
    assert torch.allclose(value, exact, rtol=1e-12, atol=0)
    assert value.dtype == torch.float64
    for name, parameter in potential.named_parameters():
        for entry in range(parameter.numel()):
            h = 1e-5 * float(parameter.detach().view(-1)[entry])
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[entry] += sign * h
                sides.append(reweighted(potential, frames, reference, several))
                with torch.no_grad():
                    parameter.view(-1)[entry] -= sign * h
            numeric = (sides[0] - sides[1]) / (2 * h)
            assert torch.allclose(gradient[name][:, entry], numeric, rtol=1e-6, atol=1e-9)


def test_second_derivatives_of_averages():
    potential, frames = bonded_potential(), chain_frames()
    ensemble = Ensemble(potential, frames, temperature=T, batch_size=7)
    k = potential.get_parameter("bonds.k")

    def gradient():
        (g,) = torch.autograd.grad(ensemble.average(end_to_end), [k], create_graph=True)
        return g

    hessian = torch.stack(
        [torch.autograd.grad(entry, [k], retain_graph=True)[0] for entry in gradient()]
    )
    assert torch.allclose(hessian, hessian.T, rtol=1e-9, atol=1e-15)
    for entry in range(k.numel()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                k[entry] += sign * 0.01
            sides.append(gradient().detach())
            with torch.no_grad():
                k[entry] -= sign * 0.01
        assert torch.allclose(hessian[entry], (sides[0] - sides[1]) / 0.02, rtol=1e-5, atol=1e-12)


def test_batches_do_not_matter():
    potential, frames = bonded_potential(), chain_frames()
    results = []
    for batch_size in (1, 7, 30, None):
        ensemble = Ensemble(potential, frames, temperature=T, batch_size=batch_size)
        potential.zero_grad()
        ensemble.average(gyration).backward()
        results.append(torch.cat([p.grad for p in potential.parameters()]))
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-10)


def test_losses_of_averages_train_the_potential():
    system, ensemble = oscillator(n_frames=500)
    optimiser = torch.optim.SGD([system.potential.get_parameter("wells.center")], lr=0.3)
    for _ in range(30):
        optimiser.zero_grad()
        loss = (ensemble.average(lambda f: f.positions.mean(dim=(1, 2))) - 0.11) ** 2
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-10


def test_other_tensors_of_the_observable_get_gradients():
    _, ensemble = oscillator(n_frames=50)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inner = scale * 3.0  # not a leaf: its graph is shared by all batches
    ensemble.batch_size = 9
    average = ensemble.average(lambda f: inner * f.positions.square().sum(dim=(1, 2)))
    average.backward()
    assert scale.grad.item() == pytest.approx(average.item() / 2.0, rel=1e-12)


def test_no_graph_without_gradients():
    system, ensemble = oscillator(n_frames=20)
    with torch.no_grad():
        assert not ensemble.average(PotentialEnergy(system.potential)).requires_grad
    system.potential.freeze("*")
    assert not ensemble.average(lambda f: f.positions[:, 0, 0]).requires_grad


def test_changed_parameters_between_forward_and_backward_are_noticed():
    system, ensemble = oscillator(n_frames=20)
    average = ensemble.average(lambda f: f.positions[:, 0, 0])
    set_parameter(system.potential, "wells.k", 701.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        average.backward()


# Closed forms -------------------------------------------------------------------------------------


def test_oscillator_averages_and_gradients():
    system, ensemble = oscillator()

    def observable(frames):
        x = frames.positions[:, 0]
        return torch.stack([x, x * x], dim=-2)  # (F, 2, 3)

    estimate = ensemble.estimate(observable)
    assert estimate.value.shape == (2, 3)
    assert within(estimate.value[0], estimate.standard_error[0], 0.1)
    assert within(estimate.value[1], estimate.standard_error[1], system.mean_square())
    exact = (system.mean_position_gradient(), system.mean_square_gradient())
    for name in ("wells.center", "wells.k"):
        for row in range(2):
            assert within(
                estimate.gradient[name][row],
                estimate.gradient_standard_error[name][row],
                exact[row][name],
            )
    assert torch.allclose(
        estimate.statistical_inefficiency[0], torch.tensor(4.0).double(), rtol=0.35
    )
    assert estimate.gradient_inefficiency["wells.k"].shape == (2, 3)
    assert estimate.bias == "consistent"
    assert estimate.pareto_k is None


def test_reweighting_reaches_the_closed_form():
    system, ensemble = oscillator(n_frames=8000)
    set_parameter(system.potential, "wells.k", 800.0)
    set_parameter(system.potential, "wells.center", 0.11)
    moved = HarmonicOscillators(1, center=0.11, k=800.0, temperature=T)
    estimate = ensemble.estimate(lambda f: f.positions[:, 0, 0] ** 2)
    assert within(estimate.value, estimate.standard_error, moved.mean_square())
    for name, exact in moved.mean_square_gradient().items():
        assert within(estimate.gradient[name], estimate.gradient_standard_error[name], exact)
    assert estimate.method == "reweighting"
    assert estimate.effective_sample_size < estimate.entropy_sample_size < 8000
    assert estimate.max_weight > 1 / 8000
    assert 0.0 < float(estimate.standard_error)


def test_explicit_dependence_is_included():
    """<U> = 3N kT/2 whatever the parameters: <dU> and the covariance must cancel."""
    system, ensemble = oscillator(n_particles=2)
    estimate = ensemble.estimate(PotentialEnergy(system.potential))
    assert within(estimate.value, estimate.standard_error, system.mean_energy())
    for name, gradient in estimate.gradient.items():
        assert within(gradient, estimate.gradient_standard_error[name], 0.0)
    # Without the explicit term it would be -beta Var(U) / k, far outside the error.
    half = 0.5 * 6 * KT / 700.0
    assert 20 * float(estimate.gradient_standard_error["wells.k"]) < half


def test_an_observable_that_uses_forces():
    system, ensemble = oscillator()

    def virial(frames):
        return -(system.potential.forces(frames.positions) * frames.positions).sum(dim=(1, 2))

    average = ensemble.average(virial)
    gradient = torch.autograd.grad(average, list(system.potential.parameters()))
    estimate = ensemble.estimate(virial)
    assert within(estimate.value, estimate.standard_error, 3 * KT)
    for got, name in zip(gradient, ("wells.center", "wells.k"), strict=True):
        assert torch.allclose(got, estimate.gradient[name], rtol=1e-9)
        assert within(got, estimate.gradient_standard_error[name], 0.0)


def test_function_of_averages_by_the_delta_method():
    _, ensemble = oscillator(n_frames=4000)

    def moments(frames):
        x = frames.positions[:, 0, 0]
        return torch.stack([x, x * x], dim=-1)

    def variance(average):
        return average[1] - average[0] ** 2

    estimate = ensemble.estimate(moments, function=variance)
    assert within(estimate.value, estimate.standard_error, KT / 700.0)
    k_error = estimate.gradient_standard_error["wells.k"]
    assert within(estimate.gradient["wells.k"], k_error, -KT / 700.0**2)
    series = moments(ensemble.frames)
    replicates = moving_block_bootstrap(
        series, lambda s: variance(s.mean(dim=0)), n_resamples=300, generator=seeded(1)
    )
    assert float(estimate.standard_error) == pytest.approx(float(replicates.std()), rel=0.2)
    with pytest.raises(InvalidInputError, match="function: returned float"):
        ensemble.estimate(moments, function=lambda average: 1.0)


def test_gradient_of_a_function_is_that_of_the_graph():
    potential, frames = bonded_potential(), chain_frames()
    ensemble = Ensemble(potential, frames, temperature=T)

    def function(average):
        return torch.stack([average[2] - average[0] ** 2, average[1] / average[0]])

    estimate = ensemble.estimate(several, function=function)
    value = function(ensemble.average(several))
    for row in range(2):
        (k,) = torch.autograd.grad(
            value[row], [potential.get_parameter("bonds.k")], retain_graph=True
        )
        assert torch.allclose(estimate.gradient["bonds.k"][row], k, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("n_particles", [1, 10])
def test_sample_sizes_in_closed_form(n_particles):
    system, ensemble = oscillator(n_particles, n_frames=20000, correlation=0.0)
    set_parameter(system.potential, "wells.k", 1.5 * 700.0)
    overlap = ensemble.overlap()
    assert overlap.effective_sample_size / 20000 == pytest.approx(
        system.kish_fraction(1.5), rel=0.05
    )
    assert overlap.entropy_sample_size / 20000 == pytest.approx(
        system.entropy_fraction(1.5), rel=0.03
    )


def test_coverage_of_the_whole_route():
    """95 % intervals from 200 ensembles of correlated frames, three coordinates each."""
    system = HarmonicOscillators(1, center=0.1, k=700.0, temperature=T)
    frames = system.sample(200 * 600, correlation=0.8, generator=seeded(4))
    exact = {"value": system.mean_square(), **system.mean_square_gradient()}
    hits = {name: [] for name in exact}
    for part in frames.batches(600):
        ensemble = Ensemble(system.potential, part, temperature=T)
        estimate = ensemble.estimate(lambda f: f.positions[:, 0] ** 2)
        values = {"value": estimate.value, **estimate.gradient}
        errors = {"value": estimate.standard_error, **estimate.gradient_standard_error}
        for name, found in hits.items():
            found.append((values[name] - exact[name]).abs() < 1.96 * errors[name])
    for name, found in hits.items():
        covered = float(torch.stack(found).double().mean())
        assert 0.88 <= covered <= 0.98, (name, covered)


# Constant pressure --------------------------------------------------------------------------------


def gas(n_frames=4000, correlation=0.7, seed=5):
    system = IdealGas(20, temperature=T, pressure=50.0)
    frames = system.sample(n_frames, correlation=correlation, generator=seeded(seed))
    return system, Ensemble(system.potential, frames, temperature=T, pressure=50.0)


def test_ideal_gas_gradients():
    system, ensemble = gas()
    estimate = ensemble.estimate(Volume())
    assert within(estimate.value, estimate.standard_error, system.volume_moment())
    (name, exact), *_ = system.mean_volume_gradient().items()
    assert within(estimate.gradient[name], estimate.gradient_standard_error[name], exact)
    by_t = ensemble.temperature_derivative(Volume())
    assert within(by_t.value, by_t.standard_error, system.mean_volume_temperature_derivative())
    by_p = ensemble.pressure_derivative(Volume())
    assert within(by_p.value, by_p.standard_error, system.mean_volume_pressure_derivative())
    assert by_p.gradient == {}


def test_ideal_gas_reweighted_to_another_pressure():
    system, ensemble = gas()
    tension = 0.2 * 50.0 * BAR_NM3
    set_parameter(system.potential, "squeeze.tension", tension)
    estimate = ensemble.estimate(Volume())
    exact = system.volume_moment(tension=tension)
    assert within(estimate.value, estimate.standard_error, exact)
    assert within(
        estimate.gradient["squeeze.tension"],
        estimate.gradient_standard_error["squeeze.tension"],
        -exact / (50.0 * BAR_NM3 + tension),
    )


@pytest.mark.parametrize(
    ("property_of", "exact"),
    [
        (heat_capacity, 21 * BOLTZMANN),
        (isothermal_compressibility, 1 / 50.0),
        (thermal_expansion, 1 / T),
    ],
)
def test_ideal_gas_fluctuations(property_of, exact):
    _, ensemble = gas()
    estimate = property_of(ensemble)
    assert within(estimate.value, estimate.standard_error, exact)
    # <V> = (n + 1) kT / (P + tension): kappa falls as the squared inverse pressure.
    slopes = {isothermal_compressibility: -1 / 50.0 / (50.0 * BAR_NM3)}
    if property_of in slopes:
        assert within(
            estimate.gradient["squeeze.tension"],
            estimate.gradient_standard_error["squeeze.tension"],
            slopes[property_of],
        )


def test_heat_capacity_at_constant_volume():
    system, ensemble = oscillator(n_particles=3)
    estimate = heat_capacity(ensemble)
    assert within(estimate.value, estimate.standard_error, 4.5 * BOLTZMANN)
    del system
    for fluctuation in (isothermal_compressibility, thermal_expansion):
        with pytest.raises(WrongEnsembleError, match="volume fluctuations"):
            fluctuation(ensemble)


def test_temperature_derivative_at_constant_volume():
    system, ensemble = oscillator()
    estimate = ensemble.temperature_derivative(lambda f: f.positions[:, 0, 0] ** 2)
    assert within(estimate.value, estimate.standard_error, system.variance / T)


def test_observables_of_the_box():
    system, ensemble = gas(n_frames=10)
    frames = ensemble.frames
    v = torch.linalg.det(frames.box)
    assert torch.allclose(Volume()(frames), v)
    assert torch.allclose(Density(360.0)(frames), 360.0 * DALTON_PER_NM3 / v)
    water = Frames(positions=torch.zeros(1, 1, 3), box=torch.eye(3)[None])
    # One 18.015 Da molecule in 0.0299 nm^3 is liquid water.
    assert float(Density(18.015 / 0.0299 * 1.0)(water)) == pytest.approx(1000.5, rel=1e-3)
    set_parameter(system.potential, "squeeze.tension", 2.0)
    energy = PotentialEnergy(system.potential, n_molecules=20)
    assert torch.allclose(energy(frames), 2.0 * v / 20)
    enthalpy = Enthalpy(system.potential, 50.0, n_molecules=20)
    assert torch.allclose(enthalpy(frames), (2.0 + 50.0 * BAR_NM3) * v / 20)
    both = Stack((Volume(), energy))
    assert torch.equal(both(frames)[:, 1], energy(frames))


# Identities ---------------------------------------------------------------------------------------


class _Offset(AbstractTerm):
    """U -> U + c: must change no average."""

    def __init__(self):
        super().__init__(periodic=False)
        self.add_parameter("c", torch.tensor(3.0, dtype=torch.float64), "kilojoule/mole")

    def forward(
        self,
        positions,
        box,
        values: Mapping[str, torch.Tensor],
        global_values: Mapping[str, torch.Tensor],
    ):
        return values["c"].expand(positions.shape[0])


def test_a_constant_added_to_the_energy_has_no_gradient():
    bonds = bonded_potential().term("bonds")
    potential = Potential({"bonds": bonds, "offset": _Offset()}, n_particles=4)
    ensemble = Ensemble(potential, chain_frames(), temperature=T)
    estimate = ensemble.estimate(several, ["offset.c"])
    assert float(estimate.gradient["offset.c"].abs().max()) < 1e-14
    average = ensemble.average(end_to_end)
    (gradient,) = torch.autograd.grad(average, [potential.get_parameter("offset.c")])
    assert abs(float(gradient)) < 1e-14
    set_parameter(potential, "offset.c", 1000.0)
    assert torch.allclose(ensemble.average(end_to_end), average, rtol=1e-12)


def test_yvon_identity():
    """<lap U> = beta <|F|^2>, and as w = x - center gives equipartition, within errors."""
    system, ensemble = oscillator(n_particles=2)

    def difference(frames):
        forces = system.potential.forces(frames.positions)
        return 6 * 700.0 - forces.square().sum(dim=(1, 2)) / KT

    estimate = ensemble.estimate(difference, [])
    assert within(estimate.value, estimate.standard_error, 0.0)
    assert estimate.gradient == {}


def test_energy_scale_identity_to_machine_precision():
    """sum theta dO/dtheta + T d<O>/dT = 0 over all energy scales, for any frames."""
    potential, frames = bonded_potential(), chain_frames()
    ensemble = Ensemble(potential, frames, temperature=T)
    estimate = ensemble.estimate(several)
    k = potential.get_parameter("bonds.k").detach()
    scaled = estimate.gradient["bonds.k"] @ k
    by_t = T * ensemble.temperature_derivative(several).value
    assert torch.allclose(scaled, -by_t, rtol=1e-11, atol=1e-14)
    energy = ensemble.estimate(PotentialEnergy(potential))
    scaled = energy.gradient["bonds.k"] @ k
    by_t = T * ensemble.temperature_derivative(PotentialEnergy(potential)).value
    assert float(scaled + by_t) == pytest.approx(float(energy.value), rel=1e-11)


def test_halves_agree():
    _, ensemble = oscillator(n_frames=4000)
    first, second = (half.estimate(lambda f: f.positions[:, 0] ** 2) for half in ensemble.halves())
    assert first.n_frames == second.n_frames == 2000
    for name in first.gradient:
        errors = first.gradient_standard_error[name], second.gradient_standard_error[name]
        difference = first.gradient[name] - second.gradient[name]
        assert bool((difference.abs() < 4 * torch.hypot(*errors)).all())
    short = Ensemble(ensemble.potential, ensemble.frames[:3], temperature=T)
    with pytest.raises(InvalidInputError, match="halves need at least 4"):
        short.halves()


# Precision, devices -------------------------------------------------------------------------------


def test_single_precision_potentials():
    double, single = bonded_potential(), bonded_potential(dtype=torch.float32)
    frames = chain_frames()
    results = []
    for potential in (double, single):
        ensemble = Ensemble(potential, frames, temperature=T)
        ensemble.average(gyration).backward()
        results.append((potential.get_parameter("bonds.k").grad, ensemble.estimate(gyration)))
    (exact, _), (rounded, estimate) = results
    assert rounded.dtype == torch.float32
    assert estimate.value.dtype == torch.float64
    assert torch.allclose(rounded.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
