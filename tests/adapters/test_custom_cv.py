"""CustomCVForce and ATMForce: forces inside forces."""

import copy

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees

N = 10
BOX = np.diag([2.2, 2.3, 2.4])


def square(state):
    """At module level, so that it can be pickled."""
    x = state.getPositions(asNumpy=True)._value
    return np.sum(x**2), -2 * x


def torsion():
    force = openmm.CustomTorsionForce("scale*theta")
    force.addGlobalParameter("scale", 1.0)
    force.addTorsion(0, 1, 2, 3, [])
    return force


def bond(k=2.0):
    force = openmm.HarmonicBondForce()
    force.addBond(0, 4, 0.3, k)
    force.addBond(2, 5, 0.2, 3.0)
    return force


def nonbonded(method="NoCutoff"):
    rng = np.random.default_rng(1)
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(getattr(openmm.NonbondedForce, method))
    force.setCutoffDistance(1.0)
    for _ in range(N):
        force.addParticle(0.3 * rng.normal(), 0.2, 0.5)
    force.addException(0, 1, 0.0, 0.2, 0.0)
    return force


def cv(kind):
    table = openmm.Continuous1DFunction(np.random.default_rng(0).normal(size=15).tolist(), -3, 3)
    if kind == "umbrella":
        force = openmm.CustomCVForce("0.5*k*min(d, 6.283185-d)^2; d = abs(phi-phi0)")
        force.addGlobalParameter("k", 30.0)
        force.addGlobalParameter("phi0", 0.4)
        force.addEnergyParameterDerivative("phi0")
        force.addCollectiveVariable("phi", torsion())
    elif kind == "table":
        force = openmm.CustomCVForce("f(phi)*scale + 0*unused + g")
        force.addTabulatedFunction("f", table)
        force.addGlobalParameter("g", 2.0)
        force.addGlobalParameter("scale", 1.0)
        force.addCollectiveVariable("phi", torsion())
        force.addCollectiveVariable("unused", bond())
    elif kind == "mixed":
        force = openmm.CustomCVForce("sqrt(1+b.1^2)*cos(phi)+u/(1+u^2/1e4)")
        force.addCollectiveVariable("b.1", bond())
        force.addCollectiveVariable("phi", torsion())
        force.addCollectiveVariable("u", nonbonded("PME"))
    else:
        inner = openmm.CustomCVForce("phi^2")
        inner.addCollectiveVariable("phi", torsion())
        force = openmm.CustomCVForce("inner*b")
        force.addCollectiveVariable("inner", inner)
        force.addCollectiveVariable("b", bond())
    return force


def atm(kind):
    rng = np.random.default_rng(2)
    if kind == "custom":
        force = openmm.ATMForce("select(step(u1-u0), a*u1, u0)+b*(u1-u0)^2/(1+abs(u0))")
        force.addGlobalParameter("a", 0.4)
        force.addGlobalParameter("b", 0.1)
    else:
        force = openmm.ATMForce(0.2, 0.6, 0.1, 10.0, 1.0, 200.0, 100.0, 1.0 / 16, 1.0)
    force.addForce(nonbonded("PME" if kind == "periodic" else "NoCutoff"))
    force.addForce(bond())
    force.addForce(bond(7.0))
    for i in range(N):
        if kind == "offset" and i in (3, 6):
            # The second has an initial displacement as well.
            places = (7, 2) if i == 3 else (8, 1, 5, 4)
            offset = openmm.ParticleOffsetDisplacement(*places)
            force.addParticle(offset)
            # The force owns it now, which OpenMM's wrapper does not know.
            offset.thisown = False
        else:
            d1, d0 = (rng.normal(size=(2, 3)) * 0.1) if i % 3 == 0 else np.zeros((2, 3))
            force.addParticle(openmm.Vec3(*d1), openmm.Vec3(*d0))
    return force


