"""Exact identities on trajectories that OpenMM sampled: scaling, charges, Yvon, agreement."""

from __future__ import annotations

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft import Frames, Potential
from mdgraft._units import BOLTZMANN
from mdgraft.ensembles import Ensemble, PotentialEnergy, Stack, Volume, per_frame_gradients
from openmm import app, unit

EXACT = 1e-8
#: The power of an energy scale that each parameter stands for: U(scale^p theta) = scale U.
ENERGY_SCALE = {
    "k": 1.0,
    "epsilon": 1.0,
    "charge": 0.5,
    "exception_epsilon": 1.0,
    "exception_charge_product": 1.0,
}


def first_shell(frames: Frames) -> torch.Tensor:
    """A structural quantity: how near the others are to particle 0, smoothly counted."""
    assert frames.box is not None
    lengths = frames.box.diagonal(dim1=-2, dim2=-1)[:, None]
    d = frames.positions[:, 1:] - frames.positions[:, :1]
    d = d - lengths * torch.round(d / lengths)
    return torch.exp(-((d.square().sum(dim=-1)) / 0.3**2)).sum(dim=1)


STRUCTURE = Stack((first_shell, Volume()))


def lattice(n, spacing, seed):
    """Cubic lattice with a little noise [nm]."""
    grid = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return spacing * (grid + 0.5) + np.random.default_rng(seed).normal(0, 0.005, grid.shape)


@pytest.fixture(scope="module")
def lennard_jones():
    """125 argon atoms: an unswitched cutoff and no tail, so that scaling laws are exact."""
    n, spacing = 5, 0.40
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*(np.eye(3) * n * spacing))
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(force.CutoffPeriodic)
    force.setCutoffDistance(0.75)
    force.setUseDispersionCorrection(False)
    for i in range(n**3):
        system.addParticle(39.95)
        # Two kinds, so that mixed pairs are tested too.
        force.addParticle(0.0, *((0.34, 0.997) if i % 2 else (0.32, 0.8)))
    system.addForce(force)
    return system, lattice(n, spacing, 0)


@pytest.fixture(scope="module")
def water():
    """64 flexible water molecules with PME."""
    n, spacing = 4, 0.3105
    topology = app.Topology()
    chain = topology.addChain()
    centers = lattice(n, spacing, 1)
    rng = np.random.default_rng(2)
    positions = []
    geometry = np.array([[0.0, 0.0, 0.0], [0.09572, 0.0, 0.0], [-0.023999, 0.092663, 0.0]])
    for center in centers:
        residue = topology.addResidue("HOH", chain)
        o, *h = [
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
            for name in ("O", "H1", "H2")
        ]
        for hydrogen in h:
            topology.addBond(o, hydrogen)
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        positions.append(center + geometry @ rotation)
    topology.setPeriodicBoxVectors(np.eye(3) * n * spacing * unit.nanometer)
    system = app.ForceField("tip3p.xml").createSystem(
        topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.6 * unit.nanometer,
        rigidWater=False,
        removeCMMotion=False,
    )
    return system, np.concatenate(positions)


def run(system, positions, *, n_frames, interval, temperature, pressure=None, seed=1):
    sampler = mdgraft_openmm.Sampler(
        system,
        positions=positions,
        temperature=temperature,
        pressure=pressure,
        seed=seed,
        interval=interval,
        equilibration=1.0,
        timestep=0.001,
    )
    return sampler.sample(n_frames)


@pytest.fixture(scope="module")
def lennard_jones_frames(lennard_jones):
    return run(*lennard_jones, n_frames=24, interval=0.1, temperature=120.0, pressure=50.0)


@pytest.fixture(scope="module")
def water_frames(water):
    return run(*water, n_frames=8, interval=0.05, temperature=300.0)


