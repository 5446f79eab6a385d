"""GBSAOBCForce, LCPOForce, RMSDForce, RGForce and OrientationRestraintForce against OpenMM."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees
from scipy.spatial.transform import Rotation

N = 14
BOX = np.array([[2.0, 0, 0], [0.4, 2.1, 0], [-0.5, 0.3, 2.2]])


def needs(name):
    """Skips a test where OpenMM lacks a class."""
    return pytest.mark.skipif(not hasattr(openmm, name), reason=f"this OpenMM has no {name}")


def system_with(*forces, spread=1.0):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for _ in range(N):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    rng = np.random.default_rng(8)
    lattice = np.array([(i % 3, i // 3 % 3, i // 9) for i in range(N)]) * 0.3 * spread
    return system, lattice + rng.uniform(-0.05, 0.05, size=(N, 3))


def obc(method="NoCutoff", cutoff=0.8):
    rng = np.random.default_rng(1)
    force = openmm.GBSAOBCForce()
    force.setNonbondedMethod(getattr(openmm.GBSAOBCForce, method))
    force.setCutoffDistance(cutoff)
    force.setSoluteDielectric(1.5)
    force.setSurfaceAreaEnergy(3.1)
    for i in range(N):
        # Some spheres lie within others, some are much larger than the distance.
        radius = 0.4 if i == 3 else rng.uniform(0.1, 0.25)
        force.addParticle(0.5 * rng.normal(), radius, 1.4 if i == 5 else rng.uniform(0.6, 0.9))
    return force


def obc_with(radius=0.15, scale=0.8):
    force = obc()
    force.setParticleParameters(2, 0.1, radius, scale)
    return force


def lcpo(periodic=False):
    rng = np.random.default_rng(2)
    force = openmm.LCPOForce()
    force.setSurfaceTension(2.3)
    force.setUsesPeriodicBoundaryConditions(periodic)
    for i in range(N):
        radius = 0.0 if i in (2, 9) else rng.uniform(0.2, 0.33)
        force.addParticle(radius, *rng.normal(size=4))
    return force


@pytest.mark.parametrize("method", ["NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic"])
def test_obc(method):
    system, positions = system_with(obc(method))
    if method == "CutoffPeriodic":
        positions += np.random.default_rng(3).integers(-1, 2, size=(N, 3)) @ BOX
    assert_agrees(system, positions)


@pytest.mark.parametrize("which", ["Solute", "Solvent"])
def test_without_a_dielectric_the_surface_remains(which):
    force = obc()
    getattr(force, f"set{which}Dielectric")(0.0)
    system, positions = system_with(force)
    potential = assert_agrees(system, positions, gradients=False)
    potential(positions).backward()
    assert all(p.grad.isfinite().all() for p in potential.parameters())


@needs("LCPOForce")
@pytest.mark.parametrize("spread", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("periodic", [False, True], ids=["open", "periodic"])
def test_lcpo(periodic, spread):
    system, positions = system_with(lcpo(periodic), spread=min(spread, 1.4) if periodic else spread)
    if periodic:
        positions += np.random.default_rng(3).integers(-1, 2, size=(N, 3)) @ BOX
    assert_agrees(system, positions)


def reference():
    return np.random.default_rng(5).normal(size=(N, 3))


@pytest.mark.parametrize("particles", [[], [0, 3, 5, 7, 11]], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["rmsd", "rg", "orientation"])
def test_collective(kind, particles):
    force = {
        "rmsd": lambda: openmm.RMSDForce(reference(), particles),
        "rg": lambda: openmm.RGForce(particles),
        "orientation": lambda: openmm.OrientationRestraintForce(13.0, reference(), particles),
    }[kind]()
    assert_agrees(*system_with(force))


@pytest.mark.parametrize("shape", ["line", "plane", "mirrored", "equal"])
def test_superposition_of_symmetric_structures(shape):
    """Coinciding eigenvalues, other than the largest, must not spoil second derivatives."""
    y = reference()
    if shape == "line":
        y[:, 1:] = 0.0
    elif shape == "plane":
        y[:, 2] = 0.0
    elif shape == "equal":
        # An octahedron has three equal moments.
        corners = np.concatenate([np.eye(3), -np.eye(3)])
        y = np.concatenate([corners, np.zeros((N - 6, 3))])
    x = Rotation.from_rotvec([0.3, -0.5, 0.2]).apply(y) + 0.1
    x += 0.02 * np.random.default_rng(0).normal(size=(N, 3))
    if shape == "mirrored":
        x = x * [1, 1, -1] * [1, 1, 0.2]
    system, _ = system_with(openmm.RMSDForce(y))
    assert_agrees(system, x, float32_rtol=None)


def test_perfect_superposition():
    y = reference()
    system, _ = system_with(openmm.RMSDForce(y), openmm.OrientationRestraintForce(5.0, y))
    potential = mdgraft.graft(system)
    x = torch.tensor(y + 0.5, requires_grad=True)
    energies = potential.energy_by_term(x)
    assert energies["RMSDForce"].item() == pytest.approx(0.0, abs=1e-7)
    assert energies["OrientationRestraintForce"].item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(energies["OrientationRestraintForce"], x, create_graph=True)
    assert gradient.abs().max().item() < 1e-12
    # A small rotation costs k theta^2 / 2.
    axis = np.array([0.0, 0.0, 1e-3])
    turned = Rotation.from_rotvec(axis).apply(y)
    energy = potential.energy_by_term(turned)["OrientationRestraintForce"].item()
    assert energy == pytest.approx(0.5 * 5.0 * 1e-6, rel=1e-6)


@needs("LCPOForce")
@pytest.mark.parametrize("kind", ["rmsd", "rg", "orientation"])
def test_single_precision_loses_nothing_to_cancellation(kind):
    """A long chain that deviates little, far from the origin."""
    rng = np.random.default_rng(3)
    y = np.cumsum(rng.normal(0, 0.1, size=(2000, 3)), axis=0) + 7.0
    force = {
        "rmsd": lambda: openmm.RMSDForce(y),
        "rg": lambda: openmm.RGForce(),
        "orientation": lambda: openmm.OrientationRestraintForce(500.0, y),
    }
    name = {"rmsd": "RMSDForce", "rg": "RGForce", "orientation": "OrientationRestraintForce"}[kind]
    if not hasattr(openmm, name):
        pytest.skip(f"this OpenMM has no {name}")
    system = openmm.System()
    for _ in y:
        system.addParticle(1.0)
    system.addForce(force[kind]())
    x = torch.tensor(y + rng.normal(0, 0.02, size=y.shape)).float()
    slopes = []
    for dtype in (torch.float64, torch.float32):
        z = x.to(dtype).requires_grad_()
        energy = mdgraft.graft(system, dtype=dtype)(z)
        assert energy.dtype == dtype
        slopes.append(torch.autograd.grad(energy, z)[0].double())
    # The reference of the second one is rounded by 1e-6 nm.
    assert (slopes[1] - slopes[0]).norm() <= 1e-4 * slopes[0].norm()


def test_write_back():
    y = reference()
    system, positions = system_with(
        obc(),
        lcpo(),
        openmm.RMSDForce(y),
        openmm.OrientationRestraintForce(5.0, y),
        openmm.RGForce(),
    )
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.05)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    with pytest.raises(mdgraft.ParameterMismatchError, match="solute_dielectric, solvent_diel"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    torch.testing.assert_close(mdgraft.graft(system)(positions), potential(positions))
    context.reinitialize()
    with torch.no_grad():
        potential.get_parameter("RMSDForce.reference_positions")[2] += 0.3
        potential.get_parameter("LCPOForce.surface_tension").mul_(2.0)
    mdgraft_openmm.write_parameters(potential, context)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(potential(positions).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("force", "message"),
    [
        (lambda: obc_with(radius=0.0), "radius: entry 2 is 0; OpenMM accepts only positive"),
        (lambda: obc_with(scale=-0.1), "scaling_factor: entry 2 is -0.1"),
        (lambda: obc("CutoffPeriodic", 0.0), "has a cutoff of 0 nm, which must be positive"),
        (lambda: obc("CutoffPeriodic", 1.1), "half of the default box is 1 nm"),
        (lambda: openmm.GBSAOBCForce(), f"has 0 particles, the System {N}"),
        pytest.param(
            lambda: openmm.LCPOForce(), "has 0 particles, the System", marks=needs("LCPOForce")
        ),
        (lambda: openmm.RMSDForce(np.zeros((3, 3))), "has 3 reference positions"),
        (lambda: openmm.RGForce([0, N]), rf"refers to \[{N}\]"),
    ],
)
def test_what_is_refused(force, message):
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system_with(force())[0])
