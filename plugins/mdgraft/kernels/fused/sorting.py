"""Particles sorted into columns along z, each column by height and cut into clusters.

Columns at the border of the grid reach to infinity, so that a few particles far away do not stretch
the grid, and a particle's column never decreases as its coordinate grows, whatever is rounded.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mdgraft.kernels.fused.spreading import compiled

#: Bins with more particles are sorted by a method that suits many.
_MANY = 32
#: Particles that look for neighbours together.
GROUP = 32
#: Particles that distances are taken to together, at least.
BLOCK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Columns along z and bins of height within them.

    Attributes
    ----------
    low
        ``(3,)`` where columns and bins begin [nm].
    inverse
        ``(3,)`` columns and bins per length [1/nm].
    numbers
        ``(3,)`` columns along x and y, and bins along z.
    """

    low: np.ndarray
    inverse: np.ndarray
    numbers: np.ndarray


def make_grid(
    positions: np.ndarray, low: np.ndarray, high: np.ndarray, group: float, width: float = 0.0
) -> Grid:
    """A grid for particles that may fill space unevenly.

    Parameters
    ----------
    positions
        ``(N, 3)`` float64 [nm], finite.
    low, high
        Of their `extent`.
    group
        How many particles lie in a piece of a column as high as it is wide.
    width
        Of columns at least [nm].
    """
    n = len(positions)
    if n == 0:
        return Grid(low=np.zeros(3), inverse=np.ones(3), numbers=np.ones(3, dtype=np.int64))
    if n >= 64:
        # Most particles of a sample, and some room for the rest.
        sample = positions[:: n // 1024 + 1]
        k = len(sample) // 20
        parted = np.partition(sample, (k, len(sample) - 1 - k), axis=0)
        inner_low, inner_high = parted[k], parted[-1 - k]
        room = 0.25 * (inner_high - inner_low) + width
        low, high = np.maximum(low, inner_low - room), np.minimum(high, inner_high + room)
    # Further away than that squares overflow.
    low, high = np.clip(low, -1e90, 1e90), np.clip(high, -1e90, 1e90)
    size = np.maximum(high - low, 1e-6 * max(1.0, float(np.max(high - low))))
    volume, area = float(np.prod(size)), float(size[0] * size[1])
    for _ in range(4):
        edge = (volume * group / n) ** (1 / 3)
        cells = np.clip(size / edge, 1, 4 * n ** (1 / 3) + 4).astype(np.int64)
        occupied = _occupied(positions, low, cells / size, cells)
        rest = occupied / float(np.prod(cells))
        volume *= rest
        # Full as far as one can tell from cells of that many particles.
        if rest > 0.5:
            break
    # A column that holds less than one group would be mostly padding.
    edge = max((volume * group / n) ** (1 / 3), width)
    n_columns = np.clip(size[:2] / edge, 1, 2 * n**0.5 + 1).astype(np.int64)
    most = max(1.0, 2 * n / group)
    if np.prod(n_columns) > most:
        n_columns = np.maximum(n_columns * (most / np.prod(n_columns)) ** 0.5, 1).astype(np.int64)
    # Bins of about one particle; what is left to sort within them is little.
    height = volume / n / (area / np.prod(n_columns))
    bins = min(max(size[2] / height, 1), 4 * n / np.prod(n_columns) + 1)
    numbers = np.array([*n_columns, int(bins)], dtype=np.int64)
    return Grid(low=low, inverse=numbers / size, numbers=numbers)


@compiled
def extent(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates, zero without particles."""
    low, high = np.zeros(3), np.zeros(3)
    for k in range(3):
        if len(positions):
            low[k] = high[k] = positions[0, k]
        for i in range(1, len(positions)):
            low[k] = min(low[k], positions[i, k])
            high[k] = max(high[k], positions[i, k])
    return low, high


@compiled
def place_on_axis(x: float, low: float, inverse: float, n: int) -> int:
    """The column or bin of a coordinate."""
    place = (x - low) * inverse
    # In this order, so that not a number goes somewhere too.
    return 0 if not place > 0 else n - 1 if place >= n else int(place)


@compiled
def _occupied(
    positions: np.ndarray, low: np.ndarray, inverse: np.ndarray, numbers: np.ndarray
) -> int:
    """How many cells of a grid have particles."""
    seen = np.zeros(numbers[0] * numbers[1] * numbers[2], dtype=np.uint8)
    for i in range(len(positions)):
        cell = 0
        for k in range(3):
            cell *= numbers[k]
            cell += place_on_axis(positions[i, k], low[k], inverse[k], numbers[k])
        seen[cell] = 1
    n = 0
    for cell in range(len(seen)):
        n += seen[cell]
    return n


@compiled
def wrap(positions: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the brick, and the numbers of box vectors that were taken off."""
    n = len(positions)
    wrapped = np.empty((n, 3))
    wraps = np.empty((n, 3))
    for i in range(n):
        x, y, z = positions[i, 0], positions[i, 1], positions[i, 2]
        c = np.floor(z / cell[2, 2])
        x, y, z = x - c * cell[2, 0], y - c * cell[2, 1], z - c * cell[2, 2]
        # Whole rows: what lies above the diagonal is small, not always zero.
        b = np.floor(y / cell[1, 1])
        x, y, z = x - b * cell[1, 0], y - b * cell[1, 1], z - b * cell[1, 2]
        a = np.floor(x / cell[0, 0])
        x, y, z = x - a * cell[0, 0], y - a * cell[0, 1], z - a * cell[0, 2]
        wrapped[i, 0], wrapped[i, 1], wrapped[i, 2] = x, y, z
        wraps[i, 0], wraps[i, 1], wraps[i, 2] = a, b, c
    return wrapped, wraps


@compiled
def sort(
    positions: np.ndarray, low: np.ndarray, inverse: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Particles column after column, those of a column by height, and where each column begins."""
    n = len(positions)
    nx, ny, nz = numbers[0], numbers[1], numbers[2]
    key = np.empty(n, dtype=np.int32)
    count = np.zeros(nx * ny * nz + 1, dtype=np.int32)
    for i in range(n):
        x = place_on_axis(positions[i, 0], low[0], inverse[0], nx)
        y = place_on_axis(positions[i, 1], low[1], inverse[1], ny)
        z = place_on_axis(positions[i, 2], low[2], inverse[2], nz)
        key[i] = (x * ny + y) * nz + z
        count[key[i] + 1] += 1
    for k in range(nx * ny * nz):
        count[k + 1] += count[k]
    place = count[:-1].copy()
    order = np.empty(n, dtype=np.int64)
    height = np.empty(n)
    for i in range(n):
        j = place[key[i]]
        order[j], height[j] = i, positions[i, 2]
        place[key[i]] += 1
    for k in range(nx * ny * nz):
        begin, end = count[k], count[k + 1]
        if end - begin > _MANY:
            by_height = np.argsort(height[begin:end])
            order[begin:end] = order[begin:end][by_height]
            continue
        for j in range(begin + 1, end):
            moving, z = order[j], height[j]
            m = j
            while m > begin and height[m - 1] > z:
                order[m], height[m] = order[m - 1], height[m - 1]
                m -= 1
            order[m], height[m] = moving, z
    starts = np.empty(nx * ny + 1, dtype=np.int64)
    for column in range(nx * ny + 1):
        starts[column] = count[column * nz]
    return order, starts


@compiled
def clusters_of(
    positions: np.ndarray,
    sorted_: np.ndarray,
    starts: np.ndarray,
    lanes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut columns into clusters.

    Parameters
    ----------
    positions
        ``(N, 3)`` [nm].
    sorted_, starts
        See `sort`.

    Returns
    -------
    order
        ``(clusters * lanes,)`` particles, -1 in lanes without one.
    lane_of
        ``(N,)`` where each particle is in ``order``.
    firsts
        ``(columns + 1,)`` first cluster of each column.
    groups
        ``(groups + 1,)`` first cluster of each group, whose clusters belong to one column.
    places
        ``(blocks, 3, lanes)`` positions, in blocks of one cluster or more; empty lanes lie at
        infinity.
    bounds, of_columns
        ``(clusters, 6)``, ``(columns, 6)`` lowest and highest coordinates.
    """
    n_columns = len(starts) - 1
    firsts = np.zeros(n_columns + 1, dtype=np.int64)
    for column in range(n_columns):
        members = starts[column + 1] - starts[column]
        firsts[column + 1] = firsts[column] + (members + lanes - 1) // lanes
    n_clusters = firsts[n_columns]
    groups = np.empty(n_clusters + 1, dtype=np.int64)
    n_groups = 0
    for column in range(n_columns):
        for cluster in range(firsts[column], firsts[column + 1], max(GROUP // lanes, 1)):
            groups[n_groups] = cluster
            n_groups += 1
    groups[n_groups] = n_clusters
    order = np.full(n_clusters * lanes, -1, dtype=np.int64)
    lane_of = np.empty(len(positions), dtype=np.int64)
    block = max(lanes, BLOCK)
    places = np.full(((n_clusters * lanes + block - 1) // block, 3, block), np.inf)
    bounds = np.empty((n_clusters, 6))
    of_columns = np.empty((n_columns, 6))
    for column in range(n_columns):
        for k in range(3):
            of_columns[column, k], of_columns[column, 3 + k] = np.inf, -np.inf
        for cluster in range(firsts[column], firsts[column + 1]):
            begin = starts[column] + (cluster - firsts[column]) * lanes
            n = min(lanes, starts[column + 1] - begin)
            for lane in range(n):
                order[cluster * lanes + lane] = sorted_[begin + lane]
                lane_of[sorted_[begin + lane]] = cluster * lanes + lane
            for k in range(3):
                lowest, highest = np.inf, -np.inf
                for lane in range(n):
                    x = positions[sorted_[begin + lane], k]
                    j = cluster * lanes + lane
                    places[j // block, k, j % block] = x
                    lowest, highest = min(lowest, x), max(highest, x)
                bounds[cluster, k], bounds[cluster, 3 + k] = lowest, highest
                of_columns[column, k] = min(of_columns[column, k], lowest)
                of_columns[column, 3 + k] = max(of_columns[column, 3 + k], highest)
    return order, lane_of, firsts, groups[: n_groups + 1], places, bounds, of_columns


def images(cell: np.ndarray, cutoff: float) -> np.ndarray:
    """Numbers of box vectors ``(shifts, 3)`` that may bring a particle close to the brick."""
    reach = np.zeros(3, dtype=np.int64)
    offset = np.zeros(3)
    for k in (2, 1, 0):
        # An image and a particle differ by less than one box, plus what longer vectors shift.
        reach[k] = int((cutoff + offset[k]) / cell[k, k]) + 1
        offset += reach[k] * np.abs(cell[k])
    every = np.indices(tuple((2 * reach + 1).tolist())).reshape(3, -1).T
    shifts: np.ndarray = every - reach.astype(float)
    return shifts
