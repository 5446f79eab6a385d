"""Systems that mix a model and a force field, against what they were made of and OpenMM-ML."""

import functools

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from mdgraft import InvalidInputError, UnsupportedForceError
from mdgraft.neural import MessagePassingNetwork, neural_potential
from mdgraft.testing import check_model
from mdgraft_openmm import mixed_system
from openmm import app
from test_whole_systems import dipeptide

#: A module with a list of neighbours has no other way into OpenMM.
pytestmark = pytest.mark.skipif(
    not hasattr(openmm, "PythonForce"), reason="OpenMM has no PythonForce before version 8.5"
)

#: Regions of the dipeptide: all of it, a chain end that a bond joins to the rest, and a middle
#: piece with two such bonds.
REGIONS = {
    "whole": list(range(22)),
    "end": [16, 17, 18, 19, 20, 21, 14, 15],
    "middle": list(range(6, 16)),
}


@functools.cache
def molecule():
    topology, positions = dipeptide()
    return topology, np.array(positions._value)


@functools.cache
def field():
    return app.ForceField("amber14-all.xml", "amber14/tip3p.xml")


@functools.cache
def vacuum():
    topology, positions = molecule()
    system = field().createSystem(topology, constraints=app.HBonds)
    return system, topology, positions


@functools.cache
def solvated(method=app.PME, switch=None):
    topology, positions = molecule()
    modeller = app.Modeller(topology, positions)
    modeller.addSolvent(field(), boxSize=openmm.Vec3(1.9, 1.9, 1.9))
    system = field().createSystem(
        modeller.topology, nonbondedMethod=method, nonbondedCutoff=0.7, switchDistance=switch
    )
    return system, modeller.topology, np.array(modeller.positions._value)


@functools.cache
def network():
    model = MessagePassingNetwork([1, 6, 7, 8], 0.35, channels=4, radial=4)
    with torch.no_grad():
        model.scale.fill_(50.0)
    return model


def evaluate(system, positions, **parameters):
    """Energy, forces and derivatives of parameters; sites without positions are placed."""
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    everything = np.zeros((system.getNumParticles(), 3))
    everything[: len(positions)] = positions
    context.setPositions(everything)
    context.computeVirtualSites()
    for name, value in parameters.items():
        context.setParameter(name, value)
    state = context.getState(
        energy=True, forces=True, positions=True, parameterDerivatives=bool(parameters)
    )
    slopes = dict(state.getEnergyParameterDerivatives()) if parameters else {}
    return (
        state.getPotentialEnergy()._value,
        np.array(state.getForces(asNumpy=True)._value),
        torch.tensor(np.array(state.getPositions(asNumpy=True)._value)),
        slopes,
    )


def nothing(x):
    """A model without energy."""
    return 0.0 * x.sum()


def box_of(system):
    vectors = system.getDefaultPeriodicBoxVectors()
    return torch.tensor([list(v._value) for v in vectors], dtype=torch.float64)


# Against OpenMM-ML ----------------------------------------------------------------------------


def with_openmmml(system, topology, atoms, **options):
    openmmml = pytest.importorskip("openmmml", reason="OpenMM-ML is not installed")
    return openmmml.MLPotential("mdgraft", model=network()).createMixedSystem(
        topology, system, atoms, **options
    )


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("solvent", [False, True])
def test_agrees_with_openmmml(region, solvent):
    system, topology, positions = solvated() if solvent else vacuum()
    ours = mixed_system(system, network(), REGIONS[region], topology=topology)
    theirs = with_openmmml(system, topology, REGIONS[region])
    assert ours.getNumParticles() == theirs.getNumParticles()
    assert ours.getNumConstraints() == theirs.getNumConstraints()
    found, wanted = evaluate(ours, positions), evaluate(theirs, positions)
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("region", REGIONS)
def test_interpolation_agrees_with_openmmml(region):
    system, topology, positions = vacuum()
    ours = mixed_system(system, network(), REGIONS[region], topology=topology, interpolate=True)
    theirs = with_openmmml(system, topology, REGIONS[region], interpolate=True)
    for value in (0.0, 0.4, 1.0):
        found = evaluate(ours, positions, lambda_interpolate=value)
        wanted = evaluate(theirs, positions, lambda_interpolate=value)
        # It has a Coulomb constant of fewer digits.
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_constraints_and_groups(keep):
    system, topology, _ = vacuum()
    options = {"remove_constraints": not keep, "force_group": 7, "name": "network"}
    ours = mixed_system(system, network(), REGIONS["middle"], topology=topology, **options)
    theirs = with_openmmml(
        system, topology, REGIONS["middle"], removeConstraints=not keep, forceGroup=7
    )
    for mixed in (ours, theirs):
        pairs = [mixed.getConstraintParameters(i)[:2] for i in range(mixed.getNumConstraints())]
        inside = [p for p in pairs if set(p) <= set(REGIONS["middle"])]
        assert bool(inside) == keep
    assert ours.getNumConstraints() == theirs.getNumConstraints()
    (force,) = (f for f in ours.getForces() if f.getName() == "network")
    assert force.getForceGroup() == 7


