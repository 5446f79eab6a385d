"""HippoNonbondedForce against OpenMM's Reference platform."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, assert_follows_energy, reference_context
from mdgraft.potentials.hippo.damping import overlap, two_centers
from mdgraft_openmm._known import remarks

Hippo = openmm.HippoNonbondedForce
BOX = np.array([[1.7, 0, 0], [0.3, 1.8, 0], [-0.4, 0.5, 1.9]])
N = 9
KINDS = (Hippo.ZThenX, Hippo.Bisector, Hippo.ZOnly, Hippo.NoAxisType)


def molecules(*, pme=False, equal=False, axes="mixed", exceptions=True, orders=4, zero=(), seed=2):
    """Three molecules of three atoms; with equal widths, as atoms of one element have them."""
    rng = np.random.default_rng(seed)
    system, force = openmm.System(), Hippo()
    system.setDefaultPeriodicBoxVectors(*BOX)
    force.setExtrapolationCoefficients([-0.154, 0.017, 0.658, 0.474][:orders])
    if pme:
        force.setNonbondedMethod(Hippo.PME)
        force.setCutoffDistance(0.8)
        force.setSwitchingDistance(0.6)
        # Even, for on odd ones OpenMM's forces are not the gradient of its energy.
        force.setPMEParameters(3.7, 30, 32, 36)
        force.setDPMEParameters(3.5, 16, 17, 18)
    positions = []
    shape = np.array([[0, 0, 0], [0.1, 0.02, 0], [-0.04, 0.09, 0.03]])
    for i in range(N):
        kind = KINDS[i % 4] if axes == "mixed" else axes
        others = [i - i % 3 + (i + shift) % 3 for shift in (1, 2)]
        particles = [*others, (i + 3) % N]
        if kind == Hippo.NoAxisType:
            particles = [-1, -1, -1]
        elif kind in (Hippo.Bisector, Hippo.ZOnly):
            # With z only, x does not count, but without one OpenMM's forces are those of chance.
            particles[2] = -1
        a, b, c, d, e = rng.normal(0, 2e-4, size=5)
        dipole, quadrupole = rng.normal(0, 0.01, size=3), [a, b, c, b, d, e, c, e, -a - d]
        if kind == Hippo.ZOnly:
            # For moments of another symmetry OpenMM's torques are not right.
            dipole[:2], quadrupole = 0.0, [a, 0, 0, 0, a, 0, 0, 0, -2 * a]
        if kind == Hippo.NoAxisType:
            # The Reference platform never reads these.
            dipole, quadrupole = np.zeros(3), 9 * [0.0]
        same = equal and i % 3
        force.addParticle(
            0.3 * rng.normal(),
            dipole,
            quadrupole,
            rng.uniform(1, 4),
            40.0 if same else rng.uniform(30, 50),
            rng.uniform(100, 300),
            rng.uniform(20, 40),
            rng.uniform(0.01, 0.04),
            rng.uniform(0.5, 1.5),
            rng.uniform(2, 4),
            42.0 if same else rng.uniform(35, 50),
            0.0 if i in zero else rng.uniform(3e-4, 1e-3),
            kind,
            *particles,
        )
        system.addParticle(1.0)
        molecule, k = divmod(i, 3)
        turn = np.linalg.qr(np.random.default_rng(molecule).normal(size=(3, 3)))[0]
        centre = 0.36 * np.array([molecule % 2, molecule // 2, 0.2 * molecule])
        positions.append(centre + shape[k] @ turn + rng.uniform(-0.01, 0.01, 3))
    if exceptions:
        for first in range(0, N, 3):
            for i, j in ((1, 0), (0, 2), (1, 2)):
                force.addException(first + i, first + j, *rng.uniform(0, 0.5, size=6))
    system.addForce(force)
    return system, np.array(positions)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(equal=True),
        dict(pme=True),
        dict(pme=True, equal=True, seed=5),
        dict(orders=1, exceptions=False),
        *(dict(axes=kind, orders=2) for kind in KINDS),
    ],
    ids=str,
)
def test_agrees(options):
    """Energy, forces, box, all parameters and second derivatives, in every variant.

    Where widths are equal, so that OpenMM has another formula, differences of it are noise.
    """
    system, positions = molecules(**options)
    if options.get("pme"):
        images = np.repeat(np.random.default_rng(1).integers(-1, 2, size=(3, 3)), 3, axis=0)
        positions = positions + images @ BOX
    assert_agrees(
        system,
        positions,
        second_rtol=1e-5,
        parameter_rtol=1e-2 if options.get("equal") else 1e-6,
        translation_rtol=None,
    )


@pytest.mark.parametrize("kind", [Hippo.ThreeFold, Hippo.ZBisect])
def test_frames_that_openmm_has_not_right(kind):
    """The gradient of OpenMM's energy, which its forces are not."""
    system, positions = molecules(axes=kind)
    assert_follows_energy(system, positions, rtol=1e-7, energy_rtol=1e-11)


