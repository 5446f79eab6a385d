"""AmoebaMultipoleForce against OpenMM's Reference platform."""

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees, assert_follows_energy, reference_context
from mdgraft_openmm._known import precision, remarks
from openmm import app, unit

Multipole = openmm.AmoebaMultipoleForce
POLARIZATION = {"direct": Multipole.Direct, "mutual": Multipole.Mutual}
POLARIZATION["extrapolated"] = Multipole.Extrapolated
TRICLINIC = np.array([[1.7, 0, 0], [0.3, 1.8, 0], [-0.4, 0.5, 1.9]])
N = 12


def quadrupole(rng, size=2e-4):
    a, b, c, d, e = rng.normal(0, size, size=5)
    return [a, b, c, b, d, e, c, e, -a - d]


def molecules(
    *,
    polarization="mutual",
    pme=False,
    axes="mixed",
    moments=True,
    axial=True,
    zero=(),
    grid=None,
    seed=4,
):
    """Three molecules of four atoms each, with all kinds of frames and all scaled pairs."""
    rng = np.random.default_rng(seed)
    system, force = openmm.System(), Multipole()
    system.setDefaultPeriodicBoxVectors(*TRICLINIC)
    force.setPolarizationType(POLARIZATION[polarization])
    force.setMutualInducedTargetEpsilon(1e-10)
    force.setMutualInducedMaxIterations(300)
    force.setExtrapolationCoefficients([-0.154, 0.017, 0.658, 0.474])
    if pme:
        force.setNonbondedMethod(Multipole.PME)
        force.setCutoffDistance(0.8)
        if grid is not None:
            force.setPMEParameters(4.0, *grid)
    kinds = [
        Multipole.ZThenX,
        Multipole.Bisector,
        Multipole.ZBisect,
        Multipole.ZOnly,
        Multipole.NoAxisType,
    ]
    shape = np.array([[0, 0, 0], [0.1, 0.02, 0], [-0.04, 0.09, 0.03], [0.02, -0.05, 0.1]])
    positions = []
    for i in range(N):
        molecule, k = divmod(i, 4)
        kind = kinds[i % 5] if axes == "mixed" else axes
        others = [4 * molecule + (k + shift) % 4 for shift in (1, 2, 3)]
        if kind == Multipole.NoAxisType:
            others = [-1, -1, -1]
        elif kind == Multipole.ZOnly:
            others[1:] = [-1, -1]
        elif kind in (Multipole.ZThenX, Multipole.Bisector) and i % 4:
            # The others are chiral centres.
            others[2] = -1
        dipole = rng.normal(0, 0.01, size=3) * moments
        second = np.array(quadrupole(rng)) * moments
        if axial and kind == Multipole.ZOnly:
            # As its symmetry wants it; for other moments OpenMM's torques are not right.
            dipole[:2] = 0.0
            second = second[0] * np.array([1, 0, 0, 0, 1, 0, 0, 0, -2])
        alpha = 0.0 if i in zero else rng.uniform(3e-4, 1.2e-3)
        damping = 0.0 if i in zero else rng.uniform(0.26, 0.33)
        force.addMultipole(
            rng.normal(0, 0.3), dipole, second, kind, *others, rng.uniform(0.2, 0.4), damping, alpha
        )
        system.addParticle(1.0)
        turn = np.linalg.qr(np.random.default_rng(molecule).normal(size=(3, 3)))[0]
        centre = 0.38 * np.array([molecule % 2, molecule // 2, 0.2 * molecule])
        positions.append(centre + shape[k] @ turn + rng.uniform(-0.01, 0.01, 3))
    for i in range(N):
        first = i - i % 4
        chain = [[j for j in range(first, first + 4) if abs(j - i) == d] for d in (1, 2, 3)]
        for name, atoms in zip(("12", "13", "14"), chain, strict=True):
            force.setCovalentMap(i, getattr(Multipole, f"Covalent{name}"), atoms)
        force.setCovalentMap(i, Multipole.Covalent15, [j for j in (0, 9) if abs(i - j) == 9])
        # In the second molecule one group, in the others two; a 1-4 pair within one counts half.
        half = [first, first + 1] if i % 4 < 2 else [first + 2, first + 3]
        group = list(range(first, first + 4)) if i // 4 == 1 else half
        force.setCovalentMap(i, Multipole.PolarizationCovalent11, group)
        rest = [j for j in range(first, first + 4) if j not in group]
        force.setCovalentMap(i, Multipole.PolarizationCovalent12, rest)
    system.addForce(force)
    return system, np.array(positions)


@pytest.mark.parametrize("pme", [False, True], ids=["open", "pme"])
@pytest.mark.parametrize("polarization", POLARIZATION)
def test_agrees(polarization, pme):
    """Energy, forces, box, all parameters and second derivatives.

    OpenMM converges mutual dipoles to 1e-10 debye, and with a mesh it takes the exponentials that
    damp them in single precision, which its differences in Thole factors show.
    """
    system, positions = molecules(polarization=polarization, pme=pme)
    if pme:
        images = np.repeat(np.random.default_rng(1).integers(-1, 2, size=(3, 3)), 4, axis=0)
        positions = positions + images @ TRICLINIC
    single = pme and polarization != "direct"
    assert_agrees(
        system,
        positions,
        rtol=1e-7 if single else 1e-9,
        parameter_rtol=1e-2 if single else 1e-6,
        second_rtol=1e-5,
        translation_rtol=None,
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(moments=False),
        dict(zero=(0, 3, 7)),
        dict(zero=tuple(range(N)), pme=True),
        dict(pme=True, grid=(14, 16, 18), polarization="direct"),
        *(dict(axes=kind, polarization="direct") for kind in (0, 1, 2, 4, 5)),
    ],
    ids=str,
)
def test_variants(options):
    """Charges alone, sites without polarizability, odd meshes, every kind of frame."""
    system, positions = molecules(**options)
    assert_agrees(system, positions, second_rtol=1e-5, translation_rtol=None)


@pytest.mark.parametrize("kind", [Multipole.ThreeFold, Multipole.ZOnly, Multipole.ZBisect])
def test_frames_that_openmm_has_not_right(kind):
    """The gradient of OpenMM's energy, which its forces are not.

    In three-fold frames never, in frames with z only where moments lack their symmetry, in z-bisect
    ones where z is far from the middle of the other two.
    """
    system, positions = molecules(axes=kind, polarization="direct", axial=False)
    if kind == Multipole.ZBisect:
        positions[1:4] = positions[0] + np.array(
            [[-0.1, 0.01, 0], [0.08, 0.09, 0], [0.09, -0.1, 0.01]]
        )
        assert [r for r in remarks(system, TRICLINIC) if "z-bisect" in r]
    assert_follows_energy(system, positions)


def test_rounded_quadrupoles():
    """A small trace: the gradient of OpenMM's energy, which its forces are only nearly."""
    system, positions = molecules(polarization="direct")
    assert precision(system) == {}
    force = system.getForce(0)
    for i in range(N):
        row = list(force.getMultipoleParameters(i))
        row[2] = np.array([x._value for x in row[2]]) + 1e-8 * np.eye(3).reshape(9)
        force.setMultipoleParameters(i, *row)
    assert_follows_energy(system, positions)
    size = precision(system)[force.getName()]
    assert 1e-7 < size < 1e-5
    assert_agrees(system, positions, force_rtol=size, second_rtol=size, gradients=False)


def test_linear_molecule():
    """A frame without an axis x: moments around z count all the same."""
    system, positions = molecules(axes=Multipole.ZThenX, polarization="direct", pme=True)
    positions[1:3] = positions[0] + np.array([[0.12, 0, 0], [-0.12, 0, 0]])
    context = reference_context(system)
    context.setPositions(positions)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    x = torch.tensor(positions, requires_grad=True)
    found = mdgraft.graft(system)(x, torch.tensor(TRICLINIC))
    assert found.item() == pytest.approx(energy, rel=1e-8)
    assert torch.isfinite(torch.autograd.grad(found, x)[0]).all()


def test_induced_dipoles_of_a_pair():
    """Applequist's closed form, and the derivative of the energy in a polarizability."""
    alpha, r, charge = (1.0e-3, 1.5e-3), 0.25, 0.4
    system, force = openmm.System(), Multipole()
    force.setPolarizationType(Multipole.Mutual)
    for i in range(3):
        system.addParticle(1.0)
        polarizability = (*alpha, 0.0)[i]
        none = [0.0] * 3, [0.0] * 9, Multipole.NoAxisType, -1, -1, -1
        force.addMultipole(charge * (i == 2), *none, 0.39, 0.0, polarizability)
    system.addForce(force)
    # Far away, so that its field is nearly the same at both; along the pair.
    positions = torch.tensor([[0.0, 0, 0], [r, 0, 0], [1e4, 0, 0]], dtype=torch.float64)
    potential = mdgraft.graft(system)
    energy = potential(positions)
    a, b = (x / r**3 for x in alpha)
    total = r**3 * (a + b + 4 * a * b) / (1 - 4 * a * b)
    field = charge / 1e8
    assert energy.item() == pytest.approx(-0.5 * 138.93545764 * total * field**2, rel=1e-4)
    (slope,) = torch.autograd.grad(
        energy, potential.get_parameter("AmoebaMultipoleForce.polarizability")
    )
    dipole = field * alpha[0] * (1 + 2 * b) / (1 - 4 * a * b)
    expected = -0.5 * 138.93545764 * dipole**2 / alpha[0] ** 2
    assert slope[0].item() == pytest.approx(expected, rel=1e-4)


def test_a_polarization_catastrophe():
    system, positions = molecules(polarization="mutual")
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter("AmoebaMultipoleForce.thole").fill_(100.0)
        potential.get_parameter("AmoebaMultipoleForce.polarizability").fill_(5e-3)
    with pytest.raises(mdgraft.SimulationError, match="polarization catastrophe"):
        potential(torch.tensor(positions))


def test_water():
    """Liquid water as OpenMM's force field has it, with the vdW and bonded forces around it."""
    forcefield = app.ForceField("amoeba2018.xml")
    water = app.Modeller(app.Topology(), [])
    water.addSolvent(forcefield, boxSize=openmm.Vec3(1.85, 1.85, 1.85))
    system = forcefield.createSystem(
        water.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=0.7 * unit.nanometer,
        vdwCutoff=0.9 * unit.nanometer,
        constraints=None,
        rigidWater=False,
        polarization="mutual",
        mutualInducedTargetEpsilon=1e-9,
    )
    for force in system.getForces():
        if isinstance(force, Multipole):
            force.setMutualInducedMaxIterations(200)
    positions = np.array(water.positions.value_in_unit(unit.nanometer))
    box = np.array(water.topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))
    potential = mdgraft.graft(system)
    assert set(potential.routes.values()) == {"native"}
    context = reference_context(system)
    context.setPeriodicBoxVectors(*box)
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    x, h = torch.tensor(positions, requires_grad=True), torch.tensor(box)
    energy = potential(x, h)
    assert energy.item() == pytest.approx(state.getPotentialEnergy()._value, rel=1e-7)
    forces = -torch.autograd.grad(energy, x)[0].numpy()
    truth = state.getForces(asNumpy=True)._value
    assert np.sqrt(((forces - truth) ** 2).mean()) < 1e-6 * np.sqrt((truth**2).mean())


