"""Exports with derivatives in global parameters: the same as without them, whatever OpenMM does."""

import concurrent.futures
import copy
import gc
import pickle
import warnings
import weakref

import mdgraft
import numpy as np
import openmm
import pytest
import torch
from exported import (
    BOX,
    CALLBACKS,
    GLOBALS,
    POSITIONS,
    N,
    Periodic,
    Springs,
    evaluate,
    expected,
    open_context,
)
from mdgraft import InvalidInputError, MDGraftWarning, UnavailableBackendError
from mdgraft_openmm import to_force

SQUARE = float((POSITIONS**2).sum())


PYTHON = CALLBACKS["PythonForce"]
pytestmark = pytest.mark.usefixtures("each_callback")


def exported(module, **options):
    return to_force(module, **({"global_parameters": GLOBALS, "backend": PYTHON} | options))


# What OpenMM does with forces ---------------------------------------------------------------------


def _verlet():
    return openmm.VerletIntegrator(0.002), []


def _multiple_steps():
    return openmm.MTSIntegrator(0.004, [(0, 1), (3, 4)]), []


def _nose_hoover():
    return openmm.NoseHooverIntegrator(300.0, 1.0, 0.002), []


def _barostat():
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 2)
    barostat.setRandomNumberSeed(5)
    return openmm.VerletIntegrator(0.001), [barostat]


def _flexible_barostat():
    barostat = openmm.MonteCarloFlexibleBarostat(1.0, 300.0, 2)
    barostat.setRandomNumberSeed(5)
    return openmm.VerletIntegrator(0.001), [barostat]


RUNS = {
    "Verlet": (Springs, _verlet),
    "multiple time steps": (Springs, _multiple_steps),
    "Nose-Hoover": (Springs, _nose_hoover),
    "barostat": (Periodic, _barostat),
    "flexible barostat": (Periodic, _flexible_barostat),
}


@pytest.mark.parametrize("platform", ["Reference", "CPU", "OpenCL single"])
@pytest.mark.parametrize("run", RUNS)
def test_trajectories_are_those_of_a_bare_force(run, platform):
    make, how = RUNS[run]
    ends = []
    for slopes in (False, True):
        integrator, others = how()
        force = exported(
            make(), periodic=make is Periodic, force_group=3, parameter_derivatives=slopes
        )
        context = open_context(
            [force, *others],
            box=10 * BOX if make is Periodic else None,
            platform=platform,
            integrator=integrator,
        )
        context.setPositions(POSITIONS)
        context.setVelocitiesToTemperature(300.0, 1)
        context.setParameter("k", 20.0)
        integrator.step(40)
        state = context.getState(positions=True, energy=True)
        box = state.getPeriodicBoxVectors(asNumpy=True)._value
        ends.append((state.getPositions(asNumpy=True)._value, box))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-9)
    assert np.abs(ends[0][0] - POSITIONS).max() > 1e-3


def test_minimised_as_a_bare_force():
    for start in (1.0, 1e4):
        ends = []
        for slopes in (False, True):
            context = open_context(exported(Springs(), parameter_derivatives=slopes))
            context.setPositions(start * POSITIONS)
            openmm.LocalEnergyMinimizer.minimize(context, 1e-3)
            ends.append(context.getState(energy=True).getPotentialEnergy()._value)
        assert ends[1] == pytest.approx(ends[0], rel=1e-9)


def test_checkpoints_and_states():
    context = open_context(exported(Springs()))
    context.setPositions(POSITIONS)
    context.setParameter("k", 2.0)
    context.getIntegrator().step(3)
    kept = context.createCheckpoint()
    state = context.getState(positions=True, velocities=True, parameters=True)
    text = openmm.XmlSerializer.serialize(state)

    def found():
        now = context.getState(energy=True, parameterDerivatives=True)
        return now.getPotentialEnergy()._value, now.getEnergyParameterDerivatives()["k"]

    truth = found()
    for restore in (
        lambda: context.loadCheckpoint(kept),
        lambda: context.setState(openmm.XmlSerializer.deserialize(text)),
        lambda: context.reinitialize(preserveState=True),
    ):
        restore()
        assert found() == pytest.approx(truth, rel=1e-12)
        context.setParameter("k", 7.0)
        context.getIntegrator().step(5)
        context.setParameter("k", 2.0)
        context.loadCheckpoint(kept)


def test_virtual_sites():
    ends = []
    for slopes in (False, True):
        system = openmm.System()
        for i in range(N):
            system.addParticle(12.0 * (i != 3))
        system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.3, 0.7))
        system.addForce(exported(Springs(), parameter_derivatives=slopes))
        platform = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.002), platform)
        context.setPositions(POSITIONS)
        context.computeVirtualSites()
        context.getIntegrator().step(40)
        ends.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-12)


def _inside_variables(force):
    outer = openmm.CustomCVForce("0.3*v^2")
    outer.addCollectiveVariable("v", force)
    return outer


