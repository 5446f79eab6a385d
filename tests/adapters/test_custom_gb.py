"""CustomGBForce against OpenMM's Reference platform."""

import math

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees
from mdgraft.potentials.custom.gb import Computation, CustomGB, Step
from mdgraft.potentials.nonbonded import Method
from openmm.app.internal import customgbforces

Force = openmm.CustomGBForce
METHODS = (Force.NoCutoff, Force.CutoffNonPeriodic, Force.CutoffPeriodic)
SINGLE, PAIR, NO_EXCLUSIONS = (
    Force.SingleParticle,
    Force.ParticlePair,
    Force.ParticlePairNoExclusions,
)
TRICLINIC = np.array([[2.2, 0.0, 0.0], [0.5, 2.1, 0.0], [-0.6, 0.7, 2.3]])


def grid(n, seed, spacing=0.3):
    """Particles on a grid, each somewhat displaced."""
    side = math.ceil(n ** (1 / 3) - 1e-9)
    points = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)[:n]
    return spacing * points + np.random.default_rng(seed).normal(scale=0.04, size=(n, 3))


def system_with(force, n, box=TRICLINIC):
    """A System of ``n`` particles with one force."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in box))
    system.addForce(force)
    return system


def make(n, seed, method, values, terms, *, cutoff=1.0, exclusions=((0, 1), (5, 2))):
    """A force with parameters ``q`` and ``a``, a global ``k`` and a table ``f``."""
    rng = np.random.default_rng(seed)
    force = Force()
    force.addPerParticleParameter("q")
    force.addPerParticleParameter("a")
    force.addGlobalParameter("k", 1.3)
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(rng.normal(size=9), 0.0, 2.5))
    for row in values:
        force.addComputedValue(*row)
    for row in terms:
        force.addEnergyTerm(*row)
    for _ in range(n):
        force.addParticle([rng.normal(), rng.uniform(0.5, 1.5)])
    for pair in exclusions:
        force.addExclusion(*pair)
    force.setNonbondedMethod(method)
    force.setCutoffDistance(cutoff)
    return force


@pytest.mark.parametrize("kind", [PAIR, NO_EXCLUSIONS])
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_value_and_term(method, kind):
    """A chain of values and energies of every kind, none of them symmetric."""
    force = make(
        10,
        1,
        method,
        [
            ("b", "a1*q2*exp(-k*r)+f(r)*a1", kind),
            ("c", "b^2+a*q", SINGLE),
            ("d", "sin(b)*c+k*q", SINGLE),
        ],
        [
            ("d*c+b", SINGLE),
            ("q1*a2*c1*d2/(r+0.1)", PAIR),
            ("b1*c2*exp(-r)+k*a1+f(abs(c2))", NO_EXCLUSIONS),
        ],
    )
    assert_agrees(system_with(force, 10), grid(10, 1))


@pytest.mark.parametrize("method", METHODS)
def test_positions_in_expressions(method):
    """Single particles see their coordinates, which are not wrapped into the box."""
    force = make(
        8,
        2,
        method,
        [("b", "a1*q2/(r+k)", PAIR), ("c", "b^2+a*x+0.3*y*z*b", SINGLE), ("d", "c*z+q", SINGLE)],
        [("d*c+b*z+x*y", SINGLE), ("c1*d2*exp(-r)", PAIR)],
    )
    # Such an energy is not that of a periodic system.
    periodic = method == Force.CutoffPeriodic
    assert_agrees(
        system_with(force, 8),
        grid(8, 2) + 3.0,
        consistent=not periodic,
        **({} if periodic else {"translation_rtol": None}),
    )


def test_constants():
    """Expressions of nothing, energies of single particles and of pairs."""
    force = make(
        6,
        3,
        Force.CutoffNonPeriodic,
        [("n", "1", PAIR)],
        [("n^2", SINGLE), ("2", PAIR), ("k", SINGLE)],
    )
    x = grid(6, 3)
    system = system_with(force, 6)
    r = np.linalg.norm(x[:, None] - x, axis=-1) < 1.0
    r[[0, 1, 5, 2], [1, 0, 2, 5]] = False
    number = r.sum(axis=1) - 1
    found = mdgraft.graft(system)(torch.tensor(x)).detach().item()
    assert found == pytest.approx((number**2).sum() + number.sum() + 6 * 1.3, rel=1e-14)
    assert_agrees(system, x)


MODELS = {
    "HCT": customgbforces.GBSAHCTForce,
    "OBC1": customgbforces.GBSAOBC1Force,
    "OBC2": customgbforces.GBSAOBC2Force,
    "GBn": customgbforces.GBSAGBnForce,
    "GBn2": customgbforces.GBSAGBn2Force,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("periodic", [False, True])
def test_amber_models(model, periodic):
    """Generalised Born models as Amber's topologies ask for them."""
    n, rng = 7, np.random.default_rng(4)
    force = MODELS[model](SA=None if periodic else "ACE", cutoff=0.9, kappa=0.7)
    radii = np.array([0.12, 0.15, 0.17])
    for _ in range(n):
        row = [rng.normal(), rng.choice(radii), rng.uniform(0.7, 0.9)]
        force.addParticle(row + ([0.8, 0.5, 0.3] if model == "GBn2" else []))
    force.finalize()
    force.setNonbondedMethod(Force.CutoffPeriodic if periodic else Force.NoCutoff)
    assert_agrees(system_with(force, n), grid(n, 4, spacing=0.22), float32_rtol=5e-3)


