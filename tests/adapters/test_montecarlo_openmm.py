"""Chains whose energies and trajectories are OpenMM's: `ContextEnergy` and `HybridMonteCarlo`."""

from __future__ import annotations

import math
from typing import Any

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError, WrongEnsembleError
from mdgraft._units import BAR_NM3
from mdgraft.ensembles import standard_error
from mdgraft.montecarlo import (
    HMC,
    MALA,
    ChainState,
    Displacement,
    InsertionDeletion,
    Metropolis,
    Mixture,
    PotentialByNumber,
    Recording,
    Sequence,
    Target,
    Torsion,
    Translation,
    Volume,
)
from mdgraft_openmm import ContextEnergy, HostPotential, HybridMonteCarlo, Sampler
from montecarlo_laws import F64, KT, TEMPERATURE, dihedral
from montecarlo_systems import (
    K,
    agree,
    by_chain,
    chain,
    diatomics,
    velocity_verlet,
    wells,
)
from openmm import mtsintegrator

# Energies ---------------------------------------------------------------------------------------


def test_energies_and_forces_are_those_of_the_graft() -> None:
    system, x, box = diatomics()
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    system.addForce(openmm.CMMotionRemover())
    before = openmm.XmlSerializer.serialize(system)
    energy, potential = ContextEnergy(system), mdgraft.graft(system)
    assert openmm.XmlSerializer.serialize(system) == before
    assert not any("Barostat" in type(f).__name__ for f in energy.system.getForces())
    rng = torch.Generator().manual_seed(0)
    state = ChainState(
        positions=x + 0.02 * torch.randn(3, *x.shape, generator=rng, dtype=F64),
        box=box * torch.tensor([1.0, 1.1, 1.2], dtype=F64)[:, None, None],
    )
    host, native = Target(energy, temperature=300.0), Target(potential, temperature=300.0)
    with torch.no_grad():
        torch.testing.assert_close(host.energies(state), native.energies(state))
        found, wanted = host.energies_and_forces(state), native.energies_and_forces(state)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-8, atol=1e-7)


def test_a_context_lends_its_platform_and_global_parameters() -> None:
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("a*x")
    force.addGlobalParameter("a", 1.0)
    force.addParticle(0, [])
    system.addForce(force)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU")
    )
    context.setParameter("a", 3.0)
    energy = ContextEnergy(context)
    state = ChainState(positions=torch.ones(2, 1, 3, dtype=F64))
    assert energy.platform == "CPU"
    assert energy(state).tolist() == pytest.approx([3.0, 3.0])
    move = HybridMonteCarlo(energy, 0.1, 2)
    assert dict(move._context.getParameters()) == {"a": 3.0}


def test_virtual_sites_are_placed() -> None:
    system = openmm.System()
    force = openmm.CustomExternalForce(f"0.5*{K}*(x^2+y^2+z^2)")
    bond = openmm.HarmonicBondForce()
    for mass in (10.0, 20.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.25, 0.75))
    force.addParticle(2, [])
    bond.addBond(0, 1, 0.1, 500.0)
    system.addForce(force)
    system.addForce(bond)
    energy = ContextEnergy(system)
    x = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [7.0, 7.0, 7.0]], dtype=F64)
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE),
        HybridMonteCarlo(energy, 0.05, 8),
        ChainState.replicate(8, positions=x),
        seed=2,
    )
    chains.burn_in(50)
    samples = chains.sample(250)
    sites = samples.positions[:, :, :2].mul(torch.tensor([[0.25], [0.75]], dtype=F64)).sum(dim=2)
    torch.testing.assert_close(samples.positions[:, :, 2], sites)
    agree(by_chain(samples, sites.square().mean(dim=-1)), (KT / K, 0.0))
    arm = (samples.positions[:, :, 1] - samples.positions[:, :, 0]).norm(dim=-1)
    grid = torch.linspace(1e-4, 0.6, 4000, dtype=F64)
    weights = grid.square() * (-0.5 * 500.0 / KT * (grid - 0.1).square()).exp()
    agree(by_chain(samples, arm), (float((weights * grid).sum() / weights.sum()), 0.0))


# Trajectories -----------------------------------------------------------------------------------


INTEGRATORS = {
    "leapfrog": lambda: None,
    "velocity Verlet": velocity_verlet,
    "multiple time steps": lambda: mtsintegrator.MTSIntegrator(0.001, [(0, 2)]),
}


