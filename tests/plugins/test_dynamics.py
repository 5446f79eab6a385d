"""Steps of dynamics: closed forms, reversibility, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError
from mdgraft._units import BOLTZMANN
from mdgraft.constraints import AverageSite, ConstraintSet, VirtualSites
from mdgraft.dynamics import LangevinMiddle, State, VelocityVerlet
from mdgraft.testing import finite_difference


def normal(*shape, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def harmonic(k):
    return lambda x, box: -k * x


def test_velocity_verlet_of_an_oscillator():
    # x_n = x0 cos(n phi) + v0 h sin(n phi) / sin(phi) with cos(phi) = 1 - k h^2 / 2m.
    free = ConstraintSet([], [], [1.0])
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    state = State(
        positions=torch.tensor([[1.0, 0, 0]], dtype=torch.float64),
        velocities=torch.tensor([[0.3, 0, 0]], dtype=torch.float64),
    )
    method = VelocityVerlet(timestep=0.1)
    for _ in range(200):
        state = method.step(state, harmonic(k), free)
    x = state.positions[0, 0]
    assert float(x.detach()) == pytest.approx(-1.006572732467800, abs=1e-12)
    (slope,) = torch.autograd.grad(x, k)
    assert float(slope) == pytest.approx(-1.267052360053544, abs=1e-11)


def test_langevin_middle_of_an_oscillator():
    # The map of one degree of freedom, by hand.
    h, t, gamma, k, m = 0.02, 310.0, 3.0, 50.0, 4.0
    free = ConstraintSet([], [], [m])
    x, v, eta = normal(1, 3), normal(1, 3, seed=2), normal(1, 3, seed=3)
    method = LangevinMiddle(timestep=h, temperature=t, friction=gamma)
    found = method.step(State(positions=x, velocities=v), harmonic(k), free, noise=eta)
    a = math.exp(-gamma * h)
    v1 = v - h * k / m * x
    v2 = a * v1 + math.sqrt((1 - a * a) * BOLTZMANN * t / m) * eta
    torch.testing.assert_close(found.positions, x + 0.5 * h * (v1 + v2), atol=1e-14, rtol=0)
    torch.testing.assert_close(found.velocities, v2, atol=1e-14, rtol=0)


# A ring of three, a bond, a free particle, and a site, which two of them place.
PAIRS = [(0, 1), (0, 2), (1, 2), (3, 4)]
SITES = {6: AverageSite(parents=(0, 3), weights=(0.4, 0.6))}


def system():
    sites = VirtualSites(SITES, n_particles=7)
    x = sites(0.3 * normal(1, 7, 3))[0]
    lengths = torch.stack([(x[i] - x[j]).norm() for i, j in PAIRS])
    masses = torch.tensor([12.0, 1, 3, 16, 2, 5, 0], dtype=torch.float64)
    c = ConstraintSet(PAIRS, lengths, masses, sites=sites)
    v = c.project_velocities(normal(7, 3, seed=2), x)
    return c, State(positions=x, velocities=v)


def forces(k, places):
    """Springs to places that act on the site through its parents too."""

    def energy(x):
        return 0.5 * (k * (x - places).square()).sum()

    def of(x, box):
        sites = VirtualSites(SITES, n_particles=7)

        def placed(y):
            return energy(sites(y[None])[0])

        return -torch.func.grad(placed)(x)

    return of


METHODS = {
    "velocity Verlet": (VelocityVerlet, {"timestep": 0.002}, False),
    "LF-Middle": (
        LangevinMiddle,
        {"timestep": 0.002, "temperature": 300.0, "friction": 5.0},
        True,
    ),
}
each_method = pytest.mark.parametrize("name", METHODS)


@each_method
def test_steps_keep_constraints(name):
    kind, options, random = METHODS[name]
    c, state = system()
    method, force = kind(**options), forces(200.0, normal(7, 3, seed=4))
    for n in range(50):
        noise = {"noise": normal(7, 3, seed=10 + n)} if random else {}
        state = method.step(state, force, c, **noise)
        assert float(c.residuals(state.positions).abs().max()) < 1e-13
        placed = c.sites(state.positions[None])[0]
        torch.testing.assert_close(state.positions, placed, atol=0, rtol=0)
    if name == "velocity Verlet":
        assert float(c.velocity_residuals(state.velocities, state.positions).abs().max()) < 1e-12
    # The velocity of a site means nothing and stays as it was.
    torch.testing.assert_close(state.velocities[6], system()[1].velocities[6], atol=0, rtol=0)


def test_velocity_verlet_is_reversible_and_conserves_energy():
    c, start = system()
    places = normal(7, 3, seed=4)
    force, method = forces(200.0, places), VelocityVerlet(timestep=0.001)

    def energy(s):
        kinetic = 0.5 * (c.masses[:, None] * s.velocities.square()).sum()
        return float((kinetic + 100.0 * (s.positions - places).square().sum()).detach())

    state = start
    for _ in range(300):
        state = method.step(state, force, c)
    assert energy(state) == pytest.approx(energy(start), rel=1e-4)
    state = State(positions=state.positions, velocities=-state.velocities)
    for _ in range(300):
        state = method.step(state, force, c)
    torch.testing.assert_close(state.positions, start.positions, atol=1e-10, rtol=0)


@each_method
def test_derivatives_of_several_steps(name):
    """State, force constants, lengths, masses and the numbers of the method, by differences."""
    kind, options, random = METHODS[name]
    c, start = system()
    places, w = normal(7, 3, seed=4), normal(7, 3, seed=5)
    u = normal(7, 3, seed=6)
    numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in options.items()}
    given = {
        "x": start.positions,
        "v": start.velocities,
        "k": torch.tensor(200.0, dtype=torch.float64),
        "lengths": c.lengths.detach(),
        "masses": c.masses.detach(),
        **numbers,
    }
    if random:
        given["noise"] = normal(3, 7, 3, seed=7)

    def loss(values):
        method = kind(**{key: values[key] for key in options})
        state = State(positions=values["x"], velocities=values["v"])
        for n in range(3):
            noise = {"noise": values["noise"][n]} if random else {}
            state = method.step(
                state,
                forces(values["k"], places),
                c,
                lengths=values["lengths"],
                masses=values["masses"],
                **noise,
            )
        mobile = (c.masses > 0)[:, None]
        return (w * state.positions).sum() + 0.1 * (u * mobile * state.velocities).sum()

    gradients = torch.func.grad(loss)(given)
    for key, value in given.items():
        direction = normal(*value.shape, seed=8) * value.abs().mean()
        if key == "masses":
            direction = direction * (value > 0)
        scale = 1e-3 if key in ("x", "lengths") else 1e-2

        def moved(t, key=key, value=value, direction=direction):
            return loss({**given, key: value + t * direction}).detach().numpy()

        truth = finite_difference(moved, step=scale)
        found = float((gradients[key] * direction).sum())
        assert found == pytest.approx(float(truth.value), rel=1e-7, abs=1e-9), key


@each_method
def test_batches(name):
    kind, options, random = METHODS[name]
    c, start = system()
    method, force = kind(**options), forces(200.0, normal(7, 3, seed=4))
    v = torch.stack([start.velocities, -start.velocities])
    noise = normal(2, 7, 3, seed=9)

    def one(velocities, eta):
        extra = {"noise": eta} if random else {}
        state = State(positions=start.positions, velocities=velocities)
        after = method.step(state, force, c, **extra)
        return after.positions, after.velocities

    def together(x, box):
        return torch.func.vmap(lambda y: force(y, box))(x)

    extra = {"noise": noise} if random else {}
    state = State(positions=start.positions.expand(2, -1, -1), velocities=v)
    found = method.step(state, together, c, **extra)
    mapped = torch.func.vmap(one)(v, noise)
    for k in range(2):
        x_k, v_k = one(v[k], noise[k])
        for positions, velocities in ((found.positions, found.velocities), mapped):
            torch.testing.assert_close(positions[k], x_k, atol=1e-14, rtol=0)
            torch.testing.assert_close(velocities[k], v_k, atol=1e-12, rtol=0)


def test_rigid_diatomic_equipartition():
    # 5 degrees of freedom of kinetic energy; velocities as LF-Middle has them.
    c = ConstraintSet([(0, 1)], [0.2], [3.0, 5.0])
    n = 4000
    method = LangevinMiddle(timestep=0.004, temperature=300.0, friction=50.0)
    random = torch.Generator().manual_seed(1)
    x = torch.zeros(n, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = 0.2
    state = State(positions=x, velocities=torch.zeros_like(x))
    with torch.no_grad():
        for _ in range(40):
            noise = torch.randn(x.shape, generator=random, dtype=torch.float64)
            state = method.step(state, harmonic(0.0), c, noise=noise)
    kinetic = 0.5 * (c.masses[:, None] * state.velocities.square()).sum(dim=(-2, -1))
    mean, error = kinetic.mean(), kinetic.std() / math.sqrt(n)
    assert abs(float(mean) - 2.5 * BOLTZMANN * 300.0) < 4 * float(error)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timestep": 0.0}, "timestep: got 0, wanted a positive number"),
        ({"timestep": -0.1}, "timestep: got -0.1"),
        ({"temperature": -1.0}, "temperature: got -1"),
        ({"friction": float("nan")}, "friction: got nan"),
        ({"friction": torch.ones(2)}, r"friction: got shape \(2,\), wanted one number"),
        ({"temperature": torch.zeros((), requires_grad=True)}, "at zero its derivative does not"),
        ({"friction": torch.zeros((), requires_grad=True)}, "at zero its derivative does not"),
    ],
)
def test_numbers_that_are_refused(options, match):
    c, state = system()
    method = LangevinMiddle(**{"timestep": 0.001, "temperature": 0.0, "friction": 0.0, **options})
    with pytest.raises(InvalidInputError, match=match):
        method.step(state, harmonic(1.0), c, noise=normal(7, 3))


def test_noise_of_a_wrong_shape():
    c, state = system()
    method = LangevinMiddle(timestep=0.001, temperature=300.0, friction=1.0)
    with pytest.raises(InvalidInputError, match=r"noise: got shape \(3,\), wanted"):
        method.step(state, harmonic(1.0), c, noise=normal(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timestep", {"temperature": 300.0, "friction": 0.0}),
        ("timestep", {"temperature": 0.0, "friction": 1.0}),
        ("friction", {"temperature": 0.0, "timestep": 0.002}),
    ],
)
def test_derivatives_without_noise(name, options):
    c = ConstraintSet([(0, 1)], [0.1], [3.0, 5.0])
    x = torch.tensor([[0.0, 0, 0], [0.1, 0, 0]], dtype=torch.float64)
    velocities, noise, weights = normal(2, 3), normal(2, 3, seed=2), normal(2, 2, 3, seed=3)

    def loss(value):
        state = State(positions=x, velocities=velocities)
        method = LangevinMiddle(**options, **{name: value})
        end = method.step(state, harmonic(40.0), c, noise=noise)
        return (weights[0] * end.positions + weights[1] * end.velocities).sum()

    at = 0.002 if name == "timestep" else 1.0
    value = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(value), value)
    step = 1e-4 * at
    ends = [loss(torch.tensor(at + s * step, dtype=torch.float64)) for s in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9)
