"""Estimators of Monte Carlo gradients on alanine dipeptide, with the energies of OpenMM."""

from __future__ import annotations

import math

import mdgraft
import mdgraft_openmm
import openmm
import pytest
import torch
from mdgraft.montecarlo import MALA, ChainState, Metropolis, Target, Torsion
from mdgraft.montecarlo.comparison import compare
from mdgraft.montecarlo.gradients import (
    Coupled,
    Covariance,
    RaoBlackwell,
    Reparameterized,
    Score,
    SquaredJump,
)
from openmm import app
from test_whole_systems import dipeptide

#: The four atoms of psi.
PSI = [6, 8, 14, 16]
PHI_BOND, PSI_BOND = (6, 8), (8, 14)


def grafted(system, make=mdgraft.graft):
    """A potential with two numbers to differentiate in, the strengths of psi and of charges."""
    potential = make(system)
    (torsions,) = (f for f in system.getForces() if isinstance(f, openmm.PeriodicTorsionForce))
    about = [
        i
        for i in range(torsions.getNumTorsions())
        if set(torsions.getTorsionParameters(i)[1:3]) == set(PSI_BOND)
    ]
    values = {name: value.detach().clone() for name, value in potential.values().items()}
    potential.freeze("*")
    k, charge = values["PeriodicTorsionForce.k"], values["NonbondedForce.charge"]
    potential.tie("psi", {"PeriodicTorsionForce.k": (about, k[about])}, value=1.0)
    potential.tie("charge", {"NonbondedForce.charge": (None, charge)}, value=1.0)
    return potential


def cos_psi(state):
    x = state.positions[:, PSI]
    axis = x[:, 2] - x[:, 1]
    first = torch.linalg.cross(x[:, 0] - x[:, 1], axis)
    last = torch.linalg.cross(axis, x[:, 3] - x[:, 2])
    return -(first * last).sum(dim=1) / (first.norm(dim=1) * last.norm(dim=1))


@pytest.fixture(scope="module")
def peptide():
    topology, positions = dipeptide()
    system = app.ForceField("amber14-all.xml").createSystem(topology)
    start = torch.tensor(positions.value_in_unit(openmm.unit.nanometer), dtype=torch.float64)
    bonds = [(bond.atom1.index, bond.atom2.index) for bond in topology.bonds()]
    return system, start, bonds


def exact_gradient(potential, start, bonds, temperature, points):
    """Average of cos(psi) and its gradient, over a grid of both torsions."""
    target = Target(potential, temperature=temperature)
    angles = torch.arange(points, dtype=torch.float64) * (2.0 * math.pi / points)
    pairs = torch.cartesian_prod(angles, angles)
    states = ChainState.replicate(len(pairs), positions=start)
    turn = Torsion(1.0, bonds, rotatable=[PHI_BOND, PSI_BOND])
    for which, angle in zip((0.25, 0.75), pairs.T, strict=True):
        noise = {"which": torch.full((len(pairs),), which), "normal": angle}
        states = turn.apply(states, noise, target).state
    weights = (-target.beta * potential(states.positions)).softmax(dim=0)
    mean = (weights * cos_psi(states)).sum()
    named = {n: p for n, p in potential.named_parameters() if p.requires_grad}
    gradient = torch.autograd.grad(mean, list(named.values()))
    return float(mean.detach()), {n: float(g) for n, g in zip(named, gradient, strict=True)}


