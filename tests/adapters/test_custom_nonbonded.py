"""CustomNonbondedForce against OpenMM's Reference platform."""

import math

import mdgraft
import mdgraft_openmm
import numpy as np
import openmm
import pytest
import torch
from agreement import assert_agrees
from mdgraft.potentials.custom.nonbonded import CustomNonbonded
from mdgraft.potentials.nonbonded import Method
from mdgraft.testing import check_potential

Force = openmm.CustomNonbondedForce
METHODS = (Force.NoCutoff, Force.CutoffNonPeriodic, Force.CutoffPeriodic)
TRICLINIC = np.array([[2.2, 0.0, 0.0], [0.5, 2.1, 0.0], [-0.6, 0.7, 2.3]])
LJ = "4*sqrt(epsilon1*epsilon2)*((s/r)^12-(s/r)^6); s=0.5*(sigma1+sigma2)"
SOFTCORE = (
    "4*eps*lambda*(1/(a+x)^2-1/(a+x))+138.935456*lambda*charge1*charge2/(r^6+0.01*(1-lambda))^(1/6);"
    "x=(r/sigma)^6; a=0.5*(1-lambda); sigma=0.5*(sigma1+sigma2); eps=sqrt(epsilon1*epsilon2)"
)
GROUPS = (([0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8]), ([0, 1, 9], [0, 1, 9, 10]), ([3, 2], [0, 1, 11]))


def grid(n, seed, spacing=0.45):
    """Particles on a grid, each somewhat displaced."""
    side = math.ceil(n ** (1 / 3) - 1e-9)
    points = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)[:n]
    return spacing * points + np.random.default_rng(seed).normal(scale=0.05, size=(n, 3))


def system_with(force, n, box=TRICLINIC):
    """A System of ``n`` particles with one force."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in np.asarray(box)))
    system.addForce(force)
    return system


def make(energy, parameters, method=Force.NoCutoff, *, globals_=(), cutoff=1.0, switch=None):
    """A force with per-particle parameters ``{name: (N,)}``."""
    force = Force(energy)
    for name in parameters:
        force.addPerParticleParameter(name)
    for name, value in dict(globals_).items():
        force.addGlobalParameter(name, value)
    for row in zip(*parameters.values(), strict=True):
        force.addParticle([float(x) for x in row])
    force.setNonbondedMethod(method)
    force.setCutoffDistance(cutoff)
    if switch is not None:
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(switch)
    return force


def lennard_jones_parameters(n, seed, kinds=None):
    """Sigma, epsilon and charge, of a few kinds or all different."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) if kinds is None else rng.integers(kinds, size=n)
    table = {
        "sigma": rng.uniform(0.25, 0.32, n),
        "epsilon": rng.uniform(0.4, 1.5, n),
        "charge": rng.normal(size=n),
    }
    return {name: column[kind] for name, column in table.items()}


def reference_energy(system, positions):
    """Energy on the Reference platform."""
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy()._value


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_energies_that_are_not_symmetric(method, grouped):
    """It matters which particle is 1: by index, or by the set of an interaction group."""
    rng = np.random.default_rng(1)
    parameters = lennard_jones_parameters(12, 1) | {"w": rng.normal(size=12)}
    force = make(
        "scale*" + LJ.replace(";", "+charge1*w2*exp(-k*r)+c1*c2/r;", 1),
        parameters,
        method,
        globals_={"scale": 0.7, "k": 2.0},
        switch=0.8,
    )
    force.addComputedValue("c", "charge*w+0.1*k")
    force.addExclusion(0, 1)
    force.addExclusion(5, 2)
    for group in GROUPS if grouped else ():
        force.addInteractionGroup(*group)
    # Particles may lie outside the box.
    assert_agrees(system_with(force, 12), grid(12, 1) + 5.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("energy", "globals_"),
    [
        (SOFTCORE, {"lambda": 0.35}),
        ("D*((1-exp(-a*(r-r0)))^2-1); D=sqrt(epsilon1*epsilon2); r0=sigma1+sigma2", {"a": 12.0}),
        ("A*exp(-B*r)-C/r^6; A=1e3*epsilon1*epsilon2; C=1e-3*sigma1*sigma2", {"B": 25.0}),
        ("step(r-0.5)*charge1*charge2/r+select(epsilon1-epsilon2, r^2, sigma1)", {}),
        ("k*r^2", {"k": 3.0}),
        ("1.5", {}),
    ],
    ids=["softcore", "morse", "buckingham", "step", "no-parameters", "constant"],
)
def test_pair_potentials(energy, globals_, method):
    """Forms in common use, and degenerate ones."""
    force = make(energy, lennard_jones_parameters(9, 2), method, globals_=globals_)
    force.addExclusion(3, 4)
    assert_agrees(system_with(force, 9), grid(9, 2))


