"""Terms that OpenMM evaluates: the numbers of native ones, and forces without a native form.

PythonForce among them.
"""

import copy
import pickle

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft.testing import check_potential
from mdgraft_openmm.forces import CONVERTERS

BOX = np.diag([2.0, 2.1, 2.2])
with_python_force = pytest.mark.skipif(
    not hasattr(openmm, "PythonForce"), reason="PythonForce came with OpenMM 8.5"
)


def quartic(state):
    """At module level, so that it can be pickled."""
    k, x = state.getParameters()["k"], state.getPositions(asNumpy=True)._value
    return k * np.sum(x**4), -4 * k * x**3


def native_system(*, sites=False):
    """Bonds, angles, torsions with a global parameter, and nonbonded interactions by PME."""
    rng = np.random.default_rng(5)
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    bonds, angles, torsions = (
        openmm.HarmonicBondForce(),
        openmm.HarmonicAngleForce(),
        openmm.PeriodicTorsionForce(),
    )
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.PME)
    nonbonded.setCutoffDistance(0.9)
    nonbonded.addGlobalParameter("lambda", 0.6)
    for _ in range(6):
        system.addParticle(12.0)
        nonbonded.addParticle(0.3 * rng.normal(), 0.25, 0.4)
    nonbonded.addParticleParameterOffset("lambda", 1, 0.2, 0.01, 0.1)
    for i in range(3):
        bonds.addBond(i, i + 1, 0.2, 900.0)
        nonbonded.addException(i, i + 1, 0.1 * i, 0.2, 0.0)
    angles.addAngle(0, 1, 2, 1.9, 80.0)
    torsions.addTorsion(0, 1, 2, 3, 3, 0.4, 5.0)
    for force in (bonds, angles, torsions, nonbonded):
        system.addForce(force)
    positions = rng.uniform(0.0, 1.4, size=(6, 3))
    if sites:
        system.addParticle(0.0)
        nonbonded.addParticle(-0.4, 0.2, 0.1)
        nonbonded.addException(0, 6, 0.0, 0.1, 0.0)
        nonbonded.addException(1, 6, 0.0, 0.1, 0.0)
        system.setVirtualSite(6, openmm.TwoParticleAverageSite(0, 1, 0.3, 0.7))
        positions = np.concatenate([positions, np.zeros((1, 3))])
    return system, torch.tensor(positions), torch.tensor(BOX)


def derivatives(potential, x, h):
    """Energy, first derivatives in everything and their product with a direction, by name."""
    x, h = x.clone().requires_grad_(), h.clone().requires_grad_()
    inputs = {"positions": x, "box": h, **dict(potential.named_parameters())}
    energy = potential(x, h)
    first = torch.autograd.grad(energy, list(inputs.values()), create_graph=True)
    random = torch.Generator().manual_seed(1)
    along = torch.randn(x.shape, generator=random, dtype=torch.float64)
    second = torch.autograd.grad((first[0] * along).sum(), list(inputs.values()), allow_unused=True)
    return energy, dict(zip(inputs, first, strict=True)), dict(zip(inputs, second, strict=True))


@pytest.mark.parametrize("sites", [False, True], ids=["plain", "sites"])
def test_agrees_with_the_native_route_to_second_order(sites):
    system, x, h = native_system(sites=sites)
    native, host = mdgraft.graft(system), mdgraft.graft(system, route="host")
    assert set(native.routes.values()) == {"native"} and set(host.routes.values()) == {"host"}
    assert dict(native.named_parameters()).keys() == dict(host.named_parameters()).keys()
    assert native.units == host.units
    expected, answered = derivatives(native, x, h), derivatives(host, x, h)
    energy = expected[0].item()
    assert answered[0].item() == pytest.approx(energy, rel=1e-12)
    for order, rtol in ((1, 2e-9), (2, 3e-8)):
        for name, truth in expected[order].items():
            found = answered[order][name]
            if truth is None:
                assert found is None or not found.any()
                continue
            if name == "box":
                # A reduced box has six entries; the host knows no others.
                assert not found.triu(1).any()
                truth = truth.tril()
            # Differences resolve no more than the rounding of the energy lets them.
            scale = max(truth.abs().max().item(), 0.01 * abs(energy))
            torch.testing.assert_close(found, truth, rtol=0, atol=rtol * scale, msg=name)


