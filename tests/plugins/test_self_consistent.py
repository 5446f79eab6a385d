"""Particles at the minimum: energies, responses, transforms."""

from __future__ import annotations

import math

import pytest
import torch
from mdgraft import InvalidInputError, Potential, SimulationError
from mdgraft.potentials import AbstractTerm, SelfConsistent
from mdgraft.potentials.drude import Drude
from mdgraft.potentials.nonbonded import Method, Nonbonded, NonbondedSettings

COULOMB = 138.93545764438198


class Field(AbstractTerm):
    """Charges in a uniform field along x."""

    def __init__(self, charge, field):
        super().__init__()
        self.add_parameter("charge", charge, "elementary charge")
        self.add_parameter("field", field, "kilojoule/(elementary charge*nanometer*mole)")

    def forward(self, positions, box, values, global_values):
        return -values["field"] * (values["charge"] * positions[..., 0]).sum(dim=-1)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def isolated(alpha=9.782e-4, charge=-1.7, field=200.0):
    """One oscillator in a field."""
    drude = Drude(
        torch.tensor([[1, 0, -1, -1, -1]]),
        numbers(charge),
        numbers(alpha),
        numbers(1.0),
        numbers(1.0),
        pairs=torch.zeros(0, 2, dtype=torch.long),
        thole=numbers(),
        periodic=False,
    )
    terms = {"drude": drude, "field": Field(numbers(-charge, charge), numbers(field)[0])}
    return SelfConsistent(Potential(terms, n_particles=2), [1])


