"""Lists of tiles of particles within a cutoff, and the order that makes tiles compact.

Particles are sorted into columns along z, and each column is cut into clusters as long as a vector.
A tile is a group of `ROWS` particles with a cluster. Boxes are bricks whose periodic images are
shifted along x and y as the box is tilted; a tile names the image of its four particles.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.tiles import ROW_FIELDS, ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileList:
    """Tiles whose particles may be within a cutoff.

    Attributes
    ----------
    order
        ``(clusters * lanes,)`` particles in the order of clusters, -1 in lanes without one.
    wraps
        ``(N, 3)`` numbers of box vectors that were taken off each particle's position.
    images
        ``(shifts, 3)`` numbers of box vectors that each shift adds.
    rows, tiles, masks
        See `tiles._LoopEmitter`.
    """

    order: np.ndarray
    wraps: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    tiles: np.ndarray
    masks: np.ndarray
    lanes: int

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return len(self.order) // self.lanes


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """Pairs that do not interact: those of particle i are ``partners[starts[i]:starts[i + 1]]``."""

    starts: np.ndarray
    partners: np.ndarray

    @classmethod
    def of_pairs(cls, pairs: np.ndarray, n_particles: int) -> Exclusions:
        """From ``(exclusions, 2)`` indices."""
        both = np.concatenate([pairs, pairs[:, ::-1]]).reshape(-1, 2).astype(np.int64)
        both = both[np.lexsort((both[:, 1], both[:, 0]))]
        starts = np.searchsorted(both[:, 0], np.arange(n_particles + 1)).astype(np.int64)
        return cls(starts, np.ascontiguousarray(both[:, 1]))


def tile_list(
    positions: np.ndarray,
    box: np.ndarray | None,
    cutoff: float,
    exclusions: Exclusions,
    lanes: int,
) -> TileList:
    """Tiles of all pairs closer than a cutoff, each pair in one tile.

    Parameters
    ----------
    positions
        ``(N, 3)`` float64 [nm]; they may lie outside the box.
    box
        ``(3, 3)`` [nm] in reduced form, or None for an open system.
    cutoff
        [nm]; with a box, pairs of any number of images count.
    exclusions
        Pairs that tiles mask out, in every image.
    lanes
        Length of a cluster, a multiple of `ROWS`.
    """
    n = len(positions)
    if box is None:
        wrapped, wraps = positions, np.zeros((n, 3), dtype=np.int32)
        low = positions.min(axis=0) if n else np.zeros(3)
        size = (positions.max(axis=0) - low if n else np.ones(3)) + 1e-9
        cell, reach = np.diag(size), np.zeros(3, dtype=np.int64)
    else:
        cell = np.ascontiguousarray(box, dtype=np.float64)
        wrapped, wraps = _wrap(np.ascontiguousarray(positions), cell)
        low, size = np.zeros(3), np.diagonal(cell).copy()
        reach = _reach(cell, cutoff)
    images = np.stack(
        np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    n_columns = _columns(size, n, lanes)
    order, starts = _sort(wrapped, low, size, n_columns, lanes)
    rows, tiles, masks = _search(
        wrapped,
        cell,
        low,
        size,
        n_columns,
        order,
        starts,
        reach,
        float(cutoff),
        exclusions.starts,
        exclusions.partners,
        lanes,
        box is not None,
    )
    return TileList(
        order=order, wraps=wraps, images=images, rows=rows, tiles=tiles, masks=masks, lanes=lanes
    )


def _reach(cell: np.ndarray, cutoff: float) -> np.ndarray:
    """How many box vectors away an image can be and still have a neighbour in the box."""
    reach = np.zeros(3, dtype=np.int64)
    offset = np.zeros(3)
    for k in (2, 1, 0):
        # An image and a particle differ by less than one box, plus what longer vectors shift.
        reach[k] = int((cutoff + offset[k]) / cell[k, k]) + 1
        offset += reach[k] * np.abs(cell[k])
    return reach


def _columns(size: np.ndarray, n: int, lanes: int) -> tuple[int, int]:
    """Columns along x and y, about as wide as a cluster is high."""
    volume = float(np.prod(np.maximum(size, 1e-6)))
    width = (volume * lanes / max(n, 1)) ** (1 / 3)
    limit = int(np.sqrt(max(n, 1))) + 1
    return (
        int(min(max(size[0] / width, 1), limit)),
        int(min(max(size[1] / width, 1), limit)),
    )


@compiled
def _wrap(positions: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(positions)
    wrapped = np.empty_like(positions)
    wraps = np.empty((n, 3), dtype=np.int32)
    for i in range(n):
        x, y, z = positions[i, 0], positions[i, 1], positions[i, 2]
        c = np.floor(z / cell[2, 2])
        x, y, z = x - c * cell[2, 0], y - c * cell[2, 1], z - c * cell[2, 2]
        b = np.floor(y / cell[1, 1])
        x, y = x - b * cell[1, 0], y - b * cell[1, 1]
        a = np.floor(x / cell[0, 0])
        x = x - a * cell[0, 0]
        wrapped[i, 0], wrapped[i, 1], wrapped[i, 2] = x, y, z
        wraps[i, 0], wraps[i, 1], wraps[i, 2] = a, b, c
    return wrapped, wraps


@compiled
def _sort(
    wrapped: np.ndarray,
    low: np.ndarray,
    size: np.ndarray,
    n_columns: tuple[int, int],
    lanes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Order of particles, and the first cluster of each column."""
    n = len(wrapped)
    nx, ny = n_columns
    per_column = n // (nx * ny) + 1
    # Bins of about one particle; what is left to sort within them is little.
    nz = per_column
    key = np.empty(n, dtype=np.int64)
    count = np.zeros(nx * ny * nz + 1, dtype=np.int64)
    for i in range(n):
        x = min(int((wrapped[i, 0] - low[0]) / size[0] * nx), nx - 1)
        y = min(int((wrapped[i, 1] - low[1]) / size[1] * ny), ny - 1)
        z = min(int((wrapped[i, 2] - low[2]) / size[2] * nz), nz - 1)
        key[i] = (max(x, 0) * ny + max(y, 0)) * nz + max(z, 0)
        count[key[i] + 1] += 1
    for k in range(nx * ny * nz):
        count[k + 1] += count[k]
    place = count[:-1].copy()
    sorted_ = np.empty(n, dtype=np.int64)
    for i in range(n):
        sorted_[place[key[i]]] = i
        place[key[i]] += 1
    starts = np.zeros(nx * ny + 1, dtype=np.int64)
    for column in range(nx * ny):
        members = count[(column + 1) * nz] - count[column * nz]
        starts[column + 1] = starts[column] + (members + lanes - 1) // lanes
    order = np.full(starts[-1] * lanes, -1, dtype=np.int64)
    for column in range(nx * ny):
        for k in range(nz):
            begin, end = count[column * nz + k], count[column * nz + k + 1]
            for j in range(begin + 1, end):
                moving = sorted_[j]
                height = wrapped[moving, 2]
                m = j
                while m > begin and wrapped[sorted_[m - 1], 2] > height:
                    sorted_[m] = sorted_[m - 1]
                    m -= 1
                sorted_[m] = moving
        begin, end = count[column * nz], count[(column + 1) * nz]
        target = starts[column] * lanes
        for j in range(begin, end):
            order[target + j - begin] = sorted_[j]
    return order, starts