@pytest.mark.parametrize("kind", INTEGRATORS)
def test_harmonic_wells(kind: str) -> None:
    energy = ContextEnergy(wells())
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE),
        # Long steps, so that much is rejected and every term of the acceptance matters.
        HybridMonteCarlo(energy, 0.11, 3, integrator=INTEGRATORS[kind]()),
        ChainState.replicate(8, positions=torch.full((4, 3), 0.02, dtype=F64)),
        seed=3,
    )
    chains.burn_in(60, adapt=False)
    samples = chains.sample(500)
    (counts,) = chains.statistics.values()
    assert 0.15 < float(counts.acceptance.mean()) < 0.95
    for axis, factor in enumerate((1, 2, 3)):
        squares = samples.positions[..., axis].square().mean(dim=-1)
        agree(by_chain(samples, squares), (KT / (factor * K), 0.0))


@pytest.mark.parametrize("kind", ["leapfrog", "velocity Verlet"])
@pytest.mark.parametrize(("pull", "step", "check_return"), [(300, 0.008, False), (0, 0.016, True)])
def test_constrained_chain_has_the_rigid_law(
    kind: str, pull: float, step: float, check_return: bool
) -> None:
    # Momenta are integrated out on the constraints: p(cos) ~ sqrt(det A M^-1 A^T), which for
    # masses M, m, M is sqrt((1/M + 1/m)^2 - cos^2 / m^2).
    system = openmm.System()
    for mass in (10.0, 1.0, 10.0):
        system.addParticle(mass)
    system.addConstraint(0, 1, 0.1)
    system.addConstraint(1, 2, 0.15)
    field = openmm.CustomExternalForce("4*x")
    field.addParticle(0, [])
    system.addForce(field)
    # Constant, but its forces along the constraints are large.
    along = openmm.CustomBondForce(f"{pull}*r")
    along.addBond(0, 1, [])
    along.addBond(1, 2, [])
    system.addForce(along)
    weak = openmm.CustomExternalForce("0.5*400*(x^2+y^2+z^2)")
    weak.addParticle(1, [])
    system.addForce(weak)
    energy = ContextEnergy(system)
    x = torch.tensor([[0.1, 0, 0], [0, 0, 0], [0, 0.15, 0]], dtype=F64)
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE),
        HybridMonteCarlo(
            energy, step, 9, integrator=INTEGRATORS[kind](), check_return=check_return
        ),
        ChainState.replicate(16, positions=x),
        seed=5,
    )
    chains.burn_in(40, adapt=False)
    samples = chains.sample(450, record=Recording())
    (counts,) = chains.statistics.values()
    assert float(counts.acceptance.mean()) > 0.7
    if not check_return:
        # There and back are equally frequent, so accepted changes of the total energy cancel.
        log_alpha = torch.stack([u.transition.log_alpha for u in samples.updates])
        finite = log_alpha.clamp(min=-100.0)
        agree(by_chain(samples, finite.clamp(max=0.0).exp() * finite), (0.0, 0.0))
    p = samples.positions
    a, b = p[:, :, 0] - p[:, :, 1], p[:, :, 2] - p[:, :, 1]
    torch.testing.assert_close(
        a.norm(dim=-1), torch.full(a.shape[:2], 0.1, dtype=F64), rtol=1e-6, atol=0
    )
    cosine = (a * b).sum(dim=-1) / (0.1 * 0.15)
    c = torch.linspace(-1, 1, 20001, dtype=F64)
    weights = (1.1**2 - c.square()).sqrt()
    exact = float((weights * c.square()).sum() / weights.sum())
    agree(by_chain(samples, cosine.square()), (exact, 0.0))
    agree(by_chain(samples, cosine), (0.0, 0.0))
    # What flexible bonds or no projection of velocities would give.
    assert abs(exact - 1 / 3) > 5 * by_chain(samples, cosine.square())[1]
    # The end of the first bond in the field: the middle one's well is not tilted by rotations.
    strength = 4 * 0.1 / KT
    agree(by_chain(samples, a[..., 0] / 0.1), (-(1 / math.tanh(strength) - 1 / strength), 0.0))