def test_transforms_batches_and_precision():
    system, x, h = native_system()
    native, host = mdgraft.graft(system), mdgraft.graft(system, route="host")
    hessian = torch.func.hessian(lambda y: host(y, h))(x)
    truth = torch.func.hessian(lambda y: native(y, h))(x)
    torch.testing.assert_close(hessian, truth, rtol=0, atol=1e-8 * truth.abs().max().item())
    tangent = torch.ones_like(x)
    torch.testing.assert_close(
        torch.func.jvp(lambda y: host(y, h), (x,), (tangent,))[1],
        torch.func.jvp(lambda y: native(y, h), (x,), (tangent,))[1],
        rtol=1e-9,
        atol=1e-8,
    )
    frames = torch.stack([x, x + 0.01, 0.99 * x])
    torch.testing.assert_close(torch.vmap(lambda y: host(y, h))(frames), native(frames, h))
    single = mdgraft.graft(system, route="host", dtype=torch.float32)
    assert single(x.float(), h.float()).dtype == torch.float32
    scales = torch.linspace(0.9, 1.1, 3, dtype=torch.float64)

    def scaled(potential, factor):
        changed = {"HarmonicBondForce.k": factor * potential.get_parameter("HarmonicBondForce.k")}
        return torch.func.functional_call(potential, changed, (x, h))

    torch.testing.assert_close(
        torch.vmap(lambda s: scaled(host, s))(scales),
        torch.vmap(lambda s: scaled(native, s))(scales),
    )


@with_python_force
@pytest.mark.parametrize("closure", [False, True], ids=["pickled", "closure"])
def test_python_force(closure):
    """The second kind cannot be copied, so it is evaluated among the other forces."""
    system, x, h = native_system(sites=True)
    exponent = 4

    def local(state):
        k, y = state.getParameters()["k"], state.getPositions(asNumpy=True)._value
        return k * np.sum(y**exponent), -exponent * k * y ** (exponent - 1)

    system.addForce(openmm.PythonForce(local if closure else quartic, {"k": 2.5}))
    groups = [force.getForceGroup() for force in system.getForces()]
    potential = mdgraft.graft(system)
    assert potential.routes["PythonForce"] == "host"
    assert potential.routes["NonbondedForce"] == "native"
    assert potential.get_parameter("globals.k").item() == 2.5
    x = potential._modules["sites"](x[None], h[None])[0].detach()
    energy = potential.energy_by_term(x, h)["PythonForce"]
    torch.testing.assert_close(energy, 2.5 * (x**4).sum())
    (slope,) = torch.autograd.grad(energy, potential.get_parameter("globals.k"))
    torch.testing.assert_close(slope, (x**4).sum(), rtol=1e-10, atol=0)
    potential.freeze("*")
    bare = mdgraft.Potential(
        {"PythonForce": potential.term("PythonForce")},
        n_particles=7,
        global_parameters={"k": torch.tensor(2.5, dtype=torch.float64)},
    )
    if not closure:
        check_potential(bare, x + 0.3, translation_rtol=None)
    assert [force.getForceGroup() for force in system.getForces()] == groups


def differentiated(state):
    """A model that differentiates itself."""
    x = torch.tensor(state.getPositions(asNumpy=True)._value, requires_grad=True)
    energy = (x[1:] - x[:-1]).pow(4).sum()
    energy.backward()
    return energy.item(), -x.grad.numpy()


@with_python_force
def test_python_force_that_uses_torch():
    """Inside an autograd function gradients are off, inside inference mode tensors are dead."""
    system, x, h = native_system()
    system.addForce(openmm.PythonForce(differentiated, {}))
    potential = mdgraft.graft(system)

    def term(y):
        return potential.energy_by_term(y, h)["PythonForce"]

    def truth(y):
        return (y[1:] - y[:-1]).pow(4).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        expected = transform(truth)(x)
        torch.testing.assert_close(
            transform(term)(x), expected, rtol=0, atol=1e-7 * expected.abs().max().item()
        )
    with torch.inference_mode():
        assert term(x).item() == pytest.approx(truth(x).item())


@with_python_force
def test_python_force_in_a_context():
    system, x, _ = native_system()
    force = openmm.PythonForce(quartic, {"k": 2.5})
    system.addForce(force)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(x.numpy())
    context.setParameter("k", 1.5)
    potential = mdgraft.graft(context)
    assert potential.get_parameter("globals.k").item() == 1.5
    with torch.no_grad():
        potential.get_parameter("globals.k").fill_(0.75)
    mdgraft_openmm.write_parameters(potential, context)
    assert context.getParameter("k") == 0.75
    with pytest.raises(
        mdgraft.ParameterMismatchError, match=r"globals\.k: its force has no setter"
    ):
        mdgraft_openmm.write_parameters(potential, system)


def test_unknown_class(monkeypatch):
    """A class without a converter has forces, box derivatives and its global parameters."""
    system, x, h = native_system()
    native = mdgraft.graft(system)
    truth = native.energy_by_term(x, h)["NonbondedForce"]
    slope = torch.autograd.grad(truth, native.get_parameter("globals.lambda"))[0]
    monkeypatch.delitem(CONVERTERS, openmm.NonbondedForce)
    potential = mdgraft.graft(system)
    assert potential.routes["NonbondedForce"] == "host"
    assert [n for n, _ in potential.named_parameters() if n.startswith("Nonbonded")] == []
    energy = potential.energy_by_term(x, h)["NonbondedForce"]
    torch.testing.assert_close(energy, truth, rtol=1e-12, atol=0)
    found = torch.autograd.grad(energy, potential.get_parameter("globals.lambda"))[0]
    torch.testing.assert_close(found, slope, rtol=1e-8, atol=0)
    with torch.no_grad():
        potential.get_parameter("globals.lambda").fill_(0.9)
    mdgraft_openmm.write_parameters(potential, system)
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    assert force.getGlobalParameterDefaultValue(0) == 0.9
    with pytest.raises(mdgraft.UnsupportedForceError, match=r"NonbondedForce \(NonbondedForce\)"):
        mdgraft.graft(system, route="native")


