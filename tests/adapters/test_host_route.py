"""Terms that OpenMM evaluates: the numbers of native ones, and forces without a native form.

PythonForce among them.
"""

import concurrent.futures
import copy
import pickle

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft.testing import check_potential
from mdgraft_openmm._engine import ForceEngine
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
        with torch.no_grad():
            lower, upper = (native(x, h + t * torch.eye(3)) for t in (-1e-5, 1e-5))
        cell = h.clone().requires_grad_()
        (slope,) = torch.autograd.grad(potential(x, cell), cell)
        # Differences of energies that are single precision in part.
        assert slope.trace().item() == pytest.approx(
            ((upper - lower) / 2e-5).item(), rel=1e-6 if name == "Reference" else 3e-3
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


def third_by_autograd(energy, x):
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(y), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y, create_graph=True)
    return torch.autograd.grad(second.sum(), y)


def third_by_backward(energy, x):
    y = x.clone().requires_grad_()
    torch.autograd.functional.vhp(energy, y, torch.ones_like(y), create_graph=True)[
        1
    ].sum().backward()


@pytest.mark.parametrize(
    "third",
    [
        third_by_autograd,
        third_by_backward,
        lambda energy, x: torch.func.jacfwd(torch.func.hessian(energy))(x),
        lambda energy, x: torch.func.jacrev(torch.func.jacfwd(torch.func.jacfwd(energy)))(x),
    ],
)
def test_third_derivatives_raise(third):
    system, x, h = native_system()
    potential = mdgraft.graft(system, route="host").freeze("*")
    with pytest.raises(mdgraft.UnsupportedDerivativeError, match="second order"):
        third(lambda y: potential(y, h), x)


def product(energy, x):
    """Hessian times vector, by a derivative of the gradient's own backward pass."""
    return torch.autograd.functional.hvp(energy, x, torch.sin(40 * x))[1]


def rows_of_product(energy, x):
    """What a product depends on linearly is no third derivative."""
    gradient = torch.func.vjp(torch.func.grad(energy), x)[1]
    return torch.func.jacrev(lambda v: gradient(v)[0])(torch.sin(40 * x))


@pytest.mark.parametrize(
    "second",
    [
        product,
        rows_of_product,
        lambda energy, x: torch.func.jacfwd(torch.func.jacfwd(energy))(x),
        lambda energy, x: torch.func.jacrev(torch.func.jacfwd(energy))(x),
        lambda energy, x: torch.func.jacrev(torch.func.jacrev(energy))(x),
    ],
)
def test_every_way_to_the_second_order(second):
    system, x, h = native_system(sites=True)
    native, host = mdgraft.graft(system), mdgraft.graft(system, route="host")
    expected, found = second(lambda y: native(y, h), x), second(lambda y: host(y, h), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_costs_only_what_is_asked_for(monkeypatch):
    """Trainable parameters cost energies when their derivatives are wanted, not before."""
    system, x, h = native_system()
    potential = mdgraft.graft(system, route="host")
    calls = []
    state = ForceEngine._state

    def counted(self, **wanted):
        calls.append(wanted)
        return state(self, **wanted)

    monkeypatch.setattr(ForceEngine, "_state", counted)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential(y, h), y, create_graph=True)
    assert len(calls) == 4
    torch.autograd.grad(gradient.square().sum(), y, retain_graph=True)
    assert len(calls) == 12
    torch.autograd.grad(gradient.sum(), potential.get_parameter("HarmonicBondForce.k"))
    assert len(calls) <= 12 + 1 + 3 * 4


@with_python_force
def test_python_force_among_forces_of_every_group():
    """Where it cannot be copied, other forces in its group, or their reciprocal space, stay out."""
    system, x, h = native_system()
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    nonbonded.setReciprocalSpaceForceGroup(1)
    for group in range(32):
        restraint = openmm.CustomExternalForce("x")
        restraint.addParticle(0, [])
        restraint.setForceGroup(group)
        system.addForce(restraint)
    system.addForce(openmm.PythonForce(lambda state: quartic(state), {"k": 2.5}))

    def groups():
        both = ("getForceGroup", "getReciprocalSpaceForceGroup")
        return [getattr(f, name)() for f in system.getForces() for name in both if hasattr(f, name)]

    before = groups()
    energy = mdgraft.graft(system).energy_by_term(x, h)["PythonForce"]
    torch.testing.assert_close(energy, 2.5 * (x**4).sum(), rtol=1e-12, atol=0)
    assert groups() == before


SITES = {
    "average": lambda: openmm.TwoParticleAverageSite(0, 1, 0.3, 0.7),
    "out of plane": lambda: openmm.OutOfPlaneSite(0, 1, 2, 0.3, 0.4, 1.5),
    "local coordinates": lambda: openmm.LocalCoordinatesSite(
        [0, 1, 2], [0.2, 0.3, 0.5], [-1, 1, 0], [0, -1, 1], openmm.Vec3(0.1, 0.05, -0.08)
    ),
}


@with_python_force
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_python_force_on_virtual_sites(site):
    """Where it cannot be copied, its System hands forces of sites to their parents, once."""
    answers = []
    for function in (quartic, lambda state: quartic(state)):
        system, x, h = native_system(sites=True)
        system.setVirtualSite(6, site())
        system.addForce(openmm.PythonForce(function, {"k": 2.5}))
        potential = mdgraft.graft(system)
        y, k = x.clone().requires_grad_(), potential.get_parameter("globals.k")
        energy = potential.energy_by_term(y, h)["PythonForce"]
        (first,) = torch.autograd.grad(energy, y, create_graph=True)
        second = torch.autograd.grad((first * torch.sin(40 * x)).sum(), [y, k])
        answers.append((energy, first, *second))
    for expected, found in zip(*answers, strict=True):
        bound = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@with_python_force