def build(force):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for _ in range(N):
        system.addParticle(12.0)
    system.addForce(force)
    lattice = np.array([(i % 3, i // 3 % 3, i // 9) for i in range(N)]) * 0.45
    return system, lattice + np.random.default_rng(4).uniform(-0.08, 0.08, size=(N, 3))


@pytest.mark.parametrize("kind", ["umbrella", "table", "mixed", "nested"])
def test_collective_variables(kind):
    system, positions = build(cv(kind))
    assert_agrees(system, positions, translation_rtol=None)


@pytest.mark.parametrize("kind", ["default", "custom", "offset", "periodic"])
def test_alchemical_transfer(kind):
    system, positions = build(atm(kind))
    assert_agrees(system, positions, translation_rtol=None)


@pytest.mark.parametrize("energy", ["(1-l)*u0+l*u1", "select(l, u1, u0)"])
def test_an_end_state_with_an_infinite_energy(energy):
    """The copy on top of another particle has no weight, and leaves no trace in derivatives."""
    force = openmm.ATMForce(energy)
    force.addGlobalParameter("l", 0.0)
    inner = openmm.NonbondedForce()
    system = openmm.System()
    for k in range(3):
        system.addParticle(1.0)
        inner.addParticle(0.3, 0.3, 0.5)
        force.addParticle(openmm.Vec3(0.5 * (k == 0), 0, 0))
    force.addForce(inner)
    system.addForce(force)
    positions = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0.6, 0]], dtype=torch.float64)
    assert_agrees(system, positions.numpy(), gradients=False, second=False, consistent=False)
    potential = mdgraft.graft(system)
    potential(positions).backward()
    names = [n for n, p in potential.named_parameters() if not p.grad.isfinite().all()]
    assert names == []
    frames = torch.stack([positions, 1.1 * positions])
    single = torch.stack([torch.func.hessian(potential)(x) for x in frames])
    mapped = torch.func.vmap(torch.func.hessian(potential))(frames)
    assert single.isfinite().all()
    torch.testing.assert_close(mapped, single)


def test_names_and_routes():
    system, _ = build(cv("mixed"))
    system.addForce(atm("default"))
    potential = mdgraft.graft(system)
    names = set(dict(potential.named_parameters()))
    assert {"CustomCVForce.b_1.k", "CustomCVForce.u.charge", "globals.scale"} <= names
    assert {"ATMForce.HarmonicBondForce_1.k", "ATMForce.displacement1", "globals.Lambda1"} <= names
    assert potential.units["CustomCVForce.u.charge"] == "elementary charge"
    assert set(potential.routes.values()) == {"native"}


def test_write_back():
    system, positions = build(cv("mixed"))
    system.addForce(atm("offset"))
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    box = torch.tensor(BOX)
    with torch.no_grad():
        potential.get_parameter("ATMForce.displacement1")[0] += 0.1
        potential.get_parameter("globals.scale").fill_(1.5)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(potential(positions, box).item(), rel=1e-9)
    with torch.no_grad():
        potential.get_parameter("CustomCVForce.b_1.k").mul_(1.5)
    with pytest.raises(mdgraft.ParameterMismatchError, match="changes of b_1"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    again = mdgraft.graft(system)
    torch.testing.assert_close(again(positions, box), potential(positions, box))
    with torch.no_grad():
        potential.get_parameter("ATMForce.HarmonicBondForce_1.k").mul_(1.5)
    with pytest.raises(mdgraft.ParameterMismatchError, match="HarmonicBondForce_1 differ, but"):
        mdgraft_openmm.write_parameters(potential, system)
    with torch.no_grad():
        potential.get_parameter("ATMForce.displacement1")[3] = 0.1
    with pytest.raises(mdgraft.ParameterMismatchError, match="particle 3 is displaced by other"):
        mdgraft_openmm.write_parameters(potential, system)


def test_two_variables_of_one_name():
    """OpenMM takes the energy of one and the forces of both."""
    force = openmm.CustomCVForce("v")
    force.addCollectiveVariable("v", bond())
    force.addCollectiveVariable("v", torsion())
    with pytest.raises(mdgraft.InvalidInputError, match="two collective variables are called 'v'"):
        mdgraft.graft(build(force)[0])


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="came with OpenMM 8.5")
def test_a_variable_without_a_native_form():
    force = openmm.CustomCVForce("0.5*s^2")
    force.addCollectiveVariable("s", openmm.PythonForce(square))
    system, positions = build(force)
    potential = mdgraft.graft(system)
    assert potential.routes == {"CustomCVForce": "host"}
    x = torch.tensor(positions, requires_grad=True)
    energy = potential(x)
    torch.testing.assert_close(energy, 0.5 * (x**2).sum() ** 2)
    (gradient,) = torch.autograd.grad(energy, x)
    torch.testing.assert_close(gradient, 2 * (x**2).sum().detach() * x.detach())


@pytest.mark.parametrize("name", ["energy", "units", "kind", "training", "global_names", "type"])
def test_variables_may_be_called_like_what_terms_keep(name):
    force = openmm.CustomCVForce(f"{name}^2")
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1, 10.0)
    force.addCollectiveVariable(name, bond)
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(force)
    potential = mdgraft.graft(system)
    assert f"CustomCVForce.{name}.k" in dict(potential.named_parameters())
    assert isinstance(potential.get_parameter(f"CustomCVForce.{name}.k"), torch.nn.Parameter)
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.0]], dtype=torch.float64)
    assert potential(x).item() == pytest.approx(0.2**2)
    assert copy.deepcopy(potential)(x).item() == pytest.approx(0.2**2)