def test_write_back():
    system, positions = molecules(pme=True)
    context = reference_context(system)
    context.setPositions(positions)
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.mul_(1.05)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    found = potential(torch.tensor(positions), torch.tensor(TRICLINIC)).item()
    assert found == pytest.approx(energy, rel=1e-7)


@pytest.mark.parametrize(
    ("key", "entry", "value", "match"),
    [
        ("quadrupole", (1, 0, 0), 0.5, "entry 1 has a trace of"),
        ("quadrupole", (2, 0, 1), 0.5, "entry 2 has an antisymmetric part"),
        ("polarizability", (3,), -1e-4, "entry 3 is -0.0001"),
    ],
)
def test_refused_values(key, entry, value, match):
    system, _ = molecules()
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter(f"AmoebaMultipoleForce.{key}")[entry] = value
    with pytest.raises(mdgraft.ParameterMismatchError, match=match):
        mdgraft_openmm.write_parameters(potential, system)


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ((Multipole.ZThenX, 1, -1, -1), "needs the first 2"),
        ((Multipole.ThreeFold, 1, 2, 99), "needs the first 3"),
        ((17, 1, 2, 3), "unknown axis type 17"),
    ],
)
def test_what_is_refused(axes, match):
    system, _ = molecules()
    force = system.getForce(0)
    row = list(force.getMultipoleParameters(0))
    force.setMultipoleParameters(0, *row[:3], *axes, *row[7:])
    with pytest.raises(mdgraft.InvalidInputError, match=match):
        mdgraft.graft(system)
