"""Constraints of Systems: projections and their derivatives against OpenMM's own."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft import ConstraintError, Frames, InvalidInputError, UnsupportedHostError
from mdgraft._units import BOLTZMANN
from mdgraft.constraints import ConstraintSet
from mdgraft.ensembles import Ensemble, length_derivative
from mdgraft.testing import finite_difference
from openmm import app, unit

DATA = Path(app.__file__).parent / "data"
TIGHT = 1e-13


@functools.cache
def villin():
    """A protein of 582 atoms without its water."""
    pdb = app.PDBFile(str(DATA / "test.pdb"))
    model = app.Modeller(pdb.topology, pdb.positions)
    model.delete([r for r in model.topology.residues() if r.name in ("HOH", "Cl")])
    return model.topology, model.positions


def protein(constraints):
    topology, positions = villin()
    field = app.ForceField("amber14/protein.ff14SB.xml")
    return field.createSystem(topology, constraints=constraints), positions


def water(model, size=1.3):
    field = app.ForceField(f"amber14/{model}.xml")
    box = app.Modeller(app.Topology(), [])
    box.addSolvent(field, model=model, boxSize=openmm.Vec3(size, size, size))
    return field.createSystem(box.topology), box.positions


def mixed():
    """A flexible ring of beads, a rigid triangle that is not isosceles, water, a free ion."""
    random = np.random.default_rng(4)
    angles = 0.785 * np.arange(8)
    ring = [[0.3 * np.cos(a), 0.3 * np.sin(a), 0.05 * k] for k, a in enumerate(angles)]
    first = [[2, 0, 0], [2.1, 0, 0], [2.03, 0.13, 0]]
    second = [[3, 0, 0], [3.1, 0, 0], [2.97, 0.09, 0]]
    x = np.array([*ring, *first, *second, [5, 5, 5]]) + 0.005 * random.normal(size=(15, 3))
    system = openmm.System()
    masses = random.uniform(1, 20, size=15)
    # OpenMM's SETTLE is wrong for outer particles of different masses, see below.
    masses[13] = masses[12]
    for mass in masses:
        system.addParticle(mass)
    for k in range(8):
        j = (k + 1) % 8
        system.addConstraint(k, j, np.linalg.norm(x[k] - x[j]) * 1.01)
    for i, j, d in ((8, 9, 0.1), (9, 10, 0.15), (8, 10, 0.13)):
        system.addConstraint(i, j, d)
    for i, j, d in ((11, 12, 0.1), (11, 13, 0.1), (12, 13, 0.16)):
        system.addConstraint(i, j, d)
    return system, x * unit.nanometer


SYSTEMS = {
    "TIP3P": lambda: water("tip3p"),
    "TIP4P-Ew": lambda: water("tip4pew"),
    "protein, bonds to hydrogen": lambda: protein(app.HBonds),
    "protein, all bonds": lambda: protein(app.AllBonds),
    "protein, bonds and angles of hydrogen": lambda: protein(app.HAngles),
    "mixed": mixed,
}
each_system = pytest.mark.parametrize("name", SYSTEMS, ids=lambda n: n.replace(" ", "_"))


@functools.cache
def build(name):
    """System, constraints, positions that meet them, and positions after a step."""
    system, positions = SYSTEMS[name]()
    x = torch.tensor(np.array([list(p) for p in positions.value_in_unit(unit.nanometer)]))
    c = mdgraft_openmm.constraints(system)
    random = torch.Generator().manual_seed(3)
    old = c.project_positions(x)
    step = 0.002 * torch.randn(x.shape, generator=random, dtype=torch.float64)
    return system, c, old, old + step, torch.randn(x.shape, generator=random, dtype=torch.float64)


def real(c, x):
    return x[c.masses > 0]


@each_system
def test_structure(name):
    system, c, *_ = build(name)
    assert isinstance(c, ConstraintSet)
    assert c.n_particles == system.getNumParticles()
    rows = [system.getConstraintParameters(k) for k in range(system.getNumConstraints())]
    assert c.pairs.tolist() == [[i, j] for i, j, _ in rows]
    lengths = [d._value for *_, d in rows]
    # OpenMM rounds the lengths of rigid water to single precision.
    np.testing.assert_allclose(c.lengths.detach(), lengths, rtol=6e-8)
    exact = mdgraft_openmm.constraints(system, exact_lengths=True)
    np.testing.assert_allclose(exact.lengths.detach(), lengths, rtol=1e-15)
    masses = [system.getParticleMass(i)._value for i in range(c.n_particles)]
    np.testing.assert_array_equal(c.masses.detach(), masses)
    assert (c.sites is not None) == ("TIP4P" in name)


@each_system
def test_projections_are_those_of_the_host(name):
    system, c, old, trial, velocities = build(name)
    host = mdgraft_openmm.HostProjection(system, tolerance=TIGHT)
    found = c.project_positions(trial)
    wanted = host.project_positions(trial[None])[0]
    torch.testing.assert_close(real(c, found), real(c, wanted), atol=1e-11, rtol=0)
    assert float(c.residuals(found).abs().max()) < 1e-13
    found = c.project_velocities(velocities, old)
    wanted = host.project_velocities(velocities[None], old[None])[0]
    torch.testing.assert_close(real(c, found), real(c, wanted), atol=1e-11, rtol=0)


def seeds(x, n=2):
    random = torch.Generator().manual_seed(8)
    for _ in range(n):
        direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
        yield direction / direction.abs().max()


@each_system
def test_adjoint_against_differences_of_the_host(name):
    """Central differences through OpenMM's own projections, which know nothing of adjoints."""
    system, c, old, trial, velocities = build(name)
    host = mdgraft_openmm.HostProjection(system, tolerance=1e-14)
    w = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = w * (c.masses > 0).unsqueeze(-1)
    x = trial.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((w * c.project_positions(x)).sum(), x)
    v, r = velocities.clone().requires_grad_(), old.clone().requires_grad_()
    slopes = torch.autograd.grad((w * c.project_velocities(v, r)).sum(), (v, r))
    size = float(w.abs().sum())
    for d in seeds(old):
        d = d * (c.masses > 0).unsqueeze(-1)

        def position(t, d=d):
            return (w * host.project_positions((trial + t * d)[None])[0]).sum().numpy()

        truth = finite_difference(position, step=1e-3, rtol=1e-9)
        # Normalised by how many numbers are added up, this is an error of each derivative.
        assert abs(float((gradient * d).sum()) - float(truth.value)) < 1e-8 * size

        def velocity(t, d=d):
            return (w * host.project_velocities(velocities[None], (old + t * d)[None])[0]).sum()

        truth = finite_difference(lambda t: velocity(t).numpy(), step=1e-3, rtol=1e-9)
        assert abs(float((slopes[1] * d).sum()) - float(truth.value)) < 1e-6 * size


