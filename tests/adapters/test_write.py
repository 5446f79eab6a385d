"""Write-back into Systems and Contexts."""

import copy

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

POSITIONS = np.array([[0, 0, 0], [0.1, 0, 0], [0.13, 0.11, 0], [0.3, 0.2, 0.15], [0.5, 0.1, 0.3]])


def make_system():
    """Five particles; every number needs all its digits."""
    rng = np.random.default_rng(11)
    system = openmm.System()
    for _ in range(5):
        system.addParticle(12.0)
    bond = openmm.HarmonicBondForce()
    for i in range(4):
        bond.addBond(i, i + 1, 0.1 + 0.01 * rng.random(), 1000 * rng.random())
    second = openmm.HarmonicBondForce()
    second.addBond(0, 4, 0.5, rng.random())
    nonbonded = openmm.NonbondedForce()
    nonbonded.addGlobalParameter("lambda", 0.1)
    for _ in range(5):
        nonbonded.addParticle(*rng.random(3))
    nonbonded.addException(0, 1, 0, 1, 0)
    nonbonded.addException(1, 2, *rng.random(3))
    nonbonded.addParticleParameterOffset("lambda", 2, *rng.random(3))
    nonbonded.addExceptionParameterOffset("lambda", 1, *rng.random(3))
    for force in (bond, second, nonbonded, openmm.CMMotionRemover()):
        system.addForce(force)
    return system


def make_context(system, platform="Reference"):
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform)
    )
    context.setPositions(POSITIONS)
    return context


def energy_of(context):
    return context.getState(energy=True).getPotentialEnergy()._value


def serialize(system):
    return openmm.XmlSerializer.serialize(system)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip_is_exact(dtype):
    system = make_system()
    before = serialize(system)
    mdgraft_openmm.write_parameters(mdgraft.graft(system, dtype=dtype), system)
    assert serialize(system) == before


def perturb(potential, exclusions=True):
    rng = np.random.default_rng(12)
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            change = 1 + 0.1 * torch.tensor(rng.random(parameter.shape))
            parameter.mul_(change)
            if exclusions and name.endswith("exception_epsilon"):
                parameter.add_(0.1)
    return potential


def test_new_values_reach_a_system_and_its_xml():
    system = make_system()
    potential = perturb(mdgraft.graft(system))
    target = make_system()
    mdgraft_openmm.write_parameters(potential, target)
    loaded = openmm.XmlSerializer.deserialize(serialize(target))
    assert energy_of(make_context(loaded)) == pytest.approx(potential(POSITIONS).item(), rel=1e-12)
    again = mdgraft.graft(loaded)
    for name, value in again.values().items():
        assert torch.equal(value, potential.values()[name]), name


@pytest.mark.parametrize("kind", ["context", "simulation"])
def test_new_values_reach_a_live_context(kind):
    system = make_system()
    if kind == "simulation":
        topology = app.Topology()
        residue = topology.addResidue("X", topology.addChain())
        for _ in range(5):
            topology.addAtom("C", app.element.carbon, residue)
        target = app.Simulation(
            topology,
            system,
            openmm.VerletIntegrator(0.001),
            openmm.Platform.getPlatformByName("Reference"),
        )
        target.context.setPositions(POSITIONS)
        context = target.context
    else:
        target = context = make_context(system)
    potential = perturb(mdgraft.graft(target), exclusions=False)
    mdgraft_openmm.write_parameters(potential, target)
    assert energy_of(context) == pytest.approx(potential(POSITIONS).item(), rel=1e-12)
    assert context.getParameter("lambda") == potential.values()["globals.lambda"].item()


def test_a_context_follows_its_system():
    system = make_system()
    context = make_context(system)
    potential = perturb(mdgraft.graft(system), exclusions=False)
    mdgraft_openmm.write_parameters(potential, system)
    mdgraft_openmm.write_parameters(potential, context)
    assert energy_of(context) == pytest.approx(potential(POSITIONS).item(), rel=1e-12)
    mdgraft_openmm.write_parameters(perturb(potential), system)
    with pytest.raises(
        mdgraft.ParameterMismatchError, match=r"cannot take over its System's.*reinitialize"
    ):
        mdgraft_openmm.write_parameters(potential, context)


@pytest.mark.parametrize(
    "name", ["lambda", "type", "half", "training", "units", "n_particles", "forces", "a.b", ""]
)
def test_names_of_every_kind(name):
    system = make_system()
    for force in system.getForces():
        force.setName(name)
    nonbonded = system.getForce(2)
    nonbonded.setGlobalParameterName(0, name)
    _, *offset = nonbonded.getParticleParameterOffset(0)
    nonbonded.setParticleParameterOffset(0, name, *offset)
    _, *offset = nonbonded.getExceptionParameterOffset(0)
    nonbonded.setExceptionParameterOffset(0, name, *offset)
    potential = perturb(mdgraft.graft(system))
    again = mdgraft.graft(system)
    again.load_state_dict(potential.state_dict())
    mdgraft_openmm.write_parameters(copy.deepcopy(again), system)
    energy = energy_of(make_context(system))
    assert energy == pytest.approx(potential(POSITIONS).item(), rel=1e-12)
    parameters = {key: value.detach() for key, value in potential.named_parameters()}
    called = torch.func.functional_call(mdgraft.graft(system), parameters, (POSITIONS,))
    assert called.item() == pytest.approx(energy, rel=1e-12)


