"""Random systems of random forces with random options against OpenMM's Reference platform."""

import functools
import random

import numpy as np
import openmm
import pytest
from agreement import assert_agrees

N = 10
VARIABLES = {
    "distance": "distance({0},{1})",
    "angle": "angle({0},{1},{2})",
    "dihedral": "cos(dihedral({0},{1},{2},{3}))",
}
SHAPES = ("{a}*({v}-{b})^2", "{a}*exp(-{b}*{v}^2)", "{a}*sin({v}+{b})", "{a}*{v}/({b}^2+{v}^2)")


def geometry(rng, labels):
    """An expression of the geometry of some labels."""
    parts = []
    for i in range(rng.randint(1, 3)):
        kind = rng.choice([k for k in VARIABLES if VARIABLES[k].count("{") <= len(labels)])
        variable = VARIABLES[kind].format(*rng.sample(labels, VARIABLES[kind].count("{")))
        parts.append(rng.choice(SHAPES).format(a=rng.choice(["k", "g", "2"]), v=f"v{i}", b="b"))
        parts[-1] += f"*h; h=1+0.1*v{i}*g; v{i}={variable}" if i == 0 else ""
        if i:
            parts[-1] = parts[-1].replace(f"v{i}", variable)
    first, *definitions = parts[0].split("; ")
    return "; ".join(["+".join([*parts[1:], first]), *definitions])


def tabulated(rng, force):
    """A continuous table of one argument under the name f."""
    values = [rng.uniform(-1, 1) for _ in range(rng.randint(4, 9))]
    periodic = rng.random() < 0.5
    if periodic:
        values[-1] = values[0]
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(values, 0.0, 1.5, periodic))


def cut(rng, force):
    """One of the three usual methods."""
    method = rng.randrange(3)
    force.setNonbondedMethod(method)
    force.setCutoffDistance(rng.uniform(0.5, 0.95))


def exclude(rng, add):
    for pair in {tuple(sorted(rng.sample(range(N), 2))) for _ in range(rng.randint(0, 6))}:
        add(*pair)


def custom_bonded(rng):
    cls, size, name, kind = rng.choice(
        [
            (openmm.CustomBondForce, 2, "r", "Bond"),
            (openmm.CustomAngleForce, 3, "theta", "Angle"),
            (openmm.CustomTorsionForce, 4, "theta", "Torsion"),
        ]
    )
    force = cls(rng.choice(SHAPES).format(a="k", v=name, b="b") + f"+g*{name}")
    for parameter in ("k", "b"):
        getattr(force, f"addPer{kind}Parameter")(parameter)
    force.addGlobalParameter("g", 0.7)
    for _ in range(rng.randint(1, 6)):
        values = [rng.uniform(1, 9), rng.uniform(0.1, 2)]
        getattr(force, f"add{kind}")(*rng.sample(range(N), size), values)
    force.setUsesPeriodicBoundaryConditions(rng.random() < 0.5)
    return force


def compound(rng):
    size = rng.randint(2, 5)
    centroid = rng.random() < 0.5
    cls = openmm.CustomCentroidBondForce if centroid else openmm.CustomCompoundBondForce
    labels = [f"{'g' if centroid else 'p'}{i + 1}" for i in range(size)]
    force = cls(size, f"f(0.3*g)+{geometry(rng, labels)}")
    for parameter in ("k", "b"):
        force.addPerBondParameter(parameter)
    force.addGlobalParameter("g", 0.7)
    tabulated(rng, force)
    if centroid:
        for _ in range(6):
            members = rng.sample(range(N), rng.randint(2, 4))
            weights = [rng.uniform(0.5, 2) for _ in members] if rng.random() < 0.5 else []
            force.addGroup(members, weights)
    for _ in range(rng.randint(1, 4)):
        force.addBond(rng.sample(range(6), size), [rng.uniform(1, 9), rng.uniform(0.3, 2)])
    force.setUsesPeriodicBoundaryConditions(rng.random() < 0.5)
    return force


