"""AmoebaWcaDispersionForce against OpenMM's Reference platform."""

import math

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, reference_context


def wca_system(*, n=8, spacing=0.22, radii=(0.1, 0.2), zero=(), seed=3, **options):
    """Atoms on a jittered cube."""
    rng = np.random.default_rng(seed)
    system, force = openmm.System(), openmm.AmoebaWcaDispersionForce()
    for i in range(n):
        system.addParticle(1.0)
        epsilon = 0.0 if i in zero else rng.uniform(0.1, 0.6)
        force.addParticle(rng.uniform(*radii), epsilon)
    for key, value in options.items():
        getattr(force, f"set{key}")(value)
    system.addForce(force)
    lattice = np.array([[i % 2, i // 2 % 2, i // 4] for i in range(n)], float)
    return system, spacing * lattice + rng.uniform(-0.03, 0.03, (n, 3))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        # Atoms so close or far apart that each branch of the integral occurs.
        dict(spacing=0.12),
        dict(spacing=0.35, radii=(0.05, 0.4)),
        dict(spacing=0.6, radii=(0.05, 0.3)),
        dict(Dispoff=0.3),
        dict(Shctd=1.0, Slevy=0.7, Awater=20.0, Dispoff=0.02),
        dict(n=1),
    ],
)
def test_agrees(options):
    """Energy, forces, parameters and second derivatives, in every variant."""
    system, positions = wca_system(**options)
    assert_agrees(system, positions)


def test_atoms_without_a_well():
    """Atoms that water does not see still hide water from others."""
    system, positions = wca_system(zero=(0, 3))
    potential = assert_agrees(system, positions, gradients=False)
    energy = potential(torch.tensor(positions)).sum()
    for gradient in torch.autograd.grad(energy, list(potential.parameters())):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dispoff", [0.05, 0.3])
def test_single_atom(dispoff):
    """The integral over all space, by quadrature."""
    system, positions = wca_system(n=1, Dispoff=dispoff)
    force = system.getForce(0)
    radius, epsilon = (float(v._value) for v in force.getParticleParameters(0))
    energy = 0.0
    for depth, water, count in (
        (force.getEpso()._value, force.getRmino()._value, 1),
        (force.getEpsh()._value, force.getRminh()._value, 2),
    ):
        mixed = 4 * depth * epsilon / (math.sqrt(depth) + math.sqrt(epsilon)) ** 2
        minimum = 2 * (water**3 + radius**3) / (water**2 + radius**2)
        nodes, weights = np.polynomial.legendre.leggauss(200)
        # In 1/x the integrand is a polynomial beyond the minimum.
        top = 1 / max(minimum, minimum / 2 + dispoff)
        x = 2 / (top * (nodes + 1))
        u = (minimum / x) ** 14 - 2 * (minimum / x) ** 7
        integral = 4 * math.pi * (0.5 * top * weights * u * x**4).sum()
        integral -= 4 / 3 * math.pi * max(minimum**3 - (minimum / 2 + dispoff) ** 3, 0.0)
        energy += count * mixed * integral
    energy *= force.getAwater()._value
    assert mdgraft.graft(system)(torch.tensor(positions)).item() == pytest.approx(energy, rel=1e-9)


def test_write_back():
    """A live Context takes particles, a System also the properties of water."""
    system, positions = wca_system()
    context = reference_context(system)
    context.setPositions(positions)
    potential = mdgraft.graft(system)
    values = dict(potential.named_parameters())
    with torch.no_grad():
        for key in ("radius", "epsilon"):
            values[f"AmoebaWcaDispersionForce.{key}"].mul_(1.1)
    x = torch.tensor(positions)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(x).item() == pytest.approx(energy, rel=1e-10)
    with torch.no_grad():
        for key in ("epso", "epsh", "rmino", "rminh", "awater", "shctd", "dispoff", "slevy"):
            values[f"AmoebaWcaDispersionForce.{key}"].mul_(1.05)
    with pytest.raises(mdgraft.ParameterMismatchError, match="epso, epsh"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert potential(x).item() == pytest.approx(energy, rel=1e-10)


def test_refuses_a_wrong_count():
    """One entry for each particle."""
    system, _ = wca_system()
    system.addParticle(1.0)
    with pytest.raises(openmm.OpenMMException):
        reference_context(system)
    with pytest.raises(mdgraft.InvalidInputError, match="has 8 particles, the System 9"):
        mdgraft.graft(system)