def test_global_parameters_that_a_potential_cannot_tell_apart():
    system = make_system()
    system.getForce(2).addGlobalParameter("a.b", 0.0)
    system.getForce(2).addGlobalParameter("a_b", 0.0)
    with pytest.raises(mdgraft.InvalidInputError, match=r"'a.b' and 'a_b' would both be"):
        mdgraft.graft(system)


def test_ties_survive():
    system = make_system()
    potential = mdgraft.graft(system)
    potential.tie("k", {"HarmonicBondForce.k": [0, 2], "HarmonicBondForce_1.k": ...}, value=500.0)
    mdgraft_openmm.write_parameters(potential, system)
    assert [system.getForce(0).getBondParameters(i)[3]._value for i in (0, 2)] == [500.0, 500.0]
    assert system.getForce(1).getBondParameters(0)[3]._value == 500.0


def test_a_live_context_refuses_what_it_cannot_take_over():
    system = make_system()
    context = make_context(system)
    before = serialize(system)
    potential = perturb(mdgraft.graft(system))
    with pytest.raises(
        mdgraft.ParameterMismatchError,
        match=r"cannot take over changes of exception 0 \(particles 0 and 1\).*reinitialize",
    ):
        mdgraft_openmm.write_parameters(potential, context)
    assert serialize(system) == before
    mdgraft_openmm.write_parameters(potential, system)
    context.reinitialize(preserveState=True)
    mdgraft_openmm.write_parameters(potential, context)
    assert energy_of(context) == pytest.approx(potential(POSITIONS).item(), rel=1e-12)


@pytest.mark.parametrize("parameter", ["switching_distance", "reaction_field_dielectric"])
def test_cutoff_settings_need_a_new_context(parameter):
    system = make_system()
    force = system.getForce(2)
    force.setNonbondedMethod(force.CutoffNonPeriodic)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.3)
    force.setCutoffDistance(0.6)
    context = make_context(system)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter(f"NonbondedForce.{parameter}").mul_(1.1)
    with pytest.raises(mdgraft.ParameterMismatchError, match=f"changes of {parameter}"):
        mdgraft_openmm.write_parameters(potential, context)
    mdgraft_openmm.write_parameters(potential, system)
    context.reinitialize(preserveState=True)
    assert energy_of(context) == pytest.approx(potential(POSITIONS).item(), rel=1e-12)
    with torch.no_grad():
        potential.get_parameter("NonbondedForce.switching_distance").fill_(0.7)
    with pytest.raises(
        mdgraft.ParameterMismatchError, match="0.7 nm is not between 0 and the cutoff"
    ):
        mdgraft_openmm.write_parameters(potential, system)


def test_nothing_is_written_when_anything_is_wrong():
    system = make_system()
    before = serialize(system)
    for name, value, message in (
        ("HarmonicBondForce.length", -0.1, "HarmonicBondForce.length: entry 1 is -0.1 nm"),
        ("NonbondedForce.charge", torch.nan, "NonbondedForce.charge: holds NaN or infinity"),
        ("NonbondedForce.sigma", -0.1, r"NonbondedForce.sigma: entry 1 is -0.1"),
        ("NonbondedForce.exception_epsilon", -1.0, "OpenMM accepts only values that are not neg"),
    ):
        potential = mdgraft.graft(system)
        with torch.no_grad():
            potential.get_parameter("HarmonicBondForce.k").mul_(2)
            potential.get_parameter(name)[1] = value
        with pytest.raises(mdgraft.ParameterMismatchError, match=message):
            mdgraft_openmm.write_parameters(potential, system)
        assert serialize(system) == before


def test_other_systems_are_refused():
    system = make_system()
    potential = mdgraft.graft(system)
    fewer = copy.deepcopy(system)
    fewer.removeForce(1)
    with pytest.raises(
        mdgraft.ParameterMismatchError, match="has the forces .*the potential the t"
    ):
        mdgraft_openmm.write_parameters(potential, fewer)
    longer = copy.deepcopy(system)
    longer.getForce(0).addBond(0, 2, 0.1, 1.0)
    with pytest.raises(mdgraft.ParameterMismatchError, match=r"shape \(4,\), the host \(5,\)"):
        mdgraft_openmm.write_parameters(potential, longer)
    moved = copy.deepcopy(system)
    moved.getForce(0).setBondParameters(1, 1, 3, 0.1, 1.0)
    with pytest.raises(
        mdgraft.ParameterMismatchError, match=r"HarmonicBondForce: .* differs .* \['particles'\]"
    ):
        mdgraft_openmm.write_parameters(potential, moved)
    with pytest.raises(mdgraft.UnsupportedHostError, match="got builtins.str, wanted an openmm"):
        mdgraft_openmm.write_parameters(potential, "system.xml")
    with pytest.raises(mdgraft.InvalidInputError, match="potential: got System, wanted what"):
        mdgraft_openmm.write_parameters(system, system)
