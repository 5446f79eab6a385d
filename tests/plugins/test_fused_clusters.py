"""Every pair once: tiles and half lists against all pairs of all images."""

import dataclasses
import itertools

import numpy as np
import pytest
from mdgraft.kernels.fused import clusters
from mdgraft.kernels.fused import half_list as module
from mdgraft.kernels.fused.clusters import Exclusions, tile_list
from mdgraft.kernels.fused.half_list import half_list
from mdgraft.kernels.fused.tiles import ROWS
from mdgraft.kernels.pairs import close_pairs

LANES = (4, 8, 16)


@dataclasses.dataclass
class Case:
    positions: np.ndarray
    box: np.ndarray | None
    cutoff: float
    exclusions: np.ndarray
    lanes: int


def random_box(rng):
    """Cubic, orthorhombic, flat, elongated; straight or tilted, as far as reduced boxes go."""
    size = [
        np.full(3, rng.uniform(0.5, 4)),
        rng.uniform(0.5, 4, 3),
        rng.uniform(0.5, 4, 3) * rng.permutation([1, 1, 0.1]),
        rng.uniform(0.5, 2, 3) * rng.permutation([1, 1, 10]),
    ][rng.integers(4)]
    box = np.diag(size)
    tilt = [0.0, 0.5, -0.5, *rng.uniform(-0.5, 0.5, 4)]
    for row, column in ((1, 0), (2, 0), (2, 1)):
        box[row, column] = rng.choice(tilt) * size[column]
    return box


def random_fractions(rng, n):
    kind = rng.integers(8)
    if kind == 0:
        return rng.choice([0.0, 0.25, 0.5, 1.0, -1.0, np.nextafter(1, 0), -1e-17], (n, 3))
    if kind == 1:
        return rng.integers(0, 5, (n, 3)) / 5
    if kind == 2:
        return 1e-3 * rng.random((n, 3))
    if kind == 3:
        return np.repeat(rng.random((1, 3)), n, axis=0)
    if kind == 4:
        return rng.random((n, 3)) * rng.permutation([1.0, 1.0, 0.0])
    if kind == 5:
        return 0.5 + 0.05 * rng.normal(size=(n, 3)) * rng.choice([1, 1, 10], (n, 1))
    return rng.random((n, 3))


def random_exclusions(rng, n):
    if n < 2 or rng.random() < 0.3:
        return np.empty((0, 2), dtype=int)
    every = np.array(list(itertools.combinations(range(n), 2)))
    if rng.random() < 0.1:
        return every
    chosen = every[rng.integers(0, len(every), rng.integers(1, 3 * n))]
    return np.where(rng.random((len(chosen), 1)) < 0.5, chosen, chosen[:, ::-1])


def random_case(rng):
    n = int(rng.choice([0, 1, 2, 3, *rng.integers(4, 40, 6), *rng.integers(40, 200, 3)]))
    positions, box = random_fractions(rng, n), None
    if rng.random() < 0.7:
        box = random_box(rng)
        cutoff = rng.choice([0.5, 0.5, rng.uniform(0.02, 0.5)]) * np.diagonal(box).min()
        # With a skin.
        cutoff *= rng.choice([1.0, 1.0, 1.1])
        far = rng.choice([0, 1, 3, 100_000])
        positions = (positions + rng.integers(-far, far + 1, (n, 3))) @ box
    else:
        positions = positions * rng.uniform(0.1, 10, 3)
        cutoff = rng.choice([np.inf, 0.3, 1.0, rng.uniform(0.05, 12)])
        if n and rng.random() < 0.3:
            positions[rng.integers(n, size=2)] += rng.choice([1e3, 1e6]) * rng.normal(size=3)
    return Case(positions, box, float(cutoff), random_exclusions(rng, n), int(rng.choice(LANES)))


def build(case, **options):
    exclusions = Exclusions.of_pairs(case.exclusions, len(case.positions))
    return tile_list(case.positions, case.box, case.cutoff, exclusions, case.lanes, **options)