# Against what it is made of -------------------------------------------------------------------


METHODS = {
    "no cutoff": None,
    "reaction field": (app.CutoffPeriodic, None),
    "switched": (app.CutoffPeriodic, 0.55),
    "PME": (app.PME, None),
    "PME, switched": (app.PME, 0.55),
    "Ewald": (app.Ewald, None),
}


@pytest.mark.parametrize("method", METHODS)
def test_interpolation_ends_at_the_force_field(method):
    """At zero there is the classical System to rounding, at one the mixed one."""
    system, topology, positions = (
        vacuum() if METHODS[method] is None else solvated(*METHODS[method])
    )
    options = {"topology": topology, "remove_constraints": False}
    between = mixed_system(system, network(), range(22), interpolate="mix", **options)
    mixed = mixed_system(system, network(), range(22), **options)
    classical = evaluate(system, positions)
    start, end = evaluate(between, positions, mix=0.0), evaluate(between, positions, mix=1.0)
    whole = evaluate(mixed, positions)
    assert start[0] == pytest.approx(classical[0], rel=1e-11)
    np.testing.assert_allclose(start[1], classical[1], rtol=1e-8, atol=1e-6)
    assert end[0] == pytest.approx(whole[0], rel=1e-12)
    half = evaluate(between, positions, mix=0.5)
    assert half[0] == pytest.approx(0.5 * (start[0] + end[0]), rel=1e-11)
    assert half[3]["mix"] == pytest.approx(end[0] - start[0], rel=1e-8)


def test_a_whole_molecule_in_vacuum_is_the_model_alone():
    system, topology, positions = vacuum()
    mixed = mixed_system(system, network(), range(22), topology=topology)
    numbers = [atom.element.atomic_number for atom in topology.atoms()]
    alone = neural_potential(network(), numbers)
    energy, forces, *_ = evaluate(mixed, positions)
    assert energy == pytest.approx(alone(positions).item(), rel=1e-12)
    np.testing.assert_allclose(forces, alone.forces(positions).detach(), atol=1e-9)
    assert mixed.getNumConstraints() == 0 and system.getNumConstraints() == 12


def test_the_order_of_atoms_is_the_model_s():
    """A model that counts its first atom alone gets the one that the user named first."""

    def first(x):
        return 100.0 * (x[0] ** 2).sum()

    system, topology, positions = vacuum()
    mixed = mixed_system(system, first, [17, 3, 9], topology=topology, link_atoms=False)
    empty = mixed_system(system, nothing, [17, 3, 9], topology=topology, link_atoms=False)
    found = evaluate(mixed, positions)[1] - evaluate(empty, positions)[1]
    expected = np.zeros_like(positions)
    expected[17] = -200.0 * positions[17]
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("solvent", [False, True])
def test_grafts_to_one_potential(solvent, interpolate):
    """Native terms, and the true graph of the network."""
    system, topology, positions = solvated() if solvent else vacuum()
    mixed = mixed_system(
        system, network(), REGIONS["middle"], topology=topology, interpolate=interpolate
    )
    parameters = {"lambda_interpolate": 0.3} if interpolate else {}
    energy, forces, x, slopes = evaluate(mixed, positions, **parameters)
    potential = mdgraft.graft(mixed)
    assert set(potential.routes.values()) == {"native"}
    if interpolate:
        with torch.no_grad():
            potential.get_parameter("globals.lambda_interpolate").fill_(0.3)
    box = box_of(mixed) if solvent else None
    found = potential(x, box)
    found.backward()
    assert found.item() == pytest.approx(energy, rel=1e-9)
    sites = [mixed.isVirtualSite(i) for i in range(mixed.getNumParticles())]
    real = ~np.array(sites)
    np.testing.assert_allclose(potential.forces(x, box).detach()[real], forces[real], atol=2e-4)
    grads = {n: p.grad for n, p in potential.named_parameters() if "readout" in n}
    assert grads and all(g.abs().max() > 0 for g in grads.values())
    if interpolate:
        slope = potential.get_parameter("globals.lambda_interpolate").grad.item()
        assert slope == pytest.approx(slopes["lambda_interpolate"], rel=1e-6)


