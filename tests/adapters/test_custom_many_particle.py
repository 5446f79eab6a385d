"""CustomHbondForce and CustomManyParticleForce against OpenMM."""

import dataclasses
import tracemalloc

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees

N = 15
BOX = np.array([[1.9, 0, 0], [0.4, 2.0, 0], [-0.5, 0.3, 2.1]])
METHODS = ("NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic")


def system_with(force):
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*BOX)
    for _ in range(N):
        system.addParticle(12.0)
    system.addForce(force)
    rng = np.random.default_rng(8)
    lattice = np.array([(i % 3, i // 3 % 3, i // 9) for i in range(N)]) / 3
    positions = lattice @ BOX + rng.uniform(-0.12, 0.12, size=(N, 3))
    if force.usesPeriodicBoundaryConditions():
        positions += rng.integers(-1, 2, size=(N, 3)) @ BOX
    return system, positions


@dataclasses.dataclass(frozen=True)
class Hbond:
    """A CustomHbondForce."""

    energy: str
    method: str = "NoCutoff"
    table: bool = False

    def make(self):
        rng = np.random.default_rng(2)
        force = openmm.CustomHbondForce(self.energy)
        force.setNonbondedMethod(getattr(openmm.CustomHbondForce, self.method))
        force.setCutoffDistance(0.93)
        force.addPerDonorParameter("k")
        force.addPerDonorParameter("r0")
        force.addPerAcceptorParameter("t0")
        force.addGlobalParameter("lambda", 0.7)
        if self.table:
            values = rng.normal(size=20).tolist()
            force.addTabulatedFunction("f", openmm.Continuous1DFunction(values, 0.0, 4.0))
        for i in range(0, 9, 3):
            force.addDonor(i, i + 1, i + 2, [rng.uniform(1, 5), rng.uniform(0.3, 0.5)])
        for i in (1, 9, 12, 6):
            force.addAcceptor(i, i + 1, i + 2, [rng.uniform(1, 2)])
        force.addExclusion(0, 0)
        force.addExclusion(1, 2)
        force.addExclusion(2, 3)
        return force


HBONDS = {
    "distance-angle": ("k*(distance(a1,d1)-r0)^2*(angle(a1,d1,d2)-t0)^2*lambda", False),
    "dihedrals": (
        "k*cos(dihedral(a3,a2,a1,d1))+distance(d1, a2)*sin(2*dihedral(d2,d1,a1,a2)-t0)",
        False,
    ),
    "table": ("f(distance(a1,d1))*angle(d3,a1,a2)+k*0+s*r0; s=lambda*t0", True),
    "parameters-only": ("k*t0+lambda", False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HBONDS)
def test_hydrogen_bonds(name, method):
    energy, table = HBONDS[name]
    assert_agrees(*system_with(Hbond(energy, method, table).make()))


@dataclasses.dataclass(frozen=True)
class Many:
    """A CustomManyParticleForce."""

    energy: str
    size: int = 3
    central: bool = False
    filters: tuple = ()
    table: bool = False

    def make(self, method):
        rng = np.random.default_rng(6)
        force = openmm.CustomManyParticleForce(self.size, self.energy)
        force.setNonbondedMethod(getattr(openmm.CustomManyParticleForce, method))
        force.setCutoffDistance(0.88)
        mode = force.UniqueCentralParticle if self.central else force.SinglePermutation
        force.setPermutationMode(mode)
        force.addPerParticleParameter("c")
        force.addPerParticleParameter("lambda")
        force.addGlobalParameter("scale", 1.3)
        if self.table:
            values = rng.normal(size=9).tolist()
            force.addTabulatedFunction("f", openmm.Continuous1DFunction(values, -1.0, 1.0))
        for i in range(N):
            force.addParticle([rng.uniform(0.5, 1.5), rng.normal()], (7, 2, 2, 9)[i % 4])
        for i in range(0, N - 1, 2):
            force.addExclusion(i, i + 1)
        for place, types in self.filters:
            force.setTypeFilter(place, types)
        return force


AXILROD = (
    "scale*c1*c2*c3*(1+3*cos(theta1)*cos(theta2)*cos(theta3))/(r12*r13*r23)^3*1e-3;"
    "theta1=angle(p1,p2,p3); theta2=angle(p2,p3,p1); theta3=angle(p3,p1,p2);"
    "r12=distance(p1,p2); r13=distance(p1,p3); r23=distance(p2,p3)"
)
STILLINGER = (
    "c1*scale*(cos(angle(p2,p1,p3))+1/3)^2*exp(-distance(p1,p2))*exp(-distance(p1,p3))+lambda2*c3"
)
SETS = {
    "axilrod-teller": Many(AXILROD),
    "stillinger-weber": Many(STILLINGER, central=True),
    "filters": Many(
        "c1*distance(p1,p2)+2*c2*angle(p1,p2,p3)+lambda3", filters=((0, {2}), (2, {7, 9}))
    ),
    "filters-central": Many(
        "c1*distance(p1,p2)^2+c3*distance(p1,p3)", central=True, filters=((0, {7}), (1, {2, 9}))
    ),
    "pairs": Many("c1*lambda2*exp(-pointdistance(x1,y1,z1,x2,y2,z2))", size=2),
    "pairs-central": Many(
        "c1*exp(-distance(p1,p2)^2)+lambda2", size=2, central=True, filters=((0, {2}), (1, {9}))
    ),
    "no-such-points": Many(
        "c1*pointdistance(x1,y1,z1,x2+1,y2,z2)", filters=((0, {55}),), central=True
    ),
    "no-such-type": Many("distance(p1,p2)", size=2, filters=((0, {55}),)),
    "four": Many(
        "scale*c4*sin(dihedral(p1,p2,p3,p4))*f(cos(angle(p2,p1,p4)))",
        size=4,
        table=True,
        central=True,
        filters=((0, {9}),),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETS)
def test_many_particles(name, method):
    assert_agrees(*system_with(SETS[name].make(method)))


@pytest.mark.parametrize(
    "force",
    [Hbond(*HBONDS["table"][:1], table=True).make(), SETS["four"].make("NoCutoff")],
    ids=["hbond", "many"],
)
def test_write_back(force):
    system, positions = system_with(force)
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    with torch.no_grad():
        for value in potential.parameters():
            value.mul_(1.25)
    mdgraft_openmm.write_parameters(potential, system)
    torch.testing.assert_close(mdgraft.graft(system)(positions), potential(positions))


@pytest.mark.parametrize("kind", ["Hbond", "ManyParticle"])
def test_expressions_that_end_at_the_cutoff(kind):
    """Under vmap all frames share the sets of any, some of them beyond the cutoff."""
    text = "exp(0.3/({0}-0.57))*exp(0.3/({1}-0.57))"
    if kind == "Hbond":
        force = openmm.CustomHbondForce(text.format("distance(d1,a1)", "distance(a1,d1)"))
        for i in range(N // 2):
            force.addDonor(i, -1, -1, [])
            force.addAcceptor(N - 1 - i, -1, -1, [])
    else:
        force = openmm.CustomManyParticleForce(3, text.format("distance(p1,p2)", "distance(p1,p3)"))
        force.setPermutationMode(force.UniqueCentralParticle)
        for _ in range(N):
            force.addParticle([], 0)
    force.setNonbondedMethod(force.CutoffNonPeriodic)
    force.setCutoffDistance(0.57)
    system, positions = system_with(force)
    potential = mdgraft.graft(system)
    # At 0.5701 nm the exponential overflows.
    inwards = torch.tensor(positions)
    inwards[N - 1] = inwards[0] + torch.tensor([0.5701, 0.0, 0.0])
    frames = torch.stack([0.9 * inwards, inwards])
    for derivative in (torch.func.grad(potential), torch.func.hessian(potential)):
        single = torch.stack([derivative(x) for x in frames])
        assert single.isfinite().all()
        assert single.abs().max() > 0
        torch.testing.assert_close(torch.func.vmap(derivative)(frames), single)


def test_sets_of_many_particles():
    """Listing them takes memory that grows with their number, not with all pairs."""
    n = 20000
    force = openmm.CustomManyParticleForce(3, "distance(p1,p2)*distance(p1,p3)")
    force.setPermutationMode(force.UniqueCentralParticle)
    force.setNonbondedMethod(force.CutoffNonPeriodic)
    force.setCutoffDistance(0.11)
    system = openmm.System()
    for _ in range(n):
        system.addParticle(1.0)
        force.addParticle([], 0)
    system.addForce(force)
    chain = 0.1 * torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0])
    tracemalloc.start()
    energy = mdgraft.graft(system)(chain)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.25 * n * n
    assert energy.item() == pytest.approx((n - 2) * 0.01, rel=1e-9)


@pytest.mark.parametrize("kind", ["Hbond", "ManyParticle"])
def test_an_unlimited_cap(kind):
    """A global parameter may be infinite."""
    most = "min(most, distance({0},{1})^2)"
    if kind == "Hbond":
        force = openmm.CustomHbondForce(most.format("d1", "a1"))
        force.addDonor(0, -1, -1)
        force.addAcceptor(1, -1, -1)
    else:
        force = openmm.CustomManyParticleForce(2, most.format("p1", "p2"))
        for _ in range(N):
            force.addParticle([], 0)
    force.addGlobalParameter("most", np.inf)
    system, positions = system_with(force)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    x = torch.tensor(positions, requires_grad=True)
    energy = mdgraft.graft(system)(x)
    energy.backward()
    assert energy.item() == pytest.approx(state.getPotentialEnergy()._value, rel=1e-12)
    np.testing.assert_allclose(-x.grad, state.getForces(asNumpy=True)._value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["Hbond", "ManyParticle"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f.addExclusion(1, 2), f.addExclusion(1, 2)), "more than one exclusion"),
        (lambda f: f.setCutoffDistance(0), "has a cutoff of 0 nm, which must be positive"),
        (lambda f: f.setCutoffDistance(1.2), "half of the default box is 0.95 nm"),
        (
            lambda f: [
                f.addTabulatedFunction("t", openmm.Discrete1DFunction([1.0, 2.0])) for _ in "12"
            ],
            "two tabulated functions are called 't'",
        ),
    ],
)
def test_what_openmm_refuses(kind, change, message):
    if kind == "Hbond":
        force = openmm.CustomHbondForce("distance(d1,a1)")
        for i in range(4):
            force.addDonor(i, -1, -1, [])
            force.addAcceptor(i + 4, -1, -1, [])
    else:
        force = openmm.CustomManyParticleForce(2, "distance(p1,p2)")
        for _ in range(N):
            force.addParticle([], 0)
    force.setNonbondedMethod(force.CutoffPeriodic)
    force.setCutoffDistance(0.9)
    change(force)
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system_with(force)[0])


def test_what_is_refused():
    force = openmm.CustomHbondForce("distance(d2,a1)")
    force.addDonor(0, -1, -1, [])
    force.addAcceptor(1, 2, 3, [])
    with pytest.raises(mdgraft.InvalidInputError, match="uses d2, which entry 0 of the donors"):
        mdgraft.graft(system_with(force)[0])
    force = openmm.CustomHbondForce("distance(d1,a1)")
    force.addDonor(0, N, -1, [])
    with pytest.raises(
        mdgraft.InvalidInputError, match=rf"donor 0 has the particles \[0, {N}, -1\]"
    ):
        mdgraft.graft(system_with(force)[0])
    force = openmm.CustomManyParticleForce(3, "distance(p1,p4)")
    for _ in range(N):
        force.addParticle([], 0)
    with pytest.raises(mdgraft.InvalidInputError, match="must be among p1, p2, p3"):
        mdgraft.graft(system_with(force)[0])
    force = SETS["pairs"].make("CutoffPeriodic")
    force.setCutoffDistance(1.2)
    system, positions = system_with(force)
    with pytest.raises(mdgraft.BoxTooSmallError, match=r"cutoff of 1\.2 nm"):
        mdgraft.graft(system)(positions, BOX)
