"""Cluster lists for GPUs, made by torch operations: every pair is there, from both sides."""

import itertools

import numpy as np
import pytest
import torch
from mdgraft.kernels.device.clusters import SIZE, cluster_list

CUBIC = np.diag([2.0, 2.0, 2.0])
BRICK = np.diag([1.7, 2.9, 4.1])
TRICLINIC = np.array([[2.0, 0, 0], [0.9, 2.1, 0], [-0.8, 1.0, 2.3]])
#: Not in reduced form, and left-handed.
GENERAL = np.array([[0.1, 2.2, -0.2], [2.0, 0.5, 0.3], [-0.6, 0.7, 2.4]])

#: Box, number of particles, cutoff, and how many boxes wide the cloud is.
SYSTEMS = {
    "open": (None, 70, 0.5, 1.0),
    "open, few": (None, 3, 0.5, 1.0),
    "open, all": (None, 37, np.inf, 1.0),
    "cubic": (CUBIC, 64, 0.7, 1.0),
    "brick": (BRICK, 150, 0.6, 1.0),
    "triclinic": (TRICLINIC, 90, 0.8, 1.0),
    "general": (GENERAL, 40, 0.6, 1.0),
    "outside the box": (TRICLINIC, 50, 0.8, 7.0),
    "smaller than the cutoff": (0.5 * TRICLINIC, 20, 1.4, 1.0),
    "two": (CUBIC, 2, 0.9, 1.0),
    "large": (2 * CUBIC, 300, 0.4, 1.0),
}


def configuration(box, n, width, n_frames):
    rng = np.random.default_rng(n)
    fractional = width * (rng.uniform(size=(n_frames, n, 3)) - 0.3)
    x = torch.tensor(fractional @ (2.0 * np.eye(3) if box is None else box))
    if box is None:
        return x, None
    scale = torch.linspace(1, 1.05, n_frames, dtype=torch.float64)[:, None, None]
    return x * scale, torch.tensor(box) * scale


def brute_force(x, box, cutoff):
    """Ordered pairs with the image of the second, as ``{(i, j, image): squared distance}``."""
    images = [(0, 0, 0)]
    if box is not None:
        width = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
        # Particles may be several boxes apart.
        far = np.ptp(x @ np.linalg.inv(box), axis=0)
        most = np.ceil(cutoff / width + far).astype(int)
        images = list(itertools.product(*(range(-m, m + 1) for m in most)))
    found = {}
    for image in images:
        move = 0 if box is None else np.array(image) @ box
        vectors = x[None] + move - x[:, None]
        squares = (vectors**2).sum(-1)
        for i, j in np.argwhere(squares < cutoff**2):
            if i != j or any(image):
                found[int(i), int(j), image] = squares[i, j]
    return found