def test_it_runs():
    """Dynamics with link atoms conserves energy."""
    system, topology, positions = vacuum()
    mixed = mixed_system(system, network(), REGIONS["middle"], topology=topology)
    integrator = openmm.VerletIntegrator(0.0002)
    context = openmm.Context(mixed, integrator, openmm.Platform.getPlatformByName("Reference"))
    everything = np.zeros((mixed.getNumParticles(), 3))
    everything[:22] = positions
    context.setPositions(everything)
    context.applyConstraints(1e-8)
    context.computeVirtualSites()
    context.setVelocitiesToTemperature(100.0, 1)
    totals = []
    for _ in range(20):
        integrator.step(5)
        state = context.getState(energy=True)
        totals.append(state.getPotentialEnergy()._value + state.getKineticEnergy()._value)
    assert np.std(totals) < 0.01 and np.ptp(totals) < 0.03


# Forces of every kind -------------------------------------------------------------------------


def _nonbonded(kind):
    force = openmm.CustomNonbondedForce("k1*k2*exp(-3*r)")
    force.addPerParticleParameter("k")
    for k in (1.0, 2.0, 3.0, 4.0):
        force.addParticle([k])
    if kind == "groups":
        force.addInteractionGroup([0, 1], [1, 2, 3])
    force.addExclusion(2, 3)
    return force


def simple(force):
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    system.addForce(force)
    return system


def compound(rows):
    force = openmm.CustomCompoundBondForce(2, "50*(distance(p1,p2)-0.2)^2")
    for row in rows:
        force.addBond(row)
    return force


def centroid(rows):
    force = openmm.CustomCentroidBondForce(2, "50*(distance(g1,g2)-0.2)^2")
    for i in range(4):
        force.addGroup([i])
    for row in rows:
        force.addBond(row)
    return force


def harmonic(rows):
    force = openmm.HarmonicBondForce()
    for i, j in rows:
        force.addBond(i, j, 0.2, 500.0)
    return force


def custom_bonds(rows):
    force = openmm.CustomBondForce("50*(r-0.2)^2")
    for i, j in rows:
        force.addBond(i, j)
    return force


X = np.array([[0.0, 0, 0], [0.21, 0.02, 0], [0.05, 0.24, 0.03], [0.2, 0.2, 0.25]])
PAIRS = [(0, 1), (1, 2), (2, 3), (0, 3)]


@pytest.mark.parametrize("make", [harmonic, custom_bonds, compound])
def test_lists_of_interactions(make):
    mixed = mixed_system(
        simple(make(PAIRS)), lambda x: 3.0 + 0.0 * x.sum(), [0, 1], link_atoms=False
    )
    rest = evaluate(simple(make(PAIRS[1:])), X)
    found = evaluate(mixed, X)
    assert found[0] == pytest.approx(rest[0] + 3.0, rel=1e-12)
    np.testing.assert_allclose(found[1], rest[1], atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "groups"])
def test_custom_nonbonded_forces(kind):
    system = simple(_nonbonded(kind))
    mixed = mixed_system(system, nothing, [0, 1])
    r = np.linalg.norm(X[0] - X[1])
    gone = 2.0 * np.exp(-3 * r)
    assert evaluate(mixed, X)[0] == pytest.approx(evaluate(system, X)[0] - gone, rel=1e-12)
    if kind == "groups":
        with pytest.raises(UnsupportedForceError, match="interaction groups"):
            mixed_system(system, nothing, [0, 1], interpolate=True)
    else:
        between = mixed_system(system, nothing, [0, 1], interpolate=True)
        for value in (0.0, 0.25):
            found = evaluate(between, X, lambda_interpolate=value)[0]
            assert found == pytest.approx(evaluate(system, X)[0] - value * gone, rel=1e-12)