def test_adapted_trajectories_of_a_rigid_pair_have_its_law() -> None:
    # A dipole in a field, with one end in a well: at longer steps, which would be accepted as
    # often as asked for, constraints have solutions that lead elsewhere.
    system = openmm.System()
    field = openmm.CustomExternalForce("40*q*z+100*(1+q)/2*(x^2+y^2+z^2)")
    field.addPerParticleParameter("q")
    for i, (mass, q) in enumerate(((3.0, 1.0), (5.0, -1.0))):
        system.addParticle(mass)
        field.addParticle(i, [q])
    system.addForce(field)
    system.addConstraint(0, 1, 0.1)
    energy = ContextEnergy(system)
    x = torch.tensor([[0.0, 0, 0], [0.1, 0, 0]], dtype=F64)
    state = ChainState.replicate(100, positions=x)
    target = Target(energy, temperature=TEMPERATURE)
    chains = Metropolis(target, HybridMonteCarlo(energy, 0.01, 10), state, seed=3)
    chains.burn_in(40)
    speed = math.sqrt(KT * (1 / 3.0 + 1 / 5.0))
    assert chains.scales["HybridMonteCarlo"] == pytest.approx(0.2 * 0.1 / speed)
    found = torch.stack([s.positions for s in chains.sample(40).states])
    cosines = (found[:, :, 1, 2] - found[:, :, 0, 2]).mean(dim=0) / 0.1
    a = 4.0 / KT
    error = float(cosines.std()) / 10.0
    assert abs(float(cosines.mean()) - (1 / math.tanh(a) - 1 / a)) < 4 * error
    free = HybridMonteCarlo(energy, 0.01, 10, check_return=True)
    chains = Metropolis(target, free, state[:4], seed=3)
    chains.burn_in(30)
    assert chains.scales["HybridMonteCarlo"] > 0.2 * 0.1 / speed


def test_trajectories_come_back() -> None:
    system, x = chain(constrained=True)
    energy = ContextEnergy(system)
    move = HybridMonteCarlo(energy, 0.004, 25)
    target = Target(energy, temperature=TEMPERATURE)
    state = ChainState(positions=x[None])
    move.check(state, target)
    noise = move.draw(state, torch.Generator().manual_seed(1))
    velocities = move._velocities(noise, target)[0]
    first = energy.energies_and_forces(state)[1][0].numpy()
    there = move._trajectory(x.numpy(), None, velocities, first, 0.004)
    assert there is not None
    # Turned around at the end: velocities are only known inside, so take those of the Context.
    ended = np.array(move._context.getState(velocities=True).getVelocities(asNumpy=True)._value)
    back = move._trajectory(there[0], None, -ended, there[2], 0.004)
    assert back is not None
    assert np.abs(there[0] - x.numpy()).max() > 1e-2
    assert np.abs(back[0] - x.numpy()).max() < 1e-7
    assert back[3] == pytest.approx(-there[3], abs=1e-5)


def test_moves_of_every_kind_agree_on_a_chain_molecule() -> None:
    system, x = chain()
    energy = ContextEnergy(system)
    native = mdgraft.graft(system)
    bonds = [(i, i + 1) for i in range(4)]
    results: dict[str, list[tuple[float, float]]] = {}
    runs: dict[str, tuple[Any, Any, int]] = {
        "host trajectories": (energy, HybridMonteCarlo(energy, 0.004, 12), 200),
        "torch trajectories": (native, HMC(0.004, 10, mass=14.0), 120),
        "torsions and displacements": (
            energy,
            Sequence([Torsion(1.5, bonds), Displacement(0.01), Displacement(0.006, together=True)]),
            700,
        ),
        "host trajectories, native energy": (native, HybridMonteCarlo(energy, 0.004, 12), 200),
    }
    for name, (which, moves, n_samples) in runs.items():
        chains = Metropolis(
            Target(which, temperature=TEMPERATURE),
            moves,
            ChainState.replicate(16, positions=x),
            seed=7,
        )
        chains.burn_in(150)
        samples = chains.sample(n_samples)
        p = samples.positions.detach()
        phi = dihedral(p[:, :, :4].reshape(-1, 4, 3)).reshape(p.shape[:2])
        ends = (p[:, :, 4] - p[:, :, 0]).norm(dim=-1)
        results[name] = [
            by_chain(samples, values)
            for values in (samples.energies.detach(), phi.cos(), (3 * phi).cos(), ends)
        ]
    for quantity in zip(*results.values(), strict=True):
        agree(*quantity)


