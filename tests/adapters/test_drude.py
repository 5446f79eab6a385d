"""DrudeForce against OpenMM's Reference platform."""

import pathlib

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, reference_context
from mdgraft.potentials import SelfConsistent
from openmm import app, unit

AXES = np.array(
    [[0.5, 0.1, -0.3], [0.1, 0.6, 0.2], [-0.4, 0.3, 0.5], [0, -0.5, 0.1], [0.8, 0.7, 0]]
)
TRICLINIC = np.array([[1.2, 0.0, 0.0], [0.3, 1.3, 0.0], [-0.2, 0.4, 1.25]])


def drude_system(*, axes=((-1, -1, -1),), screened=(), periodic=False, spacing=0.25, seed=1):
    """Oscillators on a jittered lattice, then five particles that can be axes."""
    rng = np.random.default_rng(seed)
    system, force = openmm.System(), openmm.DrudeForce()
    n = len(axes)
    for _ in range(2 * n + 5):
        system.addParticle(1.0)
    for i, axis in enumerate(axes):
        particles = [a if a < 0 else 2 * n + a for a in axis]
        q, alpha = rng.uniform(-2, 2), rng.uniform(0.5e-3, 2e-3)
        force.addParticle(2 * i + 1, 2 * i, *particles, q, alpha, *rng.uniform(0.6, 1.3, 2))
    for i, j in screened:
        force.addScreenedPair(i, j, rng.uniform(1.0, 3.0))
    force.setUsesPeriodicBoundaryConditions(periodic)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*TRICLINIC)
    lattice = spacing * np.array([[i % 2, i // 2 % 2, i // 4] for i in range(n)], float)
    lattice = lattice.reshape(-1, 3) + rng.uniform(-0.03, 0.03, (n, 3))
    shells = lattice + rng.uniform(-0.02, 0.02, (n, 3))
    positions = np.concatenate(
        [np.stack([lattice, shells], 1).reshape(-1, 3), AXES + rng.uniform(-0.05, 0.05, (5, 3))]
    )
    return system, positions


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(axes=[(0, -1, -1)]),
        dict(axes=[(0, 1, -1)]),
        dict(axes=[(-1, 0, 1)]),
        dict(axes=[(0, 1, 2), (-1, -1, -1), (2, 3, 4)]),
        dict(axes=[(-1, -1, -1)] * 4, screened=[(0, 1), (0, 2), (3, 1)]),
        dict(axes=[(0, 1, 2), (-1, 2, 3), (4, -1, -1)], screened=[(0, 1), (2, 1)], periodic=True),
    ],
)
def test_agrees(options):
    """Energy, forces, parameter gradients and second derivatives, in every variant."""
    system, positions = drude_system(**options)
    assert_agrees(system, positions)


def test_pairs_across_the_boundary():
    """Screened pairs of nearest images; springs are not wrapped, as in OpenMM."""
    system, positions = drude_system(
        axes=[(-1, 0, 1)] * 8, screened=[(0, 7), (6, 1), (2, 3)], periodic=True, spacing=0.8
    )
    potential = assert_agrees(system, positions)
    x, term = torch.tensor(positions)[None], potential.term("DrudeForce")
    open_energy = term(x, None, term.parameter_values(), {})
    assert abs((open_energy - potential(x, torch.tensor(TRICLINIC))).item()) > 1e-4


def test_no_oscillators():
    """A force without entries is zero."""
    system, positions = drude_system(axes=())
    potential = mdgraft.graft(system)
    assert potential(torch.tensor(positions)).item() == 0.0


def test_shell_on_its_parent():
    """A shell exactly on its parent is a smooth minimum."""
    system, positions = drude_system(axes=[(0, 1, 2), (-1, -1, -1)], screened=[(0, 1)])
    positions[1] = positions[0]
    assert_agrees(system, positions)


def test_coincident_charges():
    """The screened interaction stays finite where OpenMM divides zero by zero."""
    system, positions = drude_system(axes=[(-1, -1, -1)] * 2, screened=[(0, 1)])
    potential = mdgraft.graft(system)
    near, at = positions.copy(), positions.copy()
    at[3] = positions[0]
    near[3] = positions[0] + np.array([1e-9, 0, 0])
    x = torch.tensor(at, requires_grad=True)
    energy = potential(x)
    (gradient,) = torch.autograd.grad(energy, x)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(energy, potential(torch.tensor(near)), rtol=1e-6, atol=0)


def polarizable_water(n):
    """Water of a CHARMM force field with flexible bonds, as OpenMM's tools set it up."""
    pdb = app.PDBFile(str(pathlib.Path(app.__file__).parent / "data" / "tip3p.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    field = app.ForceField("charmm_polar_2019.xml")
    # The first molecule and its closest neighbours.
    centres = np.array(pdb.positions.value_in_unit(unit.nanometer))[::3]
    near = np.argsort(np.linalg.norm(centres - centres[0], axis=1))[:n]
    modeller.delete([residue for residue in pdb.topology.residues() if residue.index not in near])
    modeller.addExtraParticles(field)
    system = field.createSystem(modeller.topology, constraints=None, rigidWater=False)
    return system, np.array(modeller.positions.value_in_unit(unit.nanometer))


def test_polarizable_water():
    """Springs of a real force field."""
    system, positions = polarizable_water(4)
    for i in reversed(range(system.getNumForces())):
        if not isinstance(system.getForce(i), openmm.DrudeForce):
            system.removeForce(i)
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            system.setParticleMass(i, 0.0)
    positions += np.random.default_rng(0).normal(0.0, 0.005, positions.shape)
    potential = assert_agrees(system, positions)
    assert len(potential.term("DrudeForce").particles) == 4


def relaxed_by_openmm(system, positions, tolerance):
    """What DrudeSCFIntegrator finds; nothing else moves in a step of no length."""
    integrator = openmm.DrudeSCFIntegrator(1e-12)
    integrator.setMinimizationErrorTolerance(tolerance)
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(system, integrator, platform)
    context.setPositions(positions)
    context.computeVirtualSites()
    # It gives up when a pass gains little, so that a few more come closer.
    integrator.step(5)
    state = context.getState(positions=True, energy=True)
    return state.getPositions(asNumpy=True)._value, state.getPotentialEnergy()._value


def test_relaxes_as_the_integrator_does():
    """Shells of water at the minimum: positions and energy of OpenMM's own iteration."""
    system, positions = polarizable_water(5)
    for i in range(system.getNumParticles()):
        if not system.isVirtualSite(i):
            system.setParticleMass(i, 1e12)
    placed, energy = relaxed_by_openmm(system, positions, 1e-8)
    shells = mdgraft_openmm.drude_particles(system)
    assert len(shells) == 5
    relaxed = SelfConsistent(mdgraft.graft(system), shells, tolerance=1e-8)
    x = torch.tensor(placed)
    x[shells] = torch.tensor(positions)[shells]
    found = relaxed.relax(x).detach().numpy()
    moved = np.linalg.norm(placed[shells] - positions[shells], axis=1)
    assert moved.min() > 1e-4
    np.testing.assert_allclose(found[shells], placed[shells], rtol=0, atol=1e-10)
    assert relaxed(x).item() == pytest.approx(energy, rel=1e-11)


def test_force_on_cores_when_shells_follow():
    """The graft's forces against differences of OpenMM's minimised energies."""
    system, positions = polarizable_water(2)
    for i in range(system.getNumParticles()):
        if not system.isVirtualSite(i):
            system.setParticleMass(i, 1e12)
    shells = mdgraft_openmm.drude_particles(system)
    relaxed = SelfConsistent(mdgraft.graft(system), shells)
    x = torch.tensor(positions, requires_grad=True)
    (gradient,) = torch.autograd.grad(relaxed(x), x)
    step = np.random.default_rng(0).normal(size=positions.shape)
    energies = [relaxed_by_openmm(system, positions + h * step, 1e-9)[1] for h in (-1e-5, 1e-5)]
    expected = (energies[1] - energies[0]) / 2e-5
    assert (gradient.numpy() * step).sum() == pytest.approx(expected, rel=1e-5)


def test_write_back():
    """New values reach the System, and a live Context through updateParametersInContext."""
    system, positions = drude_system(
        axes=[(0, 1, 2), (-1, -1, -1), (2, 3, 4)], screened=[(0, 1), (1, 2)]
    )
    context = reference_context(system)
    context.setPositions(positions)
    potential = mdgraft.graft(context)
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.07)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(torch.tensor(positions)).item() == pytest.approx(energy, rel=1e-10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.addParticle(99, 0, -1, -1, -1, 1, 1e-3, 1, 1), "entry 2 refers to"),
        (lambda f: f.addParticle(5, 6, 99, -1, -1, 1, 1e-3, 1, 1), "axis particles"),
        (lambda f: f.addParticle(1, 6, -1, -1, -1, 1, 1e-3, 1, 1), "more than one oscillator"),
        (lambda f: f.addScreenedPair(0, 7, 2.6), "entry 0 refers to"),
        (
            lambda f: [f.addScreenedPair(0, 1, 2.6), f.addScreenedPair(1, 0, 2.6)],
            "more than one screened pair",
        ),
    ],
)
def test_refuses_what_openmm_refuses(spoil, message):
    """Wrong indices, shared particles and repeated pairs."""
    system, _ = drude_system(axes=[(-1, -1, -1)] * 2)
    spoil(system.getForce(0))
    with pytest.raises(openmm.OpenMMException):
        openmm.Context(system, openmm.VerletIntegrator(0.001))
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)