def test_host_potential_runs_on_the_platform_of_its_context():
    system, x, h = native_system()
    native = mdgraft.graft(system)
    for name, rtol in (("Reference", 1e-12), ("CPU", 1e-4)):
        context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(name)
        )
        context.setPositions(x.numpy() + 1.0)
        potential = mdgraft_openmm.HostPotential(context)
        assert {potential.term(n).engine.platform for n in potential.term_names} == {name}
        torch.testing.assert_close(potential(x, h), native(x, h), rtol=rtol, atol=0)
        forces = native.forces(x, h).detach()
        torch.testing.assert_close(
            potential.forces(x, h).detach(), forces, rtol=0, atol=rtol * forces.abs().max().item()
        )
        # The user's own Context has not moved.
        kept = context.getState(positions=True).getPositions(asNumpy=True)._value
        np.testing.assert_allclose(kept, x.numpy() + 1.0, rtol=1e-6)
        assert potential.term("HarmonicBondForce").engine.steps.positions == (
            1e-6 if name == "Reference" else 1e-3
        )


def test_route_by_term_and_tied_parameters():
    system, x, h = native_system()
    native = mdgraft.graft(system)
    potential = mdgraft.graft(system, route={"Harmonic*": "host"})
    assert potential.routes == {
        "HarmonicBondForce": "host",
        "HarmonicAngleForce": "host",
        "PeriodicTorsionForce": "native",
        "NonbondedForce": "native",
    }
    for p in (native, potential):
        p.tie("k", {"HarmonicBondForce.k": None})
        (g,) = torch.autograd.grad(p(x, h), p.get_parameter("tied.k"))
        p.slope = g
    torch.testing.assert_close(potential.slope, native.slope, rtol=1e-10, atol=0)
    with torch.no_grad():
        potential.get_parameter("tied.k").fill_(500.0)
    mdgraft_openmm.write_parameters(potential, system)
    assert system.getForce(0).getBondParameters(2)[3]._value == 500.0
    torch.testing.assert_close(mdgraft.graft(system)(x, h), potential(x, h), rtol=1e-12, atol=0)


def test_declared_derivatives_are_those_of_the_host():
    """Exact to rounding, which differences are not."""
    system = openmm.System()
    force = openmm.CustomBondForce("scale^3*r^2")
    force.addGlobalParameter("scale", 1.7)
    force.addEnergyParameterDerivative("scale")
    for _ in range(2):
        system.addParticle(1.0)
    force.addBond(0, 1, [])
    system.addForce(force)
    potential = mdgraft.graft(system, route="host")
    x = torch.tensor([[0.0, 0, 0], [0.3, 0.4, 0.0]], dtype=torch.float64, requires_grad=True)
    scale = potential.get_parameter("globals.scale")
    (slope,) = torch.autograd.grad(potential(x), scale, create_graph=True)
    assert slope.item() == pytest.approx(3 * 1.7**2 * 0.25, rel=1e-15)
    mixed, curvature = torch.autograd.grad(slope, [x, scale])
    torch.testing.assert_close(mixed[1], 6 * 1.7**2 * x[1].detach(), rtol=1e-9, atol=0)
    assert curvature.item() == pytest.approx(6 * 1.7 * 0.25, rel=1e-9)


def test_copies_and_pickles():
    system, x, h = native_system()
    potential = mdgraft.graft(system, route="host")
    for other in (copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        torch.testing.assert_close(other(x, h), potential(x, h))
        torch.testing.assert_close(other.forces(x, h), potential.forces(x, h))


def test_third_derivatives_raise():
    system, x, h = native_system()
    potential = mdgraft.graft(system, route="host").freeze("*")
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(potential(y, h), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y, create_graph=True)
    with pytest.raises(mdgraft.UnsupportedDerivativeError, match="second order"):
        torch.autograd.grad(second.sum(), y)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("fast", "route: got 'fast'"),
        ({"HarmonicBondForce": "fast"}, "route: got 'fast'"),
        ({"Custom*": "host"}, r"route: 'Custom\*' matches no term"),
    ],
)
def test_routes_that_make_no_sense(route, message):
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(native_system()[0], route=route)


def test_parameters_that_the_host_refuses():
    system, x, h = native_system()
    potential = mdgraft.graft(system, route="host")
    with torch.no_grad():
        potential.get_parameter("NonbondedForce.sigma")[2] = -0.1
    with pytest.raises(mdgraft.InvalidInputError, match=r"sigma: entry 2 is -0\.1"):
        potential(x, h)
    with pytest.raises(mdgraft.MissingBoxError):
        potential(x)