def test_volume_moves_agree_with_the_barostat() -> None:
    system, x, box = diatomics(27, 3.4)
    pressure = 30.0
    energy = ContextEnergy(system)
    molecules = [[2 * i, 2 * i + 1] for i in range(27)]
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE, pressure=pressure),
        Sequence(
            [HybridMonteCarlo(energy, 0.005, 15), Volume(0.3, molecules=molecules, smallest=0.8)]
        ),
        ChainState.replicate(4, positions=x, box=box),
        seed=4,
    )
    chains.burn_in(60)
    samples = chains.sample(250)
    assert samples.ensemble == "NPT" and samples.box is not None
    volume = torch.linalg.det(samples.box)
    frames = Sampler(
        system,
        positions=x,
        box=box,
        temperature=TEMPERATURE,
        pressure=pressure,
        seed=3,
        platform="Reference",
        timestep=0.004,
        interval=0.4,
        equilibration=10.0,
        barostat_frequency=10,
        block_frames=350,
    ).sample(350)
    assert frames.box is not None
    host = torch.linalg.det(frames.box)
    agree(by_chain(samples, volume), (float(host.mean()), float(standard_error(host))))
    # Attraction and repulsion do not cancel: the ideal gas would be elsewhere.
    ideal = 28 * KT / (pressure * BAR_NM3)
    assert abs(float(host.mean()) - ideal) > 4 * float(standard_error(host))


def test_host_forces_serve_other_moves() -> None:
    energy = ContextEnergy(wells())
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE),
        Mixture([MALA(0.03), HMC(0.05, 3, mass=10.0), HybridMonteCarlo(energy, 0.1, 3)]),
        ChainState.replicate(8, positions=torch.zeros(4, 3, dtype=F64)),
        seed=3,
    )
    chains.burn_in(150)
    samples = chains.sample(800)
    agree(by_chain(samples, samples.energies), (6 * KT, 0.0))
    for counts in chains.statistics.values():
        assert float(counts.acceptances.sum()) > 0


def test_translations_by_any_potential_of_the_host() -> None:
    system = wells(2)
    state = ChainState.replicate(4, positions=torch.full((2, 3), 0.02, dtype=F64))
    runs = [
        Metropolis(
            Target(energy, temperature=TEMPERATURE), Translation(0.05, [[0], [1]]), state, seed=1
        ).sample(20)
        for energy in (ContextEnergy(system), HostPotential(system), mdgraft.graft(system))
    ]
    for other in runs[1:]:
        torch.testing.assert_close(runs[0].positions, other.positions.detach())


# Numbers that vary ------------------------------------------------------------------------------


