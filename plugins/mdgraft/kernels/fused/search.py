"""Which clusters of particles are close to which, in a compiled loop."""

from __future__ import annotations

import numpy as np

from mdgraft.kernels.fused.sorting import BLOCK, place_on_axis
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.tiles import ROW_FIELDS, ROWS


@compiled
def gap(low: float, high: float, other_low: float, other_high: float) -> float:
    """Distance of two intervals."""
    return max(max(other_low - high, low - other_high), 0.0)


@compiled
def _candidates(
    own: int,
    low: np.ndarray,
    high: np.ndarray,
    squared: float,
    grid_low: np.ndarray,
    inverse: np.ndarray,
    numbers: np.ndarray,
    firsts: np.ndarray,
    bounds: np.ndarray,
    of_columns: np.ndarray,
    home: int,
    per_block: int,
    found: np.ndarray,
) -> int:
    """Blocks of clusters, not before one's own, that a brick may have neighbours in."""
    nx, ny = numbers[0], numbers[1]
    cutoff = np.sqrt(squared)
    first_x = max(place_on_axis(low[0] - cutoff, grid_low[0], inverse[0], nx), home // ny)
    last_x = place_on_axis(high[0] + cutoff, grid_low[0], inverse[0], nx)
    first_y = place_on_axis(low[1] - cutoff, grid_low[1], inverse[1], ny)
    last_y = place_on_axis(high[1] + cutoff, grid_low[1], inverse[1], ny)
    n = 0
    for x in range(first_x, last_x + 1):
        for column in range(max(x * ny + first_y, home), x * ny + last_y + 1):
            rest = squared
            for k in range(2):
                rest -= gap(low[k], high[k], of_columns[column, k], of_columns[column, 3 + k]) ** 2
            # An empty column is infinitely far away.
            if not rest > 0:
                continue
            reach = np.sqrt(rest)
            lowest, highest = low[2] - reach, high[2] + reach
            # Clusters of a column are sorted by height.
            begin, end = max(firsts[column], own), firsts[column + 1]
            lower, upper = begin, end
            while lower < upper:
                middle = (lower + upper) // 2
                if bounds[middle, 5] < lowest:
                    lower = middle + 1
                else:
                    upper = middle
            for cluster in range(lower, end):
                if bounds[cluster, 2] > highest:
                    break
                distance = 0.0
                for k in range(3):
                    distance += (
                        gap(low[k], high[k], bounds[cluster, k], bounds[cluster, 3 + k]) ** 2
                    )
                if distance < squared and (n == 0 or found[n - 1] != cluster // per_block):
                    found[n] = cluster // per_block
                    n += 1
    return n


@compiled
def _close(
    places: np.ndarray,
    own: int,
    first: int,
    offset: np.ndarray,
    found: np.ndarray,
    squared: float,
    width: tuple[int, ...],
    close: np.ndarray,
) -> int:
    """Clusters of blocks, not before one's own, that have a particle close to one of four."""
    # Lengths that the compiler knows make loops of vectors.
    lanes = len(width)
    block = max(lanes, BLOCK)
    four = places[first // block]
    lane = first % block
    ox, oy, oz = offset[0], offset[1], offset[2]
    x0, y0, z0 = four[0, lane] + ox, four[1, lane] + oy, four[2, lane] + oz
    x1, y1, z1 = four[0, lane + 1] + ox, four[1, lane + 1] + oy, four[2, lane + 1] + oz
    x2, y2, z2 = four[0, lane + 2] + ox, four[1, lane + 2] + oy, four[2, lane + 2] + oz
    x3, y3, z3 = four[0, lane + 3] + ox, four[1, lane + 3] + oy, four[2, lane + 3] + oz
    n = 0
    for m in range(len(found)):
        there = places[found[m]]
        near = np.int32(0)
        for j in range(block):
            x, y, z = there[0, j], there[1, j], there[2, j]
            hit = np.int32((x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2 < squared)
            hit |= np.int32((x - x1) ** 2 + (y - y1) ** 2 + (z - z1) ** 2 < squared)
            hit |= np.int32((x - x2) ** 2 + (y - y2) ** 2 + (z - z2) ** 2 < squared)
            hit |= np.int32((x - x3) ** 2 + (y - y3) ** 2 + (z - z3) ** 2 < squared)
            near |= hit << np.int32(j // lanes)
        for k in range(block // lanes):
            cluster = found[m] * (block // lanes) + k
            close[n] = cluster
            n += (near >> np.int32(k)) & (cluster >= own)
    return n


@compiled
def grown(array: np.ndarray, needed: int) -> np.ndarray:
    """The array, or a longer one that begins with it."""
    if needed <= len(array):
        return array
    larger = np.empty(max(needed, 2 * len(array)), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


@compiled
def search(
    begin: int,
    end: int,
    order: np.ndarray,
    firsts: np.ndarray,
    groups: np.ndarray,
    places: np.ndarray,
    bounds: np.ndarray,
    of_columns: np.ndarray,
    grid_low: np.ndarray,
    inverse: np.ndarray,
    numbers: np.ndarray,
    offsets: np.ndarray,
    cutoff: float,
    exclusions: tuple[np.ndarray, np.ndarray],
    lane_of: np.ndarray,
    width: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, tiles and masks of groups ``begin`` to ``end``, see `tiles._LoopEmitter`.

    Parameters
    ----------
    order, firsts, groups, places, bounds, of_columns
        See `sorting.clusters_of`.
    grid_low, inverse, numbers
        See `sorting.Grid`.
    offsets
        ``(shifts, 3)`` that images are shifted by [nm].
    cutoff
        [nm], with what rounding may get wrong.
    exclusions
        See `clusters.Exclusions`.
    lane_of
        ``(N,)`` where each particle is in ``order``.
    width
        A tuple as long as a cluster.
    """
    lanes = len(width)
    n_clusters = len(order) // lanes
    squared = cutoff * cutoff
    excluded_starts, excluded = exclusions
    # All particles lie in this brick.
    all_low, all_high = np.full(3, np.inf), np.full(3, -np.inf)
    for column in range(len(of_columns)):
        for k in range(3):
            all_low[k] = min(all_low[k], of_columns[column, k])
            all_high[k] = max(all_high[k], of_columns[column, 3 + k])
    # One bit a pair, lanes fastest.
    one = np.int64(1)
    whole = (one << np.int64(lanes)) - 1
    everything = np.int64(0)
    for i in range(ROWS):
        everything |= whole << np.int64(i * lanes)
    filled = np.empty(n_clusters, dtype=np.int64)
    for cluster in range(n_clusters):
        filled[cluster] = everything
        for lane in range(lanes):
            if order[cluster * lanes + lane] < 0:
                for i in range(ROWS):
                    filled[cluster] &= ~(one << np.int64(i * lanes + lane))
    allowed = filled.copy()
    rows = np.empty(8 * ROW_FIELDS * (end - begin + 1), dtype=np.int64)
    tiles = np.empty(64 * (end - begin + 1), dtype=np.int32)
    masks = np.empty(8 * (end - begin + 1), dtype=np.int64)
    found = np.empty(n_clusters + 1, dtype=np.int32)
    close = np.empty(n_clusters + 1, dtype=np.int32)
    plain = np.empty(n_clusters + 1, dtype=np.int32)
    n_rows, n_tiles, n_masks = 0, 0, 0
    low, high = np.empty(3), np.empty(3)
    home = 0
    for index in range(begin, end):
        # Clusters above one another look for partners together.
        group, group_end = groups[index], groups[index + 1]
        while firsts[home + 1] <= group:
            home += 1
        for shift in range(len(offsets)):
            offset = offsets[shift]
            apart = 0.0
            for k in range(3):
                low[k], high[k] = bounds[group, k], bounds[group, 3 + k]
                for own in range(group + 1, group_end):
                    low[k] = min(low[k], bounds[own, k])
                    high[k] = max(high[k], bounds[own, 3 + k])
                low[k], high[k] = low[k] + offset[k], high[k] + offset[k]
                apart += gap(low[k], high[k], all_low[k], all_high[k]) ** 2
            if apart >= squared:
                continue
            n_found = _candidates(
                group,
                low,
                high,
                squared,
                grid_low,
                inverse,
                numbers,
                firsts,
                bounds,
                of_columns,
                home,
                max(BLOCK // lanes, 1),
                found,
            )
            if n_found == 0:
                continue
            for four in range(group * lanes // ROWS, group_end * lanes // ROWS):
                own = four * ROWS // lanes
                first = four * ROWS - own * lanes
                present = np.int64(0)
                for i in range(ROWS):
                    if order[four * ROWS + i] >= 0:
                        present |= whole << np.int64(i * lanes)
                if present == 0:
                    continue
                if cutoff == np.inf:
                    n_close = n_clusters - own
                    for m in range(n_close):
                        close[m] = own + m
                else:
                    n_close = _close(
                        places, own, four * ROWS, offset, found[:n_found], squared, width, close
                    )
                if n_close == 0:
                    continue
                # Each pair once: partners come later in the order.
                for i in range(ROWS):
                    allowed[own] &= ~(
                        ((one + one << np.int64(first + i)) - 1) << np.int64(i * lanes)
                    )
                for i in range(ROWS):
                    particle = order[four * ROWS + i]
                    if particle >= 0:
                        for k in range(excluded_starts[particle], excluded_starts[particle + 1]):
                            j = lane_of[excluded[k]]
                            allowed[j // lanes] &= ~(one << np.int64(i * lanes + j % lanes))
                tiles = grown(tiles, n_tiles + n_close)
                masks = grown(masks, n_masks + n_close)
                first_tile, first_mask, n_plain = n_tiles, n_masks, 0
                for m in range(n_close):
                    cluster = close[m]
                    mask = allowed[cluster] & present
                    if mask == everything:
                        plain[n_plain] = cluster
                        n_plain += 1
                    elif mask != 0:
                        tiles[n_tiles], masks[n_masks] = cluster, mask
                        n_tiles += 1
                        n_masks += 1
                allowed[own] = filled[own]
                for i in range(ROWS):
                    particle = order[four * ROWS + i]
                    if particle >= 0:
                        for k in range(excluded_starts[particle], excluded_starts[particle + 1]):
                            cluster = lane_of[excluded[k]] // lanes
                            allowed[cluster] = filled[cluster]
                if n_tiles + n_plain == first_tile:
                    continue
                middle = n_tiles
                for m in range(n_plain):
                    tiles[n_tiles + m] = plain[m]
                n_tiles += n_plain
                rows = grown(rows, (n_rows + 1) * ROW_FIELDS)
                row = rows[n_rows * ROW_FIELDS : (n_rows + 1) * ROW_FIELDS]
                row[0], row[1], row[2] = four, shift, first_tile
                row[3], row[4], row[5] = middle, n_tiles, first_mask
                n_rows += 1
    return (
        rows[: n_rows * ROW_FIELDS].copy().reshape(-1, ROW_FIELDS),
        tiles[:n_tiles].copy(),
        masks[:n_masks].copy(),
    )
