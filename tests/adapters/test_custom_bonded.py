"""Custom bonds of every kind, external fields and volume energies against OpenMM.

CustomBondForce, CustomAngleForce, CustomTorsionForce, CustomCompoundBondForce,
CustomCentroidBondForce, CustomExternalForce, CustomVolumeForce.
"""

import dataclasses
from collections.abc import Callable

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees

N = 9
BOX = np.array([[2.0, 0, 0], [0.5, 2.1, 0], [-0.4, 0.6, 2.2]])
RNG = np.random.default_rng(7)
TABLE_1D = RNG.normal(size=12).tolist()
TABLE_2D = RNG.normal(size=30).tolist()
TABLE_3D = RNG.normal(size=60).tolist()


def bonds(energy, items, names=(), rows=None, globals_=()):
    """A CustomBondForce, CustomAngleForce or CustomTorsionForce, by the number of particles."""
    kind = {2: "Bond", 3: "Angle", 4: "Torsion"}[len(items[0])]
    force = getattr(openmm, f"Custom{kind}Force")(energy)
    for name in names:
        getattr(force, f"addPer{kind}Parameter")(name)
    for name, value in globals_:
        force.addGlobalParameter(name, value)
    for i, item in enumerate(items):
        getattr(force, f"add{kind}")(*item, rows[i] if rows else [])
    return force


def external(energy, names=(), rows=None, particles=range(N), globals_=()):
    force = openmm.CustomExternalForce(energy)
    for name in names:
        force.addPerParticleParameter(name)
    for name, value in globals_:
        force.addGlobalParameter(name, value)
    for i, particle in enumerate(particles):
        force.addParticle(particle, rows[i] if rows else [])
    return force


def compound(n, energy, items, names=(), rows=None, globals_=(), tables=()):
    force = openmm.CustomCompoundBondForce(n, energy)
    for name in names:
        force.addPerBondParameter(name)
    for name, value in globals_:
        force.addGlobalParameter(name, value)
    for name, table in tables:
        force.addTabulatedFunction(name, table())
    for i, item in enumerate(items):
        force.addBond(list(item), rows[i] if rows else [])
    return force


def centroid(n, energy, items, groups, names=(), rows=None, tables=()):
    force = openmm.CustomCentroidBondForce(n, energy)
    for name in names:
        force.addPerBondParameter(name)
    for name, table in tables:
        force.addTabulatedFunction(name, table())
    for group in groups:
        force.addGroup(*group)
    for i, item in enumerate(items):
        force.addBond(list(item), rows[i] if rows else [])
    return force


def volume(energy, globals_=()):
    force = openmm.CustomVolumeForce(energy)
    for name, value in globals_:
        force.addGlobalParameter(name, value)
    return force


LINE = openmm.Continuous1DFunction([0.0, 1.0], 0.0, 1.0)
PAIRS = [(0, 1), (2, 7), (5, 3)]
TRIPLES = [(0, 1, 2), (4, 3, 8)]
QUADRUPLES = [(0, 1, 2, 3), (7, 4, 6, 5)]
GROUPS = [([0, 1, 2],), ([3, 4], [0.3, 1.7]), ([5, 6, 7, 8], [1.0, 2.0, -0.5, 0.25])]
IMPROPER = "k*min(d, 2*pi-d)^2; d = abs(theta-theta0); pi = 3.1415926535"


@dataclasses.dataclass(frozen=True)
class Case:
    """A force and what is special about it."""

    make: Callable[[], openmm.Force]
    box: bool = True
    wrap: bool = False
    translation: bool = True


