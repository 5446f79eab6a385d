"""Neighbour lists, periodic images and special functions against brute force."""

import itertools
import math

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft.kernels import special
from mdgraft.kernels.observe import observe
from mdgraft.kernels.pairs import all_pairs, exclusion_keys, neighbor_pairs
from mdgraft.kernels.periodic import minimum_image, reciprocal, volume
from mdgraft.kernels.pme import moduli, spline

NO_EXCLUSIONS = torch.empty(0, dtype=torch.long)


def random_box(rng, smallest):
    """A reduced triclinic box whose diagonal is at least ``smallest``."""
    diagonal = smallest * rng.uniform(1.0, 1.8, size=3)
    box = np.diag(diagonal)
    for i, j in ((1, 0), (2, 0), (2, 1)):
        box[i, j] = rng.uniform(-0.5, 0.5) * diagonal[j]
    return box


def shortest_distances(positions, box):
    """All pairs over 125 images."""
    i, j = np.triu_indices(len(positions), 1)
    delta = positions[j] - positions[i]
    delta -= np.round(delta @ np.linalg.inv(box)) @ box
    images = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ box
    return i, j, np.linalg.norm(delta[:, None] + images, axis=-1).min(axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_neighbours_in_random_boxes(seed):
    rng = np.random.default_rng(seed)
    cutoff = rng.uniform(0.3, 1.0)
    box = random_box(rng, 2 * cutoff)
    n = int(rng.integers(2, 80))
    positions = rng.uniform(-3, 3, size=(n, 3)) @ box
    excluded = rng.integers(0, n, size=(5, 2))
    excluded = excluded[excluded[:, 0] != excluded[:, 1]]
    keys = exclusion_keys(torch.tensor(excluded).reshape(-1, 2), n)
    pairs = neighbor_pairs(
        torch.tensor(positions)[None], torch.tensor(box)[None], cutoff=cutoff, excluded=keys
    )
    i, j, distance = shortest_distances(positions, box)
    removed = {(min(p), max(p)) for p in excluded.tolist()}
    expected = {(a, b) for a, b, d in zip(i, j, distance, strict=True) if d < cutoff} - removed
    found = [
        tuple(sorted(p)) for p in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    vectors = pairs.displacements(torch.tensor(positions)[None], torch.tensor(box)[None])
    lengths = dict(zip(found, vectors.norm(dim=-1).tolist(), strict=True))
    brute = {(a, b): d for a, b, d in zip(i, j, distance, strict=True)}
    for pair, length in lengths.items():
        assert length == pytest.approx(brute[pair], abs=1e-12)


def test_open_neighbours_and_all_pairs():
    rng = np.random.default_rng(0)
    positions = torch.tensor(rng.uniform(0, 2, size=(2, 30, 3)))
    keys = exclusion_keys(torch.tensor([[3, 1], [7, 29]]), 30)
    every = all_pairs(30, keys)
    assert len(every.first) == 30 * 29 // 2 - 2
    near = neighbor_pairs(positions, None, cutoff=0.8, excluded=keys)
    for f in range(2):
        chosen = near.frame == f
        distance = every.displacements(positions, None)[f].norm(dim=-1)
        assert chosen.sum() == (distance < 0.8).sum()
    ones = torch.ones(len(near.first), dtype=torch.float64)
    assert near.sum(ones, 2).sum() == len(near.first)


@pytest.mark.parametrize("n", [0, 1])
def test_no_pairs(n):
    pairs = neighbor_pairs(
        torch.zeros(1, n, 3), torch.eye(3)[None], cutoff=0.4, excluded=NO_EXCLUSIONS
    )
    assert len(pairs.first) == 0
    assert pairs.sum(torch.zeros(0), 1).tolist() == [0.0]


def test_box_too_small():
    with pytest.raises(mdgraft.BoxTooSmallError, match="needs at least 1.2 nm in every direction"):
        neighbor_pairs(torch.zeros(1, 4, 3), torch.eye(3)[None], cutoff=0.6, excluded=NO_EXCLUSIONS)


def test_vmap_list_holds_the_pairs_of_every_member():
    rng = np.random.default_rng(3)
    positions = torch.tensor(rng.uniform(0, 3, size=(4, 25, 3)))

    def count(x):
        pairs = neighbor_pairs(x[None], None, cutoff=0.9, excluded=NO_EXCLUSIONS)
        return (pairs.displacements(x[None], None).norm(dim=-1) < 0.9).sum()

    counts = torch.vmap(count)(positions)
    expected = [int(count(x)) for x in positions]
    assert counts.tolist() == expected


def test_minimum_image_and_its_box_derivative():
    rng = np.random.default_rng(4)
    box = torch.tensor(random_box(rng, 1.0), requires_grad=True)
    delta = torch.tensor(rng.normal(size=(20, 3)) * 3, requires_grad=True)
    image = minimum_image(delta, box)
    half = 0.5 * box.diagonal()
    assert bool((image.abs()[:, 2] <= half[2] + 1e-12).all())
    shift = (image - delta) @ torch.linalg.inv(box)
    torch.testing.assert_close(shift, shift.round(), atol=1e-10, rtol=0)
    assert torch.autograd.gradcheck(minimum_image, (delta, box))
    torch.testing.assert_close(volume(box), torch.linalg.det(box))
    torch.testing.assert_close(box @ reciprocal(box), torch.eye(3, dtype=torch.float64))


def test_observe_is_constant_and_sees_plain_values():
    seen = []

    def look(x):
        seen.append(type(x) is torch.Tensor and tuple(x.shape))
        return torch.arange(3)

    x = torch.ones(2, 4, 3, requires_grad=True)
    torch.func.grad(lambda y: (observe(look, lambda r, n: r, y) * y.sum()).sum())(x)
    torch.func.jvp(lambda y: (observe(look, lambda r, n: r, y) * y.sum()).sum(), (x,), (x,))
    torch.vmap(torch.vmap(lambda y: observe(look, lambda r, n: r, y) * y.sum()))(
        torch.ones(5, 6, 2, 4, 3)
    )
    assert seen == [(2, 4, 3), (2, 4, 3), (60, 4, 3)]


class TestSpecialFunctions:
    u = torch.cat(
        [torch.zeros(1), torch.logspace(-12, 1.2, 200), torch.tensor([0.1, 1.0])]
    ).double()

    @staticmethod
    def exact(function, values):
        mpmath = pytest.importorskip("mpmath", reason="mpmath comes with torch's sympy")
        mpmath.mp.dps = 60
        exact = [float(function(mpmath, mpmath.mpf(v))) for v in values.tolist()]
        return torch.tensor(exact, dtype=torch.float64)

    def test_erf_over_root(self):
        def exact(m, u):
            return m.erf(m.sqrt(u)) / m.sqrt(u) if u else 2 / m.sqrt(m.pi)

        torch.testing.assert_close(
            special.erf_over_root(self.u), self.exact(exact, self.u), rtol=5e-15, atol=0
        )

    def test_dispersion_damping(self):
        def exact(m, x):
            if not x:
                return m.mpf(1) / 6
            return (1 - m.exp(-x) * (1 + x + x * x / 2)) / x**3

        torch.testing.assert_close(
            special.dispersion_damping(self.u), self.exact(exact, self.u), rtol=2e-13, atol=0
        )

    @pytest.mark.parametrize("function", [special.erf_over_root, special.dispersion_damping])
    def test_derivatives_are_smooth_through_zero(self, function):
        u = self.u.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(u).sum(), u, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), u)
        assert bool(torch.isfinite(first).all()) and bool(torch.isfinite(second).all())
        inside = torch.linspace(0.02, 8, 60, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, inside)
        assert torch.autograd.gradgradcheck(function, inside)


def test_splines_partition_unity_and_reproduce_a_line():
    w = torch.linspace(0, 1, 11, dtype=torch.float64)
    weights = spline(w)
    torch.testing.assert_close(weights.sum(-1), torch.ones(11, dtype=torch.float64))
    knots = torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close((weights * knots).sum(-1), w + 1.5)


@pytest.mark.parametrize("n", [6, 7, 15, 16])
def test_spline_moduli(n):
    frequencies = np.arange(n)
    values = {1: 1 / 24, 2: 11 / 24, 3: 11 / 24, 4: 1 / 24}
    sums = sum(v * np.exp(2j * math.pi * frequencies * k / n) for k, v in values.items())
    expected = np.abs(sums) ** 2
    regular = expected > 1e-7
    np.testing.assert_allclose(moduli(n)[regular], expected[regular], rtol=1e-12)
    assert (moduli(n) > 1e-7).all()