@pytest.mark.parametrize("method", METHODS)
def test_nbfix_tables(method):
    """Coefficients by type from two-dimensional tables, which are parameters themselves."""
    rng = np.random.default_rng(3)
    size = 4
    a = rng.uniform(0.5, 1.0, (size, size))
    b = rng.uniform(0.5, 1.0, (size, size))
    force = make(
        "acoef(type1, type2)^2*1e-6/r^12 - bcoef(type1, type2)*1e-3/r^6",
        {"type": rng.integers(size, size=9)},
        method,
        switch=0.9,
    )
    force.addTabulatedFunction("acoef", openmm.Discrete2DFunction(size, size, (a + a.T).ravel()))
    force.addTabulatedFunction("bcoef", openmm.Discrete2DFunction(size, size, (b + b.T).ravel()))
    potential = assert_agrees(system_with(force, 9), grid(9, 3))
    x, h = torch.tensor(grid(9, 3)), torch.tensor(TRICLINIC)
    entries = potential.get_parameter("CustomNonbondedForce.acoef")
    (gradient,) = torch.autograd.grad(
        potential(x, h if potential.periodic else None).sum(), entries
    )
    assert gradient.shape == (size * size,)
    assert gradient.abs().sum() > 0


def test_spline_of_the_distance():
    """A continuous table of r, whose range ends within the cutoff."""
    rng = np.random.default_rng(4)
    force = make("charge1*charge2*f(r)", {"charge": rng.normal(size=9)}, Force.CutoffPeriodic)
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(rng.normal(size=12), 0.1, 0.95))
    assert_agrees(system_with(force, 9), grid(9, 4))


def test_awkward_names():
    """Names of torch modules, of variables and of our own parameters."""
    n = 6
    rng = np.random.default_rng(5)
    names = ("type", "training", "switching_distance", "r", "s.x")
    force = make(
        "type1*training2+switching_distance1*r1*r2/r*forward",
        {name: rng.normal(size=n) for name in names},
        Force.CutoffNonPeriodic,
        globals_={"forward": 1.5},
        switch=0.7,
    )
    potential = assert_agrees(system_with(force, n), grid(n, 5))
    assert "CustomNonbondedForce.switching_distance_1" in dict(potential.named_parameters())


def test_excluded_particles_may_coincide():
    """A pair that is excluded is never evaluated."""
    x = grid(6, 6)
    x[1] = x[0]
    force = make("charge1*charge2/r", lennard_jones_parameters(6, 6))
    force.addExclusion(0, 1)
    system = system_with(force, 6)
    positions = torch.tensor(x, requires_grad=True)
    energy = mdgraft.graft(system)(positions)
    truth = reference_energy(system, x)
    assert float(energy.detach()) == pytest.approx(truth, rel=1e-12)
    assert torch.autograd.grad(energy, positions)[0].isfinite().all()


def test_no_derivative_comes_from_beyond_the_cutoff():
    """An energy that does not exist there leaves no NaN, in a mapped batch either."""
    force = make(
        "charge1*charge2*sqrt(1-(r/0.6)^2)",
        lennard_jones_parameters(8, 7),
        Force.CutoffNonPeriodic,
        cutoff=0.6,
    )
    potential = mdgraft.graft(system_with(force, 8))
    frames = torch.tensor(np.stack([grid(8, 7), grid(8, 8)]))
    single = torch.stack([potential.forces(frame) for frame in frames])
    mapped = torch.func.vmap(torch.func.grad(lambda x: potential(x).sum()))(frames)
    torch.testing.assert_close(-mapped, single)


# Long-range correction -------------------------------------------------------------------------

CUBE = 3.0 * np.eye(3)
TAILS = {
    "lj": (LJ, {}),
    "switched": (LJ, {"switch": 0.7}),
    "asymmetric": ("lambda*epsilon1*(sigma2/r)^6+epsilon2^2*(sigma1/r)^9", {"switch": 0.6}),
    "groups": (SOFTCORE.split("+138")[0] + ";" + SOFTCORE.split(";", 1)[1], {"groups": GROUPS}),
    "computed": ("c1*c2/r^6", {"computed": "sigma*epsilon^2+lambda"}),
    "yukawa": ("charge1*charge2*exp(-3*r)/r", {}),
    "gauss": ("exp(-r^2)", {"switch": 0.3}),
    "slow": ("1/r^4", {}),
}