def custom_nonbonded(rng):
    energy = rng.choice(
        [
            "g*e1*e2*((s/r)^6-(s/r)^4)*f(r); s=0.5*(s1+s2)",
            "g*sqrt(e1*e2)/(r^2+s1*s2)+c1*c2*exp(-r)",
            "select(step(r-0.5), g*e1*e2/r, e1*e2/r^2+min(c1, c2)*f(r))",
        ]
    )
    force = openmm.CustomNonbondedForce(energy)
    for name in ("s", "e"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("g", 0.7)
    force.addComputedValue("c", "s*e+0.2*s^2")
    tabulated(rng, force)
    for _ in range(N):
        force.addParticle([rng.uniform(0.1, 0.3), rng.uniform(0.3, 2)])
    cut(rng, force)
    force.setUseSwitchingFunction(rng.random() < 0.5)
    force.setSwitchingDistance(force.getCutoffDistance() * rng.uniform(0.6, 0.95))
    exclude(rng, force.addExclusion)
    for _ in range(rng.randint(0, 2)):
        force.addInteractionGroup(rng.sample(range(N), 4), rng.sample(range(N), 5))
    return force


def custom_gb(rng):
    force = openmm.CustomGBForce()
    for name in ("q", "s"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("g", 0.7)
    tabulated(rng, force)
    kinds = [force.ParticlePair, force.ParticlePairNoExclusions]
    force.addComputedValue("I", "s1*s2*exp(-r^2)+0.1*f(r)", rng.choice(kinds))
    force.addComputedValue("B", "g/(2+tanh(I*s))+0.01*x", force.SingleParticle)
    force.addEnergyTerm("-q^2/B+y*I", force.SingleParticle)
    force.addEnergyTerm("q1*q2/sqrt(r^2+B1*B2*exp(-r))", rng.choice(kinds))
    for _ in range(N):
        force.addParticle([rng.uniform(-1, 1), rng.uniform(0.5, 1.5)])
    cut(rng, force)
    exclude(rng, force.addExclusion)
    return force


def hydrogen_bonds(rng):
    labels = ["d1", "d2", "d3", "a1", "a2", "a3"]
    force = openmm.CustomHbondForce(geometry(rng, labels))
    force.addPerDonorParameter("k")
    force.addPerAcceptorParameter("b")
    force.addGlobalParameter("g", 0.7)
    for _ in range(rng.randint(1, 4)):
        force.addDonor(*rng.sample(range(5), 3), [rng.uniform(1, 5)])
        force.addAcceptor(*rng.sample(range(5, N), 3), [rng.uniform(0.3, 2)])
    cut(rng, force)
    force.addExclusion(0, 0)
    return force


def many_particles(rng):
    size = rng.choice([3, 3, 4])
    energy = geometry(rng, [f"p{i + 1}" for i in range(size)]).replace("k", "(k1+k2*k3)")
    force = openmm.CustomManyParticleForce(size, energy.replace("b", "b1"))
    for parameter in ("k", "b"):
        force.addPerParticleParameter(parameter)
    force.addGlobalParameter("g", 0.7)
    force.setPermutationMode(rng.randrange(2))
    for i in range(N):
        force.addParticle([rng.uniform(0.5, 2), rng.uniform(0.3, 2)], i % 3)
    for i in range(size):
        if rng.random() < 0.5:
            force.setTypeFilter(i, rng.sample(range(3), rng.randint(1, 2)))
    cut(rng, force)
    exclude(rng, force.addExclusion)
    return force


def nonbonded(rng):
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(rng.choice([0, 1, 2, 4, 5]))
    force.setCutoffDistance(rng.uniform(0.5, 0.95))
    force.setUseSwitchingFunction(rng.random() < 0.5)
    force.setSwitchingDistance(force.getCutoffDistance() * rng.uniform(0.6, 0.95))
    force.setUseDispersionCorrection(rng.random() < 0.5)
    force.setExceptionsUsePeriodicBoundaryConditions(rng.random() < 0.5)
    force.addGlobalParameter("g", 0.7)
    for _ in range(N):
        force.addParticle(rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.25), rng.uniform(0.1, 1))
    exclude(rng, lambda i, j: force.addException(i, j, rng.uniform(-0.2, 0.2), 0.2, rng.random()))
    for i in rng.sample(range(N), rng.randint(0, 4)):
        force.addParticleParameterOffset("g", i, rng.uniform(-0.3, 0.3), 0.02, 0.1)
    return force


def collective(rng):
    inner = [custom_bonded, compound, custom_nonbonded, hydrogen_bonds]
    force = openmm.CustomCVForce("0.01*(v0+v1)^2*g+f(v0)*0.1")
    force.addGlobalParameter("g", 0.7)
    tabulated(rng, force)
    for i in range(2):
        force.addCollectiveVariable(f"v{i}", rng.choice(inner)(rng))
    return force


KINDS = {
    f.__name__: f
    for f in (
        custom_bonded,
        compound,
        custom_nonbonded,
        custom_gb,
        hydrogen_bonds,
        many_particles,
        nonbonded,
        collective,
    )
}


@functools.cache
def lattice():
    rng = np.random.default_rng(6)
    points = np.array([(i % 3, i // 3 % 3, i // 9) for i in range(N)]) * 0.33
    return points + rng.uniform(-0.08, 0.08, size=(N, 3))


def random_system(kind, seed):
    rng = random.Random(f"{kind} {seed}")
    system = openmm.System()
    x, y = rng.uniform(1.95, 2.2), rng.uniform(1.95, 2.2)
    box = [[x, 0, 0], [rng.uniform(-0.3, 0.3), y, 0], [rng.uniform(-0.3, 0.3), 0.2, 2.05]]
    system.setDefaultPeriodicBoxVectors(*box)
    for _ in range(N):
        system.addParticle(rng.uniform(1, 20))
    system.addForce(KINDS[kind](rng))
    positions = lattice() + np.array([[rng.uniform(-0.02, 0.02) for _ in "xyz"] for _ in range(N)])
    if system.usesPeriodicBoundaryConditions():
        positions += np.array([[rng.randint(-1, 1) for _ in "xyz"] for _ in range(N)]) @ box
    return system, positions


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_agrees(kind, seed):
    assert_agrees(*random_system(kind, seed), consistent=False)
