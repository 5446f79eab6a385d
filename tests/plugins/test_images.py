"""Pairs over all periodic images against brute force over translations."""

from __future__ import annotations

import itertools

import mdgraft
import numpy as np
import pytest
import torch
from mdgraft.kernels.images import image_pairs

# Name, box vectors [nm], number of particles, cutoff [nm].
CELLS = {
    "one particle in a primitive cell": ([[0, 0.2, 0.2], [0.2, 0, 0.2], [0.2, 0.2, 0]], 1, 1.0),
    "smaller than the cutoff": ([[0.5, 0, 0], [0, 0.6, 0], [0, 0, 0.7]], 4, 0.9),
    "left-handed": ([[0, 0.8, 0], [0.9, 0.1, 0], [0, 0.3, 0.7]], 5, 0.5),
    "very oblique": ([[1.0, 0, 0], [2.7, 0.9, 0], [-1.9, 3.1, 1.1]], 6, 0.6),
    "large": ([[3.0, 0, 0], [0.5, 3.2, 0], [0.2, -0.6, 2.9]], 60, 0.7),
    "flat": ([[0.3, 0, 0], [0, 4.0, 0], [0, 0, 4.0]], 20, 0.8),
}


def in_order(first, second, vectors):
    """Rows ``first, second, x, y, z`` in an order that rounding does not change."""
    rows = np.column_stack([first, second, vectors])
    return rows[np.lexsort(np.round(rows, 6).T[::-1] + 0.0)]


def brute_force(x, box, cutoff, pbc):
    """All ordered pairs within the cutoff."""
    box = np.asarray(box, dtype=float)
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    spread = np.ptp(x @ np.linalg.inv(box), axis=0)
    most = np.where(pbc, np.ceil(cutoff / heights + spread).astype(int) + 1, 0)
    parts = []
    for shift in itertools.product(*(range(-m, m + 1) for m in most)):
        vectors = x[None, :] + np.array(shift) @ box - x[:, None]
        near = np.linalg.norm(vectors, axis=-1) < cutoff
        if not any(shift):
            near &= ~np.eye(len(x), dtype=bool)
        i, j = np.nonzero(near)
        parts.append(np.column_stack([i, j, vectors[i, j]]))
    rows = np.concatenate(parts)
    return in_order(rows[:, 0], rows[:, 1], rows[:, 2:])


@pytest.mark.parametrize("pbc", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("cell", CELLS)
def test_against_brute_force(cell, pbc):
    box, n, cutoff = CELLS[cell]
    # Far outside the cell as well.
    x = np.random.default_rng(1).normal(0, 1.5, size=(n, 3))
    frames, cells = torch.tensor(x)[None], torch.tensor(box, dtype=torch.float64)[None]
    wanted = brute_force(x, box, cutoff, pbc)
    pairs = image_pairs(frames, cells, cutoff=cutoff, pbc=pbc, half=False)
    found = in_order(pairs.first, pairs.second, pairs.displacements(frames, cells))
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    # Every pair of the half list and its reverse make the full one.
    pairs = image_pairs(frames, cells, cutoff=cutoff, pbc=pbc)
    i, j, v = pairs.first, pairs.second, pairs.displacements(frames, cells)
    both = in_order(torch.cat([i, j]), torch.cat([j, i]), torch.cat([v, -v]))
    np.testing.assert_allclose(both, wanted, atol=1e-12)


def test_batches_open_systems_and_transforms():
    x = torch.tensor(np.random.default_rng(2).normal(0, 0.6, size=(3, 7, 3)))
    box = torch.eye(3, dtype=torch.float64).expand(3, 3, 3) * torch.tensor([0.7, 0.8, 0.9])
    for cells in (None, box):
        together = image_pairs(x, cells, cutoff=0.65)
        for f in range(3):
            alone = image_pairs(x[f : f + 1], None if cells is None else cells[:1], cutoff=0.65)
            of_frame = together.frame == f
            assert torch.equal(together.first[of_frame], alone.first)
            assert torch.equal(together.shifts[of_frame], alone.shifts)

    def energy(frames, cells):
        pairs = image_pairs(frames, cells, cutoff=0.65)
        r2 = pairs.displacements(frames, cells).square().sum(-1)
        values = torch.where(r2 < 0.65**2, (1 - r2 / 0.65**2) ** 3, 0.0)
        return values.new_zeros(len(frames)).index_add(0, pairs.frame, values)

    direct = energy(x, box)
    mapped = torch.func.vmap(lambda y, h: energy(y[None], h[None])[0])(x, box)
    torch.testing.assert_close(mapped, direct, rtol=1e-12, atol=0)
    torch.autograd.gradcheck(energy, (x.clone().requires_grad_(), box.clone().requires_grad_()))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]], "spans no volume"),
        ([[1e-6, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], "too thin"),
    ],
)
def test_refused(box, message):
    with pytest.raises(mdgraft.InvalidInputError, match=message):
        image_pairs(torch.zeros(1, 2, 3).double(), torch.tensor(box)[None].double(), cutoff=1.0)
    lost = torch.full((1, 2, 3), torch.nan).double()
    with pytest.raises(mdgraft.InvalidInputError, match="not finite"):
        image_pairs(lost, torch.eye(3)[None].double(), cutoff=1.0)
