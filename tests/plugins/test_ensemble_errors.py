"""What an ensemble refuses: lost overlap, wrong states, bad observables."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from mdgraft import (
    Frames,
    InsufficientOverlapError,
    InvalidInputError,
    MissingBoxError,
    WrongEnsembleError,
)
from mdgraft.ensembles import (
    Covariance,
    Density,
    Ensemble,
    Enthalpy,
    PotentialEnergy,
    Stack,
    Volume,
)
from mdgraft.testsystems import HarmonicOscillators
from openmm import unit

T = 300.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def first_coordinate(frames):
    return frames.positions[:, 0, 0]


def oscillator(n_particles=1, n_frames=3000, correlation=0.6, seed=0, **options):
    system = HarmonicOscillators(n_particles, center=0.1, k=700.0, temperature=T)
    frames = system.sample(n_frames, correlation=correlation, generator=seeded(seed))
    return system, Ensemble(system.potential, frames, temperature=T, **options)


def set_parameter(potential, name, value):
    with torch.no_grad():
        potential.get_parameter(name).copy_(torch.as_tensor(value))


# Overlap ------------------------------------------------------------------------------------------


def test_lost_overlap_raises_and_can_be_inspected():
    system, ensemble = oscillator(n_particles=10, n_frames=500)
    set_parameter(system.potential, "wells.k", 3.0 * 700.0)
    overlap = ensemble.overlap()
    assert not overlap.ok
    assert overlap.effective_sample_size < 50
    for call in (ensemble.average, ensemble.estimate, ensemble.temperature_derivative):
        with pytest.raises(
            InsufficientOverlapError, match=r"effective sample size .* of 500 .*sample new"
        ):
            call(lambda f: f.positions[:, 0, 0])
    set_parameter(system.potential, "wells.k", 700.0)
    assert ensemble.overlap().ok
    assert ensemble.overlap().effective_sample_size == 500.0


def test_heavy_tails_raise_although_the_sample_size_is_large():
    system, ensemble = oscillator(n_particles=2, n_frames=2000, gradient=Covariance(min_ess=0.0))
    set_parameter(system.potential, "wells.k", 0.3 * 700.0)
    assert ensemble.overlap().pareto_k > 0.7
    with pytest.raises(InsufficientOverlapError, match="Pareto k"):
        ensemble.average(first_coordinate)
    lenient = dataclasses.replace(ensemble.gradient, max_pareto_k=math.inf)
    ensemble.gradient = lenient
    ensemble.average(first_coordinate)


def test_thresholds_are_checked():
    with pytest.raises(InvalidInputError, match="min_ess: got 2"):
        Covariance(min_ess=2)
    with pytest.raises(InvalidInputError, match="max_pareto_k: got 0"):
        Covariance(max_pareto_k=0)
    system, _ = oscillator(n_frames=10)
    frames = system.sample(1000, generator=seeded(6))
    strict = Ensemble(system.potential, frames, temperature=T, gradient=Covariance(min_ess=0.999))
    set_parameter(system.potential, "wells.k", 730.0)
    with pytest.raises(InsufficientOverlapError, match="wanted at least 999"):
        strict.average(first_coordinate)


def test_generating_energies_can_be_given():
    system, ensemble = oscillator(n_frames=50)
    set_parameter(system.potential, "wells.k", 710.0)
    resumed = Ensemble(
        system.potential,
        ensemble.frames,
        temperature=T,
        generating_energies=ensemble.generating_energies,
    )
    assert torch.equal(resumed.average(first_coordinate), ensemble.average(first_coordinate))
    assert ensemble.weights().sum().item() == pytest.approx(1.0)


# Bad input ----------------------------------------------------------------------------------------

FRAMES = Frames(positions=torch.zeros(5, 1, 3, dtype=torch.float64))
BOXED = dataclasses.replace(FRAMES, box=torch.eye(3, dtype=torch.float64).expand(5, 3, 3))


@pytest.mark.parametrize(
    ("frames", "options", "error", "message"),
    [
        (FRAMES, {"temperature": 0.0}, InvalidInputError, "temperature: got 0"),
        (FRAMES, {"temperature": math.nan}, InvalidInputError, "temperature: got nan"),
        (FRAMES, {"temperature": "warm"}, InvalidInputError, "temperature: got 'warm'"),
        (FRAMES, {"batch_size": 0}, InvalidInputError, "batch_size: got 0"),
        (FRAMES[:1], {}, InvalidInputError, "frames: got 1"),
        (FRAMES, {"pressure": 1.0}, MissingBoxError, "no box, but a pressure"),
        (BOXED, {"pressure": math.inf}, InvalidInputError, "pressure: got inf"),
        (
            dataclasses.replace(BOXED, sampled="NPT"),
            {},
            WrongEnsembleError,
            "pass pressure= in bar",
        ),
        (
            dataclasses.replace(BOXED, sampled="NVT"),
            {"pressure": 1.0},
            WrongEnsembleError,
            r"constant volume \(NVT\)",
        ),
        (dataclasses.replace(FRAMES, sampled="NVE"), {}, WrongEnsembleError, "NVE"),
        (
            Frames(positions=torch.zeros(5, 2, 3)),
            {},
            InvalidInputError,
            "have 2 particles, the potential 1",
        ),
        (
            FRAMES,
            {"generating_energies": torch.zeros(4)},
            InvalidInputError,
            "generating_energies: got shape",
        ),
        (
            FRAMES,
            {"generating_energies": torch.tensor([0.0, math.inf, 0.0, 0.0, 0.0])},
            InvalidInputError,
            "not finite, the first is frame 1",
        ),
        (FRAMES, {"temperature": 300.0 * unit.bar}, InvalidInputError, "temperature: .*kelvin"),
        (BOXED, {"pressure": 1.0 * unit.kelvin}, InvalidInputError, "pressure: .*bar"),
        (FRAMES, {"gradient": "covariance"}, InvalidInputError, "gradient: got str"),
        (FRAMES.positions, {}, InvalidInputError, "frames: got Tensor, wanted a mdgraft.Frames"),
    ],
)
def test_bad_states_are_refused(frames, options, error, message):
    potential = HarmonicOscillators(1, k=1.0).potential
    with pytest.raises(error, match=message):
        Ensemble(potential, frames, **{"temperature": T, **options})


@pytest.mark.parametrize(
    ("observable", "message"),
    [
        (lambda f: f.positions.mean(), r"observable: returned shape \(\)"),
        (lambda f: f.positions[0, 0], r"observable: returned shape \(3,\)"),
        (lambda f: 1.0, "observable: returned float"),
        (lambda f: f.positions[:, 0, 0] + 0j, "real numbers"),
        (lambda f: f.positions[:, 0, 0] * math.nan, "NaN or infinity"),
    ],
)
def test_bad_observables_are_refused(observable, message):
    _, ensemble = oscillator(n_frames=20)
    for call in (ensemble.average, ensemble.estimate):
        with pytest.raises(InvalidInputError, match=message):
            call(observable)


def test_bad_requests_are_refused():
    _, ensemble = oscillator(n_frames=20)
    with pytest.raises(InvalidInputError, match="matches no parameter"):
        ensemble.estimate(first_coordinate, ["wells.depth"])
    with pytest.raises(WrongEnsembleError, match="pressure: is None"):
        ensemble.pressure_derivative(first_coordinate)
    with pytest.raises(MissingBoxError, match="which Volume needs"):
        ensemble.average(Volume())
    boxed = Ensemble(ensemble.potential, BOXED, temperature=T, pressure=1.0)
    with pytest.raises(WrongEnsembleError, match="all have the same volume"):
        boxed.pressure_derivative(Volume())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Density(0.0), "total_mass: got 0.0"),
        (lambda p: PotentialEnergy(p, n_molecules=0), "n_molecules: got 0"),
        (lambda p: Enthalpy(p, math.nan), "pressure: got nan"),
        (lambda p: Stack(()), "observables: got none"),
    ],
)
def test_bad_observable_arguments_are_refused(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make(HarmonicOscillators(1, k=1.0).potential)


@pytest.mark.parametrize(
    "positions", [np.zeros((2, 1, 3)), [[[0.0, 0.0, 0.0]]], torch.zeros(2, 1, 3, dtype=torch.int64)]
)
def test_frames_hold_floating_point_tensors(positions):
    with pytest.raises(InvalidInputError, match="positions: got .*wanted a tensor of floating"):
        Frames(positions=positions)


def test_foreign_files_hold_no_frames(tmp_path):
    foreign, text, torn = (tmp_path / name for name in ("foreign.npz", "text.npz", "torn.npz"))
    np.savez(foreign, other=np.zeros(3))
    text.write_text("nothing")
    FRAMES.save(torn)
    assert torch.equal(Frames.load(torn).positions, FRAMES.positions)
    torn.write_bytes(torn.read_bytes()[:-50])
    for path in (foreign, text, torn):
        with pytest.raises(InvalidInputError, match=r"does not hold what Frames\.save writes"):
            Frames.load(path)


def test_infinite_energies_are_refused():
    system, ensemble = oscillator(n_frames=20)
    set_parameter(system.potential, "wells.k", math.inf)
    with pytest.raises(InvalidInputError, match="energy that is not finite"):
        ensemble.average(first_coordinate)