def soft_gas(n: int, fixed: int = 0) -> openmm.System:
    """Particles with a soft repulsion in a periodic box of 1 nm."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors([1, 0, 0], [0, 1, 0], [0, 0, 1])
    force = openmm.CustomNonbondedForce("15*(1-r/0.4)^2*step(0.4-r)")
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.4)
    for _ in range(n + fixed):
        system.addParticle(1.0)
        force.addParticle([])
    system.addForce(force)
    return system


def test_grand_canonical_chains_of_host_potentials() -> None:
    # <n> and its fluctuation from the series of configuration integrals, each by plain sampling.
    z, places = 2.0, 12
    energy = PotentialByNumber(lambda n: mdgraft.graft(soft_gas(n)), [[i] for i in range(places)])
    rng = torch.Generator().manual_seed(5)
    weights, errors = [1.0], [0.0]
    for n in range(1, 9):
        x = torch.rand(4_000, n, 3, generator=rng, dtype=F64)
        with torch.no_grad():
            factors = (-energy.potential(n)(x, torch.eye(3, dtype=F64)) / KT).exp()
        weights.append(z**n / math.factorial(n) * float(factors.mean()))
        errors.append(z**n / math.factorial(n) * float(factors.std()) / math.sqrt(4_000))
    law = torch.tensor(weights, dtype=F64) / sum(weights)
    numbers = torch.arange(9, dtype=F64)
    exact = float((law * numbers).sum())
    doubt = math.sqrt(sum((e * (k - exact) / sum(weights)) ** 2 for k, e in enumerate(errors)))
    state = ChainState.replicate(
        64,
        positions=torch.zeros(places, 3, dtype=F64),
        box=torch.eye(3, dtype=F64),
        present=torch.zeros(places, dtype=torch.bool),
    )
    chains = Metropolis(
        Target(energy, temperature=TEMPERATURE, log_activity=math.log(z)),
        Mixture([InsertionDeletion(), Translation(0.3, [[i] for i in range(places)])]),
        state,
        seed=6,
    )
    chains.burn_in(50)
    samples = chains.sample(150)
    agree(by_chain(samples, samples.numbers.double()), (exact, doubt))
    assert exact < z - 0.2  # The ideal gas would have z.
    for k in range(4):
        share = (samples.numbers == k).double()
        agree(by_chain(samples, share), (float(law[k]), errors[k] / sum(weights) + 1e-3))


def test_molecules_beside_fixed_particles() -> None:
    energy = PotentialByNumber(
        lambda n: mdgraft.graft(soft_gas(n, fixed=1)), [[1], [2], [3]], fixed=[0]
    )
    x = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    box = torch.eye(3, dtype=F64).expand(2, 3, 3).clone()
    present = torch.tensor([[False, True, True], [False, False, False]])
    found = energy(ChainState(positions=x, box=box, present=present))
    with torch.no_grad():
        wanted = mdgraft.graft(soft_gas(3))(x[0, [0, 2, 3]], box[0])
    torch.testing.assert_close(found[0], wanted)
    assert float(found[1]) == 0.0 and sorted(energy.potentials) == [0, 2]
    with pytest.raises(InvalidInputError, match=r"wanted \(chains, 3\) booleans"):
        energy(ChainState(positions=x))
    with pytest.raises(InvalidInputError, match="gave 3 for 1 molecules, wanted a Potential of 1"):
        PotentialByNumber(lambda n: mdgraft.graft(soft_gas(3)), [[0]]).potential(1)
    with pytest.raises(InvalidInputError, match="differ in size"):
        PotentialByNumber(lambda n: mdgraft.graft(soft_gas(n)), [[0], [1, 2]])


# Virtual sites ----------------------------------------------------------------------------------


def site_in_a_well() -> openmm.System:
    """Two particles on a spring; the site between them and the first feel a well."""
    system = openmm.System()
    for mass in (16.0, 4.0, 0.0):
        system.addParticle(mass)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.4, 0.6))
    spring, well = openmm.HarmonicBondForce(), openmm.CustomExternalForce("100*(x^2+y^2+z^2)")
    spring.addBond(0, 1, 0.0, 800.0)
    for i in (0, 2):
        well.addParticle(i, [])
    for force in (spring, well):
        system.addForce(force)
    return system


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(
    "move", [Displacement(0.06, together=True), MALA(0.06), HMC(0.05, 3)], ids=lambda m: m.name
)
def test_samples_hold_virtual_sites_where_they_belong(move: Any, host: bool) -> None:
    system = site_in_a_well()
    energy: Any = ContextEnergy(system) if host else mdgraft.graft(system)
    rng = torch.Generator().manual_seed(1)
    x = 0.3 * torch.rand(3, 3, generator=rng, dtype=F64)
    start = ChainState.replicate(60 if host else 400, positions=x)
    sampler = Metropolis(Target(energy, temperature=TEMPERATURE), move, start, seed=2)
    sampler.burn_in(150)
    states = sampler.sample(40, stride=2).states
    x = torch.stack([state.positions for state in states])
    torch.testing.assert_close(x[..., 2, :], 0.4 * x[..., 0, :] + 0.6 * x[..., 1, :])
    # A Gaussian law: U = x A x / 2 in each direction, with the site s = (0.4, 0.6) . x.
    site = torch.tensor([0.4, 0.6], dtype=F64)
    first, spring = torch.tensor([1.0, 0], dtype=F64), torch.tensor([1.0, -1], dtype=F64)
    hessian = 200.0 * (first.outer(first) + site.outer(site)) + 800.0 * spring.outer(spring)
    wanted = KT * float(site @ torch.linalg.inv(hessian) @ site)
    means = x[..., 2, :].square().mean(dim=(0, 2))
    assert abs(float(means.mean()) - wanted) < 4.0 * float(means.std()) / len(means) ** 0.5


def test_forces_of_the_host_are_zero_on_virtual_sites() -> None:
    system = site_in_a_well()
    x = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.06, 0, 0]], dtype=F64)
    state = ChainState.replicate(1, positions=x)
    _, forces = ContextEnergy(system).energies_and_forces(state)
    torch.testing.assert_close(forces[0], mdgraft.graft(system).forces(x).detach())


def test_volume_moves_do_not_take_a_virtual_site_for_a_molecule() -> None:
    target = Target(mdgraft.graft(site_in_a_well()), temperature=300.0, pressure=1.0)
    start = ChainState.replicate(
        2, positions=torch.zeros(3, 3, dtype=F64), box=2.0 * torch.eye(3, dtype=F64)
    )
    with pytest.raises(InvalidInputError, match=r"particles \[2\] is a virtual site alone"):
        Metropolis(target, Volume(0.1), start)
    Metropolis(target, Volume(0.1, molecules=[[0, 1, 2]]), start)


def test_trajectories_under_some_of_the_forces_are_refused() -> None:
    integrator = openmm.VerletIntegrator(0.001)
    integrator.setIntegrationForceGroups({1})
    with pytest.raises(WrongEnsembleError, match="applies only the force groups 0x2"):
        HybridMonteCarlo(ContextEnergy(site_in_a_well()), 0.001, 2, integrator=integrator)
