"""A list of all pairs within a cutoff, each once, in a compiled loop."""

from __future__ import annotations

import numpy as np

from mdgraft.kernels.fused import sorting
from mdgraft.kernels.fused.search import gap, grown
from mdgraft.kernels.fused.spreading import compiled
from mdgraft.kernels.fused.threads import run_chunks

#: Up to so many particles looking at all pairs is faster than sorting.
_FEW = 300
#: Fewer particles than this are not worth a thread of their own.
_PER_THREAD = 2500
#: Particles in a piece of a column as high as it is wide, and columns within a cutoff.
_GROUP, _WITHIN = 4, 3


def half_list(
    positions: np.ndarray, box: np.ndarray | None, cutoff: float, *, n_threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs closer than a cutoff as two int64 arrays.

    Parameters
    ----------
    positions
        ``(N, 3)`` float64 [nm], finite; they may lie outside the box.
    box
        ``(3, 3)`` [nm] in reduced form, or None for an open system.
    cutoff
        [nm]; pairs at exactly this distance are left out. With a box, at most half of every
        diagonal element, so that of all images of a pair only the nearest counts.
    n_threads
        How many threads share the work; the list does not depend on it.
    """
    n = len(positions)
    cell = np.eye(3) if box is None else np.ascontiguousarray(box, dtype=np.float64)
    positions = np.ascontiguousarray(positions)
    if n <= _FEW:
        return _few(positions, cell, box is not None, float(cutoff))
    offsets = np.zeros((1, 3))
    wrapped = positions
    if box is not None:
        wrapped, _ = sorting.wrap(positions, cell)
        offsets = sorting.images(cell, cutoff) @ cell
    low, high = sorting.extent(wrapped)
    grid = sorting.make_grid(wrapped, low, high, _GROUP, cutoff / _WITHIN)
    order, starts = sorting.sort(wrapped, grid.low, grid.inverse, grid.numbers)
    margin = 1e-9 * cutoff + 1e-14 * float(np.max(np.maximum(high, -low)))
    n_columns = len(starts) - 1
    n_chunks = max(1, min(n_threads, n // _PER_THREAD, n_columns))
    parts: list[tuple[np.ndarray, np.ndarray]] = [(order[:0], order[:0])] * n_chunks

    def work(chunk: int) -> None:
        parts[chunk] = _many(
            chunk * n_columns // n_chunks,
            (chunk + 1) * n_columns // n_chunks,
            wrapped,
            order,
            starts,
            grid.low,
            grid.inverse,
            grid.numbers,
            offsets,
            float(cutoff),
            margin,
        )

    run_chunks(work, n_chunks)
    i, j = parts[0]
    if n_chunks > 1:
        i, j = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if box is not None and 2.000001 * cutoff > np.diagonal(cell).min():
        # By rounding two images of a pair may be close.
        keys = np.unique(np.minimum(i, j) * n + np.maximum(i, j))
        return keys // n, keys % n
    return i, j


@compiled
def _few(
    positions: np.ndarray, cell: np.ndarray, periodic: bool, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    n = len(positions)
    squared = cutoff * cutoff
    first = np.empty(n * (n - 1) // 2 + 1, dtype=np.int64)
    second = np.empty(n * (n - 1) // 2 + 1, dtype=np.int64)
    found = 0
    for i in range(n):
        for j in range(i + 1, n):
            x = positions[j, 0] - positions[i, 0]
            y = positions[j, 1] - positions[i, 1]
            z = positions[j, 2] - positions[i, 2]
            if periodic:
                c = np.rint(z / cell[2, 2])
                x, y, z = x - c * cell[2, 0], y - c * cell[2, 1], z - c * cell[2, 2]
                b = np.rint(y / cell[1, 1])
                x, y = x - b * cell[1, 0], y - b * cell[1, 1]
                x -= np.rint(x / cell[0, 0]) * cell[0, 0]
            first[found], second[found] = i, j
            found += x * x + y * y + z * z < squared
    return first[:found].copy(), second[:found].copy()


@compiled
def _many(
    begin: int,
    end: int,
    positions: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    grid_low: np.ndarray,
    inverse: np.ndarray,
    numbers: np.ndarray,
    offsets: np.ndarray,
    cutoff: float,
    margin: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose earlier particle is in columns ``begin`` to ``end``."""
    n = len(order)
    nx, ny = numbers[0], numbers[1]
    squared = cutoff * cutoff
    reach = cutoff + margin
    xs, ys, zs = np.empty(n), np.empty(n), np.empty(n)
    for p in range(n):
        xs[p], ys[p], zs[p] = positions[order[p], 0], positions[order[p], 1], positions[order[p], 2]
    # Of each column in x and y, and of everything.
    bounds = np.empty((len(starts), 4))
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for column in range(len(starts) - 1):
        bounds[column, :2], bounds[column, 2:] = np.inf, -np.inf
        for p in range(starts[column], starts[column + 1]):
            bounds[column, 0] = min(bounds[column, 0], xs[p])
            bounds[column, 1] = min(bounds[column, 1], ys[p])
            bounds[column, 2] = max(bounds[column, 2], xs[p])
            bounds[column, 3] = max(bounds[column, 3], ys[p])
            low[2], high[2] = min(low[2], zs[p]), max(high[2], zs[p])
        for k in range(2):
            low[k] = min(low[k], bounds[column, k])
            high[k] = max(high[k], bounds[column, 2 + k])
    n_own = starts[end] - starts[begin]
    first = np.empty(16 * n_own + 16, dtype=np.int64)
    second = np.empty(16 * n_own + 16, dtype=np.int64)
    found = 0
    for home in range(begin, end):
        for p in range(starts[home], starts[home + 1]):
            i = order[p]
            for shift in range(len(offsets)):
                x, y, z = xs[p] + offsets[shift, 0], ys[p] + offsets[shift, 1], zs[p]
                z += offsets[shift, 2]
                if z - reach > high[2] or z + reach < low[2]:
                    continue
                if y - reach > high[1] or y + reach < low[1]:
                    continue
                if x - reach > high[0] or x + reach < low[0]:
                    continue
                first_x = sorting.place_on_axis(x - reach, grid_low[0], inverse[0], nx)
                last_x = sorting.place_on_axis(x + reach, grid_low[0], inverse[0], nx)
                first_y = sorting.place_on_axis(y - reach, grid_low[1], inverse[1], ny)
                last_y = sorting.place_on_axis(y + reach, grid_low[1], inverse[1], ny)
                for column_x in range(max(first_x, home // ny), last_x + 1):
                    begin_column = max(column_x * ny + first_y, home)
                    for column in range(begin_column, column_x * ny + last_y + 1):
                        rest = reach * reach
                        rest -= gap(x, x, bounds[column, 0], bounds[column, 2]) ** 2
                        rest -= gap(y, y, bounds[column, 1], bounds[column, 3]) ** 2
                        # An empty column is infinitely far away.
                        if not rest > 0:
                            continue
                        far = np.sqrt(rest)
                        lowest, highest = z - far, z + far
                        # Partners come later in the order: each pair once.
                        lower, last = max(starts[column], p + 1), starts[column + 1]
                        upper = last
                        while lower < upper:
                            middle = (lower + upper) // 2
                            if zs[middle] < lowest:
                                lower = middle + 1
                            else:
                                upper = middle
                        if found + last - lower > len(first):
                            # As many as there will be if it goes on like this.
                            factor = min(1.05 * n_own / (p + 1 - starts[begin]), 4.0)
                            needed = int((found + last - lower) * factor) + 1
                            first, second = grown(first, needed), grown(second, needed)
                        for q in range(lower, last):
                            if zs[q] > highest:
                                break
                            square = (xs[q] - x) ** 2 + (ys[q] - y) ** 2 + (zs[q] - z) ** 2
                            first[found], second[found] = i, order[q]
                            found += square < squared
    return first[:found], second[:found]