def test_agrees_with_the_published_sum():
    """Born radii of Hawkins, Cramer and Truhlar for two distant particles, by quadrature.

    The integral of r^-4 over a sphere of radius s at a distance d, outside the first particle.
    """
    d, s, rho = 0.6, 0.12, 0.14
    force = customgbforces.GBSAHCTForce(solventDielectric=80.0, soluteDielectric=1.0)
    force.addParticle([1.0, rho + 0.009, 1.0])
    force.addParticle([0.0, 0.1 + 0.009, s / 0.1])
    force.finalize()
    u, weight = np.polynomial.legendre.leggauss(60)
    r = d + s * u
    cap = (1 - (r * r + d * d - s * s) / (2 * r * d)) / 2
    integral = (weight * s * cap / r**2).sum()
    radius = 1 / (1 / rho - integral)
    expected = -0.5 * 138.935485 * (1 - 1 / 80) / radius
    found = mdgraft.graft(system_with(force, 2))(torch.tensor([[0.0, 0, 0], [d, 0, 0]]).double())
    assert found.detach().item() == pytest.approx(expected, rel=1e-7)


PAIRED = (
    "a1*q2*exp(-k*r)",
    "f(a2*r)",
    "min(a1, 2*r)*q2",
    "sqrt(a1^2+r^2)",
    "1/(r+a2)^2",
    "select(step(r-0.4), q1, a2*r)",
)
ALONE = ("{v}*q", "sin({v})+a", "exp(-a*{v}^2)", "{v}^2*k", "f(abs({v}))", "tanh({v})*a")
BETWEEN = (
    "{v}1*{v}2/(r+0.1)",
    "q1*{v}2*exp(-r)",
    "1/sqrt(r^2+{v}1^2+a2)",
    "f(r)*({v}1-a2)",
    "k*a1*q2/r",
)