def pairs_of_tiles(tiles):
    """Pairs and the numbers of box vectors that the first of each moves by, ``(pairs, 5)``."""
    lanes = tiles.lanes
    four, shift, begin, middle, end, first_mask = tiles.rows.T
    count = end - begin
    row = np.repeat(np.arange(len(four)), count)
    # Rows cover the list without gaps.
    np.testing.assert_array_equal(begin, np.concatenate([[0], end])[:-1])
    tile = np.arange(len(row))
    masked = tile < middle[row]
    places = (first_mask[row] + tile - begin[row])[masked]
    np.testing.assert_array_equal(places, np.arange(len(tiles.masks)))
    bits = np.arange(ROWS * lanes)
    allowed = np.ones((len(tile), ROWS * lanes), dtype=bool)
    allowed[masked] = (tiles.masks[:, None] >> bits) & 1
    which, bit = np.nonzero(allowed)
    first = tiles.order[four[row[which]] * ROWS + bit // lanes]
    second = tiles.order[tiles.tiles[which].astype(int) * lanes + bit % lanes]
    assert first.min(initial=0) >= 0
    assert second.min(initial=0) >= 0
    moves = tiles.images[shift[row[which]]] - tiles.wraps[first] + tiles.wraps[second]
    return np.column_stack([first, second, np.clip(moves, -1e9, 1e9).astype(int)])


def pairs_of_all_images(case):
    first, second = np.triu_indices(len(case.positions), 1)
    if case.box is None:
        return np.column_stack([first, second, np.zeros((len(first), 3), dtype=int)])
    nearest = np.linalg.inv(case.box)
    nearest = -np.rint((case.positions[first] - case.positions[second]) @ nearest).astype(int)
    steps = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=3)))
    moves = (nearest[:, None] + steps).reshape(-1, 3)
    return np.column_stack([np.repeat(first, len(steps)), np.repeat(second, len(steps)), moves])


def within(case, pairs, cutoff):
    vectors = case.positions[pairs[:, 0]] - case.positions[pairs[:, 1]]
    if case.box is not None:
        vectors = vectors + pairs[:, 2:] @ case.box
    return pairs[np.linalg.norm(vectors, axis=1) < cutoff]


def about(cutoff):
    """A bit less and a bit more: where rounding may decide."""
    return cutoff * (1 - 1e-8) - 1e-9, cutoff * (1 + 1e-8) + 1e-9


def check(case):
    excluded = {tuple(sorted(pair)) for pair in case.exclusions.tolist()}

    def ordered(pairs):
        turned = np.column_stack([pairs[:, 1::-1], -pairs[:, 2:]])
        return np.where(pairs[:, :1] < pairs[:, 1:2], pairs, turned)

    close, far = about(case.cutoff)
    listed = [
        tuple(pair) for pair in ordered(within(case, pairs_of_tiles(build(case)), far)).tolist()
    ]
    assert len(set(listed)) == len(listed)
    every = within(case, pairs_of_all_images(case), far)
    wanted, most = (
        {tuple(p) for p in within(case, every, limit).tolist() if tuple(p[:2]) not in excluded}
        for limit in (close, far)
    )
    assert wanted <= set(listed) <= most