def test_offsets_of_exceptions_go_as_well():
    force = openmm.NonbondedForce()
    for charge in (0.5, -0.5, 0.3, -0.3):
        force.addParticle(charge, 0.2, 0.5)
    force.addGlobalParameter("scale", 1.0)
    for i, j in ((0, 1), (2, 3)):
        index = force.addException(i, j, 0.1, 0.2, 0.5)
        force.addExceptionParameterOffset("scale", index, 0.2, 0.0, 0.3)
    system = simple(force)
    mixed = mixed_system(system, nothing, [0, 1])
    found = {s: evaluate(mixed, X, scale=s)[0] for s in (0.0, 1.0)}
    classical = {s: evaluate(system, X, scale=s)[0] for s in (0.0, 1.0)}
    r = np.linalg.norm(X[0] - X[1])
    for s in (0.0, 1.0):
        inside = mdgraft._units.COULOMB * (0.1 + 0.2 * s) / r
        inside += 4 * (0.5 + 0.3 * s) * ((0.2 / r) ** 12 - (0.2 / r) ** 6)
        assert found[s] == pytest.approx(classical[s] - inside, rel=1e-9)
    with pytest.raises(UnsupportedForceError, match="depend on global"):
        mixed_system(system, nothing, [0, 1], interpolate=True)