def test_estimators_agree_with_each_other_and_with_quadrature(peptide):
    system, start, bonds = peptide
    potential = grafted(system)
    mean, exact = exact_gradient(potential, start, bonds, 600.0, 48)
    coarse, _ = exact_gradient(potential, start, bonds, 600.0, 40)
    assert mean == pytest.approx(coarse, abs=1e-3)
    sampler = Metropolis(
        Target(potential, temperature=600.0),
        Torsion(1.4, bonds, rotatable=[PHI_BOND, PSI_BOND]),
        ChainState.replicate(64, positions=start),
        seed=1,
    )
    sampler.burn_in(200, adapt=False)
    comparison = compare(
        sampler,
        cos_psi,
        {
            "covariance": Covariance(),
            "coupled": Coupled(warm_up=120),
            "score": Score(window=100),
        },
        {"covariance": 600, "coupled": 350, "score": 350},
        reference=exact,
        seed=2,
    )
    assert comparison.largest_z() < 4.5
    for name in comparison.results:
        for parameter in exact:
            assert abs(comparison.reference_z(name, parameter)) < 4.5
    for parameter, value in exact.items():
        errors = [comparison.value(n, parameter)[1] for n in comparison.results]
        assert errors[0] < errors[1] and errors[0] < errors[2]
        assert errors[0] < 0.1 * abs(value)


def test_branches_meet_in_torsions(peptide):
    system, start, bonds = peptide
    sampler = Metropolis(
        Target(grafted(system), temperature=600.0),
        Torsion(1.0, bonds, rotatable=[PHI_BOND, PSI_BOND]),
        ChainState.replicate(16, positions=start),
        seed=3,
    )
    run = Coupled().run(sampler, cos_psi, 40)
    assert len(run.coalescence.lifetimes) > 50
    assert run.coalescence.couplings == {"Torsion": "reflection-maximal in the torsion"}


def test_energies_by_the_host_give_the_same_estimate(peptide):
    system, start, bonds = peptide
    found = []
    for make in (mdgraft.graft, mdgraft_openmm.HostPotential):
        sampler = Metropolis(
            Target(grafted(system, make), temperature=600.0),
            Torsion(1.0, bonds, rotatable=[PHI_BOND, PSI_BOND]),
            ChainState.replicate(3, positions=start),
            seed=4,
        )
        found.append(
            (
                Covariance().estimate(sampler, cos_psi, 15),
                # Turns about phi leave torsions about psi alone up to rounding, and branches that
                # are born of rounding would use up random numbers.
                Coupled(warm_up=10).estimate(sampler, cos_psi, 15, parameters=["tied.charge"]),
            )
        )
    for native, host in zip(*found, strict=True):
        assert torch.allclose(native.value, host.value, atol=1e-8)
        for name, gradient in native.gradient.items():
            assert float(gradient) != 0.0
            assert torch.allclose(gradient, host.gradient[name], rtol=1e-5, atol=1e-6)


def test_paths_through_forces_of_the_host(peptide):
    # Tangents by differences where the host's forces have no second derivative in a graph.
    system, start, _ = peptide
    found = []
    for make in (mdgraft.graft, mdgraft_openmm.HostPotential):
        potential = grafted(system, make)
        sampler = Metropolis(
            Target(potential, temperature=300.0),
            MALA(0.003),
            ChainState.replicate(2, positions=start),
            seed=5,
        )
        found.append(
            Reparameterized().estimate(sampler, cos_psi, 3, parameters=["tied.psi"]).gradient
        )
    native, host = (g["tied.psi"] for g in found)
    assert float(native) != 0.0
    assert float(host) == pytest.approx(float(native), rel=1e-3)


def test_the_time_step_of_trajectories_by_openmm_has_a_gradient(peptide):
    system, start, _ = peptide
    energy = mdgraft_openmm.ContextEnergy(system)
    move = mdgraft_openmm.HybridMonteCarlo(energy, 0.0004, 3, name="hmc")
    sampler = Metropolis(
        Target(energy, temperature=300.0), move, ChainState.replicate(2, positions=start), seed=6
    )
    estimate = RaoBlackwell(objective=SquaredJump()).estimate(sampler, 6)
    # The squared jump grows with the square of the time step, as long as most is accepted.
    slope = float(estimate.gradient["hmc.scale"]) * 0.0004 / float(estimate.value)
    assert slope == pytest.approx(2.0, abs=0.5)