def listed(clusters, f):
    """Unmasked pairs of a frame with the image of the second and their vector."""
    n = clusters.wraps.shape[1]
    order = clusters.order[f].tolist()
    wraps = clusters.wraps[f].long().tolist()
    images = clusters.images.long().tolist()
    pairs = []
    for c in range(clusters.n_clusters):
        row = f * clusters.n_clusters + c
        for segment in range(int(clusters.rows[row]), int(clusters.rows[row + 1])):
            image = images[int(clusters.image[segment])]
            tiles = range(int(clusters.segments[segment]), int(clusters.segments[segment + 1]))
            for tile in tiles:
                column = int(clusters.columns[tile]) - f * clusters.n_clusters
                mask = clusters.masks[int(clusters.mask[tile])].tolist()
                for a, b in itertools.product(range(SIZE), range(SIZE)):
                    i, j = order[c * SIZE + a], order[column * SIZE + b]
                    if i < n and j < n and not mask[a] >> b & 1:
                        whole = tuple(
                            m - wj + wi for m, wj, wi in zip(image, wraps[j], wraps[i], strict=True)
                        )
                        place = (tile, c * SIZE + a, column * SIZE + b)
                        pairs.append((i, j, whole, place))
    return pairs


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("n_frames", [1, 3])
def test_every_pair_once_from_either_side(name, n_frames):
    box, n, cutoff, width = SYSTEMS[name]
    if n_frames > 1 and n > 60:
        n = 60
    x, cell = configuration(box, n, width, n_frames)
    rng = np.random.default_rng(1)
    excluded = rng.integers(n, size=(n // 3, 2))
    excluded = excluded[excluded[:, 0] != excluded[:, 1]]
    exclusions = torch.tensor(np.concatenate([excluded, excluded[:2], excluded[:2, ::-1]]))
    clusters = cluster_list(x, cell, cutoff, exclusions, torch.float64)
    skipped = {tuple(p) for p in excluded} | {tuple(p[::-1]) for p in excluded}
    base = torch.cat([clusters.base, torch.zeros(n_frames, 1, 3)], dim=1)
    for f in range(n_frames):
        expected = brute_force(x[f].numpy(), None if cell is None else cell[f].numpy(), cutoff)
        # A particle never interacts with images of itself: boxes are two cutoffs wide.
        expected = {k for k in expected if k[:2] not in skipped and k[0] != k[1]}
        pairs = listed(clusters, f)
        found = [pair[:3] for pair in pairs]
        assert len(set(found)) == len(found)
        assert expected <= set(found)
        assert not {pair[:2] for pair in found} & skipped
        # Vectors as programs have them, from places within clusters and offsets.
        for i, j, image, (tile, row, column) in pairs[:: max(1, len(pairs) // 200)]:
            vector = (x[f, j] - base[f, column]) + clusters.offsets[tile] - (x[f, i] - base[f, row])
            move = 0 if cell is None else torch.tensor(image).double() @ cell[f]
            torch.testing.assert_close(vector, x[f, j] + move - x[f, i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["open", "cubic", "triclinic", "outside the box"])
def test_places_are_those_of_the_order(name):
    box, n, cutoff, width = SYSTEMS[name]
    x, cell = configuration(box, n, width, 2)
    none = torch.empty(0, 2, dtype=torch.long)
    clusters = cluster_list(x, cell, cutoff, none, torch.float32)
    particles = torch.arange(n).expand(2, n)
    assert torch.equal(torch.gather(clusters.order, 1, clusters.places), particles)
    assert clusters.offsets.dtype == torch.float32


def test_lost_particles_are_near_nobody():
    x, cell = configuration(CUBIC, 60, 1.0, 2)
    x[1, 7, 2], x[1, 40] = torch.nan, torch.inf
    none = torch.empty(0, 2, dtype=torch.long)
    clusters = cluster_list(x, cell, 0.7, none, torch.float64)
    # Their vectors are not numbers; all others have the neighbours that they have without.
    kept = [k for k in range(60) if k not in (7, 40)]
    alone = cluster_list(x[1:, kept], cell[1:], 0.7, none, torch.float64)
    expected = {(kept[i], kept[j], image) for i, j, image, _ in listed(alone, 0)}
    near = brute_force(x[1, kept].numpy(), cell[1].numpy(), 0.7)
    expected = {(kept[i], kept[j], image) for i, j, image in near} & expected
    assert expected <= {pair[:3] for pair in listed(clusters, 1)}


def test_clusters_are_compact():
    """Tiles hold not many more pairs than needed, or the kernel is slow."""
    rng = np.random.default_rng(0)
    n, length = 8000, 4.3
    x = torch.tensor(rng.uniform(0, length, size=(1, n, 3)))
    box = length * torch.eye(3).double()[None]
    none = torch.empty(0, 2, dtype=torch.long)
    clusters = cluster_list(x, box, 1.0, none, torch.float32)
    needed = 4 / 3 * np.pi * n / length**3
    computed = len(clusters.columns) * SIZE**2 / n
    assert computed < 4.5 * needed


def test_more_clusters_than_one_level_of_groups_is_for():
    """A long rod, whose clusters number more than 4096."""
    rng = np.random.default_rng(3)
    n = 66_000
    x = torch.tensor(rng.uniform(size=(1, n, 3)) * [0.6, 0.6, 2000.0])
    none = torch.empty(0, 2, dtype=torch.long)
    clusters = cluster_list(x, None, 0.05, none, torch.float32)
    assert clusters.n_clusters > 4096
    some = torch.argsort(x[0, :, 2])[:400]
    expected = brute_force(x[0, some].numpy(), None, 0.05)
    rows = clusters.places[0] // SIZE
    tiles = torch.diff(clusters.segments)
    row = torch.repeat_interleave(
        torch.arange(clusters.n_clusters), torch.diff(clusters.rows.long())
    )
    near = set(
        zip(
            torch.repeat_interleave(row, tiles).tolist(),
            clusters.columns.tolist(),
            strict=True,
        )
    )
    assert expected
    for i, j, _ in expected:
        assert (int(rows[some[i]]), int(rows[some[j]])) in near
