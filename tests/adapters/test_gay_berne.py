"""GayBerneForce against OpenMM's Reference platform."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, assert_follows_energy, reference_context

N = 12
BOX = np.array([[2.1, 0, 0], [0.3, 2.2, 0], [-0.4, 0.5, 2.3]])
METHODS = ("NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic")


def ellipsoids(
    *, method="NoCutoff", switch=None, biaxial=False, zero=(), exceptions=True, spacing=0.42
):
    """Four molecules of an ellipsoid, then the particles that give its axes."""
    rng = np.random.default_rng(1)
    system, force = openmm.System(), openmm.GayBerneForce()
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.setNonbondedMethod(getattr(openmm.GayBerneForce, method))
    force.setCutoffDistance(0.95)
    if switch is not None:
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(switch)
    positions = []
    for k in range(4):
        centre = spacing * np.array([k % 2, k // 2, 0.3 * k]) + rng.uniform(-0.03, 0.03, 3)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        # The y axis is oblique.
        positions += [centre, centre - 0.1 * turn[0], centre - 0.12 * turn[1] + 0.03 * turn[0]]
        sizes, wells = rng.uniform(0.15, 0.35, 3), rng.uniform(0.6, 1.5, 3)
        if not biaxial:
            sizes[2], wells[2] = sizes[1], wells[1]
        epsilon = 0.0 if k in zero else rng.uniform(0.5, 2)
        axes = (3 * k + 1, 3 * k + 2 if biaxial else -1)
        force.addParticle(rng.uniform(0.2, 0.3), epsilon, *axes, *sizes, *wells)
        for _ in range(2):
            # Spheres.
            size = rng.uniform(0.1, 0.2)
            force.addParticle(
                rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.5), -1, -1, *3 * [size], 1, 1, 1
            )
    for _ in range(N):
        system.addParticle(1.0)
    if exceptions:
        for k in range(0, N, 3):
            for i, j in ((0, 1), (0, 2), (1, 2)):
                force.addException(k + i, k + j, 0.1, 0.0)
        force.addException(0, 6, 0.25, 0.7)
    system.addForce(force)
    return system, np.array(positions)


OPTIONS = [dict(), dict(biaxial=True), dict(zero=(1,)), dict(exceptions=False, spacing=0.7)]


@pytest.mark.parametrize("switch", [None, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees(options, method, switch):
    system, positions = ellipsoids(method=method, switch=switch, **options)
    if method == "CutoffPeriodic":
        # Molecules stay whole: axes do not reach across the boundary.
        images = np.repeat([[0, 0, 0], [1, 0, -1], [0, 2, 0], [0, 0, 1]], 3, 0)
        positions = positions + images @ BOX
    # Where a depth is zero its derivative is infinite, and is taken as zero.
    gradients = "zero" not in options
    assert_agrees(system, positions, force_rtol=1.0, second=False, gradients=gradients)
    assert_follows_energy(system, positions)


def test_spheres():
    """Without axes OpenMM's forces are right, and so are their differences."""
    system, positions = ellipsoids(method="CutoffPeriodic", switch=0.5)
    force = system.getForce(0)
    for i in range(N):
        sigma, epsilon, _, _, size, *_ = force.getParticleParameters(i)
        force.setParticleParameters(i, sigma, epsilon, -1, -1, size, size, size, 1.2, 1.2, 1.2)
    assert_agrees(system, positions)


def test_particles_at_one_point():
    """The limit of spheres that approach, with finite derivatives."""
    system, force = openmm.System(), openmm.GayBerneForce()
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle(0.3, 1.0, -1, -1, 0.2, 0.2, 0.2, 1, 1, 1)
    system.addForce(force)
    potential = mdgraft.graft(system)
    near = torch.tensor([[0.0, 0, 0], [1e-9, 0, 0]], dtype=torch.float64)
    at = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    energy = potential(at)
    assert energy.item() == pytest.approx(potential(near).item(), rel=1e-6)
    energy.backward()
    assert all(p.grad.isfinite().all() for p in (at, *potential.parameters()))


def test_host_route():
    """Where OpenMM accepts no change of one entry there is no difference to take."""
    system, positions = ellipsoids()
    potential = mdgraft.graft(system, route="host")
    energy = potential(torch.tensor(positions))
    torch.testing.assert_close(energy, mdgraft.graft(system)(torch.tensor(positions)))
    with pytest.raises(mdgraft.UnsupportedDerivativeError, match="freeze it"):
        torch.autograd.grad(energy, potential.get_parameter("GayBerneForce.sy"))


def test_write_back():
    system, positions = ellipsoids(method="CutoffPeriodic", switch=0.5)
    context = reference_context(system)
    context.setPositions(positions)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if "switching" not in name:
                parameter.mul_(1.02)
    mdgraft_openmm.write_parameters(potential, context)
    box = torch.tensor(BOX)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(torch.tensor(positions), box).item() == pytest.approx(energy, rel=1e-12)
    with torch.no_grad():
        potential.get_parameter("GayBerneForce.switching_distance").fill_(0.6)
    with pytest.raises(mdgraft.ParameterMismatchError, match="switching_distance"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    assert mdgraft.graft(system)(torch.tensor(positions), box).item() == pytest.approx(
        potential(torch.tensor(positions), box).item(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("sx", 0.0, "only positive values"),
        ("epsilon", -1.0, "not negative"),
        ("sz", 0.2, "particle 0 must be axially symmetric"),
        ("ex", 2.0, "particle 1 must be a sphere"),
        ("switching_distance", 2.0, "not between 0 and the cutoff"),
    ],
)
def test_refused_values(key, value, match):
    system, _ = ellipsoids(method="CutoffPeriodic", switch=0.5)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter(f"GayBerneForce.{key}").fill_(value)
    with pytest.raises(mdgraft.ParameterMismatchError, match=match):
        mdgraft_openmm.write_parameters(potential, system)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.addParticle(1, 1, -1, -1, 1, 1, 1, 1, 1, 1), "has 13 particles"),
        (lambda f: f.setParticleParameters(0, 1, 1, 99, -1, 1, 1, 1, 1, 1, 1), "does not exist"),
        (lambda f: f.setExceptionParameters(0, 2, 1, 1, 1), "more than one exception"),
        (lambda f: f.setCutoffDistance(0), "has a cutoff of 0 nm, which must be positive"),
        (lambda f: f.setCutoffDistance(1.1), "half of the default box is 1.05 nm"),
    ],
)
def test_what_is_refused(change, match):
    system, _ = ellipsoids(method="CutoffPeriodic")
    change(system.getForce(0))
    with pytest.raises(mdgraft.InvalidInputError, match=match):
        mdgraft.graft(system)