def energy_scale_derivative(potential: Potential, gradient) -> torch.Tensor:
    """``sum_i p_i theta_i d/dtheta_i`` over all energy scales."""
    total = torch.zeros(())
    for name, part in gradient.items():
        power = ENERGY_SCALE.get(name.rpartition(".")[-1], 0.0)
        theta = potential.get_parameter(name).detach()
        dims = tuple(range(part.ndim - theta.ndim, part.ndim))
        total = total + power * (part * theta).sum(dim=dims)
    return total


def close(first, second, scale):
    """Agreement to `EXACT` of the size of the terms that cancel."""
    return bool(((first - second).abs() <= EXACT * scale.abs()).all())


def scale_only(potential: Potential) -> list[str]:
    return [
        name for name, _ in potential.named_parameters() if name.rpartition(".")[-1] in ENERGY_SCALE
    ]


def test_energy_scales_temperature_and_pressure_cancel(lennard_jones, lennard_jones_frames):
    """Scaling epsilon, T and P together changes no structure."""
    potential = mdgraft.graft(lennard_jones[0])
    ensemble = Ensemble(potential, lennard_jones_frames, temperature=120.0, pressure=50.0)
    estimate = ensemble.estimate(STRUCTURE, scale_only(potential))
    by_scale = energy_scale_derivative(potential, estimate.gradient)
    by_t = 120.0 * ensemble.temperature_derivative(STRUCTURE).value
    by_p = 50.0 * ensemble.pressure_derivative(STRUCTURE).value
    assert float(by_scale.abs().min()) > 0
    assert close(by_scale, -(by_t + by_p), by_scale)


def test_energy_scales_of_water_give_the_energy(water, water_frames):
    potential = mdgraft.graft(water[0])
    ensemble = Ensemble(potential, water_frames, temperature=300.0)
    names = scale_only(potential)
    gradients = per_frame_gradients(potential, water_frames, names)
    weights = torch.cat(
        [
            ENERGY_SCALE[name.rpartition(".")[-1]] * potential.get_parameter(name).reshape(-1)
            for name in names
        ]
    ).detach()
    energies = ensemble.generating_energies
    size = (gradients * weights).abs().sum(dim=1)
    # Frame by frame, hence also for the averages.
    assert close(gradients @ weights, energies, size)
    estimate = ensemble.estimate(first_shell, names)
    by_scale = energy_scale_derivative(potential, estimate.gradient)
    by_t = 300.0 * ensemble.temperature_derivative(first_shell).value
    assert close(by_scale, -by_t, by_scale)
    energy = ensemble.estimate(PotentialEnergy(potential), names)
    by_scale = energy_scale_derivative(potential, energy.gradient)
    by_t = 300.0 * ensemble.temperature_derivative(PotentialEnergy(potential)).value
    assert close(by_scale + by_t, energy.value, size.max())


def test_sigma_scales_like_the_coordinates(lennard_jones, lennard_jones_frames):
    """``sum sigma dU/dsigma = -sum r dU/dr``, the virial, frame by frame."""
    potential = mdgraft.graft(lennard_jones[0])
    sigma = potential.get_parameter("NonbondedForce.sigma").detach()
    frames = lennard_jones_frames
    by_sigma = per_frame_gradients(potential, frames, ["NonbondedForce.sigma"]) @ sigma
    stretch = torch.ones(len(frames), dtype=torch.float64, requires_grad=True)
    factor = stretch[:, None, None]
    energy = potential(frames.positions * factor, frames.box * factor)
    (by_size,) = torch.autograd.grad(energy.sum(), [stretch])
    assert close(by_sigma, -by_size, by_size.abs().max())


def test_charges_give_twice_the_electrostatic_energy(water, water_frames):
    potential = mdgraft.graft(water[0])
    name = "NonbondedForce.charge"
    charge = potential.get_parameter(name)
    by_charge = per_frame_gradients(potential, water_frames, [name]) @ charge.detach()
    with torch.no_grad():
        full = potential(water_frames.positions, water_frames.box)
        kept = charge.clone()
        charge.zero_()
        bare = potential(water_frames.positions, water_frames.box)
        charge.copy_(kept)
    assert close(by_charge, 2 * (full - bare), full - bare)


