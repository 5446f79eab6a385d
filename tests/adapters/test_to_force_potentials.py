"""Potentials there and back: every term as a Force of its own, and exports grafted again."""

import copy

import mdgraft
import mdgraft_openmm
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
    Predicting,
    Springs,
    assert_close,
    evaluate,
    plain,
)
from force_examples import EXAMPLES, example
from mdgraft import InvalidInputError, ParameterMismatchError
from mdgraft_openmm import to_force

PYTHON = CALLBACKS["PythonForce"]
pytestmark = pytest.mark.usefixtures("each_callback")


def reference(system, box):
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPeriodicBoxVectors(*box)
    return context


def like(system, force):
    """A System with the same particles and another force."""
    made = copy.deepcopy(system)
    while made.getNumForces():
        made.removeForce(0)
    made.addForce(force)
    return made


@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
@pytest.mark.parametrize("force_class", EXAMPLES, ids=lambda c: c.__name__)
def test_every_term_comes_back(force_class, slopes):
    """In a triclinic box, with the global parameters changed as well."""
    system, positions, box = example(force_class)
    whole = mdgraft.graft(system)
    # All that an example has, where forces are only complete together.
    potential = whole.only("*" if "Amoeba" in force_class.__name__ else whole.term_names[-1])
    force = to_force(
        potential, periodic=potential.periodic, parameter_derivatives=slopes, backend=PYTHON
    )
    native, exported = reference(system, box), reference(like(system, force), box)
    defaults = dict(exported.getParameters())
    for scale in (1.0, 0.9):
        for name, default in defaults.items():
            for context in (native, exported):
                context.setParameter(name, scale * default)
        energy, forces, derivatives = evaluate(native, positions)
        # What OpenMM reports only where the native force declares it.
        known = {k: v for k, v in derivatives.items() if slopes and v}
        found = evaluate(exported, positions)
        assert_close(found, (energy, forces, known), 1e-9)
    if slopes:
        with torch.enable_grad():
            shared = potential.values()
            x, h = torch.tensor(positions), torch.tensor(box)
            values = {
                f"globals.{n}": torch.tensor(
                    exported.getParameter(n), dtype=torch.float64, requires_grad=True
                )
                for n in defaults
            }
            found = evaluate(exported, positions)[2]
            energy = sum(potential.energy_by_term(x, h, values={**shared, **values}).values())
            for name in defaults:
                slope = torch.autograd.grad(energy, values[f"globals.{name}"], retain_graph=True)
                assert found[name] == pytest.approx(slope[0].item(), rel=1e-9, abs=1e-9)