@each_system
def test_entries_against_central_differences(name):
    # A few entries of each kind, one by one: 1e-7 absolute.
    _, c, old, trial, _ = build(name)
    w = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [trial, old, c.lengths.detach(), c.masses.detach()]

    def loss(a, b, lengths, masses):
        return (w * c.project_positions(a, b, lengths=lengths, masses=masses)).sum()

    leaves = [v.clone().requires_grad_() for v in values]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    random = np.random.default_rng(2)
    for k, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        allowed = np.flatnonzero(value.numpy() != 0) if k == 3 else np.arange(value.numel())
        for entry in random.choice(allowed, size=6, replace=False):
            moved = []
            h = 1e-3 if k == 3 else 1e-5
            for t in (h, -h):
                others = [v.clone() for v in values]
                others[k].view(-1)[entry] += t
                moved.append(float(loss(*others)))
            truth = (moved[0] - moved[1]) / (2 * h)
            assert float(gradient.reshape(-1)[entry]) == pytest.approx(truth, abs=1e-7)


@each_system
def test_host_as_solver(name):
    system, c, old, trial, velocities = build(name)
    host = mdgraft_openmm.HostProjection(system, tolerance=1e-12)

    def gradients(solver):
        leaves = [t.clone().requires_grad_() for t in (trial, velocities, old)]
        projection = c.position_projection(leaves[0], solver=solver)
        v = c.project_velocities(leaves[1], leaves[2], solver=solver)
        loss = projection.positions.sin().sum() + v.sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return projection, v, first, second

    own, by_host = gradients(None), gradients(host)
    wanted = host.project_positions(trial[None])[0]
    torch.testing.assert_close(real(c, by_host[0].positions), real(c, wanted), atol=0, rtol=0)
    assert float(by_host[0].residual.detach()) < 1e-11
    scale = float(own[0].multipliers.detach().abs().max())
    torch.testing.assert_close(
        by_host[0].multipliers, own[0].multipliers, atol=1e-8 * scale, rtol=0
    )
    for a, b in zip([*own[2], *own[3]], [*by_host[2], *by_host[3]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-8 * float(1 + a.detach().abs().max()), rtol=0)
    tangent = next(iter(seeds(trial, 1)))
    along = [
        torch.func.jvp(lambda x, s=s: c.project_positions(x, solver=s), (trial,), (tangent,))[1]
        for s in (None, host)
    ]
    torch.testing.assert_close(*along, atol=1e-8, rtol=0)
    mapped = torch.func.vmap(lambda x: c.project_positions(x, solver=host))(trial.expand(2, -1, -1))
    torch.testing.assert_close(mapped[1], by_host[0].positions.detach(), atol=0, rtol=0)


def test_host_with_a_loose_tolerance():
    # Its default is good enough for values only.
    system, c, _, trial, velocities = build("protein, bonds to hydrogen")
    host = mdgraft_openmm.HostProjection(system, tolerance=1e-4)
    assert 1e-8 < float(c.position_projection(trial, solver=host).residual) < 1e-3
    x = trial.clone().requires_grad_()
    with pytest.raises(ConstraintError, match="solver: met the constraints only to"):
        c.project_positions(x, solver=host)
    with pytest.raises(ConstraintError, match="solver: met the constraints only to"):
        torch.func.jvp(lambda y: c.project_positions(y, solver=host), (trial,), (trial,))
    c.project_velocities(velocities, trial, solver=host)
    with pytest.raises(ConstraintError, match="solver: the host's velocities differ"):
        c.project_velocities(velocities, x, solver=host)


def test_host_with_other_constraints():
    system, c, _, trial, velocities = build("mixed")
    other = openmm.System()
    for i in range(system.getNumParticles()):
        other.addParticle(system.getParticleMass(i))
    host = mdgraft_openmm.HostProjection(other)
    with pytest.raises(ConstraintError, match="solver: met the constraints only to"):
        c.project_positions(trial.clone().requires_grad_(), solver=host)
    with pytest.raises(ConstraintError, match="same constraints and masses"):
        c.project_velocities(velocities, trial, solver=host)
    with pytest.raises(InvalidInputError, match="reference: got positions, but a host projects"):
        c.project_positions(trial, trial, solver=host)


def test_half_heavy_water():
    """OpenMM gives it to SETTLE, which then loses momentum; that must not be differentiated."""
    system = massless((16, 2, 1), (0, 1, 0.1), (0, 2, 0.1), (1, 2, 0.16))
    c = mdgraft_openmm.constraints(system)
    host = mdgraft_openmm.HostProjection(system, tolerance=TIGHT)
    x = torch.tensor([[0, 0, 0], [0.11, 0, 0], [-0.03, 0.09, 0.01]], dtype=torch.float64)
    own, theirs = c.project_positions(x), c.project_positions(x, solver=host)
    masses = c.masses.unsqueeze(-1)
    assert float(c.residuals(theirs).abs().max()) < 1e-7
    assert float((masses * (own - x)).sum(dim=0).abs().max()) < 1e-14
    with pytest.raises(ConstraintError, match="solver: met the constraints only to"):
        c.project_positions(x.requires_grad_(), solver=host)


def test_of_contexts_and_simulations():
    system, c, _, trial, _ = build("mixed")
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU")
    )
    context.setPositions(trial.numpy())
    before = context.getState(positions=True).getPositions(asNumpy=True)._value
    found = mdgraft_openmm.constraints(context, dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.pairs, c.pairs)
    host = mdgraft_openmm.HostProjection(context)
    rough = host.project_positions(trial[None])[0]
    torch.testing.assert_close(rough, c.project_positions(trial), atol=1e-4, rtol=0)
    after = context.getState(positions=True).getPositions(asNumpy=True)._value
    np.testing.assert_array_equal(before, after)
    with pytest.raises(UnsupportedHostError, match="host_object: got"):
        mdgraft_openmm.constraints("system")
    with pytest.raises(InvalidInputError, match="tolerance: got 0"):
        mdgraft_openmm.HostProjection(system, tolerance=0)