def test_frames_with_z_only():
    """A particle x does not count, and OpenMM's forces need one."""
    system, positions = molecules(axes=Hippo.ZOnly)
    truth = mdgraft.graft(system).forces(torch.tensor(positions))
    force = system.getForce(0)
    assert not [r for r in remarks(system, BOX) if "z-only" in r]
    for i in range(N):
        *row, kind, z, _, y = force.getParticleParameters(i)
        force.setParticleParameters(i, *row, kind, z, -1, y)
    torch.testing.assert_close(mdgraft.graft(system).forces(torch.tensor(positions)), truth)
    assert [r for r in remarks(system, BOX) if "z-only" in r]


def test_sites_without_polarizability():
    """OpenMM divides zero by zero there; a tiny one is the limit."""
    system, positions = molecules(zero=(0, 4))
    potential = mdgraft.graft(system)
    energy = potential(torch.tensor(positions))
    force = system.getForce(0)
    for i in (0, 4):
        row = list(force.getParticleParameters(i))
        row[11] = 1e-20
        force.setParticleParameters(i, *row)
    context = reference_context(system)
    context.setPositions(positions)
    limit = context.getState(energy=True).getPotentialEnergy()._value
    # Two widths are within 0.03 % of one another, where OpenMM's closed form loses digits.
    assert energy.item() == pytest.approx(limit, rel=1e-7)
    for gradient in torch.autograd.grad(energy, list(potential.parameters())):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("function", ["two_centers", "overlap"])
def test_damping_of_similar_widths(function):
    """The series meets the closed form where they take over from each other, to second order."""
    mean = torch.linspace(1.5, 12, 8, dtype=torch.float64)

    def values(ratio, x):
        p, q = x * (1 + ratio), x * (1 - ratio)
        found = two_centers(p, q, 5) if function == "two_centers" else overlap(p, q, 0.1 * x)
        return torch.stack([f.sum() for f in found])

    inside, outside = torch.tensor([0.0299999, 0.0300001], dtype=torch.float64)
    for transform in (
        lambda f: f,
        torch.func.jacfwd,
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    ):
        near, far = (transform(lambda r: values(r, mean))(r) for r in (inside, outside))
        # The step between both sides is the slope times 2e-7.
        torch.testing.assert_close(near, far, rtol=3e-5, atol=1e-9)
    slope = torch.func.jacfwd(lambda r: values(r, mean))(torch.zeros((), dtype=torch.float64))
    assert slope.abs().max() < 1e-12


def test_switching_distance_beyond_the_cutoff():
    """OpenMM takes it, as a default of 0.9 nm with a shorter cutoff, and does not switch."""
    system, positions = molecules(pme=True)
    for distance in (0.8, 0.9):
        system.getForce(0).setSwitchingDistance(distance)
        assert_agrees(system, positions, second=False, rtol=1e-8, translation_rtol=None)


def test_write_back():
    system, positions = molecules(pme=True)
    context = reference_context(system)
    context.setPositions(positions)
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if "switching" not in name:
                parameter.mul_(1.03)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    found = potential(torch.tensor(positions), torch.tensor(BOX)).item()
    assert found == pytest.approx(energy, rel=1e-9)
    with torch.no_grad():
        potential.get_parameter("HippoNonbondedForce.switching_distance").fill_(0.5)
    with pytest.raises(mdgraft.ParameterMismatchError, match="switching_distance"):
        mdgraft_openmm.write_parameters(potential, context)


@pytest.mark.parametrize(
    ("key", "entry", "value", "match"),
    [
        ("quadrupole", (1, 0, 0), 0.5, "entry 1 has a trace of"),
        ("polarizability", (3,), -1e-4, "entry 3 is -0.0001"),
    ],
)
def test_refused_values(key, entry, value, match):
    system, _ = molecules(pme=True)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter(f"HippoNonbondedForce.{key}")[entry] = value
    with pytest.raises(mdgraft.ParameterMismatchError, match=match):
        mdgraft_openmm.write_parameters(potential, system)


@pytest.mark.parametrize(
    ("axes", "match"),
    [((Hippo.ZThenX, 1, -1, -1), "needs the first 2"), ((17, 1, 2, 3), "unknown axis type 17")],
)
def test_what_is_refused(axes, match):
    system, _ = molecules()
    force = system.getForce(0)
    row = list(force.getParticleParameters(0))
    force.setParticleParameters(0, *row[:12], *axes)
    with pytest.raises(mdgraft.InvalidInputError, match=match):
        mdgraft.graft(system)