@pytest.mark.parametrize("seed", range(6))
def test_tiles_hold_every_pair_once(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        check(random_case(rng))


@pytest.mark.parametrize("lanes", LANES)
def test_lists_do_not_depend_on_the_number_of_threads(lanes, monkeypatch):
    rng = np.random.default_rng(lanes)
    box = random_box(rng)
    positions = rng.random((500, 3)) @ box
    case = Case(positions, box, 0.5 * np.diagonal(box).min(), random_exclusions(rng, 500), lanes)
    one = build(case)
    monkeypatch.setattr(clusters, "_GROUPS_PER_THREAD", 1)
    for n_threads in (2, 5):
        several = build(case, n_threads=n_threads)
        for field in ("order", "wraps", "images", "rows", "tiles", "masks"):
            np.testing.assert_array_equal(getattr(one, field), getattr(several, field))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("periodic", [True, False])
def test_a_dense_drop_with_vapour_far_away(lanes, periodic):
    """Lists stay short although a grid over everything would put the drop into one column."""
    rng = np.random.default_rng(5)
    drop = rng.random((4000, 3)) * 4
    vapour = 200 * rng.random((30, 3))
    box = 200 * np.eye(3) if periodic else None
    none = np.empty((0, 2), dtype=int)
    case = Case(np.concatenate([drop, vapour]), box, 0.5, none, lanes)
    n_pairs = 4000 * 62.5 * 4 / 3 * np.pi * 0.5**3 / 2
    assert len(build(case).tiles) * ROWS * lanes < 12 * n_pairs


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [1e30, 1e200])
@pytest.mark.parametrize("n", [3, 200])
@pytest.mark.parametrize("periodic", [True, False])
def test_a_particle_that_was_lost(n, far, periodic):
    positions = np.random.default_rng(2).random((n, 3))
    positions[1] = [far, -far, 0.3]
    box = 2 * np.eye(3) if periodic else None
    others = np.delete(positions, 1, axis=0)
    distances = np.linalg.norm(others[:, None] - others, axis=-1)[np.triu_indices(n - 1, 1)]
    tiles = build(Case(positions, box, 0.9, np.empty((0, 2), dtype=int), 8))
    pairs = pairs_of_tiles(tiles)
    pairs = pairs[(pairs[:, :2] != 1).all(axis=1)]
    listed = np.linalg.norm(positions[pairs[:, 0]] - positions[pairs[:, 1]], axis=1) < 0.9
    assert listed.sum() >= (distances < 0.9).sum()


# Half lists -----------------------------------------------------------------------------------


def check_half_list(case):
    cutoff = case.cutoff
    if case.box is not None:
        cutoff = min(cutoff, 0.5 * np.diagonal(case.box).min())
    i, j = half_list(case.positions, case.box, cutoff)
    assert i.dtype == j.dtype == np.int64
    pairs = set(zip(np.minimum(i, j).tolist(), np.maximum(i, j).tolist(), strict=True))
    assert len(pairs) == len(i)
    every = pairs_of_all_images(case)
    fewest, most = (
        {tuple(p) for p in within(case, every, limit)[:, :2].tolist()} for limit in about(cutoff)
    )
    assert fewest <= pairs <= most


@pytest.mark.parametrize("few", [0, 1000])
def test_half_lists_hold_every_pair_once(few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    rng = np.random.default_rng(7)
    for _ in range(100):
        check_half_list(random_case(rng))


def test_half_lists_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(module, "_PER_THREAD", 1)
    rng = np.random.default_rng(7)
    positions, box = 5 * rng.random((700, 3)), np.diag([4.0, 5.0, 3.0])
    one = half_list(positions, box, 1.1)
    for n_threads in (2, 7):
        for a, b in zip(one, half_list(positions, box, 1.1, n_threads=n_threads), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("box", [None, np.diag([2.0, 5.0, 5.0]), 9 * np.eye(3)])
def test_half_lists_leave_out_the_cutoff_itself(box, few, monkeypatch):
    monkeypatch.setattr(module, "_FEW", few)
    for distance, n_pairs in ((1.0, 0), (np.nextafter(1, 0), 1)):
        positions = np.array([[0, 1, 1], [distance, 1, 1]])
        i, _ = half_list(positions, box, 1.0)
        assert len(i) == n_pairs


@pytest.mark.parametrize("n", [2, 500])
def test_a_box_that_is_too_small_by_rounding(n):
    """Two images of one pair are within the cutoff, and one counts."""
    positions = np.random.default_rng(3).random((n, 3)) * [1, 2, 2]
    positions[:2] = [[0, 0, 0], [1 - 2e-7, 0, 0]]
    i, j = close_pairs(positions, (2 - 4e-7) * np.eye(3), 1.0)
    pairs = list(zip(np.minimum(i, j).tolist(), np.maximum(i, j).tolist(), strict=True))
    assert (0, 1) in pairs
    assert len(set(pairs)) == len(pairs)