def _inside_atm(force):
    outer = openmm.ATMForce(0.3, 0.3, 0, 0, 0, 0, 0, 0, 1)
    for i in range(N):
        outer.addParticle(openmm.Vec3(0.1 * (i == 2), 0, 0))
    outer.addForce(force)
    return outer


@pytest.mark.parametrize("outer", [_inside_variables, _inside_atm])
def test_inside_of_other_forces(outer):
    """Evaluated there, with its parameters, and grafted natively."""
    energies = []
    for slopes in (False, True):
        system = openmm.System()
        for _ in range(N):
            system.addParticle(12.0)
        system.addForce(outer(exported(Springs(), parameter_derivatives=slopes)))
        platform = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
        context.setParameter("k", 1.1)
        energies.append(evaluate(context, POSITIONS)[0])
        potential = mdgraft.graft(context)
        assert set(potential.routes.values()) == {"native"}
        energies.append(potential(torch.tensor(POSITIONS)).item())
    assert energies == pytest.approx([energies[0]] * 4, rel=1e-12)


def test_many_contexts_in_threads():
    """All share one module and what is remembered of it."""
    module = Springs()
    system = openmm.System()
    for _ in range(N):
        system.addParticle(12.0)
    system.addForce(exported(module))
    platform = openmm.Platform.getPlatformByName("Reference")
    contexts = [openmm.Context(system, openmm.VerletIntegrator(0.001), platform) for _ in range(4)]

    def work(i):
        k = 1.0 + i
        contexts[i].setParameter("k", k)
        for j in range(20):
            x = (1 + 0.01 * j) * POSITIONS
            found = evaluate(contexts[i], x)
            truth = expected(module, x, k=k, shift=GLOBALS["shift"])
            assert found[0] == pytest.approx(truth[0], rel=1e-10)
            assert found[2] == pytest.approx(truth[2], rel=1e-10)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_training_shows_in_a_configuration_that_was_evaluated_before():
    module = Springs()
    context = open_context(exported(module))
    evaluate(context, POSITIONS)
    with torch.no_grad():
        module.weight.mul_(2.0)
    truth = expected(module, POSITIONS, **GLOBALS)
    for _ in range(2):
        found = evaluate(context, POSITIONS)
        assert found[0] == pytest.approx(truth[0], rel=1e-12)
        assert found[2] == pytest.approx(truth[2], rel=1e-12)


def test_pickles_of_systems():
    system = openmm.System()
    system.addParticle(1.0)
    system.addForce(exported(Springs()))
    loaded = pickle.loads(pickle.dumps(system))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(loaded, openmm.VerletIntegrator(0.001), platform)
    truth = expected(Springs(), POSITIONS[:1], **GLOBALS)
    found = evaluate(context, POSITIONS[:1])
    assert found[0] == pytest.approx(truth[0], rel=1e-12)
    assert found[2] == pytest.approx(truth[2], rel=1e-12)


@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
def test_modules_end_with_their_contexts(slopes):
    """OpenMM never lets go of functions that it copied into a Context."""
    module = Springs()
    gone = weakref.ref(module)
    context = open_context(exported(module, parameter_derivatives=slopes))
    evaluate(context, POSITIONS)
    context.reinitialize()
    evaluate(context, POSITIONS)
    gc.collect()
    openmm.LocalEnergyMinimizer.minimize(context)
    del module, context
    gc.collect()
    assert gone() is None


def test_copies_outlive_their_originals():
    system = openmm.System()
    for _ in range(N):
        system.addParticle(1.0)
    system.addForce(exported(Springs()))
    copied = copy.deepcopy(copy.deepcopy(system))
    del system
    gc.collect()
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(copied, openmm.VerletIntegrator(0.001), platform)
    del copied
    gc.collect()
    truth = expected(Springs(), POSITIONS, **GLOBALS)
    found = evaluate(context, POSITIONS)
    assert found[0] == pytest.approx(truth[0], rel=1e-12)
    assert found[2] == pytest.approx(truth[2], rel=1e-12)


# Hard values and names ----------------------------------------------------------------------------


def scaled(x, k):
    return k * x.square().sum()