def test_a_constant_shift_of_the_energy_changes_nothing(lennard_jones, lennard_jones_frames):
    ensemble = Ensemble(
        mdgraft.graft(lennard_jones[0]),
        lennard_jones_frames,
        temperature=120.0,
        pressure=50.0,
    )
    shifted = Ensemble(
        ensemble.potential,
        lennard_jones_frames,
        temperature=120.0,
        pressure=50.0,
        generating_energies=ensemble.generating_energies - 1.0e4,
    )
    first, second = ensemble.estimate(STRUCTURE, []), shifted.estimate(STRUCTURE, [])
    assert torch.allclose(first.value, second.value, rtol=EXACT)


def test_graph_and_estimate_give_the_same_gradient(lennard_jones, lennard_jones_frames):
    potential = mdgraft.graft(lennard_jones[0])
    potential.freeze("*")
    potential.tie(
        "sigma",
        {"NonbondedForce.sigma": (None, np.where(np.arange(125) % 2, 0.34, 0.32))},
        value=1.0,
    )
    ensemble = Ensemble(
        potential, lennard_jones_frames, temperature=120.0, pressure=50.0, batch_size=5
    )
    estimate = ensemble.estimate(Volume())
    ensemble.average(Volume()).backward()
    exact = potential.get_parameter("tied.sigma").grad
    assert list(estimate.gradient) == ["tied.sigma"]
    assert torch.allclose(estimate.gradient["tied.sigma"], exact, rtol=EXACT)
    # Larger atoms push the box apart.
    assert float(exact) > 0


def test_yvon_identity_holds_within_its_error(lennard_jones):
    """``<div w> = beta <w . grad U>``: neighbours closer than 0.5 nm are pushed apart by w."""
    system, positions = lennard_jones
    frames = run(system, positions, n_frames=100, interval=0.1, temperature=120.0, seed=3)
    assert frames.sampled == "NVT"
    potential = mdgraft.graft(system)
    ensemble = Ensemble(potential, frames, temperature=120.0)
    kt = BOLTZMANN * 120.0

    def both_sides(batch: Frames) -> torch.Tensor:
        assert batch.box is not None
        lengths = batch.box.diagonal(dim1=-2, dim2=-1)[:, None, None]
        d = batch.positions[:, :, None] - batch.positions[:, None]
        d = d - lengths * torch.round(d / lengths)
        s = d.square().sum(dim=-1) / 0.5**2
        # w_i = sum_j (1 - s)^2 d_ij, so div_i w_i = sum_j 3 (1 - s)^2 - 4 s (1 - s).
        inside = (s < 1) & (s > 0)
        field = torch.where(inside, (1 - s) ** 2, 0.0)[..., None] * d
        divergence = torch.where(inside, 3 * (1 - s) ** 2 - 4 * s * (1 - s), 0.0).sum(dim=(1, 2))
        forces = potential.forces(batch.positions, batch.box)
        work = -(forces * field.sum(dim=2)).sum(dim=(1, 2))
        return torch.stack([divergence, work / kt], dim=-1)

    sides = ensemble.estimate(both_sides, [])
    difference = ensemble.estimate(both_sides, [], function=lambda a: a[0] - a[1])
    assert abs(float(difference.value)) < 4.5 * float(difference.standard_error)
    # The test has power: the error is a small part of either side.
    assert float(difference.standard_error) < 0.1 * abs(float(sides.value[0]))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1.0 * unit.bar, 1.0),
        (1.0 * unit.atmosphere, 1.01325),
        (101325.0 * unit.pascal, 1.01325),
        (2, 2.0),
    ],
)
def test_quantities_are_converted(given, wanted, lennard_jones, lennard_jones_frames):
    ensemble = Ensemble(
        mdgraft.graft(lennard_jones[0]),
        lennard_jones_frames[:2],
        temperature=120.0 * unit.kelvin,
        pressure=given,
    )
    assert ensemble.pressure == pytest.approx(wanted, rel=1e-12)
    assert ensemble.temperature == 120.0