def massless(masses, *pairs):
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    for i, j, d in pairs:
        system.addConstraint(i, j, d)
    return system


def test_massless_particles():
    # Between two of them OpenMM has no constraint; to one of them it refuses.
    system = massless((0, 0, 1, 1), (0, 1, 0.1), (2, 3, 0.2))
    c = mdgraft_openmm.constraints(system)
    assert c.pairs.tolist() == [[2, 3]]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = mdgraft_openmm.HostProjection(system, tolerance=1e-13).project_positions(x[None])[0]
    torch.testing.assert_close(c.project_positions(x), wanted, atol=1e-10, rtol=0)
    for bad, match in (
        (massless((0, 1), (0, 1, 0.1)), "between particles 0 and 1 involves a massless"),
        (massless((1, 1), (0, 3, 0.1)), "constraint 0 connects particles 0 and 3"),
        (massless((1, 1), (0, 1, 0.1), (1, 0, 0.1)), "as another one does"),
        (massless((1, 1), (1, 1, 0.1)), "wanted two different ones"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            mdgraft_openmm.constraints(bad)
        with pytest.raises(openmm.OpenMMException):
            openmm.Context(bad, openmm.VerletIntegrator(0.001))


def test_a_system_without_constraints():
    system = massless((1, 2, 3))
    c = mdgraft_openmm.constraints(system)
    assert c.n_constraints == 0
    x = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(c.project_positions(x), x)


def test_gradient_through_virtual_sites_and_the_energy():
    # Energy of projected four-site water: what a force field gets back from raw coordinates.
    system, c, old, *_ = build("TIP4P-Ew")
    system = copy.deepcopy(system)
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    potential = mdgraft.graft(system)
    d = torch.tensor(0.09572, dtype=torch.float64)
    factors = c.lengths.detach() / d
    direction = next(iter(seeds(old, 1)))

    def energy(length, x):
        return potential(c.project_positions(x, lengths=factors * length))

    slope_d, slope_x = (g.detach() for g in torch.func.grad(energy, argnums=(0, 1))(d, old))
    truth = finite_difference(lambda t: energy(d + t, old).detach().numpy(), step=1e-3)
    assert float(slope_d) == pytest.approx(float(truth.value), rel=1e-7)
    truth = finite_difference(lambda t: energy(d, old + t * direction).detach().numpy(), step=1e-3)
    assert float((slope_x * direction).sum()) == pytest.approx(float(truth.value), rel=1e-7)


# The distribution that OpenMM samples with rigid bonds -----------------------------------------

KT = BOLTZMANN * 300.0


def trimers(n, masses, lengths, k, length):
    """Molecules of two rigid bonds and a spring between the ends, which do not interact."""
    system = openmm.System()
    spring = openmm.HarmonicBondForce()
    for first in range(0, 3 * n, 3):
        for mass in masses:
            system.addParticle(mass)
        system.addConstraint(first, first + 1, lengths[0])
        system.addConstraint(first + 1, first + 2, lengths[1])
        spring.addBond(first, first + 2, length, k)
    system.addForce(spring)
    return system


def sampled(masses, lengths, k, length, n=500, n_frames=40):
    """Frames ``(n * n_frames, 3, 3)`` of single molecules, those of one after the other."""
    integrator = openmm.LangevinMiddleIntegrator(300.0, 20.0, 0.004)
    integrator.setRandomNumberSeed(4)
    integrator.setConstraintTolerance(1e-8)
    context = openmm.Context(
        trimers(n, masses, lengths, k, length),
        integrator,
        openmm.Platform.getPlatformByName("Reference"),
    )
    start = np.array([[lengths[0], 0, 0], [0, 0, 0], [0, lengths[1], 0]])
    context.setPositions(np.tile(start, (n, 1)))
    context.setVelocitiesToTemperature(300.0, 5)
    integrator.step(250)
    frames = []
    for _ in range(n_frames):
        integrator.step(50)
        state = context.getState(positions=True)
        frames.append(np.array(state.getPositions(asNumpy=True)._value).reshape(n, 3, 3))
    return torch.from_numpy(np.stack(frames, axis=1).reshape(-1, 3, 3))


def cosines(x):
    return torch.nn.functional.cosine_similarity(x[:, 0] - x[:, 1], x[:, 2] - x[:, 1], dim=-1)


def by_quadrature(masses, lengths, k, length):
    """The mean squared distance of the ends."""
    cosine, weight = np.polynomial.legendre.leggauss(200)
    w1, w2, w3 = 1 / np.array(masses)
    square = lengths[0] ** 2 + lengths[1] ** 2 - 2 * lengths[0] * lengths[1] * cosine
    metric = (w1 + w2) * (w2 + w3) - (w2 * cosine) ** 2
    p = weight * np.sqrt(metric) * np.exp(-0.5 * k * (np.sqrt(square) - length) ** 2 / KT)
    return (p * square).sum() / p.sum()


def test_metric_of_what_openmm_samples():
    # Freely jointed: <cos^2> = 0.32102 instead of 1/3.
    x = sampled((3.0, 3.0, 3.0), (0.1, 0.1), 0.0, 0.1)
    means = cosines(x).square().reshape(500, -1).mean(dim=1)
    error = float(means.std()) / 500**0.5
    assert abs(float(means.mean()) - 0.32102) < 4 * error < 1 / 3 - 0.32102


def test_derivative_in_a_length_from_openmm():
    masses, lengths, k, length = (10.0, 4.0, 7.0), (0.1, 0.13), 2000.0, 0.16
    system = trimers(1, masses, lengths, k, length)
    frames = Frames(positions=sampled(masses, lengths, k, length), sampled="NVT")
    ensemble = Ensemble(mdgraft.graft(system), frames, temperature=300.0)
    found = length_derivative(
        ensemble,
        mdgraft_openmm.constraints(system),
        lambda f: (f.positions[:, 2] - f.positions[:, 0]).square().sum(dim=-1),
    )
    for bond in range(2):
        h = 1e-5
        ends = []
        for t in (h, -h):
            moved = list(lengths)
            moved[bond] += t
            ends.append(by_quadrature(masses, moved, k, length))
        wanted = (ends[0] - ends[1]) / (2 * h)
        error = float(found.gradient_standard_error["lengths"][bond])
        assert abs(float(found.gradient["lengths"][bond]) - wanted) < 4 * error
        assert error < 0.1 * abs(wanted)