def with_tail(energy, n, *, tail=True, kinds=3, switch=None, groups=(), computed=None):
    """A periodic System with or without its long-range correction."""
    force = make(
        energy,
        lennard_jones_parameters(n, 8, kinds),
        Force.CutoffPeriodic,
        globals_={"lambda": 0.8},
        switch=switch,
    )
    if computed:
        force.addComputedValue("c", computed)
    for group in groups:
        force.addInteractionGroup(*group)
    force.setUseLongRangeCorrection(tail)
    return system_with(force, n, CUBE)


@pytest.mark.parametrize("case", TAILS)
def test_long_range_correction(case):
    """OpenMM integrates in single precision until nothing changes by more than 1e-5."""
    energy, options = TAILS[case]
    x, h = grid(12, 8), torch.tensor(CUBE)
    on, off = (with_tail(energy, 12, tail=tail, **options) for tail in (True, False))
    truth = reference_energy(on, x) - reference_energy(off, x)
    graft = mdgraft.graft(on)
    found = graft(torch.tensor(x), h) - mdgraft.graft(off)(torch.tensor(x), h)
    assert float(found.detach()) == pytest.approx(truth, rel=2e-6)
    if case in ("switched", "groups"):
        check_potential(graft, x, CUBE)
    # OpenMM orders particles by class, so moving one changes what is particle 1 in others' pairs.
    if case != "asymmetric":
        assert_agrees(on, x, rtol=1e-6, second=False, consistent=False)


@pytest.mark.parametrize("kinds", [None, 3, 1])
@pytest.mark.parametrize("switch", [None, 0.7])
def test_lennard_jones_tail_is_that_of_the_closed_form(kinds, switch):
    """NonbondedForce has the same correction in closed form: value, gradients, Hessians."""
    n = 10
    parameters = lennard_jones_parameters(n, 9, kinds)
    custom = make(LJ, parameters, Force.CutoffPeriodic, switch=switch)
    custom.setUseLongRangeCorrection(True)
    native = openmm.NonbondedForce()
    for sigma, epsilon in zip(parameters["sigma"], parameters["epsilon"], strict=True):
        native.addParticle(0.0, sigma, epsilon)
    native.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    native.setCutoffDistance(1.0)
    native.setUseSwitchingFunction(switch is not None)
    native.setSwitchingDistance(switch or 0.0)
    x, h = torch.tensor(grid(n, 9)), torch.tensor(CUBE)
    names = ["sigma", "epsilon"] + (["switching_distance"] if switch else [])
    results = []
    for force in (custom, native):
        title = force.getName()
        potential = mdgraft.graft(system_with(force, n, CUBE))
        keys = [f"{title}.{name}" for name in names]
        start = [potential.get_parameter(key).detach() for key in keys]

        def energy(*values, potential=potential, keys=keys):
            return torch.func.functional_call(
                potential, dict(zip(keys, values, strict=True)), (x, h)
            ).sum()

        hessian = torch.autograd.functional.hessian(energy, tuple(start))
        every = tuple(range(len(keys)))
        functional = torch.func.hessian(energy, argnums=every)(*start)
        torch.testing.assert_close(functional, hessian, rtol=1e-9, atol=1e-9)
        gradient = torch.func.grad(energy, argnums=every)(*start)
        results.append([energy(*start), *gradient, *(block for row in hessian for block in row)])
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(
            found, truth, rtol=1e-9, atol=1e-9 * float(truth.detach().abs().max())
        )


def test_tail_of_groups_has_a_gradient_for_each_particle():
    """Equal particles in different groups differ; a graft with each alone in its class agrees."""
    energy, options = TAILS["groups"]
    potential = mdgraft.graft(with_tail(energy, 12, kinds=2, **options))
    x, h = torch.tensor(grid(12, 8)), torch.tensor(CUBE)
    keys = [f"CustomNonbondedForce.{name}" for name in ("sigma", "epsilon")]
    values = [potential.get_parameter(key).detach() for key in keys]

    def gradient(*at):
        def energy(*v):
            named = dict(zip(keys, v, strict=True))
            return torch.func.functional_call(potential, named, (x, h)).sum()

        return torch.cat(torch.func.grad(energy, argnums=(0, 1))(*at))

    spread = 1e-9 * torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).double()
    alone = gradient(values[0] + spread[0], values[1] + spread[1])
    torch.testing.assert_close(gradient(*values), alone, rtol=1e-6, atol=1e-6)