def water_with_sites():
    """Two molecules with a massless site each, and a PME force that acts on all."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    force.setCutoffDistance(0.6)
    for molecule in range(2):
        first = 4 * molecule
        for mass, charge in ((16.0, 0.0), (1.0, 0.52), (1.0, 0.52), (0.0, -1.04)):
            system.addParticle(mass)
            force.addParticle(charge, 0.2, 0.6 * (mass == 16.0))
        system.setVirtualSite(
            first + 3,
            openmm.ThreeParticleAverageSite(first, first + 1, first + 2, 0.78, 0.11, 0.11),
        )
        for i in range(4):
            for j in range(i):
                force.addException(first + i, first + j, 0.0, 0.1, 0.0)
    system.addForce(force)
    monomer = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0], [0.01, 0.01, 0]])
    return system, np.concatenate([monomer, monomer @ np.diag([1, -1, 1]) + [0.3, 0.1, 0.2]])


def test_virtual_sites():
    """Sites are placed by OpenMM and by the potential, and hand over their forces once."""
    system, positions = water_with_sites()
    potential = mdgraft.graft(system)
    force = to_force(potential, periodic=True, backend=PYTHON)
    results = []
    for context in (reference(system, BOX), reference(like(system, force), BOX)):
        context.setPositions(positions)
        context.computeVirtualSites()
        state = context.getState(energy=True, forces=True)
        results.append((state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value))
    real = [i for i in range(8) if i % 4 != 3]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    np.testing.assert_allclose(results[1][1][real], results[0][1][real], rtol=0, atol=1e-6)


def test_a_potential_of_some_particles():
    """Five atoms of nine, in another order."""
    system, positions, box = example(openmm.HarmonicBondForce)
    chosen = [7, 0, 3, 8, 2]
    small = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for _ in chosen:
        small.addParticle(12.0)
    for i in range(4):
        bonds.addBond(i, i + 1, 0.3, 500.0)
    small.addForce(bonds)
    truth = evaluate(reference(small, box), positions[chosen])
    force = to_force(mdgraft.graft(small), particles=chosen, backend=PYTHON)
    found = evaluate(reference(like(system, force), box), positions)
    assert_close((found[0], found[1][chosen], {}), (*truth[:2], {}), 1e-10)
    assert not found[1][[1, 4, 5, 6]].any()


def test_energy_is_conserved_as_by_the_native_form():
    """The same drift over a picosecond, of a system far from equilibrium."""
    system, positions, box = example(openmm.HarmonicBondForce)
    charged = openmm.NonbondedForce()
    for i in range(system.getNumParticles()):
        system.setParticleMass(i, 20.0)
        charged.addParticle(0.3 * (-1) ** i, 0.2, 0.5)
    system.addForce(charged)
    bonds = openmm.HarmonicBondForce()
    for i in range(8):
        bonds.addBond(i, i + 1, 0.3, 2000.0)
    system.addForce(bonds)
    force = to_force(mdgraft.graft(system), backend=PYTHON)
    found = []
    for each in (system, like(system, force)):
        context = reference(each, box)
        context.setPositions(positions)
        context.setVelocitiesToTemperature(100.0, 1)
        energies = []
        for _ in range(50):
            context.getIntegrator().step(20)
            state = context.getState(energy=True)
            total = state.getPotentialEnergy() + state.getKineticEnergy()
            energies.append(total._value)
        slope = np.polyfit(0.02 * np.arange(len(energies)), energies, 1)[0]
        found.append((slope, np.std(energies)))
    (native, spread), (exported, other) = found
    assert abs(exported) < 1.01 * abs(native) + 1e-6
    assert other == pytest.approx(spread, rel=1e-3)
    assert spread < 0.1


# Grafting exports ---------------------------------------------------------------------------------


def with_export(module, **options):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for _ in range(N):
        system.addParticle(12.0)
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 1, 0.2, 400.0)
    system.addForce(bonds)
    system.addForce(to_force(module, name="model", backend=PYTHON, **options))
    return system


EXPORTS = {
    "module": lambda **o: with_export(Springs(), global_parameters=GLOBALS, **o),
    "periodic": lambda **o: with_export(Periodic(), periodic=True, global_parameters=GLOBALS, **o),
    "subset": lambda **o: with_export(
        Springs(), particles=[4, 1, 3], global_parameters=GLOBALS, **o
    ),
    "function": lambda **o: with_export(plain, global_parameters=GLOBALS, **o),
    "potential": lambda **o: with_export(
        mdgraft.graft(EXPORTS["module"]()), global_parameters=["k"], **o
    ),
}


@pytest.mark.parametrize("slopes", [False, True], ids=["", "derivatives"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_grafted_as_the_module_it_is(kind, slopes):
    """Natively, to every order; the same by the host; and so are copies and what a file holds."""
    system = EXPORTS[kind](parameter_derivatives=slopes)
    x = torch.tensor(POSITIONS, requires_grad=True)
    h = torch.tensor(BOX, requires_grad=True)
    host = mdgraft.graft(system, route={"model": "host"})
    assert host.routes == {"HarmonicBondForce": "native", "model": "host"}
    truth = host(x, h)
    slope = torch.autograd.grad(truth, x)[0]
    text = openmm.XmlSerializer.serialize(system)
    for each in (system, copy.deepcopy(system), openmm.XmlSerializer.deserialize(text)):
        potential = mdgraft.graft(each)
        # In files of OpenMM 8.5 a PythonForce has no name.
        assert list(potential.routes.values()) == ["native", "native"]
        energy = potential(x, h)
        assert energy.item() == pytest.approx(truth.item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(energy, x)[0], slope)
        names = dict(potential.named_parameters())
        assert set(names) <= set(potential.units)
        if kind != "function":
            weight = next(name for name in names if name.endswith("weight"))
            assert torch.autograd.grad(potential(x, h), names[weight])[0].any()
        mdgraft_openmm.write_parameters(potential, each)
    # The host's second derivatives are differences of its forces.
    along = torch.randn(N, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    products = [
        torch.autograd.functional.hvp(lambda y, p=p: p(y, h.detach()), x.detach(), along)[1]
        for p in (potential, host)
    ]
    torch.testing.assert_close(products[0], products[1], rtol=1e-6, atol=1e-4)
    frames = torch.stack([x.detach(), 1.1 * x.detach()])
    batch = potential(frames, h.detach())
    torch.testing.assert_close(batch, torch.stack([potential(f, h.detach()) for f in frames]))
    torch.testing.assert_close(torch.vmap(lambda y: potential(y, h.detach()))(frames), batch)
    copied = copy.deepcopy(potential)
    assert copied(x, h).item() == pytest.approx(truth.item(), rel=1e-12)


def test_training_a_graft_leaves_the_running_module_alone():
    module = Springs()
    system = with_export(module, global_parameters=GLOBALS)
    potential = mdgraft.graft(system)
    before = module.weight.detach().clone()
    with torch.no_grad():
        potential.get_parameter("model.module.weight").mul_(2.0)
    torch.testing.assert_close(module.weight.detach(), before)
    with pytest.raises(ParameterMismatchError, match=r"model.module.weight: belongs.*export"):
        mdgraft_openmm.write_parameters(potential, system)
    # The way that the message names.
    module.load_state_dict(potential.term("model").module.state_dict())
    mdgraft_openmm.write_parameters(potential, system)
    x, h = torch.tensor(POSITIONS), torch.tensor(BOX)
    found = evaluate(reference(system, BOX), POSITIONS)[0]
    assert found == pytest.approx(potential(x, h).item(), rel=1e-12)


def test_global_parameters_are_shared_and_written():
    system = with_export(Springs(), global_parameters=GLOBALS, parameter_derivatives=["k"])
    context = reference(system, BOX)
    context.setParameter("k", 0.7)
    potential = mdgraft.graft(context)
    assert potential.get_parameter("globals.k").item() == 0.7
    with torch.no_grad():
        potential.get_parameter("globals.k").fill_(0.9)
    mdgraft_openmm.write_parameters(potential, context)
    assert context.getParameter("k") == 0.9
    # A CustomCVForce has a setter for its defaults.
    mdgraft_openmm.write_parameters(potential, system)
    assert reference(system, BOX).getParameter("k") == 0.9
    bare = with_export(Springs(), global_parameters=GLOBALS, parameter_derivatives=False)
    with pytest.raises(ParameterMismatchError, match="no setter for the default of 'k'"):
        mdgraft_openmm.write_parameters(potential_of(bare, k=0.1), bare)


def potential_of(system, **values):
    potential = mdgraft.graft(system)
    for name, value in values.items():
        with torch.no_grad():
            potential.get_parameter(f"globals.{name}").fill_(value)
    return potential


def test_one_global_parameter_by_two_names():
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("k_0*x")
    force.addGlobalParameter("k_0", 1.0)
    system.addForce(force)
    with pytest.raises(InvalidInputError, match=r"'k\.0' is a global parameter that was named"):
        to_force(mdgraft.graft(system), global_parameters={"k_0": 1.0, "k.0": 2.0}, backend=PYTHON)


def test_what_has_forces_of_its_own_is_left_to_the_host():
    system = with_export(Predicting(), global_parameters=GLOBALS)
    potential = mdgraft.graft(system)
    x, h = torch.tensor(POSITIONS, requires_grad=True), torch.tensor(BOX)
    with pytest.raises(mdgraft.UnsupportedDerivativeError, match=r"returns forces.*route='host'"):
        potential(x, h)
    host = mdgraft.graft(system, route={"model": "host"})
    truth = evaluate(reference(system, BOX), POSITIONS)
    torch.testing.assert_close(-torch.autograd.grad(host(x, h), x)[0].numpy(), truth[1])


def test_other_functions_and_torchscript_stay_with_the_host():
    scripted = torch.jit.script(Springs())
    assert mdgraft.graft(with_export(scripted, global_parameters=GLOBALS)).routes == {
        "HarmonicBondForce": "native",
        "model": "host",
    }


def test_particles_that_do_not_exist():
    """What comes out of a file is not compared with the System until it is grafted."""
    system = with_export(lambda x: x.sum(), particles=[0, N - 1])
    force = to_force(Springs(), particles=[0, N], global_parameters=GLOBALS, backend=PYTHON)
    text = openmm.XmlSerializer.serialize(force)
    system.addForce(openmm.XmlSerializer.deserialize(text))
    with pytest.raises(InvalidInputError, match=rf"{PYTHON.name}: entry 1 refers to \[6\]"):
        mdgraft.graft(system)


def test_a_module_in_single_precision_is_grafted_in_double():
    module = Springs(torch.float32)
    system = with_export(module, global_parameters=GLOBALS)
    potential = mdgraft.graft(system)
    assert potential.dtype == torch.float64 and module.weight.dtype == torch.float32
    x, h = torch.tensor(POSITIONS), torch.tensor(BOX)
    truth = Springs()(x, None, *(torch.tensor(v) for v in GLOBALS.values())).item()
    assert potential.energy_by_term(x, h)["model"].item() == pytest.approx(truth, rel=1e-6)
    single = mdgraft.graft(system, dtype=torch.float32)
    assert single(x.float(), h.float()).dtype == torch.float32