@pytest.mark.parametrize("seed", range(12))
def test_random_definitions(seed):
    """Random chains of values, terms, exclusions and methods."""
    rng = np.random.default_rng(200 + seed)
    n, names = 9, ["v0"]
    values = [("v0", "+".join(rng.choice(PAIRED, 2)), int(rng.choice([PAIR, NO_EXCLUSIONS])))]
    for k in range(1, rng.integers(1, 4)):
        pieces = [p.format(v=rng.choice(names)) for p in rng.choice(ALONE, 2)]
        values.append((f"v{k}", "+".join(pieces), SINGLE))
        names.append(f"v{k}")
    terms = [
        (rng.choice(ALONE).format(v=rng.choice(names)), SINGLE),
        (rng.choice(BETWEEN).format(v=rng.choice(names)), PAIR),
        (rng.choice(BETWEEN).format(v=rng.choice(names)), NO_EXCLUSIONS),
    ]
    exclusions = {tuple(sorted(map(int, p))) for p in rng.choice(n, (4, 2)) if p[0] != p[1]}
    force = make(
        n, 200 + seed, METHODS[rng.integers(3)], values, terms, cutoff=0.8, exclusions=exclusions
    )
    assert_agrees(system_with(force, n), grid(n, 200 + seed), seed=seed)


def test_write_and_live_update():
    """A round trip changes no bit; a live Context takes over particles and tables."""
    force = make(8, 5, Force.CutoffPeriodic, [("b", "a1*q2*f(r)", PAIR)], [("b^2+q", SINGLE)])
    system = system_with(force, 8)
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(grid(8, 5))
    with torch.no_grad():
        for name in ("CustomGBForce.q", "CustomGBForce.a", "CustomGBForce.f", "globals.k"):
            potential.get_parameter(name).mul_(1.1)
    mdgraft_openmm.write_parameters(potential, context)
    found = potential(torch.tensor(grid(8, 5)), torch.tensor(TRICLINIC)).detach().item()
    live = context.getState(energy=True).getPotentialEnergy()._value
    assert live == pytest.approx(found, rel=1e-10)


def _first_single(force):
    force.setComputedValueParameters(0, "b", "a", SINGLE)


def _second_pair(force):
    force.addComputedValue("c", "a1/r", PAIR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_first_single, "computed value 0, 'b'.*make it one of pairs"),
        (_second_pair, "computed value 1, 'c'.*make it one of single"),
        (lambda f: f.addExclusion(1, 0), "more than one exclusion"),
        (lambda f: f.addExclusion(0, -1), "indices reach only"),
        (lambda f: f.addParticle([1.0, 1.0]), "has 5 particles"),
        (lambda f: f.setParticleParameters(1, [1.0]), "entry 1 has 1 parameters"),
        (lambda f: f.addEnergyTerm("b1*b2", SINGLE), "b1"),
        (lambda f: f.addEnergyTerm("x*b1", PAIR), "x"),
        (lambda f: f.setCutoffDistance(1.2), "half of the default box"),
    ],
)
def test_what_openmm_refuses(change, message):
    """Each error says what is wrong."""
    force = make(
        4, 6, Force.CutoffPeriodic, [("b", "a1/r", PAIR)], [("b", SINGLE)], exclusions=((0, 1),)
    )
    system = system_with(force, 4)
    change(system.getForce(0))
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)


def test_values_of_pairs_may_follow_each_other():
    """The term itself takes several values of pairs, and none at all."""
    options = {
        "n_particles": 3,
        "exclusions": torch.zeros(0, 2, dtype=torch.long),
        "method": Method.NO_CUTOFF,
    }
    x = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0]]]).double()
    term = CustomGB(
        {},
        computed_values=[
            Step(name="n", expression="r", computation=Computation.PARTICLE_PAIR),
            Step(name="m", expression="n2/r", computation=Computation.PARTICLE_PAIR),
        ],
        energy_terms=[Step(expression="m", computation=Computation.SINGLE_PARTICLE)],
        **options,
    )
    r = torch.cdist(x[0], x[0])
    inverse = torch.where(r > 0, 1 / r, 0.0)
    torch.testing.assert_close(term(x, None, {}, {})[0], (inverse @ r.sum(1)).sum())
    bare = Step(expression="r", computation=Computation.PARTICLE_PAIR)
    term = CustomGB({}, computed_values=[], energy_terms=[bare], **options)
    torch.testing.assert_close(term(x, None, {}, {})[0], 0.5 * r.sum())
