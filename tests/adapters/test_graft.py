"""What graft accepts, how it names things, and what it refuses."""

import mdgraft
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch

BOX = np.diag([2.0, 2.2, 2.4])
POSITIONS = np.random.default_rng(0).random((4, 3)) @ BOX


def charged(*, method=openmm.NonbondedForce.PME):
    """Four ions in a box."""
    system, force = openmm.System(), openmm.NonbondedForce()
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in BOX))
    for charge in (1, -1, 1, -1):
        system.addParticle(20.0)
        force.addParticle(charge, 0.2, 0.1)
    force.setNonbondedMethod(method)
    system.addForce(force)
    return system


def simulation(system, cls=app.Simulation):
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(system.getNumParticles()):
        topology.addAtom("NA", app.element.sodium, topology.addResidue("NA", chain))
    made = cls(
        topology,
        system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    made.context.setPositions(POSITIONS)
    return made


@pytest.mark.parametrize("kind", ["System", "Context", "Simulation"])
def test_host_objects(kind):
    system = charged()
    made = simulation(system)
    hosts = {"System": system, "Context": made.context, "Simulation": made}
    potential = mdgraft.graft(hosts[kind])
    expected = made.context.getState(energy=True).getPotentialEnergy()._value
    assert potential(POSITIONS, BOX).item() == pytest.approx(expected, rel=1e-10)


def test_subclasses_are_found():
    class MySimulation(app.Simulation):
        pass

    made = simulation(charged(), MySimulation)
    assert mdgraft.graft(made).term_names == ("NonbondedForce",)


def test_quantities_and_lists():
    system = charged()
    state = simulation(system).context.getState(positions=True)
    potential = mdgraft.graft(system)
    expected = potential(POSITIONS, BOX).item()
    for positions, box in (
        (state.getPositions(), system.getDefaultPeriodicBoxVectors()),
        (state.getPositions(asNumpy=True), state.getPeriodicBoxVectors(asNumpy=True)),
        (POSITIONS * 10 * unit.angstrom, [row * 10 * unit.angstrom for row in BOX]),
        (POSITIONS.tolist(), BOX.tolist()),
    ):
        assert potential(positions, box).item() == pytest.approx(expected, rel=1e-13)


def test_dtype_and_device():
    potential = mdgraft.graft(charged(), dtype=torch.float32, device="cpu")
    assert potential.dtype == torch.float32
    assert potential.device.type == "cpu"


def test_names():
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    for name in ("HarmonicBondForce", "HarmonicBondForce", "forces", "a.b", "globals", "my bonds"):
        force = openmm.HarmonicBondForce()
        force.addBond(0, 1, 0.1, 2.0)
        force.setName(name)
        system.addForce(force)
    potential = mdgraft.graft(system)
    assert potential.term_names == (
        "HarmonicBondForce",
        "HarmonicBondForce_1",
        "forces_1",
        "a_b",
        "globals_1",
        "my bonds",
    )
    assert potential.units["HarmonicBondForce_1.k"] == "kilojoule/(nanometer**2*mole)"
    x = [[0.0, 0, 0], [0.2, 0, 0]]
    assert potential(x).item() == pytest.approx(6 * 0.01)
    values = {n: p.detach() for n, p in potential.named_parameters()}
    arguments = (torch.tensor(x, dtype=torch.float64),)
    gradient = torch.func.grad(lambda v: torch.func.functional_call(potential, v, arguments))(
        values
    )
    assert all(g.item() == pytest.approx(0.005) for n, g in gradient.items() if n.endswith(".k"))


def test_forces_without_energy_are_accepted():
    system = charged()
    system.addForce(openmm.CMMotionRemover())
    system.addForce(openmm.AndersenThermostat(300, 1))
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    system.addForce(openmm.MonteCarloAnisotropicBarostat(openmm.Vec3(1, 1, 1), 300))
    system.addForce(openmm.MonteCarloFlexibleBarostat(1, 300))
    barostat = openmm.MonteCarloMembraneBarostat
    system.addForce(barostat(1, 0, 300, barostat.XYIsotropic, barostat.ZFree))
    assert mdgraft.graft(system).term_names == ("NonbondedForce",)


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="came with OpenMM 8.5")
def test_forces_without_a_native_form_are_listed_together():
    system = charged()
    for name in ("wall", "PythonForce"):
        force = openmm.PythonForce(lambda state: (0.0, np.zeros((3, 3))))
        force.setName(name)
        system.addForce(force)
    assert mdgraft.graft(system).routes["wall"] == "host"
    with pytest.raises(
        mdgraft.UnsupportedForceError,
        match=r"wall \(PythonForce\), PythonForce \(PythonForce\); leave the route to 'auto'",
    ):
        mdgraft.graft(system, route="native")


def test_what_openmm_refuses():
    system = charged()
    system.addForce(openmm.GBSAOBCForce())
    with pytest.raises(mdgraft.InvalidInputError, match="GBSAOBCForce: has 0 particles"):
        mdgraft.graft(system)


def test_an_empty_system():
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    assert mdgraft.graft(system)(np.zeros((5, 3, 3))).tolist() == [0.0] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["CutoffPeriodic", "Ewald", "PME", "LJPME"])
def test_the_same_energy_and_forces_on_a_gpu(method):
    system = charged(method=getattr(openmm.NonbondedForce, method))
    potential = mdgraft.graft(system)
    moved = mdgraft.graft(system, device="cuda")
    x, box = torch.tensor(POSITIONS), torch.tensor(BOX)
    torch.testing.assert_close(moved(x.cuda(), box.cuda()).cpu(), potential(x, box))
    torch.testing.assert_close(moved.forces(x.cuda(), box.cuda()).cpu(), potential.forces(x, box))