def test_tail_without_parameters():
    """One integral serves all pairs: 4 pi N / ((N + 1) V) N (N + 1) / 2 k / (3 rc^3)."""
    force = make("k/r^6", {}, Force.CutoffPeriodic, globals_={"k": 2.0}, cutoff=1.1)
    for _ in range(5):
        force.addParticle([])
    system = system_with(force, 5, CUBE)
    force = system.getForce(0)
    x, h = torch.tensor(grid(5, 8)), torch.tensor(CUBE)
    energies = []
    for tail in (True, False):
        force.setUseLongRangeCorrection(tail)
        energies.append(mdgraft.graft(system)(x, h).detach().item())
    expected = 2 * math.pi * 25 / 27 * 2.0 / (3 * 1.1**3)
    assert energies[0] - energies[1] == pytest.approx(expected, rel=1e-9)


def test_a_batch_of_parameters_shares_one_partition():
    """Under vmap classes separate what differs in any member of the batch."""
    potential = mdgraft.graft(with_tail(LJ, 12, kinds=3))
    x, h = torch.tensor(grid(12, 8)), torch.tensor(CUBE)
    sigma = potential.get_parameter("CustomNonbondedForce.sigma").detach()

    def energy(value):
        return torch.func.functional_call(
            potential, {"CustomNonbondedForce.sigma": value}, (x, h)
        ).sum()

    change = torch.linspace(0, 0.01, 12, dtype=torch.float64)
    batch = torch.stack([sigma, 1.01 * sigma, sigma + change])
    for function in (energy, torch.func.grad(energy)):
        single = torch.stack([function(value) for value in batch])
        torch.testing.assert_close(torch.func.vmap(function)(batch), single, rtol=1e-11, atol=1e-11)


def test_a_diverging_tail_is_refused():
    """OpenMM cannot say so: its exception leaves a worker thread and ends the process."""
    with pytest.raises(mdgraft.InvalidInputError, match="does not converge"):
        mdgraft.graft(with_tail("charge1*charge2/r", 8))


# Other properties -----------------------------------------------------------------------------


def test_write_and_live_update():
    """A round trip changes no bit; a live Context takes over particles and tables."""
    rng = np.random.default_rng(10)
    force = make("q1*q2*f(r)", {"q": rng.normal(size=8)}, Force.CutoffPeriodic, switch=0.7)
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(rng.normal(size=7), 0.1, 1.3))
    system = system_with(force, 8)
    before = openmm.XmlSerializer.serialize(system)
    potential = mdgraft.graft(system)
    mdgraft_openmm.write_parameters(potential, system)
    assert openmm.XmlSerializer.serialize(system) == before
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(grid(8, 10))
    with torch.no_grad():
        for name in ("q", "f"):
            potential.get_parameter(f"CustomNonbondedForce.{name}").mul_(1.1)
    mdgraft_openmm.write_parameters(potential, context)
    found = potential(torch.tensor(grid(8, 10)), torch.tensor(TRICLINIC)).detach().item()
    live = context.getState(energy=True).getPotentialEnergy()._value
    assert live == pytest.approx(found, rel=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.addExclusion(1, 0), "more than one exclusion"),
        (lambda f: f.addExclusion(1, 99), "indices reach only"),
        (
            lambda f: [
                f.addTabulatedFunction("t", openmm.Discrete1DFunction([1.0, 2.0])) for _ in "12"
            ],
            "two tabulated functions are called 't'",
        ),
        (lambda f: f.addParticle([1.0]), "has 5 particles"),
        (lambda f: f.setParticleParameters(2, [1.0, 2.0]), "entry 2 has 2 parameters"),
        (lambda f: f.setEnergyFunction("q1*missing/r"), "missing"),
        (lambda f: f.setEnergyFunction("q1*q/r"), "q"),
        (lambda f: f.addComputedValue("v", "q*r"), "r"),
        (lambda f: f.setSwitchingDistance(1.0), "not between 0 and the cutoff"),
        (lambda f: f.setCutoffDistance(1.2), "half of the default box"),
        (lambda f: f.addInteractionGroup([0, 7], [1]), "set 1 of interaction group 0 holds .* 7"),
        (lambda f: f.setEnergyFunction("q1*q2"), "does not depend on r"),
    ],
)
def test_what_openmm_refuses(change, message):
    """Each error says what is wrong."""
    force = make("q1*q2/r^6", {"q": np.ones(4)}, Force.CutoffPeriodic, switch=0.5)
    force.setUseLongRangeCorrection(True)
    force.addExclusion(0, 1)
    system = system_with(force, 4)
    change(system.getForce(0))
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        mdgraft.graft(system)


