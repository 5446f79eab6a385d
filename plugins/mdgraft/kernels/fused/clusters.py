"""Lists of tiles of particles within a cutoff, and the order that makes tiles compact.

Particles are sorted into columns along z, and each column is cut into clusters as long as a vector.
A tile is a group of `ROWS` particles with a cluster. Boxes are bricks whose periodic images are
shifted along x and y as the box is tilted; a tile names the image of its four particles.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mdgraft.kernels.fused import sorting
from mdgraft.kernels.fused.search import search
from mdgraft.kernels.fused.threads import run_chunks
from mdgraft.kernels.fused.tiles import ROW_FIELDS

#: Fewer groups than this are not worth a thread of their own.
_GROUPS_PER_THREAD = 200
_NOTHING = (
    np.empty((0, ROW_FIELDS), dtype=np.int64),
    np.empty(0, dtype=np.int32),
    np.empty(0, dtype=np.int64),
)


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
    *,
    n_threads: int = 1,
) -> TileList:
    """Tiles of all pairs closer than a cutoff, each pair in one tile.

    Parameters
    ----------
    positions
        ``(N, 3)`` float64 [nm], finite; they may lie outside the box.
    box
        ``(3, 3)`` [nm] in reduced form, or None for an open system.
    cutoff
        [nm]; with a box, pairs of any number of images count.
    exclusions
        Pairs that tiles mask out, in every image.
    lanes
        Length of a cluster, a multiple of `ROWS`.
    n_threads
        How many threads share the work; the list does not depend on it.
    """
    n = len(positions)
    if len(exclusions.starts) != n + 1:
        raise ValueError(f"exclusions are of {len(exclusions.starts) - 1} particles, not of {n}")
    if box is None:
        wrapped, wraps = positions, np.zeros((n, 3))
        images = np.zeros((1, 3))
        offsets = np.zeros((1, 3))
    else:
        cell = np.ascontiguousarray(box, dtype=np.float64)
        wrapped, wraps = sorting.wrap(positions, cell)
        images = sorting.images(cell, cutoff)
        offsets = images @ cell
    low, high = sorting.extent(wrapped)
    grid = sorting.make_grid(wrapped, low, high, lanes)
    sorted_, starts = sorting.sort(wrapped, grid.low, grid.inverse, grid.numbers)
    order, lane_of, firsts, groups, places, bounds, of_columns = sorting.clusters_of(
        wrapped, sorted_, starts, lanes
    )
    # What rounding here and in the loop moves across the cutoff must not be missed.
    margin = 1e-6 * cutoff + 1e-14 * float(np.max(np.maximum(high, -low)))
    n_groups = len(groups) - 1
    n_chunks = max(1, min(n_threads, n_groups // _GROUPS_PER_THREAD))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [_NOTHING] * n_chunks

    def work(chunk: int) -> None:
        parts[chunk] = search(
            chunk * n_groups // n_chunks,
            (chunk + 1) * n_groups // n_chunks,
            order,
            firsts,
            groups,
            places,
            bounds,
            of_columns,
            grid.low,
            grid.inverse,
            grid.numbers,
            offsets,
            float(cutoff + margin),
            (exclusions.starts, exclusions.partners),
            lane_of,
            (0,) * lanes,
        )

    run_chunks(work, n_chunks)
    rows, tiles, masks = parts[0] if n_chunks == 1 else _joined(parts)
    return TileList(
        order=order, wraps=wraps, images=images, rows=rows, tiles=tiles, masks=masks, lanes=lanes
    )


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists one after the other."""
    n_tiles, n_masks = 0, 0
    for rows, tiles, masks in parts:
        rows[:, 2:5] += n_tiles
        rows[:, 5] += n_masks
        n_tiles += len(tiles)
        n_masks += len(masks)
    rows, tiles, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return rows, tiles, masks