CASES = {
    "bond": Case(
        lambda: bonds("k*(r-r0)^2", PAIRS, ("k", "r0"), [[300, 0.3], [200, 0.5], [100, 0.2]])
    ),
    "bond-globals-definitions": Case(
        lambda: bonds(
            "lambda*D*(1-exp(-a*x))^2 + if; x = r-r0; a = sqrt(k/(2*D))",
            PAIRS,
            ("D", "k", "r0", "training"),
            [[30, 300, 0.3, 1], [20, 200, 0.5, 2], [10, 100, 0.2, 3]],
            (("lambda", 0.6), ("if", -1.5), ("unused.one", 2.0)),
        )
    ),
    "bond-cusps": Case(
        lambda: bonds(
            "step(r-a)*k*(r-a)^2+max(r, a)*abs(r-b)*select(step(r-a), r, a/r)",
            PAIRS,
            ("k", "a", "b"),
            [[300, 0.3, 0.6], [200, 2.5, 0.2], [100, 0.2, 1.9]],
        )
    ),
    "bond-constant": Case(lambda: bonds("3*k", PAIRS, ("k",), [[1], [2], [3]])),
    "angle": Case(
        lambda: bonds(
            "k*(theta-t0)^2+q*cos(theta)^3",
            TRIPLES,
            ("k", "t0", "q"),
            [[50, 1.8, 2], [60, 2.1, -3]],
        )
    ),
    "torsion": Case(
        lambda: bonds(
            "k*(1+cos(n*theta-t0))", QUADRUPLES, ("k", "n", "t0"), [[5, 3, 0.3], [6, 1, 1]]
        )
    ),
    "improper": Case(lambda: bonds(IMPROPER, QUADRUPLES, ("k", "theta0"), [[20, 3.1], [30, 0.2]])),
    "external": Case(
        lambda: external(
            "k*(x-x0)^2+y*z*E+sin(x*y)",
            ("k", "x0"),
            [[i + 1.0, 0.1 * i] for i in range(N)],
            globals_=(("E", 0.4),),
        ),
        translation=False,
    ),
    "external-periodic": Case(
        lambda: external(
            "k*periodicdistance(x, y, z, x0, y0, z0)^2",
            ("k", "x0", "y0", "z0"),
            [[10.0, 0.3, 2.1, -0.2], [20.0, 1.0, 0.0, 3.0]],
            particles=(2, 6),
        ),
        wrap=True,
        translation=False,
    ),
    "volume": Case(
        lambda: volume("a*(v-v0)^2+b*ax*by+bx*cx-cy/cz", (("a", 0.3), ("b", 2.0), ("v0", 9.0)))
    ),
    "compound": Case(
        lambda: compound(
            4,
            "k*(distance(p1, p3)-r0)^2+angle(p1,p2,p3)*dihedral(p1, p2,p3,p4)+"
            "pointdistance(x1,y1,z1, 0.5*(x2+x3),0.5*(y2+y3),0.5*(z2+z3))*x4"
            "+pointangle(x1,y1,z1,x2,y2,z2,x4,y4,z4)"
            "+s*pointdihedral(x1,y1,z1,x2,y2,z2,x3,y3,z3,x4,y4,z4)*k; s = 2*lambda",
            QUADRUPLES,
            ("k", "r0"),
            [[10, 0.4], [20, 0.3]],
            (("lambda", 0.7),),
        ),
        translation=False,
    ),
    "compound-tables": Case(
        lambda: compound(
            3,
            "k*f(distance(p1,p2))+g(distance(p1,p3),angle(p1,p2,p3))+h(x1,y2,z3)+e(i)*p(x2)",
            TRIPLES,
            ("k", "i"),
            [[2.0, 1.0], [-1.0, 2.0]],
            tables=(
                ("f", lambda: openmm.Continuous1DFunction(TABLE_1D, 0.0, 3.0)),
                ("g", lambda: openmm.Continuous2DFunction(5, 6, TABLE_2D, 0.0, 4.0, 0.0, 3.2)),
                ("h", lambda: openmm.Continuous3DFunction(3, 4, 5, TABLE_3D, -4, 4, -4, 4, -4, 4)),
                ("e", lambda: openmm.Discrete1DFunction([0.5, 1.5, 2.5])),
                ("p", lambda: openmm.Continuous1DFunction([0.0, 1, 2, 1, 0.0], 0.0, 0.7, True)),
            ),
        ),
        translation=False,
    ),
    "compound-branches": Case(
        lambda: compound(
            3,
            "select(step(a-d), sqrt(a-d)*f(d)+m, min(f(1/d)+m, m^2)); m = min(q, max(log(q), f(q)))"
            "; q = distance(p2,p3); d = distance(p1,p2)",
            [*TRIPLES, (5, 6, 7)],
            ("a",),
            [[0.1], [1.0], [2.0]],
            tables=(("f", lambda: openmm.Continuous1DFunction(TABLE_1D, -1.0, 3.0)),),
        )
    ),
    "centroid": Case(
        lambda: centroid(
            3,
            "k*distance(g1,g2)^2+angle(g1,g2,g3)+f(pointdistance(x1,y1,z1,x3,y3,z3))",
            [(0, 1, 2), (2, 0, 1)],
            GROUPS,
            ("k",),
            [[5.0], [7.0]],
            (("f", lambda: openmm.Continuous1DFunction(TABLE_1D, 0.0, 4.0)),),
        )
    ),
    "centroid-masses": Case(
        lambda: centroid(2, "distance(g2,g1)", [(0, 1)], GROUPS[:1] * 1 + [([4, 5],)])
    ),
}