@pytest.mark.parametrize("k", [0.0, -0.0, 1.0, -3.7, 1e-3, 1e-23, 1.38e-23, 1e30, 1e100])
def test_energies_are_exact_for_parameters_of_any_size(k):
    """Also where the derivative is huge: the factor of a slope in the energy is zero."""

    def steep(x, k):
        return k * 1e22 * x.square().sum()

    context = open_context(exported(steep, global_parameters={"k": k}))
    energy, forces, slopes = evaluate(context, POSITIONS)
    assert energy == pytest.approx(k * 1e22 * SQUARE, rel=1e-12)
    np.testing.assert_allclose(forces, -2e22 * k * POSITIONS, rtol=1e-12)
    assert slopes["k"] == pytest.approx(1e22 * SQUARE, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_derivatives_leave_the_energy_alone(sign):
    def rooted(x, k):
        return x.square().sum() * (1 + sign * k.sqrt())

    context = open_context(exported(rooted, global_parameters={"k": 0.0}))
    energy, forces, slopes = evaluate(context, POSITIONS)
    assert energy == pytest.approx(SQUARE, rel=1e-12)
    np.testing.assert_allclose(forces, -2 * POSITIONS, rtol=1e-12)
    assert slopes["k"] == sign * np.finfo(float).max


@pytest.mark.parametrize("name", ["sin", "floor", "select", "e", "pi", "E1", "_", "K"])
def test_names_that_mean_something_in_expressions(name):
    def any_name(x, **values):
        return scaled(x, *values.values())

    context = open_context(exported(any_name, global_parameters={name: 0.3}))
    energy, _, slopes = evaluate(context, POSITIONS)
    assert energy == pytest.approx(0.3 * SQUARE, rel=1e-12)
    assert slopes[name] == pytest.approx(SQUARE, rel=1e-12)


def test_names_of_the_variables_inside_are_refused():
    def clashing(x, **values):
        return x.sum()

    with pytest.raises(InvalidInputError, match=r"'mdgraft_energy' begins like a variable"):
        exported(clashing, global_parameters={"mdgraft_energy": 1.0})


def test_as_many_parameters_as_openmm_takes():
    def many(x, **values):
        return sum(values.values()) * x.square().sum()

    values = {f"p{i}": 0.1 * i for i in range(32)}
    last = dict(list(values.items())[:31])
    found = evaluate(open_context(exported(many, global_parameters=last)), POSITIONS)[2]
    assert found == pytest.approx(dict.fromkeys(last, SQUARE), rel=1e-12)
    with pytest.raises(UnavailableBackendError, match=r"got 32 parameters.*at most 31.*=False"):
        exported(many, global_parameters=values)
    context = open_context(
        exported(many, global_parameters=values, parameter_derivatives=["p3", "p31"])
    )
    assert evaluate(context, POSITIONS)[2]["p31"] == pytest.approx(SQUARE, rel=1e-12)


# Derivatives that are none ------------------------------------------------------------------------

WRONG = {
    "detached": lambda x, a, b: (a.detach() + b) * x.square().sum(),
    "partly detached": lambda x, a, b: (a + a.detach() ** 2 + b) * x.square().sum(),
    "cancelling": lambda x, a, b: (a.detach() - b.detach() + 2) * x.square().sum(),
    "predicted forces": lambda x, a, b: (
        ((a + 1) * x.square().sum()).detach(),
        (-2 * (a + 1) * x).detach(),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", WRONG)
def test_derivatives_that_are_none_are_told(kind, dtype):
    values = {"a": 0.7, "b": 0.7}
    options = {"global_parameters": values, "dtype": dtype}
    context = open_context(exported(WRONG[kind], **options))
    with pytest.warns(MDGraftWarning, match=r"not those of its energy: 'a' \(") as told:
        evaluate(context, POSITIONS)
    assert len(told) == 1
    evaluate(context, POSITIONS)
    evaluate(open_context(exported(WRONG[kind], check=False, **options)), POSITIONS)
    evaluate(open_context(exported(WRONG[kind], parameter_derivatives=False, **options)), POSITIONS)


#: Right derivatives that differences of energies could doubt.
RIGHT = {
    "at both bounds": (lambda x, a, b: (a.clamp(0, 1) + b.clamp(0, 1)) * x.sum(), (0.0, 1.0)),
    "a step": (lambda x, a, b: ((a > 0.5) + b) * x.sum(), (0.5, 1.0)),
    "a root": (lambda x, a, b: (a.sqrt() + b) * x.sum(), (0.0, 1.0)),
    "at a minimum": (lambda x, a, b: (a**2 + b**4) * x.sum(), (0.0, 0.0)),
    "a time": (lambda x, a, b: (torch.sin(a) + b) * x.sum(), (5e3, 1.0)),
    "a temperature": (lambda x, a, b: -a * torch.log(1 + torch.exp(-x.sum() / a)), (2.5, 300.0)),
    "a large constant": (lambda x, a, b: (a * x).sum() + 1e6, (1.0, 1.0)),
    "an exponent": (lambda x, a, b: x.square().sum() ** a * torch.exp(-b), (12.0, 40.0)),
}


class Bounded(torch.nn.Module):
    """Accepts neither other positions nor other parameters than these."""

    def forward(self, x, a, b):
        if not (0 <= a <= 1 and torch.equal(x.detach(), torch.tensor(POSITIONS))):
            raise ValueError("out of bounds")
        return (a * x).square().sum()


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_checks_leave_bounds_alone(a):
    context = open_context(exported(Bounded(), global_parameters={"a": a, "b": 1.0}))
    assert evaluate(context, POSITIONS)[0] == pytest.approx(a**2 * SQUARE, rel=1e-12)
    context.setParameter("a", 2.0)
    with pytest.raises(openmm.OpenMMException, match="ValueError: out of bounds"):
        evaluate(context, POSITIONS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_derivatives_cause_no_alarm(kind, dtype):
    function, (a, b) = RIGHT[kind]
    force = exported(function, global_parameters={"a": a, "b": b}, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(open_context(force), POSITIONS)