def cluster(*, method=Method.NO_CUTOFF, n=4, alpha=1.0e-3):
    """Polarizable ions, whose parents (even) and shells (odd) interact with all others."""
    random = torch.Generator().manual_seed(4)
    index = 2 * torch.arange(n)
    none = torch.full((n,), -1)
    axis = torch.where(torch.arange(n) == 1, torch.tensor(0), none)
    charge = -1.0 - torch.rand(n, generator=random, dtype=torch.float64)
    drude = Drude(
        torch.stack([index + 1, index, axis, none, none], dim=-1),
        charge,
        alpha * (1 + torch.rand(n, generator=random, dtype=torch.float64)),
        torch.full((n,), 0.8, dtype=torch.float64),
        torch.ones(n, dtype=torch.float64),
        pairs=torch.tensor([[0, 1]]),
        thole=numbers(2.6),
        periodic=False,
    )
    within = torch.stack([index, index + 1], dim=-1)
    pair = torch.cartesian_prod(torch.tensor([0, 1]), torch.tensor([2, 3]))
    exceptions = torch.cat([within, pair])
    zeros = torch.zeros(len(exceptions), dtype=torch.float64)
    total = torch.stack([0.4 * (-1) ** torch.arange(n) - charge, charge], dim=-1).flatten()
    nonbonded = Nonbonded(
        total,
        torch.full((2 * n,), 0.25, dtype=torch.float64),
        torch.tensor([0.5, 0.0], dtype=torch.float64).repeat(n),
        exceptions=exceptions,
        exception_charge_product=zeros,
        exception_sigma=zeros + 0.2,
        exception_epsilon=zeros,
        settings=NonbondedSettings(
            method=method, cutoff=0.9 if method.periodic else math.inf, alpha=3.0, grid=(12, 12, 12)
        ),
    )
    potential = Potential({"drude": drude, "nonbonded": nonbonded}, n_particles=2 * n)
    cores = 0.3 * torch.stack([index // 2 % 2, index // 4, 0 * index], dim=-1).double()
    cores = cores + 0.03 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    positions = cores.repeat_interleave(2, dim=0)
    return SelfConsistent(potential, index + 1, tolerance=1e-9), positions


def test_dipole_in_a_field():
    """The induced dipole is alpha E/COULOMB, the energy -alpha E^2/2, with all derivatives."""
    relaxed = isolated()
    x = torch.zeros(2, 3, dtype=torch.float64)
    parameters = dict(relaxed.named_parameters())
    alpha, field = parameters["potential.drude.polarizability"], parameters["potential.field.field"]
    placed = relaxed.relax(x)
    dipole = -1.7 * (placed[1, 0] - placed[0, 0])
    assert dipole.item() == pytest.approx(1.40813586e-3, rel=1e-8)
    assert dipole.item() == pytest.approx(9.782e-4 * 200.0 / COULOMB, rel=1e-13)
    slopes = torch.autograd.grad(dipole, [alpha, field])
    assert slopes[0].item() == pytest.approx(200.0 / COULOMB, rel=1e-10)
    assert slopes[1].item() == pytest.approx(9.782e-4 / COULOMB, rel=1e-10)

    energy = relaxed(x)
    assert energy.item() == pytest.approx(-0.5 * 9.782e-4 * 200.0**2 / COULOMB, rel=1e-12)
    (first,) = torch.autograd.grad(energy, field, create_graph=True)
    assert first.item() == pytest.approx(-dipole.item(), rel=1e-12)
    second = torch.autograd.grad(first, [field, alpha])
    assert second[0].item() == pytest.approx(-9.782e-4 / COULOMB, rel=1e-10)
    assert second[1].item() == pytest.approx(-200.0 / COULOMB, rel=1e-10)


CASES = [(Method.NO_CUTOFF, None), (Method.PME, 1.9 * torch.eye(3, dtype=torch.float64))]


@pytest.fixture(params=CASES, ids=["open", "PME"])
def case(request):
    method, box = request.param
    relaxed, positions = cluster(method=method)
    return relaxed, positions, box


def test_forces_vanish_on_what_relaxes(case):
    """The start does not matter, no force is left, and the energy is lower."""
    relaxed, x, box = case
    placed = relaxed.relax(x, box).detach()
    assert (placed[1::2] - x[1::2]).abs().max() > 1e-3
    assert torch.equal(placed[::2], x[::2])
    assert relaxed.potential.forces(placed, box)[1::2].abs().max() < 1e-8
    assert relaxed(x, box) < relaxed.potential(x, box)
    start = x.clone()
    start[1::2] += 0.004
    torch.testing.assert_close(relaxed(start, box), relaxed(x, box), rtol=1e-12, atol=0)


def test_first_and_second_derivatives(case):
    """Positions, box and parameters against differences of energies and slopes."""
    relaxed, x, box = case
    parameters = {k: v.detach() for k, v in relaxed.named_parameters()}
    random = torch.Generator().manual_seed(1)

    def like(value, size):
        return size * torch.randn(value.shape, generator=random, dtype=torch.float64)

    step_x = like(x, 1.0)
    step_box = torch.zeros(3, 3) if box is None else like(box, 0.3).tril()
    steps = {k: like(v, 0.05) * v for k, v in parameters.items()}

    def energy(t):
        moved = {k: v + t * steps[k] for k, v in parameters.items()}
        cell = None if box is None else box + t * step_box
        return torch.func.functional_call(relaxed, moved, (x + t * step_x, cell))

    t = torch.tensor(0.0, dtype=torch.float64)
    first, h = torch.func.grad(energy), 1e-4

    def difference(function, h):
        return (function(t + h) - function(t - h)) / (2 * h)

    def extrapolated(function):
        return (4 * difference(function, h / 2) - difference(function, h)) / 3

    torch.testing.assert_close(first(t), extrapolated(energy), rtol=1e-7, atol=1e-6)
    second = torch.func.grad(first)(t)
    torch.testing.assert_close(second, extrapolated(first), rtol=1e-7, atol=1e-5)
    forward = torch.func.jvp(first, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(forward, second, rtol=1e-9, atol=1e-8)


def test_response_of_positions(case):
    """First derivatives of the relaxed positions, by both modes, against differences."""
    relaxed, x, box = case
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-5
    truth = (relaxed.relax(x + h * step, box) - relaxed.relax(x - h * step, box)) / (2 * h)
    forward = torch.func.jvp(lambda y: relaxed.relax(y, box), (x,), (step,))[1]
    torch.testing.assert_close(forward, truth, rtol=1e-6, atol=1e-7)
    probe = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((relaxed.relax(y, box) * probe).sum(), y)
    torch.testing.assert_close((gradient * step).sum(), (forward * probe).sum())
    assert gradient[1::2].abs().max() == 0


def test_batches_and_vmap(case):
    """Frames together, one by one, and mapped."""
    relaxed, x, box = case
    random = torch.Generator().manual_seed(3)
    frames = x + 0.01 * torch.randn(3, *x.shape, generator=random, dtype=torch.float64)
    single = torch.stack([relaxed(frame, box) for frame in frames])
    torch.testing.assert_close(relaxed(frames, box), single, rtol=1e-11, atol=0)
    mapped = torch.func.vmap(lambda y: relaxed(y, box))(frames)
    torch.testing.assert_close(mapped, single, rtol=1e-11, atol=0)
    forces = torch.func.vmap(torch.func.grad(lambda y: relaxed(y, box)))(frames)
    y = frames.clone().requires_grad_()
    (expected,) = torch.autograd.grad(relaxed(y, box).sum(), y)
    torch.testing.assert_close(forces, expected, rtol=1e-9, atol=1e-7)


def test_hessian():
    """Every second derivative at once, symmetric, and zero for what relaxes."""
    relaxed, x = cluster(n=2)
    hessian = torch.func.hessian(relaxed)(x)
    flat = hessian.reshape(x.numel(), x.numel())
    torch.testing.assert_close(flat, flat.T, rtol=1e-8, atol=1e-5)
    assert hessian[1::2].abs().max() == 0
    # Translations cost nothing once the shells follow.
    assert flat.reshape(12, 4, 3).sum(dim=1).abs().max() < 1e-5


def test_no_graph_is_unrolled():
    """The search leaves no nodes: the graph does not grow with the distance of the start."""
    relaxed, x = cluster()

    def size(start):
        seen, stack = set(), [relaxed(start.requires_grad_()).grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [following for following, _ in node.next_functions]
        return len(seen)

    far = x.clone()
    far[1::2] += 0.01
    assert size(relaxed.relax(x).detach()) == size(far)


def test_single_precision():
    """Float32 follows float64."""
    relaxed, x = cluster()
    double = relaxed(x).item()
    single = relaxed.float()
    assert single(x.float()).item() == pytest.approx(double, rel=1e-4)


def test_nothing_to_relax():
    """Without particles it is the potential itself."""
    relaxed, x = cluster()
    plain = SelfConsistent(relaxed.potential, [])
    assert torch.equal(plain(x), relaxed.potential(x))
    assert torch.equal(plain.relax(x), x)


def test_polarization_catastrophe():
    """Shells that other charges pull off have no minimum."""
    relaxed, x = cluster(alpha=0.05)
    with pytest.raises(SimulationError, match="particles: "):
        relaxed(x)


def test_too_few_iterations():
    """An unfinished search is an error, not a result."""
    relaxed, x = cluster()
    relaxed.max_iterations = 1
    with pytest.raises(SimulationError, match="after 1 iterations"):
        relaxed(x)


@pytest.mark.parametrize(
    ("particles", "message"),
    [
        ([9], "from 0 to 1"),
        ([-1], "from 0 to 1"),
        ([1.5], "from 0 to 1"),
        ([1, 1], "more than"),
    ],
)
def test_refuses_wrong_particles(particles, message):
    """Indices out of range or repeated."""
    potential = isolated().potential
    with pytest.raises(InvalidInputError, match=message):
        SelfConsistent(potential, particles)