PIECES = (
    "sin({a}*r)",
    "{a}*exp(-{b}^2*r)",
    "sqrt({a}^2+r^2)",
    "{a}*{b}/(r+0.2)",
    "f({a}^2*r)",
    "min({a}*r, {b})",
    "select(step(r-0.5), {a}/r, {b})",
    "k*erfc({a}*r)",
    "g(u1, v2)*{a}/r",
)


@pytest.mark.parametrize("seed", range(12))
def test_random_definitions(seed):
    """Sums of random pieces of random quantities with random options."""
    rng = np.random.default_rng(100 + seed)
    quantities = ["u1", "u2", "v1", "v2", "c1", "c2", "k", "(u1+v2)", "(u1*u2)"]
    pieces = [
        PIECES[p].format(a=rng.choice(quantities), b=rng.choice(quantities))
        for p in rng.integers(len(PIECES), size=3)
    ]
    n = 9
    force = make(
        "+".join(pieces),
        {"u": rng.uniform(0.3, 1.5, n), "v": rng.uniform(0.3, 1.5, n)},
        METHODS[rng.integers(3)],
        globals_={"k": 0.9},
        switch=0.75 if rng.integers(2) else None,
    )
    force.addComputedValue("c", "u*v+k^2")
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(rng.normal(size=9), 0.0, 2.0))
    force.addTabulatedFunction(
        "g", openmm.Continuous2DFunction(4, 5, rng.normal(size=20), 0.0, 2.0, 0.0, 2.0)
    )
    for i, j in {tuple(sorted(p)) for p in rng.choice(n, (4, 2)) if p[0] != p[1]}:
        force.addExclusion(int(i), int(j))
    for _ in range(rng.integers(3)):
        force.addInteractionGroup(rng.choice(n, 5).tolist(), rng.choice(n, 5).tolist())
    assert_agrees(system_with(force, n), grid(n, 100 + seed), seed=seed)


def test_all_pairs_of_a_large_open_system_fit():
    """Three thousand particles, 4.5 million pairs; groups of a few list only their own pairs."""
    n = 3000
    q = torch.linspace(-1, 1, n, dtype=torch.float64)
    options = {"n_particles": n, "exclusions": torch.zeros(0, 2, dtype=torch.long)}
    term = CustomNonbonded("q1*q2/r", {"q": q}, method=Method.NO_CUTOFF, **options)
    x = torch.tensor(grid(n, 11))[None]
    with torch.no_grad():
        energy = term(x, None, {"q": q}, {})
        r = torch.pdist(x[0])
        i, j = torch.triu_indices(n, n, 1)
        torch.testing.assert_close(energy[0], (q[i] * q[j] / r).sum())
    groups = [(np.array([0, 1]), np.array([1, 2, n - 1]))]
    few = CustomNonbonded("q1*q2/r", {"q": q}, method=Method.NO_CUTOFF, groups=groups, **options)
    assert few.group_first.shape == (5,)


@pytest.mark.parametrize("kind", ["CustomNonbondedForce", "CustomGBForce"])
def test_periodic_tables_must_close(kind):
    """Given others, OpenMM keeps no kernel, and ends the process at the next update."""
    system = openmm.System()
    if kind == "CustomGBForce":
        force = openmm.CustomGBForce()
        force.addComputedValue("v", "f(r)", force.ParticlePair)
        force.addEnergyTerm("v", force.SingleParticle)
    else:
        force = openmm.CustomNonbondedForce("f(r)")
    force.addTabulatedFunction("f", openmm.Continuous1DFunction([1.0, 2.0, 3.0, 1.0], 0, 1, True))
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle([])
    system.addForce(force)
    potential = mdgraft.graft(system)
    with torch.no_grad():
        potential.get_parameter(f"{kind}.f")[-1] = 1.5
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    for target in (system, context):
        with pytest.raises(mdgraft.ParameterMismatchError, match="must be equal along every axis"):
            mdgraft_openmm.write_parameters(potential, target)