def build(case, periodic):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for i in range(N):
        system.addParticle(1.0 + i)
    force = case.make()
    if hasattr(force, "setUsesPeriodicBoundaryConditions"):
        force.setUsesPeriodicBoundaryConditions(periodic)
    system.addForce(force)
    rng = np.random.default_rng(3)
    positions = rng.uniform(0.0, 0.9, size=(N, 3))
    if periodic or case.wrap:
        # Whole molecules, but far from the origin.
        positions += np.array([1, -2, 1]) @ BOX
    return system, positions


@pytest.mark.parametrize("periodic", [False, True], ids=["open", "periodic"])
@pytest.mark.parametrize("name", CASES)
def test_against_openmm(name, periodic):
    case = CASES[name]
    system, positions = build(case, periodic)
    assert_agrees(
        system,
        positions,
        translation_rtol=1e-9 if case.translation else None,
        # Absolute coordinates are another function of another image.
        consistent=case.translation or not periodic or case.wrap,
    )


def test_the_nearest_images_are_taken():
    """Particles in different images, which only periodic forces bring together."""
    system, positions = build(CASES["compound-tables"], True)
    system.addForce(bonds("k*r^2", PAIRS, ("k",), [[3], [2], [1]]))
    system.getForce(1).setUsesPeriodicBoundaryConditions(True)
    shifts = np.random.default_rng(5).integers(-1, 2, size=(N, 3))
    potential = assert_agrees(system, positions + shifts @ BOX, consistent=False)
    assert potential.periodic


def test_parameters_have_the_users_names():
    system, _ = build(CASES["bond-globals-definitions"], False)
    system.addForce(CASES["compound-tables"].make())
    system.addForce(CASES["centroid"].make())
    potential = mdgraft.graft(system)
    assert set(dict(potential.named_parameters())) == {
        *(f"CustomBondForce.{name}" for name in ("D", "k", "r0", "training")),
        *(f"CustomCompoundBondForce.{name}" for name in "kifghep"),
        *(f"CustomCentroidBondForce.{name}" for name in ("k", "f", "group_weights")),
        *(f"globals.{name}" for name in ("lambda", "if", "unused_one")),
    }
    assert set(potential.routes.values()) == {"native"}


def test_write_back():
    system, positions = build(CASES["compound-tables"], False)
    system.addForce(CASES["centroid"].make())
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.25)
    potential.get_parameter("CustomCompoundBondForce.i").data.div_(1.25)
    # The first and last entries of a periodic table are one.
    mdgraft_openmm.write_parameters(potential, system)
    again = mdgraft.graft(system)
    torch.testing.assert_close(again(positions), potential(positions), rtol=1e-14, atol=0)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    with torch.no_grad():
        potential.get_parameter("CustomCompoundBondForce.f").mul_(2.0)
    mdgraft_openmm.write_parameters(potential, context)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(potential(positions).item(), rel=1e-12)
    with torch.no_grad():
        potential.get_parameter("CustomCentroidBondForce.group_weights").mul_(
            torch.tensor([1.0, 2, 3, 4, 5, 6])
        )
    with pytest.raises(mdgraft.ParameterMismatchError, match="group_weights"):
        mdgraft_openmm.write_parameters(potential, context)