@compiled
def _bounds(wrapped: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Lowest and highest coordinates of each ``size`` particles in order, ``(n, 6)``."""
    n = len(order) // size
    bounds = np.empty((n, 6))
    for c in range(n):
        for k in range(3):
            bounds[c, k], bounds[c, 3 + k] = np.inf, -np.inf
        for j in range(c * size, (c + 1) * size):
            i = order[j]
            if i >= 0:
                for k in range(3):
                    bounds[c, k] = min(bounds[c, k], wrapped[i, k])
                    bounds[c, 3 + k] = max(bounds[c, 3 + k], wrapped[i, k])
    return bounds


@compiled
def _grown(array: np.ndarray, needed: int) -> np.ndarray:
    if needed <= len(array):
        return array
    larger = np.empty(max(needed, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def _close(
    place: np.ndarray,
    four: int,
    ox: float,
    oy: float,
    oz: float,
    cluster: int,
    lanes: int,
    squared: float,
) -> bool:
    """Whether any pair of a tile is within the cutoff; empty lanes lie at infinity."""
    for i in range(four * ROWS, (four + 1) * ROWS):
        x, y, z = place[0, i] + ox, place[1, i] + oy, place[2, i] + oz
        near = 0
        for j in range(cluster * lanes, (cluster + 1) * lanes):
            dx, dy, dz = place[0, j] - x, place[1, j] - y, place[2, j] - z
            near += dx * dx + dy * dy + dz * dz < squared
        if near:
            return True
    return False


@compiled
def _search(
    wrapped: np.ndarray,
    cell: np.ndarray,
    low: np.ndarray,
    size: np.ndarray,
    n_columns: tuple[int, int],
    order: np.ndarray,
    starts: np.ndarray,
    reach: np.ndarray,
    cutoff: float,
    excluded_starts: np.ndarray,
    excluded: np.ndarray,
    lanes: int,
    periodic: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    nx, ny = n_columns
    n_fours = len(order) // ROWS
    n_clusters = len(order) // lanes
    of_fours = _bounds(wrapped, order, ROWS)
    of_clusters = _bounds(wrapped, order, lanes)
    squared = cutoff * cutoff
    # Sorted places, and where each particle went.
    place = np.full((3, len(order)), np.inf)
    sorted_ = np.empty(len(wrapped), dtype=np.int64)
    for j in range(len(order)):
        if order[j] >= 0:
            sorted_[order[j]] = j
            for k in range(3):
                place[k, j] = wrapped[order[j], k]
    # One bit a pair; a whole cluster.
    whole = (np.int64(1) << np.int64(lanes)) - 1
    everything = np.int64(0)
    for i in range(ROWS):
        everything |= whole << np.int64(i * lanes)
    removed = np.zeros(n_clusters, dtype=np.int64)
    rows = np.empty(8 * ROW_FIELDS * (n_fours + 1), dtype=np.int64)
    tiles = np.empty(64 * (n_clusters + 1), dtype=np.int32)
    masks = np.empty(8 * (n_clusters + 1), dtype=np.int64)
    n_rows, n_tiles, n_masks = 0, 0, 0
    plain = np.empty(64, dtype=np.int32)
    wx, wy = size[0] / nx, size[1] / ny
    for four in range(n_fours):
        present = np.int64(0)
        for i in range(ROWS):
            if order[four * ROWS + i] >= 0:
                present |= whole << np.int64(i * lanes)
        if present == 0:
            continue
        box_low, box_high = of_fours[four, :3], of_fours[four, 3:]
        own = four * ROWS // lanes
        for i in range(ROWS):
            particle = order[four * ROWS + i]
            if particle >= 0:
                for k in range(excluded_starts[particle], excluded_starts[particle + 1]):
                    j = sorted_[excluded[k]]
                    removed[j // lanes] |= np.int64(1) << np.int64(i * lanes + j % lanes)
        # The four move by -n box vectors to meet the particles in the box.
        for c in range(-reach[2], reach[2] + 1):
            oz = c * cell[2, 2] if periodic else 0.0
            z_low, z_high = box_low[2] + oz - cutoff, box_high[2] + oz + cutoff
            if z_low > low[2] + size[2] or z_high < low[2]:
                continue
            for b in range(-reach[1], reach[1] + 1):
                oy = c * cell[2, 1] + b * cell[1, 1] if periodic else 0.0
                y_low, y_high = box_low[1] + oy - cutoff, box_high[1] + oy + cutoff
                if y_low > low[1] + size[1] or y_high < low[1]:
                    continue
                for a in range(-reach[0], reach[0] + 1):
                    ox = 0.0
                    if periodic:
                        ox = c * cell[2, 0] + b * cell[1, 0] + a * cell[0, 0]
                    x_low, x_high = box_low[0] + ox - cutoff, box_high[0] + ox + cutoff
                    if x_low > low[0] + size[0] or x_high < low[0]:
                        continue
                    begin, first_mask, n_plain = n_tiles, n_masks, 0
                    # One column more than needed: rounding may have put a particle beyond.
                    first_x = max(_column((x_low - low[0]) / wx, nx) - 1, 0)
                    last_x = min(_column((x_high - low[0]) / wx, nx) + 1, nx - 1)
                    first_y = max(_column((y_low - low[1]) / wy, ny) - 1, 0)
                    last_y = min(_column((y_high - low[1]) / wy, ny) + 1, ny - 1)
                    for column_x in range(first_x, last_x + 1):
                        for column_y in range(first_y, last_y + 1):
                            column = column_x * ny + column_y
                            first, last = starts[column], starts[column + 1]
                            if last <= own:
                                continue
                            # Clusters of a column are sorted by height.
                            lower, upper = max(first, own), last
                            while lower < upper:
                                middle = (lower + upper) // 2
                                if of_clusters[middle, 5] < z_low:
                                    lower = middle + 1
                                else:
                                    upper = middle
                            for cluster in range(lower, last):
                                if of_clusters[cluster, 2] > z_high:
                                    break
                                distance = 0.0
                                for k in range(3):
                                    o = ox if k == 0 else oy if k == 1 else oz
                                    gap = max(
                                        of_clusters[cluster, k] - box_high[k] - o,
                                        box_low[k] + o - of_clusters[cluster, 3 + k],
                                    )
                                    if gap > 0:
                                        distance += gap * gap
                                if distance >= squared:
                                    continue
                                if not _close(place, four, ox, oy, oz, cluster, lanes, squared):
                                    continue
                                mask = present & ~removed[cluster]
                                if cluster == own:
                                    # Each pair once: partners come later in the order.
                                    for i in range(ROWS):
                                        lane = four * ROWS + i - own * lanes
                                        before = (np.int64(2) << np.int64(lane)) - 1
                                        mask &= ~(before << np.int64(i * lanes))
                                if order[(cluster + 1) * lanes - 1] < 0:
                                    for lane in range(lanes):
                                        if order[cluster * lanes + lane] < 0:
                                            for i in range(ROWS):
                                                mask &= ~(np.int64(1) << np.int64(i * lanes + lane))
                                if mask == everything:
                                    plain = _grown(plain, n_plain + 1)
                                    plain[n_plain] = cluster
                                    n_plain += 1
                                elif mask != 0:
                                    tiles = _grown(tiles, n_tiles + 1)
                                    masks = _grown(masks, n_masks + 1)
                                    tiles[n_tiles] = cluster
                                    masks[n_masks] = mask
                                    n_tiles += 1
                                    n_masks += 1
                    if n_tiles == begin and n_plain == 0:
                        continue
                    middle = n_tiles
                    tiles = _grown(tiles, n_tiles + n_plain)
                    tiles[n_tiles : n_tiles + n_plain] = plain[:n_plain]
                    n_tiles += n_plain
                    rows = _grown(rows, (n_rows + 1) * ROW_FIELDS)
                    row = rows[n_rows * ROW_FIELDS : (n_rows + 1) * ROW_FIELDS]
                    row[0] = four
                    row[1] = (
                        ((a + reach[0]) * (2 * reach[1] + 1) + b + reach[1]) * (2 * reach[2] + 1)
                        + c
                        + reach[2]
                    )
                    row[2], row[3], row[4], row[5] = begin, middle, n_tiles, first_mask
                    n_rows += 1
        for i in range(ROWS):
            particle = order[four * ROWS + i]
            if particle >= 0:
                for k in range(excluded_starts[particle], excluded_starts[particle + 1]):
                    removed[sorted_[excluded[k]] // lanes] = 0
    return (
        rows[: n_rows * ROW_FIELDS].copy().reshape(-1, ROW_FIELDS),
        tiles[:n_tiles].copy(),
        masks[:n_masks].copy(),
    )


@compiled
def _column(place: float, n: int) -> int:
    """The column that a coordinate in units of columns lies in, within range."""
    return int(min(max(np.floor(place), 0.0), n - 1.0))