def test_sites_belong_to_their_parents():
    """The charged site of a water molecule goes with its atoms."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    for charge, mass in ((0.0, 16.0), (0.5, 1.0), (0.5, 1.0), (-1.0, 0.0), (0.4, 12.0)):
        system.addParticle(mass)
        force.addParticle(charge, 0.2, 0.3)
    system.setVirtualSite(3, openmm.ThreeParticleAverageSite(0, 1, 2, 0.6, 0.2, 0.2))
    system.addForce(force)
    x = np.array([[0.0, 0, 0], [0.1, 0, 0], [-0.03, 0.09, 0], [0, 0, 0], [0.3, 0.1, 0.1]])
    mixed = mixed_system(system, nothing, [0, 1, 2])
    energy, _, placed, _ = evaluate(mixed, x)
    expected = 0.0
    rows = [force.getParticleParameters(i) for i in range(5)]
    for i in range(4):
        r = float((placed[i] - placed[4]).norm())
        charge = rows[i][0]._value * rows[4][0]._value
        expected += mdgraft._units.COULOMB * charge / r
        expected += 4 * 0.3 * ((0.2 / r) ** 12 - (0.2 / r) ** 6)
    assert energy == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_separated_is_named():
    implicit = openmm.GBSAOBCForce()
    for _ in range(4):
        implicit.addParticle(0.1, 0.15, 0.8)
    system = simple(harmonic(PAIRS))
    system.addForce(implicit)
    system.addForce(centroid([(0, 1)]))
    variable = openmm.CustomCVForce("x^2")
    variable.addCollectiveVariable("x", harmonic([(0, 1)]))
    system.addForce(variable)
    rmsd = openmm.RMSDForce(X, [2, 3])
    system.addForce(rmsd)
    system.addForce(openmm.CMMotionRemover())
    model = nothing
    with pytest.raises(UnsupportedForceError) as caught:
        mixed_system(system, model, [0, 1], link_atoms=False)
    for name in ("GBSAOBCForce", "CustomCentroidBondForce", "CustomCVForce"):
        assert name in str(caught.value)
    assert "RMSDForce" not in str(caught.value) and "HarmonicBondForce" not in str(caught.value)
    keep = ["GBSAOBCForce", "CustomCentroidBondForce", "CustomCVForce"]
    mixed = mixed_system(system, model, [0, 1], link_atoms=False, keep=keep)
    r = np.linalg.norm(X[0] - X[1])
    gone = 250.0 * (r - 0.2) ** 2
    assert evaluate(mixed, X)[0] == pytest.approx(evaluate(system, X)[0] - gone, rel=1e-9)
    elsewhere = mixed_system(simple(centroid([(1, 2), (2, 3)])), model, [0, 1], link_atoms=False)
    assert elsewhere.getForce(0).getNumBonds() == 2
    with pytest.raises(InvalidInputError, match="no force"):
        mixed_system(system, model, [0, 1], link_atoms=False, keep=["Colour"])


def test_restraints_of_all_atoms_need_no_place_for_link_atoms():
    """A list that happens to name every particle is still a list."""
    system, topology, positions = vacuum()
    restrained = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    force = openmm.CustomExternalForce("10*(x^2+y^2+z^2)")
    for i in range(22):
        force.addParticle(i)
    restrained.addForce(force)
    options = {"topology": topology}
    plain = evaluate(mixed_system(system, nothing, REGIONS["middle"], **options), positions)[0]
    mixed = mixed_system(restrained, nothing, REGIONS["middle"], **options)
    expected = plain + 10 * (positions**2).sum()
    assert evaluate(mixed, positions)[0] == pytest.approx(expected, rel=1e-12)


def test_variables_that_count_particles_are_named():
    """OpenMM would find out when the Context is made."""
    system, topology, _ = vacuum()
    inner = openmm.CustomGBForce()
    for _ in range(22):
        inner.addParticle([])
    variable = openmm.CustomCVForce("x")
    variable.addCollectiveVariable("x", inner)
    outer = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    outer.addForce(variable)
    with pytest.raises(UnsupportedForceError, match="CustomCVForce wants parameters|wants param"):
        mixed_system(outer, nothing, REGIONS["middle"], topology=topology, keep=variable.getName())


@pytest.mark.parametrize(
    "expression", ["a(type1, type2)/r^6", "k*present/r^6; present=a(0,1); k=2"]
)
def test_link_atoms_stay_out_of_custom_corrections(expression):
    """Zero is a kind of particle like any other; the correction counts pairs of all kinds."""
    system, topology, positions = solvated()
    custom = openmm.CustomNonbondedForce(expression)
    custom.addTabulatedFunction("a", openmm.Discrete2DFunction(2, 2, [1e-3, 2e-3, 2e-3, 5e-3]))
    custom.addPerParticleParameter("type")
    for i in range(system.getNumParticles()):
        custom.addParticle([i % 2])
    (nonbonded,) = (f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    for i in range(nonbonded.getNumExceptions()):
        custom.addExclusion(*nonbonded.getExceptionParameters(i)[:2])
    custom.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    custom.setCutoffDistance(0.7)
    custom.setUseLongRangeCorrection(True)
    whole = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    whole.addForce(custom)
    between = mixed_system(whole, network(), REGIONS["middle"], topology=topology, interpolate=True)
    start = evaluate(between, positions, lambda_interpolate=0.0)
    classical = evaluate(whole, positions)
    # Two particles more among N change the mean over pairs by 2/N^2, were they counted by 2/N.
    uncorrected = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(whole))
    uncorrected.getForce(uncorrected.getNumForces() - 1).setUseLongRangeCorrection(False)
    correction = classical[0] - evaluate(uncorrected, positions)[0]
    n = system.getNumParticles()
    assert abs(correction) > 1.0
    allowed = 1e-3 + 10 / n**2 * abs(correction)
    assert start[0] == pytest.approx(classical[0], abs=allowed)
    assert 2 / n * abs(correction) > 3 * allowed
    np.testing.assert_allclose(start[1][: len(positions)], classical[1], rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype):
    """A copy is moved; the model that may be in training stays as it is."""
    system, topology, positions = vacuum()
    model = network()
    mixed = mixed_system(system, model, range(22), topology=topology, dtype=dtype, device="cpu")
    expected = evaluate(mixed_system(system, model, range(22), topology=topology), positions)[0]
    error = abs(evaluate(mixed, positions)[0] - expected)
    assert error < (1e-3 if dtype == torch.float32 else 1e-12)
    assert (error == 0) == (dtype == torch.float64)
    assert model.shift.dtype == torch.float64


# Borders --------------------------------------------------------------------------------------


def test_link_atoms_lie_on_the_bond():
    system, topology, positions = vacuum()
    mixed = mixed_system(
        system,
        network(),
        REGIONS["middle"],
        topology=topology,
        link_distances={(14, 16): 0.1234},
    )
    assert mixed.getNumParticles() == 24
    *_, placed, _ = evaluate(mixed, positions)
    placed = placed.numpy()
    for cap, inner, outer, distance in ((22, 6, 4, 0.071 + 0.032), (23, 14, 16, 0.1234)):
        direction = (placed[outer] - placed[inner]) / np.linalg.norm(placed[outer] - placed[inner])
        np.testing.assert_allclose(placed[cap], placed[inner] + distance * direction, atol=1e-9)


def test_without_link_atoms_the_border_stays():
    """Bonds, angles and torsions that reach over the border are those of the force field."""
    system, topology, _ = vacuum()
    mixed = mixed_system(system, nothing, REGIONS["middle"], topology=topology, link_atoms=False)
    assert mixed.getNumParticles() == 22
    inside = set(REGIONS["middle"])
    for name, width in (("HarmonicAngleForce", 3), ("PeriodicTorsionForce", 4)):
        get = "getAngleParameters" if width == 3 else "getTorsionParameters"
        count = "getNumAngles" if width == 3 else "getNumTorsions"
        before, after = (
            next(f for f in s.getForces() if f.getName() == name) for s in (system, mixed)
        )
        rows = [tuple(getattr(before, get)(i)[:width]) for i in range(getattr(before, count)())]
        kept = [tuple(getattr(after, get)(i)[:width]) for i in range(getattr(after, count)())]
        assert kept == [row for row in rows if not set(row) <= inside]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"atoms": []}, "atoms"),
        ({"atoms": [0, 0]}, "different"),
        ({"atoms": [22]}, "0 to 21"),
        ({"embedding": "electrostatic"}, "mechanical"),
        ({"model": 3}, "model: got int"),
        ({"topology": None}, "atomic_numbers: got None"),
        ({"topology": None, "atoms": REGIONS["middle"]}, "topology: got None"),
        ({"topology": None, "atomic_numbers": [1, 2]}, "one for each of 22"),
        ({"atoms": REGIONS["middle"], "link_distances": {(0, 1): 0.1}}, "no bonds from inside"),
        ({"atoms": REGIONS["middle"], "link_distances": {(6, 4): -0.1}}, "positive"),
        ({"atoms": [6, 14]}, "several atoms"),
        ({"atoms": None}, "atoms: wanted indices"),
        ({"atoms": [0.5]}, "atoms: wanted indices"),
        ({"bonds": [(0, 1, 2)]}, "pairs of different"),
        ({"dtype": "float32"}, "dtype: got 'float32'"),
        ({"interpolate": "two words"}, "interpolate: got 'two words'"),
        ({"interpolate": "model"}, "other than 'model'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, match):
    system, topology, _ = vacuum()
    given = {"model": network(), "atoms": range(22), "topology": topology, **arguments}
    with pytest.raises(InvalidInputError, match=match):
        mixed_system(system, **given)


def test_interpolation_wants_a_parameter_of_its_own():
    system, topology, _ = vacuum()
    first = mixed_system(system, nothing, range(6), topology=topology, interpolate="mix")
    with pytest.raises(InvalidInputError, match="'mix' is a global parameter of neural"):
        mixed_system(
            first, nothing, [16], topology=topology, interpolate="mix", keep="neural", name="b"
        )


def test_interpolation_keeps_other_derivatives():
    """Of global parameters that the force field has within the region, and of the model's own."""
    system, topology, positions = vacuum()
    whole = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    for force in (
        openmm.CustomBondForce("stiff*(r-0.15)^2"),
        openmm.CustomNonbondedForce("stiff*exp(-5*r)"),
    ):
        force.addGlobalParameter("stiff", 100.0)
        force.addEnergyParameterDerivative("stiff")
        if isinstance(force, openmm.CustomBondForce):
            force.addBond(6, 8)
            force.addBond(0, 1)
        else:
            for _ in range(22):
                force.addParticle([])
            (charges,) = (f for f in whole.getForces() if isinstance(f, openmm.NonbondedForce))
            for i in range(charges.getNumExceptions()):
                force.addExclusion(*charges.getExceptionParameters(i)[:2])
        whole.addForce(force)
    mixed = mixed_system(whole, network(), REGIONS["middle"], topology=topology, interpolate=True)
    at = {
        k: evaluate(mixed, positions, lambda_interpolate=0.3, stiff=k) for k in (99.0, 100.0, 101.0)
    }
    expected = (at[101.0][0] - at[99.0][0]) / 2
    assert at[100.0][3]["stiff"] == pytest.approx(expected, rel=1e-9)


def test_interpolation_wants_a_model_that_pickles():
    """OpenMM copies forces that are inside another one."""
    system, topology, _ = vacuum()
    with pytest.raises(InvalidInputError, match="pickle"):
        mixed_system(system, lambda x: x.sum(), range(22), topology=topology, interpolate=True)


@pytest.mark.parametrize("route", ["auto", "host"])
def test_force_fields_pass_the_checks_of_models(route):
    topology, positions = molecule()
    potential = mdgraft.graft(field().createSystem(topology), route=route)
    report = check_model(potential, positions)
    skipped = {check.name for check in report.checks if check.status == "skipped"}
    assert {"forces", "hessian", "rotation", "torque", "batch"}.isdisjoint(skipped)


def test_the_system_is_left_as_it_was():
    system, topology, _ = vacuum()
    before = openmm.XmlSerializer.serialize(system)
    mixed_system(system, network(), REGIONS["middle"], topology=topology, interpolate=True)
    assert openmm.XmlSerializer.serialize(system) == before
    assert mdgraft_openmm.mixed_system is mixed_system