@pytest.mark.parametrize(
    ("force", "message"),
    [
        (lambda: bonds("k*(r-r1)^2", PAIRS, ("k", "r0"), [[1, 1]] * 3), "unknown variable 'r1'"),
        (lambda: bonds("k*r)", PAIRS, ("k",), [[1]] * 3), r"'\)' cannot stand here"),
        (lambda: bonds("sine(r)", PAIRS), "unknown function 'sine'"),
        (lambda: bonds("k*r", PAIRS, ("k",), [[1, 2]] * 3), "entry 0 has 2 parameters, wanted 1"),
        (lambda: bonds("r", [(0, N)]), rf"entry 0 refers to \[0, {N}\]"),
        (lambda: compound(2, "distance(p1,p3)", PAIRS), "arguments of distance must be among p1"),
        (lambda: compound(2, "distance(p1)", PAIRS), "distance takes 2 arguments, got 1"),
        (lambda: centroid(1, "x1", [(3,)], GROUPS), r"entry 0 refers to \[3\]"),
        (lambda: centroid(1, "x1", [(0,)], [([0, 1], [1.0, -1.0])]), "add up to 0"),
        (lambda: external("periodicdistance(x,y)"), "takes 6 arguments, got 2"),
        (lambda: compound(2, "0*a", PAIRS), "unknown variable 'a'"),
        (
            lambda: compound(1, "pointangle(x1)", [(0,)], tables=(("pointangle", lambda: LINE),)),
            "pointangle takes 9 arguments, got 1",
        ),
    ],
)
def test_what_openmm_refuses(force, message):
    system = openmm.System()
    for _ in range(N):
        system.addParticle(1.0)
    system.addForce(force())
    with pytest.raises(openmm.OpenMMException):
        openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)


def test_volume_with_an_unknown_variable():
    system, _ = build(Case(lambda: volume("v*w")), True)
    with pytest.raises(mdgraft.InvalidInputError, match="unknown variable 'w'"):
        mdgraft.graft(system)


def test_coincident_particles_and_empty_forces():
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addForce(bonds("k*r^2", [(0, 1)], ("k",), [[4]]))
    for empty in (
        openmm.CustomBondForce("r^2"),
        openmm.CustomTorsionForce("theta"),
        openmm.CustomExternalForce("x"),
        openmm.CustomCompoundBondForce(3, "angle(p1,p2,p3)"),
        openmm.CustomCentroidBondForce(2, "distance(g1,g2)"),
    ):
        system.addForce(empty)
    potential = mdgraft.graft(system)
    x = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    energy = potential(x)
    (gradient,) = torch.autograd.grad(energy, x)
    assert energy.item() == 0 and not gradient.any()


@pytest.mark.parametrize("places", [(0, 0, 1), (0, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize("energy", ["angle(p1,p2,p3)", "pointangle(x1,y1,z1,x2,y2,z2,x3,y3,z3)"])
def test_an_angle_without_arms(energy, places):
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addForce(compound(3, energy, [(0, 1, 2)]))
    positions = np.array([[0.1, 0.2, 0.3], [0.5, -0.1, 0.4]])[list(places)]
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    x = torch.tensor(positions, requires_grad=True)
    value = mdgraft.graft(system)(x)
    assert value.item() == context.getState(energy=True).getPotentialEnergy()._value
    assert not torch.autograd.grad(value, x)[0].any()


def test_a_limit_that_is_infinite():
    """A global parameter may well be infinite, and large numbers become so in single precision."""
    system, positions = build(
        Case(
            lambda: bonds(
                "k*min(r, min(cap, most))",
                PAIRS,
                ("k", "cap"),
                [[3, 1e300], [2, 0.1], [1, 1e300]],
                (("most", np.inf),),
            )
        ),
        False,
    )
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        potential = mdgraft.graft(system, dtype=dtype)
        x = torch.tensor(positions, dtype=dtype)
        energy = potential(x)
        assert energy.item() == pytest.approx(state.getPotentialEnergy()._value, rel=rtol)
        forces = potential.forces(x).detach().numpy()
        np.testing.assert_allclose(forces, state.getForces(asNumpy=True)._value, atol=10 * rtol)
        energy.backward()
        assert potential.get_parameter("CustomBondForce.cap").grad.tolist() == [0, 2, 0]
