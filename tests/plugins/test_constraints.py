"""Projections onto constraints: closed forms, finite differences, transforms, errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from mdgraft import ConstraintError, InvalidInputError, MissingBoxError
from mdgraft.constraints import AverageSite, ConstraintSet, Newton, OutOfPlaneSite, VirtualSites
from mdgraft.testing import finite_difference
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """Constraints, positions that meet them, positions after a step, velocities."""

    constraints: ConstraintSet
    old: Tensor
    trial: Tensor
    velocities: Tensor


def case(pairs, n, *, massless=(), sites=None, step=0.01, seed=1, spacing=0.25):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    # A random walk, so that neighbours in number are neighbours in space.
    old = torch.cumsum(spacing * torch.nn.functional.normalize(normal(n, 3), dim=-1), dim=0)
    lengths = torch.stack([(old[i] - old[j]).norm() for i, j in pairs]) if pairs else []
    masses = 1.0 + 15.0 * torch.rand(n, generator=random, dtype=torch.float64)
    masses[list(massless)] = 0.0
    if sites is not None:
        sites = VirtualSites(sites, n_particles=n)
        masses[list(sites.indices)] = 0.0
        old = sites(old[None])[0]
    constraints = ConstraintSet(pairs, lengths, masses, sites=sites)
    return Case(constraints, old, old + step * normal(n, 3), normal(n, 3))


def ring(n, first=0):
    return [(first + k, first + (k + 1) % n) for k in range(n)]


def chain(n, first=0):
    return [(first + k, first + k + 1) for k in range(n - 1)]


TETRAHEDRON = list(itertools.combinations(range(4), 2))
CASES = {
    "none": lambda: case([], 3),
    "bond": lambda: case([(1, 0)], 3),
    "triangle": lambda: case([(0, 1), (0, 2), (1, 2)], 3),
    "two triangles": lambda: case([(0, 1), (0, 2), (2, 1), (4, 3), (5, 3), (4, 5)], 6),
    "methyl": lambda: case([(0, 1), (0, 2), (0, 3)], 4),
    "tetrahedron": lambda: case(TETRAHEDRON, 4),
    "ring": lambda: case(ring(6), 7),
    "rings that share an edge": lambda: case([*ring(6), (5, 6), (6, 7), (7, 8), (8, 4)], 9),
    "mixed": lambda: case([(0, 1), *chain(4, 2), *ring(5, 6), (11, 12), (11, 13), (12, 13)], 15),
    "chain that is filled up": lambda: case([*chain(21), *chain(19, 21)], 40, step=0.004),
    "large ring beside a bond": lambda: case([*ring(70), (70, 71)], 72, step=0.004),
    "partner that cannot move": lambda: case([(0, 1), (1, 2), (2, 3)], 4, massless=(3,)),
    "virtual sites": lambda: case(
        [(0, 1), (0, 2), (1, 2)],
        6,
        sites={
            3: AverageSite(parents=(0, 1, 2), weights=(0.7, 0.2, 0.1)),
            4: OutOfPlaneSite(parents=(0, 1, 2), weight12=0.2, weight13=0.3, weight_cross=1.5),
            5: AverageSite(parents=(3, 4), weights=(0.5, 0.5)),
        },
    ),
}
each_case = pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
ARGUMENTS = ("positions", "reference", "lengths", "masses")


def inputs(of):
    c = of.constraints
    return [of.trial, of.old, c.lengths.detach(), c.masses.detach()]


def weights_like(x, seed=5):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype)


def position_loss(of):
    w = weights_like(of.old)

    def loss(trial, old, lengths, masses):
        c = of.constraints
        moved = c.project_positions(trial, old, lengths=lengths, masses=masses)
        # A nonlinear observable, with multipliers that matter too.
        return (w * torch.sin(4 * moved)).sum()

    return loss


def velocity_loss(of):
    w = weights_like(of.old, 6)

    def loss(velocities, positions, masses):
        c = of.constraints
        return (w * torch.sin(c.project_velocities(velocities, positions, masses=masses))).sum()

    return loss


def assert_derivatives(loss, values, atol, directions=3):
    """First derivatives along random directions, then those of a gradient, by differences."""
    random = torch.Generator().manual_seed(7)
    leaves = [v.clone().requires_grad_() for v in values]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    gradients = [torch.zeros_like(v) if g is None else g for g, v in pairs]
    for k, value in enumerate(values):
        for _ in range(directions if value.numel() else 0):
            along = torch.randn(value.shape, generator=random, dtype=torch.float64)
            if k == len(values) - 1:
                along = along * (value > 0)
            along = along / along.abs().max().clamp(min=1.0)

            def moved(t, k=k, along=along):
                return [v + t * along if j == k else v for j, v in enumerate(values)]

            def first(t, moved=moved):
                return loss(*moved(t)).detach().numpy()

            truth = finite_difference(first, step=2e-4)
            found = (gradients[k] * along).sum().item()
            assert found == pytest.approx(float(truth.value), abs=atol)

            def slope(t, moved=moved):
                moving = [v.clone().requires_grad_() for v in moved(t)]
                found = torch.autograd.grad(loss(*moving), moving, allow_unused=True)
                seeds = [weights_like(v, 9) for v in values]
                pairs = zip(found, seeds, strict=True)
                return sum(float((g * s).sum()) for g, s in pairs if g is not None)

            seeds = [weights_like(v, 9) for v in values]
            total = sum((g * s).sum() for g, s in zip(gradients, seeds, strict=True))
            second = torch.autograd.grad(total, leaves[k], retain_graph=True, allow_unused=True)[0]
            found = 0.0 if second is None else (second * along).sum().item()
            truth = finite_difference(slope, step=2e-4)
            scale = 1.0 + abs(float(truth.value))
            assert found == pytest.approx(float(truth.value), abs=100 * atol * scale)


@each_case
def test_positions_meet_their_constraints(name):
    of = CASES[name]()
    c = of.constraints
    projection = c.position_projection(of.trial, of.old)
    errors = c.residuals(projection.positions)
    assert errors.shape == (c.n_constraints,)
    assert float(errors.abs().sum()) <= 1e-13 * c.n_constraints
    assert projection.residual.shape == ()
    assert float(projection.residual) < 1e-13
    # The correction acts along the old vectors, by the multipliers that are reported.
    wanted = of.trial.clone()
    for k, (i, j) in enumerate(c.pairs.tolist()):
        push = 2 * projection.multipliers[k] * (of.old[j] - of.old[i])
        for particle, sign in ((i, -1.0), (j, 1.0)):
            if c.masses[particle] > 0:
                wanted[particle] += sign * push / c.masses[particle]
    real = c.masses > 0
    torch.testing.assert_close(projection.positions[real], wanted[real], atol=1e-13, rtol=0)
    if c.sites is not None:
        placed = c.sites(projection.positions[None])[0]
        torch.testing.assert_close(projection.positions, placed, atol=1e-15, rtol=0)
    # Once is enough.
    again = c.project_positions(projection.positions, of.old)
    torch.testing.assert_close(again, projection.positions, atol=1e-13, rtol=0)


@each_case
def test_velocities_lie_along_their_constraints(name):
    of = CASES[name]()
    c = of.constraints
    found = c.project_velocities(of.velocities, of.old)
    assert float(c.velocity_residuals(found, of.old).abs().sum()) < 1e-12 * (1 + c.n_constraints)
    # The nearest such velocities, in the metric of kinetic energy: dense algebra.
    real = (c.masses > 0).nonzero().squeeze(-1)
    rows = torch.zeros(c.n_constraints, c.n_particles, 3, dtype=torch.float64)
    for k, (i, j) in enumerate(c.pairs.tolist()):
        rows[k, i], rows[k, j] = of.old[i] - of.old[j], of.old[j] - of.old[i]
    a = rows[:, real].flatten(1)
    inverse = (1 / c.masses[real]).repeat_interleave(3)
    v = of.velocities[real].flatten()
    wanted = v - inverse * (a.T @ torch.linalg.solve(a * inverse @ a.T, a @ v))
    torch.testing.assert_close(found[real].flatten(), wanted, atol=1e-12, rtol=0)
    fixed = c.masses == 0
    torch.testing.assert_close(found[fixed], of.velocities[fixed], atol=0, rtol=0)


@each_case
def test_derivatives_of_positions(name):
    of = CASES[name]()
    assert_derivatives(position_loss(of), inputs(of), atol=1e-8)


@each_case
def test_derivatives_of_velocities(name):
    of = CASES[name]()
    values = [of.velocities, of.old, of.constraints.masses.detach()]
    assert_derivatives(velocity_loss(of), values, atol=1e-8)


@each_case
def test_every_entry_against_central_differences(name):
    # Each entry by itself, to the accuracy that is promised: 1e-7 absolute.
    of = CASES[name]()
    values, loss = inputs(of), position_loss(of)
    if of.constraints.n_particles > 20:
        pytest.skip("entry by entry is for small systems; directions cover the large ones")
    leaves = [v.clone().requires_grad_() for v in values]
    gradients = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    for k, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        for entry in range(value.numel()):
            if value is values[3] and value[entry] == 0:
                continue

            def moved(t, k=k, entry=entry):
                others = [v.clone() for v in values]
                others[k].view(-1)[entry] += t
                return float(loss(*others))

            h = 1e-5 if k < 3 else 1e-3
            truth = (moved(h) - moved(-h)) / (2 * h)
            found = 0.0 if gradient is None else float(gradient.reshape(-1)[entry])
            assert found == pytest.approx(truth, abs=1e-7), (ARGUMENTS[k], entry)


@each_case
def test_forward_mode_and_hessians(name):
    of = CASES[name]()
    values, loss = inputs(of), position_loss(of)
    tangents = [1e-1 * weights_like(v, 3 + k) for k, v in enumerate(values)]
    value, along = torch.func.jvp(loss, tuple(values), tuple(tangents))
    gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*values)
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(along, backward, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(value, loss(*values), atol=0, rtol=0)
    if of.constraints.n_particles > 10:
        return
    # Forward over reverse and reverse over reverse.
    one = torch.func.jacfwd(torch.func.grad(loss))(*values)
    other = torch.func.jacrev(torch.func.grad(loss))(*values)
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(one, one.permute(2, 3, 0, 1), atol=1e-10, rtol=1e-10)


@each_case
def test_batches_and_vmap(name):
    of = CASES[name]()
    c = of.constraints
    shifts = 0.002 * weights_like(torch.empty(2, 3, *of.old.shape, dtype=torch.float64))
    trials = of.trial + shifts
    found = c.position_projection(trials, of.old)
    assert found.multipliers.shape == (2, 3, c.n_constraints)
    for index in np.ndindex(2, 3):
        one = c.position_projection(trials[index], of.old)
        torch.testing.assert_close(found.positions[index], one.positions, atol=1e-14, rtol=0)
        torch.testing.assert_close(found.multipliers[index], one.multipliers, atol=1e-9, rtol=0)
    mapped = torch.func.vmap(lambda x: c.project_positions(x, of.old))(trials[0])
    torch.testing.assert_close(mapped, found.positions[0], atol=1e-14, rtol=0)
    values, loss = inputs(of), position_loss(of)
    gradient = torch.func.grad(loss, argnums=(0, 2))
    stretched = values[2] * torch.tensor([[1.0], [1.001], [0.999]], dtype=torch.float64)
    mapped = torch.func.vmap(lambda x, d: gradient(x, of.old, d, values[3]))(trials[0], stretched)
    for k in range(3):
        alone = gradient(trials[0, k], of.old, stretched[k], values[3])
        for a, b in zip(mapped, alone, strict=True):
            torch.testing.assert_close(a[k], b, atol=1e-11, rtol=1e-11)
    velocities = torch.func.vmap(lambda v: c.project_velocities(v, of.old))(shifts[0])
    torch.testing.assert_close(velocities, c.project_velocities(shifts[0], of.old))


@each_case
def test_single_precision(name):
    of = CASES[name]()
    c = of.constraints
    double = [v.clone().requires_grad_() for v in inputs(of)]
    wanted = torch.autograd.grad(position_loss(of)(*double), double, allow_unused=True)
    single = Case(c.float(), of.old.float(), of.trial.float(), of.velocities.float())
    leaves = [v.clone().requires_grad_() for v in inputs(single)]
    loss = position_loss(single)(*leaves)
    assert loss.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(loss, leaves, allow_unused=True), wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a.double(), b, atol=2e-3 * float(b.abs().max() + 1), rtol=0)


def test_single_precision_from_the_start():
    masses = torch.tensor([16.0, 1.0])
    x = torch.tensor([[0.0, 0, 0], [0.11, 0, 0]])
    c = ConstraintSet([(0, 1)], torch.tensor([0.1]), masses)
    assert c.dtype == torch.float32
    assert float(c.residuals(c.project_positions(x)).abs().max()) < 1e-6
    # Lengths in double precision keep theirs.
    mixed = ConstraintSet([(0, 1)], [0.1], masses)
    assert mixed.dtype == torch.float64
    assert float(mixed.residuals(mixed.project_positions(x)).abs().max()) < 1e-14


@each_case
def test_order_and_orientation_do_not_matter(name):
    of = CASES[name]()
    c = of.constraints
    order = torch.randperm(c.n_constraints, generator=torch.Generator().manual_seed(2))
    pairs = c.pairs[order].flip(dims=(1,))
    other = ConstraintSet(pairs, c.lengths[order], c.masses, sites=c.sites)
    found = other.position_projection(of.trial, of.old)
    wanted = c.position_projection(of.trial, of.old)
    torch.testing.assert_close(found.positions, wanted.positions, atol=1e-13, rtol=0)
    torch.testing.assert_close(found.multipliers, wanted.multipliers[order], atol=1e-8, rtol=0)


# Closed forms and traps -----------------------------------------------------------------------


def test_a_bond_has_a_closed_form():
    # |r* + s r|^2 = d^2 is quadratic in s, and masses share the displacement.
    of = CASES["bond"]()
    c, (i, j) = of.constraints, (1, 0)
    lengths = c.lengths.detach().clone().requires_grad_()
    trial = of.trial.clone().requires_grad_()
    r, star = of.old[j] - of.old[i], trial[j] - trial[i]
    a, b, e = r @ r, r @ star, star @ star - lengths[0] ** 2
    s = (-b + (b * b - a * e).sqrt()) / a
    w = 1 / c.masses
    wanted = trial + torch.stack(
        [s * r * w[0] / (w[0] + w[1]), -s * r * w[1] / (w[0] + w[1]), 0 * r]
    )
    found = c.project_positions(trial, of.old, lengths=lengths)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)
    seed = weights_like(wanted)
    leaves = (trial, lengths)
    for x, y in zip(
        torch.autograd.grad((seed * found).sum(), leaves),
        torch.autograd.grad((seed * wanted).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_what_a_symmetric_matrix_or_constant_multipliers_would_give():
    """Both shortcuts fail by much more than the tolerance of these tests."""
    of = CASES["triangle"]()
    c = of.constraints
    pairs = c.pairs
    inverse = 1 / c.masses
    projection = c.position_projection(of.trial, of.old)
    x, seed = projection.positions, weights_like(of.old)

    def rows(positions):
        a = torch.zeros(3, 3, 3, dtype=torch.float64)
        for k, (i, j) in enumerate(pairs.tolist()):
            a[k, i], a[k, j] = 2 * (positions[i] - positions[j]), 2 * (positions[j] - positions[i])
        return a.flatten(1)

    m = inverse.repeat_interleave(3)
    new, old = rows(x), rows(of.old)
    s = (new * m) @ old.T

    def adjoint(matrix):
        mu = torch.linalg.solve(matrix, (old * m) @ seed.flatten())
        return (seed.flatten() - new.T @ mu).reshape(3, 3)

    trial = of.trial.clone().requires_grad_()
    loss = (seed * c.project_positions(trial, of.old)).sum()
    (found,) = torch.autograd.grad(loss, trial)
    torch.testing.assert_close(found, adjoint(s.T), atol=1e-12, rtol=0)
    assert float((found - adjoint(s)).abs().max()) > 1e-3
    assert float((found - seed).abs().max()) > 1e-3


def test_third_derivatives():
    of = CASES["bond"]()
    loss, values = position_loss(of), inputs(of)
    direction = weights_like(of.old, 11)

    def along(t):
        return loss(of.trial + t * direction, *values[1:])

    second = torch.func.grad(torch.func.grad(along))
    zero = torch.zeros((), dtype=torch.float64)
    third = torch.func.grad(second)(zero)
    truth = finite_difference(lambda t: second(zero + t).numpy(), step=1e-3)
    assert float(third) == pytest.approx(float(truth.value), rel=1e-6)


def test_far_from_the_constraints():
    # Coordinates as a modeller leaves them: bonds off by a third.
    of = CASES["methyl"]()
    c = of.constraints
    lengths = c.lengths * torch.tensor([0.65, 1.35, 1.0], dtype=torch.float64)
    projection = c.position_projection(of.old, lengths=lengths)
    assert float(projection.residual) < 1e-13


def test_parameters_of_the_set_take_gradients():
    of = CASES["triangle"]()
    c = of.constraints
    assert not any(p.requires_grad for p in c.parameters())
    c.requires_grad_()
    loss = (weights_like(of.old) * c.project_positions(of.trial, of.old)).sum()
    loss.backward()
    values = [v.clone().requires_grad_() for v in inputs(of)]
    again = c.project_positions(values[0], values[1], lengths=values[2], masses=values[3])
    (weights_like(of.old) * again).sum().backward()
    torch.testing.assert_close(c.lengths.grad, values[2].grad)
    torch.testing.assert_close(c.masses.grad, values[3].grad)
    assert set(c.state_dict()) >= {"lengths", "masses"}

    def replaced(lengths):
        found = torch.func.functional_call(c, {"lengths": lengths}, (of.trial, of.old))
        return (weights_like(of.old) * found).sum()

    found = torch.func.grad(replaced)(c.lengths.detach())
    torch.testing.assert_close(found, values[2].grad)


def test_many_rigid_molecules_at_once():
    # A box of water, every molecule turned at random: as one by one.
    of = CASES["triangle"]()
    c, n = of.constraints, 50
    random = torch.Generator().manual_seed(3)
    turns = torch.linalg.qr(torch.randn(n, 3, 3, generator=random, dtype=torch.float64))[0]
    places = 3 * torch.rand(n, 1, 3, generator=random, dtype=torch.float64)
    old, trial = of.old @ turns + places, of.trial @ turns + places
    pairs = (c.pairs + 3 * torch.arange(n)[:, None, None]).reshape(-1, 2)
    box = ConstraintSet(pairs, c.lengths.repeat(n), c.masses.repeat(n))
    found = box.project_positions(trial.reshape(-1, 3), old.reshape(-1, 3))
    wanted = c.project_positions(of.trial, of.old) @ turns + places
    torch.testing.assert_close(found.reshape(n, 3, 3), wanted, atol=1e-13, rtol=0)


@each_case
def test_no_frames_copies_and_pickles(name):
    of = CASES[name]()
    c = of.constraints
    nothing = c.position_projection(of.trial.expand(0, -1, -1))
    assert nothing.positions.shape == (0, c.n_particles, 3)
    assert nothing.multipliers.shape == (0, c.n_constraints)
    assert c.project_velocities(of.trial.expand(0, -1, -1), of.old).shape[0] == 0
    for other in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))):
        found = other.project_positions(of.trial, of.old)
        torch.testing.assert_close(found, c.project_positions(of.trial, of.old), atol=0, rtol=0)


# Periodic images ------------------------------------------------------------------------------

CELLS = {
    "rectangular": [[1.0, 0, 0], [0, 1.2, 0], [0, 0, 0.9]],
    "oblique": [[1.0, 0, 0], [0.9, 0.7, 0], [-0.6, 0.9, 0.8]],
    "left-handed": [[0, 1.0, 0], [1.1, 0, 0], [0, 0, 0.8]],
}


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("cell", CELLS)
def test_nearest_images(cell, pbc):
    of = CASES["triangle"]()
    c = of.constraints
    box = torch.tensor(CELLS[cell], dtype=torch.float64)
    shifts = torch.tensor([[0, 0, 0], [1, 0, -2], [-1, 0, 3]], dtype=torch.float64) @ box
    periodic = ConstraintSet(c.pairs, c.lengths, c.masses, pbc=pbc)
    assert periodic.periodic
    found = periodic.project_positions(of.trial + shifts, of.old + shifts, box=box)
    wanted = c.project_positions(of.trial, of.old) + shifts
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    v = periodic.project_velocities(of.velocities, of.old + shifts, box=box)
    torch.testing.assert_close(v, c.project_velocities(of.velocities, of.old))
    assert float(periodic.residuals(found, box=box).abs().max()) < 1e-13
    with pytest.raises(MissingBoxError, match="box: got None"):
        periodic.project_positions(of.trial, of.old)


def test_derivative_in_the_box():
    # The box moves a partner's image.
    of = CASES["bond"]()
    c = of.constraints
    periodic = ConstraintSet(c.pairs, c.lengths, c.masses, pbc=(True, True, True))
    box = torch.tensor(CELLS["oblique"], dtype=torch.float64)
    shifts = torch.tensor([[1.0, -2, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64) @ box
    seed = weights_like(of.old)

    def loss(h):
        moved = periodic.project_positions(of.trial + shifts, of.old + shifts, box=h)
        return (seed * moved).sum()

    gradient = torch.func.grad(loss)(box)
    direction = weights_like(box, 2)
    truth = finite_difference(lambda t: loss(box + t * direction).numpy(), step=1e-4)
    assert float((gradient * direction).sum()) == pytest.approx(float(truth.value), abs=1e-8)


# Errors ---------------------------------------------------------------------------------------


def test_loose_tolerance_raises_in_gradient_mode():
    of = CASES["triangle"]()
    c, loose = of.constraints, Newton(tolerance=1e-4)
    trial = of.trial.clone().requires_grad_()
    projection = c.position_projection(of.trial, of.old, solver=loose)
    assert 1e-9 < float(projection.residual) <= 1e-4
    with torch.no_grad():
        c.project_positions(trial, of.old, solver=loose)
    match = r"solver: got a tolerance of 1.0e-04.*derivatives.*1e-08"
    with pytest.raises(ConstraintError, match=match):
        c.project_positions(trial, of.old, solver=loose)

    def loss(x):
        return c.project_positions(x, of.old, solver=loose).sum()

    with pytest.raises(ConstraintError, match=match):
        torch.func.grad(loss)(of.trial)
    with pytest.raises(ConstraintError, match=match):
        torch.func.jvp(loss, (of.trial,), (of.trial,))
    # One that is tight enough is allowed.
    c.project_positions(trial, of.old, solver=Newton(tolerance=1e-9)).sum().backward()


def test_no_solution():
    # The bond has turned by more than a right angle.
    c = ConstraintSet([(0, 1)], [0.1], [1.0, 1.0])
    old = [[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]
    with pytest.raises(ConstraintError, match=r"constraints 0-1 of frame 0 are not met.*wanted"):
        c.project_positions([[0.0, 0.0, 0.0], [0.0, 0.2, 0.0]], old)
    # Lengths that no triangle has.
    c = ConstraintSet([(0, 1), (1, 2), (0, 2)], [0.1, 0.1, 0.3], [1.0, 1.0, 1.0])
    with pytest.raises(ConstraintError, match="lengths may contradict"):
        c.project_positions([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.1, 0.1, 0.0]])


SQUARE = torch.tensor(
    [[0, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0], [0, 0.1, 0]], dtype=torch.float64, requires_grad=True
)
LINE = torch.tensor([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("x", "n"), [(LINE, 3), (SQUARE, 4)], ids=["collinear", "planar"])
def test_dependent_constraints(x, n):
    pairs = list(itertools.combinations(range(n), 2))
    c = ConstraintSet(pairs, [float((x[i] - x[j]).detach().norm()) for i, j in pairs], [1.0] * n)
    match = "depend on each other in frame 0.*collinear triples"
    with pytest.raises(ConstraintError, match=match):
        c.project_velocities(x, x)
    # Already met, so that there is an answer, but no derivative.
    moved = c.project_positions(x)
    with pytest.raises(ConstraintError, match=match):
        moved.sum().backward()


@pytest.mark.parametrize(
    ("pairs", "lengths", "masses", "match"),
    [
        ([(0, 5)], [0.1], [1, 1], "constraint 0 connects particles 0 and 5.*there are 2"),
        ([(0, -1)], [0.1], [1, 1], "constraint 0 connects particles 0 and -1"),
        ([(1, 1)], [0.1], [1, 1], "wanted two different ones"),
        ([(0, 1), (1, 0)], [0.1, 0.1], [1, 1], "constraint 1 connects.*as another one does"),
        ([(0, 1)], [0.1], [0, 0], "both have no mass"),
        ([(0, 1)], [0.0], [1, 1], "lengths: entry 0 is 0 nm, wanted a positive"),
        ([(0, 1)], [-0.1], [1, 1], "lengths: entry 0 is -0.1 nm"),
        ([(0, 1)], [float("nan")], [1, 1], "lengths: entry 0 is nan"),
        ([(0, 1)], [0.1, 0.2], [1, 1], "lengths: got 2, wanted one for 1 pairs"),
        ([(0, 1)], [0.1], [1, -1], "masses: one is negative"),
        ([(0, 1)], ["a"], [1, 1], "lengths: cannot be read as numbers"),
    ],
)
def test_structures_that_are_refused(pairs, lengths, masses, match):
    with pytest.raises(InvalidInputError, match=match):
        ConstraintSet(pairs, lengths, masses)


def test_inputs_that_are_refused():
    of = CASES["triangle"]()
    c = of.constraints
    with pytest.raises(InvalidInputError, match=r"positions: got shape \(2, 3\), wanted"):
        c.project_positions(of.trial[:2])
    with pytest.raises(InvalidInputError, match=r"reference: got shape \(2, 3\), wanted"):
        c.project_positions(of.trial, of.old[:2])
    with pytest.raises(InvalidInputError, match=r"velocities: got shape"):
        c.project_velocities(of.velocities[:2], of.old)
    with pytest.raises(InvalidInputError, match="positions: NaN or infinity at particle 0"):
        c.project_positions(of.trial * torch.tensor(float("nan")))
    with pytest.raises(InvalidInputError, match="reference: NaN or infinity at particle 0"):
        c.project_positions(of.trial, of.old * torch.tensor(float("inf")))
    with pytest.raises(InvalidInputError, match=r"lengths: got shape \(1,\), wanted \(3,\)"):
        c.project_positions(of.trial, lengths=torch.ones(1))
    with pytest.raises(InvalidInputError, match="lengths: entry 2 is -1 nm"):
        c.project_positions(of.trial, lengths=torch.tensor([1.0, 1.0, -1.0]))
    with pytest.raises(InvalidInputError, match=r"masses: got shape \(1,\), wanted \(3,\)"):
        c.project_positions(of.trial, masses=torch.ones(1))
    with pytest.raises(InvalidInputError, match="masses: entry 0 is 0 Da"):
        c.project_positions(of.trial, masses=torch.zeros(3))
    with pytest.raises(InvalidInputError, match="positions: cannot be read"):
        c.project_positions("here")
    with pytest.raises(InvalidInputError, match="tolerance: got -1"):
        Newton(tolerance=-1)
    with pytest.raises(InvalidInputError, match="max_iterations: got 0"):
        Newton(max_iterations=0)
    sites = VirtualSites({8: AverageSite(parents=(0,), weights=(1.0,))}, n_particles=9)
    with pytest.raises(InvalidInputError, match="sites: are those of 9 particles"):
        ConstraintSet([], [], [1.0, 1.0], sites=sites)