def test_symmetry_sites_beside_a_function_that_cannot_be_pickled():
    system, _, _ = native_system(sites=True)
    axes = [openmm.Vec3(*row) for row in np.eye(3)]
    system.setVirtualSite(6, openmm.SymmetrySite(0, *axes, openmm.Vec3(0, 0, 1), False))
    mdgraft.graft(system)
    system.addForce(openmm.PythonForce(lambda state: quartic(state), {"k": 2.5}))
    with pytest.raises(mdgraft.UnsupportedForceError, match="top level of a module"):
        mdgraft.graft(system)


@with_python_force
def test_threads_take_turns():
    """OpenMM lets other threads run while it computes."""
    system, x, h = native_system()
    system.addForce(openmm.PythonForce(lambda state: quartic(state), {"k": 2.5}))
    potential = mdgraft.graft(system, route="host").freeze("*")
    frames = x + 0.02 * torch.sin(torch.arange(60.0).double()[:, None, None] * torch.ones(6, 3))

    def answer(frame):
        y = frame.clone().requires_grad_()
        energy = potential(y, h)
        return torch.cat([energy[None], torch.autograd.grad(energy, y)[0].reshape(-1)]).detach()

    expected = torch.stack(list(map(answer, frames)))
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        found = torch.stack(list(executor.map(answer, frames)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)


@with_python_force
def test_class_that_does_not_say_whether_it_is_periodic(monkeypatch):
    def silent(self):
        raise openmm.OpenMMException("This Force does not implement it")

    system, x, _ = native_system()
    while system.getNumForces():
        system.removeForce(0)
    system.addForce(openmm.PythonForce(quartic, {"k": 2.5}))
    monkeypatch.setattr(openmm.PythonForce, "usesPeriodicBoundaryConditions", silent)
    torch.testing.assert_close(mdgraft.graft(system)(x), 2.5 * (x**4).sum(), rtol=1e-12, atol=0)


@with_python_force
def test_function_that_cannot_be_pickled():
    system, x, h = native_system()
    system.addForce(openmm.PythonForce(lambda state: quartic(state), {"k": 2.5}))
    potential = mdgraft.graft(system)
    other = copy.deepcopy(potential)
    with torch.no_grad():
        other.get_parameter("globals.k").fill_(5.0)
    for p, k in ((other, 5.0), (potential, 2.5), (other, 5.0)):
        energy = p.energy_by_term(x, h)["PythonForce"]
        torch.testing.assert_close(energy, k * (x**4).sum(), rtol=1e-12, atol=0)
    with pytest.raises(TypeError, match="PythonForce: .* can be copied but not pickled"):
        pickle.dumps(potential)


@with_python_force
@pytest.mark.parametrize("kind", ["CustomCVForce", "ATMForce"])
def test_function_that_cannot_be_pickled_inside_another_force(kind):
    """OpenMM itself wants to copy it."""
    system, _, _ = native_system()
    inner = openmm.PythonForce(lambda state: quartic(state), {"k": 2.5})
    if kind == "CustomCVForce":
        force = openmm.CustomCVForce("v")
        force.addCollectiveVariable("v", inner)
    else:
        force = openmm.ATMForce("u0")
        force.addForce(inner)
        for _ in range(6):
            force.addParticle()
    system.addForce(force)
    with pytest.raises(mdgraft.InvalidInputError, match=f"{kind}: OpenMM cannot run it"):
        mdgraft.graft(system)


def bounded(state):
    """Defined for 0 <= k <= 1 only."""
    k, x = state.getParameters()["k"], state.getPositions(asNumpy=True)._value
    if not 0 <= k <= 1:
        raise ValueError("k is out of range")
    return k**2 * np.sum(x**2), -2 * k**2 * x


@with_python_force
@pytest.mark.parametrize("k", [0.0, 0.4, 1.0])
def test_global_parameter_at_its_border(k):
    system, x, h = native_system()
    system.addForce(openmm.PythonForce(bounded, {"k": k}))
    potential = mdgraft.graft(system)
    energy = potential.energy_by_term(x, h)["PythonForce"]
    (slope,) = torch.autograd.grad(energy, potential.get_parameter("globals.k"))
    truth = 2 * k * (x**2).sum().item()
    assert slope.item() == pytest.approx(truth, rel=1e-10, abs=1e-10)


def test_roots_at_zero():
    """What has no derivative is zero by definition, as natively, or refused; never a number."""
    system, x, h = native_system()
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    # The second has an offset, and so a derivative.
    for i in (0, 1):
        force.setParticleParameters(i, 0.2, 0.25, 0.0)
    native, host = mdgraft.graft(system), mdgraft.graft(system, route="host")
    name = "NonbondedForce.epsilon"
    slopes = [
        torch.autograd.grad(p(x, h), p.get_parameter(name))[0]
        for p in (native, host.freeze("globals.*"))
    ]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-8)
    force.setGlobalParameterDefaultValue(0, 0.0)
    host = mdgraft.graft(system, route="host")
    with pytest.raises(mdgraft.UnsupportedDerivativeError, match=r"globals\.lambda: .* freeze it"):
        torch.autograd.grad(host(x, h), host.get_parameter("globals.lambda"))


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
